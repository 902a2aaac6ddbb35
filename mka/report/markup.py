"""Text made safe for Markdown and for tables of facts."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def flatten_facts(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Labels and one-line values for a table of facts."""

    def show(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {show(inner)}" for key, inner in value.items())
        return ", ".join(map(show, value)) if isinstance(value, list | tuple) else "–" if value is None else str(value)

    return {str(key).replace("_", " "): show(value) or "–" for key, value in mapping.items()}


def escape_markdown(value: Any) -> Any:
    """Escape a value so that Markdown shows it as text on one line; what is marked safe passes."""
    if hasattr(value, "__html__"):
        return value
    return re.sub(r"([\\`*_|\[\]#])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def fence_markdown(text: str, language: str = "text") -> Any:
    """Put text into a code block whose fence is longer than any run of backticks inside."""
    from markupsafe import Markup

    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def make_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of one shape as a table of Markdown, the first column to the left and figures to the right."""
    from tabulate import tabulate

    if not rows:
        return ""
    shown = [[escape_markdown(value) for value in row.values()] for row in rows]
    sides = ("left", *["right"] * (len(shown[0]) - 1))
    return tabulate(shown, [*rows[0]], tablefmt="pipe", colalign=sides, disable_numparse=True)
