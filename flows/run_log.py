"""What a run did: told on the terminal while it runs, kept in last_run.json."""

import json
from dataclasses import dataclass, field
from typing import Any

from mka.outside.printable import hide_passwords, make_printable
from mka.store.products import Product
from mka.store.publishing import write_text
from mka.terminal import say_stage
from tasks.machine.workplace import Workplace


@dataclass
class Log:
    """What a run did, for last_run.json and the terminal: facts grow stage by stage."""

    facts: dict[str, Any] = field(default_factory=dict)

    def stage(self, name: str, seconds: float, reused: bool, why: str) -> None:
        """Note one stage and say so on the terminal."""
        self.facts.setdefault("stages", {})[name] = {"seconds": seconds, "reused": reused, "why": why}
        say_stage(name, seconds, reused, why)
        from prefect import get_run_logger

        took = "reused" if reused else f"{seconds:.1f} s"
        get_run_logger().info("%s: %s, %s", name, took, make_printable(why))

    def product(self, name: str, product: Product) -> Product:
        """Note one stage's result."""
        self.stage(name, product.seconds, product.reused, product.why)
        return product


def write_last_run(place: Workplace, facts: dict[str, Any]) -> None:
    """Replace last_run.json in one step, so that a reader never sees half of it; no password is kept in it."""
    write_text(place.last_run, hide_passwords(json.dumps(facts, indent=2)) + "\n")
