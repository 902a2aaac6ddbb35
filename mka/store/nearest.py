"""Why a result had to be made: in what it differs from the stored one that is nearest to it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mka.store.manifests import MANIFEST, read_manifest

# Stored results of a stage that are looked at, those used last: a comparison leaves thousands.
LOOKED_AT = 50
# Differences that are named, and characters of a value that is told; more would be no line.
NAMED, SHOWN = 3, 24
_ABSENT = object()


def explain_missing(
    store: Path, stage: str, *, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> str:
    """Say why there is no stored result of a stage: which input or setting is another than the nearest one's.

    Args:
        store: folder of all results.
        stage: its name.
        version: see `mka.store.products.stage_key`, as the others.
        settings: as they will be stored.
        inputs: name -> digest.
    """
    ours = _flatten(version, json.loads(json.dumps(settings)), inputs)
    nearest: tuple[str, list[str]] | None = None
    for folder in _list_last(store, stage):
        try:
            body = read_manifest(folder)
        except OSError:
            continue
        if body is None:
            continue
        theirs = _flatten(body.get("version"), body.get("settings"), body.get("inputs"))
        names = [name for name in {**ours, **theirs} if ours.get(name, _ABSENT) != theirs.get(name, _ABSENT)]
        if names and (nearest is None or len(names) < len(nearest[1])):
            nearest = folder.name, [_tell(name, ours, theirs) for name in names]
    if nearest is None:
        return "no result of this stage is stored"
    folder_name, told = nearest
    more = f" and {len(told) - NAMED} more" if len(told) > NAMED else ""
    return f"{folder_name}, the nearest stored, has another {', '.join(told[:NAMED])}{more}"


def _list_last(store: Path, stage: str) -> list[Path]:
    """Return the folders of a stage's results, those used last first."""
    used: list[tuple[int, Path]] = []
    for folder in store.glob(f"{stage}-{'[0-9a-f]' * 16}"):
        try:
            used.append(((folder / MANIFEST).stat().st_mtime_ns, folder))
        except OSError:  # being removed, or no result
            continue
    return [folder for _, folder in sorted(used, reverse=True)[:LOOKED_AT]]


def _flatten(version: Any, settings: Any, inputs: Any) -> dict[str, Any]:
    """Return name -> value of all that keys a result; inputs first, which say what before it was made anew."""
    named = {f"input {name}": digest for name, digest in inputs.items()} if isinstance(inputs, Mapping) else {}
    return named | dict(_walk("", settings)) | {"version of the stage": version}


def _walk(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield place, value
        return
    for key, inner in value.items():
        yield from _walk(f"{place}.{key}" if place else str(key), inner)


def _tell(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if name.startswith("input "):
        return name
    shown = ["nothing" if name not in side else json.dumps(side[name]) for side in (theirs, ours)]
    return f"{name} ({shown[0]}, now {shown[1]})" if max(map(len, shown)) <= SHOWN else name
