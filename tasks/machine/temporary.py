"""Prefect's temporary server, which a run without a server starts for itself; the first in a home starts alone."""

import os
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

from filelock import FileLock

from mka.errors import ServerError

# Below the ports that systems give to outgoing connections.
FIRST_PORT, PORTS = 10_000, 20_000


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
        ready = made.exists() and (home / "prefect.db").exists()
        with nullcontext() if ready else FileLock(home / ".start.lock"):
            _choose_port(server)
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
            f"Prefect's temporary server did not start: {reason}; run again, or start one (`make up`) and name it in "
            "PREFECT_API_URL"
        ) from None


def _choose_port(server: Any) -> None:
    port = FIRST_PORT + os.getpid() % PORTS
    # Whatever else listens there: Prefect looks for a free one.
    server.port = port if server.is_port_available(port) else None
