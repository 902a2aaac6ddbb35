"""How a flow that refuses ends on Prefect's pages, and how its log says so."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from mka.errors import GateRefused, MkaError

P = ParamSpec("P")
# The state of a flow whose candidate or version was measured and not let through.
REFUSED = "Refused"


def name_refusals(run: Callable[P, Any]) -> Callable[P, Any]:
    """Let a flow that refuses what it measured end in a state of its own, with the figures in its message.

    It is of Prefect's type Failed, so whoever waits for it gets the error as before.
    """

    @wraps(run)
    def run_or_refuse(*args: P.args, **kwargs: P.kwargs) -> Any:
        from prefect.states import Failed

        try:
            return run(*args, **kwargs)
        except GateRefused as error:
            return Failed(name=REFUSED, message=str(error), data=error)

    return run_or_refuse


class RefusalsByTheirLine(logging.Filter):
    """Of a refusal Prefect's log says the line, once: where in the code it was raised helps nobody."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Shorten a record of a refusal; drop it if its line was told before."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, MkaError):
            return True
        told, error.is_told = error.is_told, True
        record.msg, record.args, record.exc_info, record.exc_text = str(error), (), None, None
        return not told


def shorten_refusals() -> None:
    """Let the loggers of Prefect's runs tell refusals by their lines."""
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(RefusalsByTheirLine())
