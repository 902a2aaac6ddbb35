"""What a stored result says of itself, read from its folder: whole, or there is no result."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "stage.json"


def read_manifest(folder: Path) -> Mapping[str, Any] | None:
    """Return what a stored result's manifest says; None if it is damaged in whatever way: then there is no result.

    Raises:
        FileNotFoundError: if there is none.
    """
    try:
        body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = {"stage": str, "key": str, "seconds": int | float, "files": dict, "facts": dict}
        sound = all(isinstance(body[name], kind) for name, kind in whole.items()) and 0 <= body["seconds"] < math.inf
        sound = sound and all(
            type(entry["bytes"]) is int and isinstance(entry["sha256"], str) and _lies_below(name)
            for name, entry in body["files"].items()
        )
        # Manifests of earlier commits have no digest of their own.
        return body if sound and body.get("sha256", known := digest_manifest(body)) == known else None
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def digest_manifest(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything a manifest says but this."""
    rest = {name: value for name, value in body.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _lies_below(name: str) -> bool:
    path = PurePosixPath(name)
    possible = name.isprintable() and len(name) < 1024 and all(len(part.encode()) < 256 for part in path.parts)
    return possible and not path.is_absolute() and ".." not in path.parts
