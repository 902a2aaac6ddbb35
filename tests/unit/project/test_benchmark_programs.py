"""Programs of benchmarks/ that no other test runs: they start, say what they do, and the one for GPUs needs little."""

import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
PROGRAMS = sorted(
    path.name for path in (ROOT / "benchmarks").glob("*.py") if path.name not in ("limits.py", "rounds.py")
)
ALLOWED = ("torch", "transformers", "safetensors", "numpy", "scipy")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_says_what_it_does_and_is_named_with_its_command(program):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{program}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "usage:" in done.stdout
    assert f"    python benchmarks/{program}" in (ROOT / "benchmarks" / program).read_text(encoding="utf-8")


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


def test_the_gpu_program_runs_with_nothing_but_the_packages_it_names(tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    link_packages(ALLOWED, packages)
    assert not {"accelerate", "tabulate", "pandas", "prefect"} & {path.name for path in packages.iterdir()}
    options = ("--shape", "tiny", "--windows", "4", "--context", "24")
    done = subprocess.run(
        [sys.executable, "-S", "benchmarks/gpu.py", *options, "--work", str(tmp_path)],
        cwd=ROOT,
        env={"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (.*?) \| ([\d.]+) \|", done.stdout, re.M)
    steps = ("observe from disk", "score: NPIB", "align and merge", "merge", "prefill", "decode")
    assert all(any(name.startswith(step) for name, _ in rows) for step in steps)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]
