"""What the site holds beside the files of this folder: the recipe's reference, and pages that lie at the project's root.

mkdocs runs these functions by their names (https://www.mkdocs.org/user-guide/plugins/#events).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "build" / "recipe.schema.json"  # `mka recipe --schema` writes it
AT_ROOT = {
    "CONTRIBUTING.md": "project/contributing.md",
    "DECISIONS.md": "project/decisions.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
}


def on_config(config: MkDocsConfig) -> None:
    """Take a stand-in for workers from this folder; the theme would fetch one from the network at every view."""
    config.extra["polyfills"] = ["assets/worker.js"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of the docs folder."""
    pages = {there: (ROOT / here).read_text(encoding="utf-8") for here, there in AT_ROOT.items()}
    pages["recipe.md"] = describe_recipe(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Point links between the docs folder and the project's root at the pages they have here."""
    source = page.file.src_uri
    if source in AT_ROOT.values():
        return re.sub(r"\]\(docs/", "](../", markdown)
    for here, there in AT_ROOT.items():
        markdown = markdown.replace(f"](../{here}", f"]({there}")
    # What else lies outside is a file of the checkout and no page: its name stays, the link goes.
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)


def describe_recipe(schema: dict[str, Any]) -> str:
    """Return the reference of a recipe, section by section, from its JSON schema."""
    sections = schema["$defs"]
    lines = [
        "# The recipe",
        "",
        "A recipe is one YAML file. Every key below has a default unless it says *required*; a key that is not here is refused,",
        "and the refusal names the nearest one. `mka recipe --show RECIPE` prints a recipe with all its defaults,",
        "`mka recipe --schema` the JSON schema that editors complete and check by, and `mka init MODEL` writes a first one.",
        "This page is made from the same schema.",
    ]
    lines += ["", *_list_keys(schema, sections)]
    for name, nested in _list_sections(schema, sections):
        lines += ["", f"## `{name}`", "", nested.get("description", "").split("\n\n")[0], "", *_list_keys(nested, sections)]
    return "\n".join(lines) + "\n"


def _list_sections(schema: dict[str, Any], sections: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, field in schema["properties"].items():
        for name in dict.fromkeys(re.findall(r"#/\$defs/(\w+)", json.dumps(field))):
            if "properties" in sections[name]:
                yield f"{above}{key}", sections[name]
                yield from _list_sections(sections[name], sections, f"{above}{key}.")


def _list_keys(section: dict[str, Any], sections: dict[str, Any]) -> list[str]:
    required = section.get("required", ())
    rows = ["| key | values | default | what it says |", "|---|---|---|---|"]
    for key, field in section["properties"].items():
        default = "*required*" if key in required else _show_default(field)
        rows.append(f"| `{key}` | {_show_values(field, sections)} | {default} | {_escape(field.get('description', ''))} |")
    return rows


def _show_default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return "" if isinstance(value, dict | list) and value else f"`{json.dumps(value)}`" if "default" in field else ""


def _show_values(field: dict[str, Any], sections: dict[str, Any]) -> str:
    if "$ref" in field:
        named = sections[field["$ref"].rsplit("/", 1)[-1]]
        return "a section" if "properties" in named else _show_values(named, sections)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_show_values(one, sections) for one in field["anyOf"]))
    kind = field.get("type", "any")
    bounds = [f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field]
    if kind == "array":
        items = field.get("items") or {}
        return f"a list of {_show_values(items, sections)}" if items else "a list"
    return " ".join([TYPES.get(kind, kind), ", ".join(bounds)]).strip()


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`", "object": "keys and values", "null": "`null`"}
