"""What the command lines of flows have in common: refusals are one line on stderr and a non-zero exit."""

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from mka.errors import MkaError, ServerError


def silence_prefect() -> None:
    """Keep Prefect's own log off the terminal, on the run's page; to be called before Prefect is imported."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


def say(line: str, stream: TextIO | None = None) -> None:
    """Tell the terminal, on stdout unless told otherwise, and the flow run's log."""
    from prefect import get_run_logger

    print(line, file=stream, flush=True)
    get_run_logger().info(line)


def require_server() -> None:
    """Make sure that the Prefect server answers, if one was named; a flow would end in a traceback.

    Raises:
        ServerError: if it does not.
    """
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is None:
        return
    # One try: Prefect's own patience is meant for a server that is there.
    client = SyncPrefectClient(settings.api.url, httpx_settings={"timeout": 10.0})
    if (failure := client.api_healthcheck()) is not None:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise ServerError(
            f"Prefect server {settings.api.url} does not answer: {reason}; start it (`make up` on this machine), name "
            f"another in PREFECT_API_URL, or unset that to run without one"
        )


def run_command(program: str, run: Callable[[], Any], *, is_flow: bool = True) -> int:
    """Run a command; return its exit code. A flow is not begun on a server that does not answer."""
    try:
        if is_flow:
            require_server()
        run()
    except (MkaError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, MkaError) else MkaError.exit_code
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 130
    return 0
