"""A machine with few packages: a folder that holds some of the installed ones and nothing else."""

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

# What a machine lent for a benchmark has.
GPU_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "scipy")


def close_over(names):
    """Distributions that these ones need, themselves included, with all markers that hold here and no extras."""
    found, waiting = {}, [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        if wanted.name.lower() in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        found[wanted.name.lower()] = distribution(wanted.name)
        waiting += map(Requirement, found[wanted.name.lower()].requires or [])
    return found.values()


def link_packages(names, folder):
    """Make a site-packages of links that holds these distributions and what they need, nothing else."""
    for dist in close_over(names):
        for top in {Path(str(file)).parts[0] for file in dist.files or [] if ".." not in str(file)}:
            target = Path(str(dist.locate_file(top)))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
