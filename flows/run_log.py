"""What a run did: told on the terminal while it runs, kept in last_run.json."""

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from flows.command_line import is_interruption
from flows.told import tell_stages
from mka.errors import GateRefused, MkaError
from mka.outside.printable import LONGEST, hide_passwords, make_printable, one_line
from mka.store.products import Product
from mka.store.publishing import write_text
from mka.terminal import say_stage
from tasks.machine.workplace import Workplace

# A run that is being ended has little time left.
SECONDS_TO_ASK = 5.0


@dataclass
class Log:
    """What a run did, for last_run.json, the terminal and the run's page: facts grow stage by stage."""

    facts: dict[str, Any] = field(default_factory=dict)
    page: UUID | None = None

    def stage(self, name: str, seconds: float, reused: bool, why: str) -> None:
        """Note one stage and say so on the terminal."""
        self.facts.setdefault("stages", {})[name] = {"seconds": seconds, "reused": reused, "why": why}
        say_stage(name, seconds, reused, why)
        from prefect import get_run_logger

        took = "reused" if reused else f"{seconds:.1f} s"
        get_run_logger().info("%s: %s, %s", name, took, make_printable(why))
        self.page = tell_stages(self.facts["stages"], self.page)

    def product(self, name: str, product: Product) -> Product:
        """Note one stage's result."""
        self.stage(name, product.seconds, product.reused, product.why)
        return product

    def end(self, error: BaseException) -> None:
        """Note what ended a run before it was through."""
        if isinstance(error, GateRefused):
            status = "refused"
        elif is_interruption(error):
            status = "cancelled" if _is_cancelled() else "interrupted"
        else:
            status = "failed"
        longest = error.longest if isinstance(error, MkaError) else LONGEST
        self.facts |= {"status": status, "error": one_line(error, longest) or type(error).__name__}


def _is_cancelled() -> bool:
    """Whether somebody cancelled this flow run on its page: its process is told by a signal, as by any other end."""
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    try:
        with get_client(sync_client=True, httpx_settings={"timeout": SECONDS_TO_ASK}) as client:
            state = client.read_flow_run(UUID(str(flow_run.id))).state
    except Exception:  # whatever is wrong with the server, the run has ended
        return False
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def write_last_run(place: Workplace, facts: dict[str, Any]) -> None:
    """Replace last_run.json in one step, so that a reader never sees half of it; no password is kept in it."""
    write_text(place.last_run, hide_passwords(json.dumps(facts, indent=2)) + "\n")


def name_by_time(words: str) -> str:
    """Name a run after what it does and the time, e.g. ``smollm2-135m-20260101-120000``."""
    return f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
