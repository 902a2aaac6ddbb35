"""What every YAML file of the project shares: closed sections, and refusals that name the key."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mka.errors import RecipeError, nearest


class Section(BaseModel):
    """A part of the recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Option:
    """What makes a field of the recipe an option of commands; stands in its annotation, ``Annotated[int, Option()]``.

    Attributes:
        name: how it is typed, e.g. "--align/--no-align"; default: the field's name with dashes.
        metavar: what stands for its value in help; default: by the field's type.
        help: what help says; default: the field's description.
        null: the word that is typed for null.
        shows_default: whether help names the field's default.
    """

    name: str | None = None
    metavar: str | None = None
    help: str | None = None
    null: str | None = None
    shows_default: bool = True


def explain_validation(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """Turn pydantic's report into one line that names the key, what was given and the nearest valid key."""
    parts = []
    for item in error.errors():
        location = [str(step) for step in item["loc"]]
        key = ".".join(location) or "recipe"
        if item["type"] == "extra_forbidden":
            allowed = _fields_at(model, location[:-1])
            hint = nearest(location[-1], allowed) or f" (allowed: {', '.join(allowed)})"
            parts.append(f"unknown key '{key}'{hint}")
        elif item["type"] == "missing":
            parts.append(f"missing key '{key}'")
        else:
            silent = isinstance(item["input"], dict) or "holds a password" in item["msg"]
            given = "" if silent else f", got {item['input']!r}"
            parts.append(f"'{key}': {item['msg'].removeprefix('Value error, ')}{given}")
    return f"{where}: " + "; ".join(parts)


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
        return _UniqueLoader(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise RecipeError(f"recipe not found: {path}; {hint}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from None
