"""`mka methods`: who can plan a compression, and with which settings."""

from typing import Any

import click

from mka.cli.console import examples, reports
from mka.terminal import Outcome, align


@click.command(epilog=examples("mka methods", "mka methods --json"))
@reports
def methods() -> Outcome:
    """List the methods that can plan a compression.

    With --json, their settings too: name, default, description.
    """
    from mka.methods import get_method, method_names

    entries: list[dict[str, Any]] = []
    for method in map(get_method, method_names()):
        settings = [
            {"name": name, "default": field.default, "type": str(field.annotation), "description": field.description}
            for name, field in method.settings.model_fields.items()
        ]
        needs = sorted(method.needs(method.settings()))
        entry = {"name": method.name, "summary": method.summary, "source": method.source, "needs": needs}
        entries.append(entry | {"settings": settings})
    rows = [[e["name"], e["summary"], ", ".join(e["needs"]) or "nothing"] for e in entries]
    return Outcome({"methods": entries}, align(rows, ["method", "what it does", "looks at"]))
