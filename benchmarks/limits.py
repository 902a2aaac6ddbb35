"""A process under a memory limit, by a control group (version 1) where this user may make one."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup/memory")


def run_limited(command: Sequence[str], limit: int) -> tuple[str, bool]:
    """Run a command that is killed above a limit of memory.

    A control group counts resident pages, those of files included, which it can take back. ``ulimit -v`` is no
    stand-in: it counts address space, and the checks of a checkpoint map its files.

    Args:
        command: what to run.
        limit: bytes.

    Returns:
        What it printed, and whether it was limited: not where no control group can be made.

    Raises:
        subprocess.CalledProcessError: if it fails, or is killed.
    """
    group = GROUPS / f"mka-benchmark-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, False
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit), encoding="ascii")

        def enter_group() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=enter_group)
        return done.stdout, True
    finally:
        group.rmdir()
