"""What the command lines of flows have in common: refusals are one line on stderr and a non-zero exit."""

import logging
import os
import sys
from typing import TextIO

from mka.errors import MkaError, ServerError
from mka.outside.printable import LONGEST, describe_error, make_printable, one_line
from mka.terminal import INTERRUPTED, explain_unforeseen, keep_traceback, was_interrupted
from tasks.machine.temporary import start_temporary_server
from tasks.machine.workplace import find_workplace
from tasks.registry.tracking import refuse_password

# Whose exceptions mean that something which answered at the start does so no more: package -> what a person calls it.
SERVICES = {
    **dict.fromkeys(("prefect", "httpx", "httpcore", "anyio"), "the Prefect server"),
    **dict.fromkeys(("mlflow", "requests", "urllib3"), "the MLflow server"),
    **dict.fromkeys(("sqlalchemy", "sqlite3", "alembic"), "a database of MLflow or Prefect"),
}
AGAIN = "see that it answers and run the same command again"
SECONDS_TO_SEND = 10.0


def silence_prefect() -> None:
    """Keep Prefect's own log off the terminal, on the run's page; to be called before Prefect is imported.

    Of a server that died it would tell every few seconds, and go on after the line that says so.
    """
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    logging.raiseExceptions = False


def say(line: str, stream: TextIO | None = None) -> None:
    """Tell the terminal, on stdout unless told otherwise, and the flow run's log."""
    from prefect import get_run_logger

    shown = make_printable(line)
    print(shown, file=stream, flush=True)
    get_run_logger().info(shown)


def require_server() -> None:
    """Make sure that the Prefect server answers; where none was named, start the temporary one of this process.

    A flow would end in a traceback.

    Raises:
        ServerError: if it does not.
    """
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is None:
        start_temporary_server()
        return
    # One try: Prefect's own patience is meant for a server that is there.
    client = SyncPrefectClient(settings.api.url, httpx_settings={"timeout": 10.0})
    if (failure := client.api_healthcheck()) is not None:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise ServerError(
            f"Prefect server {settings.api.url} does not answer: {reason}; start it (`mka up` on this machine), name "
            f"another in PREFECT_API_URL, or unset that to run without one"
        )


def stop_sending(seconds: float = SECONDS_TO_SEND) -> None:
    """Give Prefect so long to send the events and log lines that are queued, and throw away the rest.

    At its exit a process waits for them without a limit, and of a server that is gone each is tried for some seconds:
    the line that says so would come ten minutes before the prompt does.
    """
    worker = sys.modules.get("prefect.events.worker")
    if worker is None:
        return
    # Prefect has no call for this: its own only counts what it could not send in time.
    sending = [(service._loop, service._task) for service in tuple(worker.EventsWorker._instances.values())]
    worker.EventsWorker.drain_all(timeout=seconds)
    for loop, task in sending:
        if loop is not None and task is not None and not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)


def is_interruption(error: BaseException) -> bool:
    """Whether somebody ended the command; within a flow SIGTERM is Prefect's, which usually hands it on."""
    prefect = sys.modules.get("prefect.exceptions")
    return was_interrupted(error, *([prefect.TerminationSignal] if prefect else []))


def refuse(program: str, error: BaseException, hint: str = "") -> int:
    """Say on stderr, in one line, what ended a command; return its exit code.

    Args:
        program: what the command is called.
        error: what ended it. What is no refusal leaves its traceback in the work folder.
        hint: how to go on.
    """
    work, interrupted = find_workplace().work, is_interruption(error)
    hint = hint and (f"; {hint}" if interrupted else f" ({hint})")
    if interrupted:
        line = f"interrupted{hint}"
    elif isinstance(error, MkaError | OSError):
        line = f"{error}{hint}"
    elif (service := SERVICES.get(type(error).__module__.partition(".")[0])) is not None:
        line = f"{service} failed meanwhile: {describe_error(error)}; {keep_traceback(error, work)}; {AGAIN}{hint}"
    else:
        line = f"{explain_unforeseen(error, work)}{hint}"
    typed = "\n" if interrupted and sys.stderr.isatty() else ""  # behind what ^C left there
    # How to go on is told whole.
    longest = (error.longest if isinstance(error, MkaError) else LONGEST) + len(hint)
    print(f"{typed}{program}: {one_line(line, longest)}", file=sys.stderr, flush=True)
    stop_sending()
    if interrupted:
        return INTERRUPTED
    return error.exit_code if isinstance(error, MkaError) else MkaError.exit_code


def prepare_flow(registry: str | None = None) -> None:
    """See to it that a flow can be begun: it has a place, a server answers, nothing secret is kept as a parameter.

    Args:
        registry: the store that was named on the command line.

    Raises:
        MkaError: if not.
    """
    refuse_password(registry, "--registry")
    find_workplace().prepare()
    require_server()
