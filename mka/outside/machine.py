"""What this machine has: cores, memory and disk that a run may use, also inside a container."""

import os
import shutil
from pathlib import Path

# Where Linux says what a container's processes may have in all, and what they have (cgroup v2).
_CGROUP = Path("/sys/fs/cgroup")


def find_memory() -> tuple[int, int]:
    """Return the bytes of memory that a process may have at most, and those it could have now."""
    import psutil

    memory = psutil.virtual_memory()
    try:
        most = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        # Pages of files that were read are given back when they are wanted.
        kept = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a bound
        return memory.total, memory.available
    free = most - used + int(kept.get("inactive_file", 0))
    return min(memory.total, most), max(0, min(memory.available, free))


def find_disk(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def count_cores() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
