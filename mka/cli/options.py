"""Options of the command line, made from the fields of the recipe's sections, and how their values are read."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource

from mka.errors import RecipeError
from mka.outside.printable import one_line

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from mka.sections import Option


Function = TypeVar("Function", bound=Callable[..., Any])
Section = TypeVar("Section", bound="BaseModel")


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
SIZE = Size()


def budgets_option(help: str) -> Callable[[Function], Function]:
    """Give a command ``--bytes SIZE``, as often as wanted, as ``budgets``."""
    return click.option("--bytes", "budgets", multiple=True, type=SIZE, help=help)


def depths_option(default: str) -> Callable[[Function], Function]:
    """Give a command ``--layers N``, as often as wanted, as ``depths``."""
    told = f"Layers that remain; may be repeated.  [default: {default}]"
    return click.option("--layers", "depths", multiple=True, type=int, metavar="N", help=told)


model_argument = click.argument("model")
output_folder = click.option(
    "--output", type=FILE, required=True, metavar="DIR", help="Folder to write; must not exist."
)
recipe_option = click.option(
    "--recipe", "recipe_file", type=FILE, metavar="FILE", help="A recipe, YAML; recipes/ has one."
)


class Command(click.Command):
    """A command whose options of the recipe are made when it is used, so that only it pays for importing the recipe.

    What was typed of them reaches the command's function as ``asked``: dotted key of the recipe -> value.
    """

    _entries: Sequence[Any]
    _made: list[click.Parameter] | None

    @property
    def params(self) -> list[click.Parameter]:
        """Arguments and options in the order of the help page."""
        if self._made is None:
            self._made = [
                option
                for entry in self._entries
                for option in ([entry] if isinstance(entry, click.Parameter) else entry())
            ]
        return self._made

    @params.setter
    def params(self, entries: list[Any]) -> None:
        self._entries, self._made = entries, None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        options = [option for option in self.params if isinstance(option, RecipeOption)]
        values = {option: ctx.params.pop(str(option.name)) for option in options}
        if options:
            ctx.params["asked"] = {
                option.key: value
                for option, value in values.items()
                if ctx.get_parameter_source(str(option.name)) is not ParameterSource.DEFAULT
            }
        return super().invoke(ctx)


class RecipeOption(click.Option):
    """An option that sets a key of the recipe."""

    def __init__(self, key: str, names: Sequence[str], **attributes: Any) -> None:
        """Remember the dotted key."""
        super().__init__([*names, key.replace(".", "__")], **attributes)
        self.key = key


def recipe_options(
    *places: str, leave_out: Sequence[str] = (), help: Mapping[str, str] | None = None, own: str = ""
) -> Callable[[Function], Function]:
    """Give a command the options of some places in the recipe; its class has to be `Command`.

    Args:
        places: dotted keys of fields, or of sections for all of their fields that have an `mka.sections.Option`; what
            is named twice keeps its first place.
        leave_out: keys of sections named that shall be no option of this command.
        help: key -> what this command says of it, in place of the field's description and default.
        own: what the command itself is called, which its options need not say: --NAME-tokens is --tokens there.
    """

    def make() -> list[RecipeOption]:
        keys = dict.fromkeys(key for place in places for key in list_keys(place) if key not in leave_out)
        return [make_option(key, (help or {}).get(key), own) for key in keys]

    def decorate(function: Function) -> Function:
        # Where click's own decorators keep theirs until the command is made.
        function.__dict__.setdefault("__click_params__", []).append(make)
        return function

    return decorate


def list_keys(place: str) -> list[str]:
    """Return the dotted keys of a section's fields that are options, or the key itself if it is no section's."""
    annotation: Any = find_field(place).annotation
    if not hasattr(annotation, "model_fields"):
        return [place]
    return [f"{place}.{name}" for name, field in annotation.model_fields.items() if find_marker(field)]


def find_field(key: str) -> "FieldInfo":
    """Return the field of the recipe at a dotted key."""
    from mka.recipe import Recipe

    section: Any = Recipe
    *parents, name = key.split(".")
    for parent in parents:
        section = section.model_fields[parent].annotation
    return section.model_fields[name]


def find_marker(field: "FieldInfo") -> "Option | None":
    """Return how a field is typed on the command line; None if it is not."""
    from mka.sections import Option

    return next((item for item in field.metadata if isinstance(item, Option)), None)


def make_option(key: str, help: str | None = None, own: str = "") -> RecipeOption:
    """Make the option of one key: name, type, default and help are those of the field; see `recipe_options`."""
    field, default = find_field(key), default_of(key)
    marker = find_marker(field)
    assert marker is not None, f"{key} has no Option in mka/recipe.py"
    attributes = {"type": str, "metavar": "SIZE"} if marker.is_size else read_type(field.annotation)
    if marker.metavar is not None:
        attributes["metavar"] = marker.metavar
    if marker.null is not None and attributes.get("type") is int:
        attributes["type"] = NumberOr(marker.null)
    elif marker.null is not None:
        attributes["callback"] = lambda context, option, value: None if str(value) == marker.null else value
    plain = f"--{key.rpartition('.')[2].replace('_', '-')}"
    name = marker.name or plain
    name = plain if own and name == f"--{own}" else name.replace(f"--{own}-", "--") if own else name
    if help is None:
        shown = marker.shows_default and default not in (None, {}) and (default is not False or "/" in name)
        default = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
        help = f"{marker.help or field.description}." + (f"  [default: {default}]" if shown else "")
    return RecipeOption(key, [name], help=help, **attributes)


def read_type(annotation: Any) -> dict[str, Any]:
    """Return what click has to know to read values of a field's type."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not NoneType)
    if get_origin(annotation) is Literal:
        return {"type": click.Choice(get_args(annotation))}
    if get_origin(annotation) is dict:
        if get_args(annotation)[1] is Any:
            return {"multiple": True, "metavar": "KEY=VALUE", "callback": read_settings}
        return {"multiple": True, "metavar": "TASK[=ITEMS]", "callback": read_tasks}
    kinds: dict[type, dict[str, Any]] = {
        bool: {"is_flag": True},
        int: {"type": int, "metavar": "N"},
        float: {"type": float, "metavar": "R"},
        Path: {"type": FILE, "metavar": "FILE"},
        str: {"type": str, "metavar": "NAME"},
    }
    return kinds[annotation]


