"""Kinds of values that are typed: names of files, recipes, sizes."""

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mka.outside.printable import one_line


class FileName(click.Path):
    """A path that can be told on one line: names with control characters or broken UTF-8 are refused."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Read what was typed."""
        if not str(value).isprintable():
            self.fail(
                f"{one_line(value, 80)!r}: a name must be one line without control characters", parameter, context
            )
        if str(value).startswith("--"):
            self.fail(f"{one_line(value, 80)!r} is an option; ./ in front makes a name of it", parameter, context)
        return super().convert(value, parameter, context)


class RecipeFile(FileName):
    """The name of a recipe; of files, YAML is offered."""

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """List the folders and the YAML files that a name may go on to."""
        typed = Path(incomplete)
        folder = typed if incomplete.endswith("/") else typed.parent
        begun = "" if incomplete.endswith("/") else typed.name
        prefix = incomplete[: len(incomplete) - len(begun)]
        try:
            found = sorted(path for path in folder.iterdir() if path.name.startswith(begun))
        except OSError:
            return []
        named = [
            f"{prefix}{path.name}{'/' if path.is_dir() else ''}" for path in found if not path.name.startswith(".")
        ]
        return [CompletionItem(name) for name in named if name.endswith(("/", ".yaml", ".yml"))]


class Size(click.ParamType):
    """Bytes as people write them, e.g. 80MB."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        """Read what was typed."""
        from mka.outside.sizes import parse_size

        try:
            size = float(parse_size(value))
        except ValueError:
            size = 0.0
        if not 0 < size < float("inf"):
            self.fail(f"{one_line(value, 60)!r} is no size, e.g. 80MB", parameter, context)
        return size


class NumberOr(click.ParamType):
    """A whole number, or a word that stands for null."""

    name = "number"

    def __init__(self, null: str) -> None:
        """Remember the word."""
        self.null = null

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int | None:
        """Read what was typed."""
        return None if value == self.null else click.INT.convert(value, parameter, context)


FILE = FileName(path_type=Path)
RECIPE = RecipeFile(path_type=Path)
SIZE = Size()
