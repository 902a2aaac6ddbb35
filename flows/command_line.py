"""What the command lines of flows have in common: refusals are one line on stderr and a non-zero exit."""

import os
import sys
from collections.abc import Callable
from typing import Any

from mka.errors import MkaError


def silence_prefect() -> None:
    """Keep Prefect's own log off the terminal, on the run's page; to be called before Prefect is imported."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


def run_command(program: str, run: Callable[[], Any]) -> int:
    """Run a command; return its exit code."""
    try:
        run()
    except (MkaError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, MkaError) else MkaError.exit_code
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 130
    return 0