def read_settings(context: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs; values are YAML, so numbers, lists and null are what they look like."""
    from mka.outside.reading import UnreadableError
    from mka.sections import parse_yaml

    settings = {}
    for item in values:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise click.BadParameter(f"{item!r} is not KEY=VALUE, e.g. coordinates=3")
        try:
            settings[key] = parse_yaml(value)
        except UnreadableError as error:
            raise click.BadParameter(f"{one_line(item, 60)!r}: the value cannot be read: {error}") from None
    return settings


def read_tasks(context: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, int | None]:
    """Read ``task``, ``task=items`` or ``task=all``, separated by commas or given several times."""
    tasks: dict[str, int | None] = {}
    for item in (part.strip() for value in values for part in value.split(",")):
        name, separator, limit = item.partition("=")
        if not name or (separator and limit != "all" and not re.fullmatch("[0-9]{1,9}", limit)):
            raise click.BadParameter(f"{item!r} is not TASK, TASK=ITEMS or TASK=all, e.g. hellaswag=40")
        tasks[name] = int(limit) if separator and limit != "all" else None
    return tasks


def pick(asked: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Return what was typed for a section of the recipe: field -> value."""
    return {key.removeprefix(f"{section}."): value for key, value in asked.items() if key.startswith(f"{section}.")}


def default_of(key: str) -> Any:
    """Return the default of a dotted key of the recipe."""
    return find_field(key).get_default(call_default_factory=True)


def build_section(section: type[Section], values: Mapping[str, Any]) -> Section:
    """Validate options as a section of the recipe.

    Raises:
        RecipeError: naming the option and what is allowed.
    """
    from pydantic import ValidationError

    from mka.sections import explain_validation

    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(explain_validation(error, section, "options")) from None


def require_align(enabled: bool, asked: Mapping[str, Any]) -> None:
    """Refuse options of an alignment that would go unused.

    Raises:
        UsageError: if nothing is aligned and they were typed.
    """
    if not enabled and pick(asked, "alignment").keys() - {"enabled"}:
        raise click.UsageError("--align-tokens and --alignment-table go with --align.")
