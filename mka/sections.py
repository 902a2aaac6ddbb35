"""What every YAML file of the project shares: closed sections, and refusals that name the key."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from mka.errors import RecipeError, nearest
from mka.outside.printable import one_line
from mka.outside.reading import LARGEST, UnreadableError, quote, read_within

# Bytes of a recipe; the longest one of the project has four thousand.
LONGEST_YAML = 250_000
# Values of a recipe, with aliases written out.
MOST_VALUES = 50_000
# Digits of a whole number; longer ones are for no computer word.
MOST_DIGITS = 20
# Mistakes that one refusal lists.
MOST_TOLD = 4


class Section(BaseModel):
    """A part of the recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _sane(cls, value: Any) -> Any:
        # Names go to terminals, files and registries; numbers to libraries that have 64 bits for them.
        if isinstance(value, str | Path) and not str(value).isprintable():
            raise ValueError("must be one line without control characters")
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise ValueError(f"must be a number of at most {LARGEST}")
        return value


@dataclass(frozen=True)
class Option:
    """What makes a field of the recipe an option of commands; stands in its annotation, ``Annotated[int, Option()]``.

    Attributes:
        name: how it is typed, e.g. "--align/--no-align"; default: the field's name with dashes.
        metavar: what stands for its value in help; default: by the field's type.
        help: what help says; default: the field's description.
        null: the word that is typed for null.
        shows_default: whether help names the field's default.
        is_size: whether it is typed as a size, e.g. 90MB.
    """

    name: str | None = None
    metavar: str | None = None
    help: str | None = None
    null: str | None = None
    shows_default: bool = True
    is_size: bool = False


def explain_validation(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """Turn pydantic's report into one line that names the key, what was given and the nearest valid key."""
    parts = []
    for item in error.errors():
        location = [str(step) for step in item["loc"]]
        key = one_line(".".join(location), 80) or "recipe"
        if item["type"] == "extra_forbidden":
            allowed = _fields_at(model, location[:-1])
            hint = nearest(location[-1], allowed) or f" (allowed: {', '.join(allowed)})"
            parts.append(f"unknown key '{key}'{hint}")
        elif item["type"] == "missing":
            parts.append(f"missing key '{key}'")
        else:
            silent = isinstance(item["input"], dict) or "holds a password" in item["msg"]
            given = "" if silent else f", got {quote(item['input'])}"
            parts.append(f"'{key}': {item['msg'].removeprefix('Value error, ')}{given}")
    more = [f"and {len(parts) - MOST_TOLD} more"] if len(parts) > MOST_TOLD else []
    return f"{where}: " + "; ".join([*parts[:MOST_TOLD], *more])


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    for step in location:
        if step.isdecimal():  # an entry of a list of sections
            continue
        annotation = model.model_fields[step].annotation if step in model.model_fields else None
        sections = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


class _UniqueLoader(yaml.SafeLoader):
    """Refuses a key that is said twice: PyYAML takes the last one and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        said: set[Any] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in said:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is said twice", problem_mark=key.start_mark)
            said.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # Before it is one: in base 60 (1:30:00) the time to make a number grows with the square of its digits.
        if len(node.value) > MOST_DIGITS:
            raise yaml.MarkedYAMLError(
                problem=f"a number of {len(node.value)} digits; the largest allowed is {LARGEST}",
                problem_mark=node.start_mark,
            )
        return super().construct_yaml_int(node)


_UniqueLoader.add_constructor("tag:yaml.org,2002:int", _UniqueLoader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Read YAML of a length a person writes.

    Raises:
        UnreadableError: if it is none, or would become far larger than it looks.
    """
    try:
        loader = _UniqueLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise UnreadableError("it is nested too deeply") from None
    # Beside its own errors the reader raises those of int, float, date and base64, and of keys that have no hash.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise UnreadableError(one_line(" ".join(str(error).split()), 300)) from None


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values that a node becomes, those behind an alias each time that it stands there."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # until it is known: an alias to what it stands in has no end
        inner = [node.value] if isinstance(node, yaml.SequenceNode) else zip(*node.value) if node.value else []
        children = [] if isinstance(node, yaml.ScalarNode) else [child for part in inner for child in part]
        known[id(node)] = 1 + sum(_count_nodes(child, known) for child in children)
        if known[id(node)] >= MOST_VALUES:
            raise UnreadableError(f"it has more than {MOST_VALUES} values, those behind an alias counted each time")
    return known[id(node)]


def read_yaml(path: str | Path, hint: str) -> Any:
    """Read a recipe's YAML.

    Args:
        path: the file.
        hint: where recipes are to be found, for the refusal of a file that is not there.

    Raises:
        RecipeError: if the file cannot be read.
    """
    path = Path(path)
    try:
        return parse_yaml(read_within(path, LONGEST_YAML).decode("utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"recipe not found: {path}; {hint}") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
