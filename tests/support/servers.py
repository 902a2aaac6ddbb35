"""Commands of this project in processes of their own, and ports for the servers they start."""

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ("127.0.0.1", "localhost")
SECONDS = 300


def run_module(environment: dict[str, str], *arguments: str) -> str:
    """Run a command of this project in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
