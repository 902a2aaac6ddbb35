"""Recipes written out for people: YAML with a comment where one helps, and the schema that editors check them by."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from mka.methods import get_method, method_names, resolve_method
from mka.recipe import Recipe
from mka.transforms import get_transform, resolve_transforms, transform_names

# Longest line of a comment.
WIDTH = 120
INDENT = "  "
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def spell_recipe(
    values: Mapping[str, Any], above: Mapping[str, str] | None = None, behind: Mapping[str, str] | None = None
) -> str:
    """Write a recipe as YAML, in the order given; what has a comment above it at the top begins a paragraph.

    Args:
        values: of JSON types, sections as mappings.
        above: dotted key -> a comment on lines of its own above it.
        behind: dotted key -> a comment behind its value.
    """
    return "".join(f"{line}\n" for line in _spell(values, "", above or {}, behind or {}))


def _spell(
    values: Mapping[str, Any], parent: str, above: Mapping[str, str], behind: Mapping[str, str]
) -> Iterator[str]:
    import textwrap

    indent = INDENT * (parent.count(".") + bool(parent))
    for name, value in values.items():
        key = f"{parent}.{name}" if parent else name
        if key in above and not parent:
            yield ""
        yield from (f"{indent}# {line}" for line in textwrap.wrap(above.get(key, ""), WIDTH - len(indent) - 2))
        comment = f"  # {behind[key]}" if key in behind else ""
        if isinstance(value, Mapping) and value:
            yield f"{indent}{_flow(name)}:{comment}"
            yield from _spell(value, key, above, behind)
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            yield f"{indent}{_flow(name)}:{comment}"
            # An entry's null is what it would be unsaid.
            said = ({key: inner for key, inner in item.items() if inner is not None} for item in value)
            yield from (f"{indent}{INDENT}- {_flow(item)}" for item in said)
        else:
            yield f"{indent}{_flow(name)}: {_flow(value)}{comment}"


def _flow(value: Any) -> str:
    """Write a value on one line."""
    text = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    return text.strip()[1:-1]


def describe_sections() -> dict[str, str]:
    """Return what each key at the top of a recipe is: its own description, or its section's first line."""
    told = {}
    for name, field in Recipe.model_fields.items():
        said = field.description or str(getattr(field.annotation, "__doc__", "")).partition("\n")[0]
        told[name] = said.replace("``", "")
    return told


def fill_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return everything that a recipe says or leaves to defaults, as JSON types; also the settings of its method."""
    filled = recipe.model_dump(mode="json")
    filled["method"]["settings"] = resolve_method(recipe.method).dump_settings()
    for entry, treatment in zip(filled["transforms"], resolve_transforms(recipe.transforms)):
        entry["settings"] = treatment.key["settings"]
    return filled


def find_changes(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says otherwise than by default: dotted key -> the default, as JSON types.

    What every recipe has to say (name, model, target) has no default but for its optional keys.
    """
    filled, changed = fill_recipe(recipe), {}
    for key, field in _list_fields(recipe):
        value: Any = filled
        for step in key.split("."):
            value = value[step]
        if field.is_required():
            continue
        default = TypeAdapter(Any).dump_python(field.get_default(call_default_factory=True), mode="json")
        if value != default:
            changed[key] = default
    return changed


def _list_fields(recipe: Recipe) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted keys of a recipe whose values stand on a line of their own, with their fields."""
    for name, field in Recipe.model_fields.items():
        fields = getattr(field.annotation, "model_fields", None) or {"": field}
        yield from ((f"{name}.{key}".rstrip("."), one) for key, one in fields.items() if key != "settings")
    for key, field in get_method(recipe.method.name).settings.model_fields.items():
        yield f"method.settings.{key}", field


def make_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, in which each method and transform has its own settings.

    What no schema can say (that one of two keys must be there, say) is refused when a recipe is read.
    """
    schema = {"$schema": DIALECT, **Recipe.model_json_schema()}
    definitions = schema["$defs"]
    for section, settings in (
        ("MethodChoice", {name: get_method(name).settings for name in method_names()}),
        ("TransformChoice", {name: get_transform(name).settings for name in transform_names()}),
    ):
        definitions[section]["properties"]["name"]["enum"] = list(settings)
        cases = []
        for name, model in settings.items():
            assert model is not None
            own = model.model_json_schema(ref_template="#/$defs/{model}")
            definitions |= own.pop("$defs", {})
            named: dict[str, Any] = {"properties": {"name": {"const": name}}}
            # Where no method is named, the default's settings are meant.
            named |= {} if name == definitions[section]["properties"]["name"].get("default") else {"required": ["name"]}
            cases.append({"if": named, "then": {"properties": {"settings": own}}})
        definitions[section]["allOf"] = cases
    return schema
