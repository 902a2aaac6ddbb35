"""Commands of this project in processes of their own, and ports for the servers they start."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

# What names a server, or where one keeps its things.
NAMING = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
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


def fresh_environment(work: Path) -> dict[str, str]:
    """What a person has who named no server: everything is made in this work folder."""
    kept = {name: value for name, value in os.environ.items() if name not in NAMING}
    return kept | {"MKA_WORK": str(work), "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
