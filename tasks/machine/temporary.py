"""Prefect's temporary server, which a run without a server starts for itself; the first in a home starts alone."""

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from mka.errors import ServerError
from mka.store.publishing import write_text
from tasks.machine.servers import Server, stop

# Below the ports that systems give to outgoing connections.
FIRST_PORT, PORTS = 10_000, 20_000
# Which run started which server, a file each, below the home.
NOTES = "temporary"


def start_temporary_server() -> None:
    """Start the server of this process, unless it runs. Prefect itself finds it then.

    Several that start at once in a new home would all make its database, and some would die of it. Each takes a port
    of its own, by its process's number: Prefect draws one of a thousand, and whoever draws another's is served by it
    until that one ends.

    Raises:
        ServerError: if it does not start, or its home cannot be written.
    """
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import get_current_settings

    home, server = get_current_settings().home, SubprocessASGIServer()
    if server.running:
        return
    made = home / f".made-{version('prefect')}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        end_orphans(home)
        ready = made.exists() and (home / "prefect.db").exists()
        with nullcontext() if ready else FileLock(home / ".start.lock"):
            _choose_port(server)
            # Noted before Prefect waits for it to answer: a run that is killed meanwhile leaves it running.
            server._run_uvicorn_command = _note_started(home, server._run_uvicorn_command)
            server.start()
            made.touch()
    except OSError as error:
        raise ServerError(
            f"Prefect home {home} cannot be written: {error.strerror or error}; set PREFECT_HOME or MKA_WORK to a "
            "folder that can"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ServerError(
            f"Prefect's temporary server did not start: {reason}; run again, or start one (`mka up`) and name it in "
            "PREFECT_API_URL"
        ) from None


def _choose_port(server: Any) -> None:
    port = FIRST_PORT + os.getpid() % PORTS
    # Whatever else listens there: Prefect looks for a free one.
    server.port = port if server.is_port_available(port) else None


def _note_started(home: Path, start: Callable[[], "subprocess.Popen[Any]"]) -> Callable[[], "subprocess.Popen[Any]"]:
    def start_and_note() -> "subprocess.Popen[Any]":
        process = start()
        pair = [_identify(name, pid) for name, pid in (("run", os.getpid()), ("prefect", process.pid))]
        write_text(home / NOTES / f"{process.pid}.json", json.dumps([[one.pid, one.created] for one in pair]))
        return process

    return start_and_note


def _identify(name: str, pid: int) -> Server:
    import psutil

    return Server(name, pid, psutil.Process(pid).create_time(), "", "")


def end_orphans(home: Path) -> None:
    """End the temporary servers of runs that were killed: their own process is noted as it was, and gone."""
    for note in (home / NOTES).glob("*.json"):
        try:
            (run, created), (server, started) = json.loads(note.read_text(encoding="utf-8"))
            owner, orphan = Server("run", run, created, "", ""), Server("prefect", server, started, "", "")
            if owner.find() is not None:
                continue
            stop(orphan)
        except (OSError, ValueError, TypeError):  # somebody else has just removed it, or it is no note of ours
            continue
        with suppress(OSError):
            note.unlink()
