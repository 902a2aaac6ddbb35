"""A model's card, README.md: what it says of itself in its front matter."""

from pathlib import Path
from typing import Any

from mka.outside.reading import UnreadableError, read_within

CARD = "README.md"
# A card with pictures inside has megabytes.
_LARGEST = 4_000_000


def read_front(folder: Path) -> dict[str, Any]:
    """Read the front matter of a folder's card; empty if it has none that can be read."""
    import yaml

    try:
        text = read_within(folder / CARD, _LARGEST).decode("utf-8").replace("\r\n", "\n")
        _, front, _ = text.split("---\n", 2) if text.startswith("---\n") else ("", "", "")
        body = yaml.safe_load(front)
    except (OSError, UnreadableError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return body if isinstance(body, dict) else {}


def read_license(folder: Path) -> dict[str, str]:
    """Return under which licence a folder's card puts its model: ``license``, ``license_name``, ``license_link``."""
    front = read_front(folder)
    found = {key: front.get(key) for key in ("license", "license_name", "license_link")}
    if isinstance(found["license"], list) and len(found["license"]) == 1:
        found["license"] = found["license"][0]
    return {key: value for key, value in found.items() if isinstance(value, str)}
