"""A process under a memory limit: a control group where this user may make one, else ulimit -v."""

import os
import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup/memory")


def run_limited(command: Sequence[str], limit: int) -> tuple[str, str]:
    """Run a command that is killed, or refused memory, above a limit.

    A control group counts all resident pages, those of files included, which it can take back. ``ulimit -v`` counts
    address space, which is more than what is resident.

    Args:
        command: what to run.
        limit: bytes.

    Returns:
        What it printed, and how it was limited.

    Raises:
        subprocess.CalledProcessError: if it fails, or is killed.
    """
    group = GROUPS / f"mka-benchmark-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        done = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        return done.stdout, "ulimit -v"
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit), encoding="ascii")
        procs = group / "cgroup.procs"
        done = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: procs.write_text(str(os.getpid()), encoding="ascii") and None,
        )
        return done.stdout, "control group (version 1)"
    finally:
        group.rmdir()
