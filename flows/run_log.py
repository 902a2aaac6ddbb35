"""What a run did: told on the terminal while it runs, kept in last_run.json."""

import json
import re
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from flows.told import tell_stages
from mka.outside.printable import hide_passwords, make_printable
from mka.store.products import Product
from mka.store.publishing import write_text
from tasks.machine.workplace import Workplace


@dataclass
class Log:
    """What a run did, for last_run.json, the terminal and the run's page: facts grow stage by stage."""

    facts: dict[str, Any] = field(default_factory=dict)
    page: UUID | None = None

    def stage(self, name: str, seconds: float, reused: bool, why: str) -> None:
        """Note one stage and say so on the terminal."""
        self.facts.setdefault("stages", {})[name] = {"seconds": seconds, "reused": reused, "why": why}
        why, took = make_printable(why), "reused" if reused else f"{seconds:6.1f} s"
        print(f"{name:<20} {took:>9}  {why}", file=sys.stderr, flush=True)
        from prefect import get_run_logger

        get_run_logger().info("%s: %s, %s", name, took.strip(), why)
        self.page = tell_stages(self.facts["stages"], self.page)

    def product(self, name: str, product: Product) -> Product:
        """Note one stage's result."""
        self.stage(name, product.seconds, product.reused, product.why)
        return product


def write_last_run(place: Workplace, facts: dict[str, Any]) -> None:
    """Replace last_run.json in one step, so that a reader never sees half of it; no password is kept in it."""
    write_text(place.last_run, hide_passwords(json.dumps(facts, indent=2)) + "\n")


def name_by_time(words: str) -> str:
    """Name a run after what it does and the time, e.g. ``smollm2-135m-20260101-120000``."""
    return f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
