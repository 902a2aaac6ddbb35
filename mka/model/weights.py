"""Which tensors are a model's weights: those stock loading takes, each from the one file said to hold it."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mka.errors import CheckpointError
from mka.model.tensors import TensorInfo, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# The one folder below a model's that belongs to it, as far as tokenizers go.
TEMPLATES = "additional_chat_templates"
_FOREIGN = (".bin", ".pt", ".pth", ".gguf")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder.

    Raises:
        CheckpointError: if it is missing or something else.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing; is this a model folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(body, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return body


def list_files(folder: Path) -> list[Path]:
    """List the files that may belong to a model: those in its folder, and its further chat templates."""
    return sorted(path for path in [*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*.jinja")] if path.is_file())


def refuse_links(folder: Path) -> None:
    """Refuse files that lie elsewhere: what they hold could change without a trace in the folder.

    Links into stores that call a file by its digest are let be: a hub cache's from ``snapshots/REVISION`` to ``blobs``,
    and DVC's into ``files/md5`` of its cache, where its checkouts are links.

    Raises:
        CheckpointError: naming the first link that leads out of the folder.
    """
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    for path in sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")]):
        if not path.is_symlink() or (path.is_dir() and path.name != TEMPLATES):
            continue
        try:
            target = path.resolve()
        except (OSError, RuntimeError):
            raise CheckpointError(f"{path} is a link to itself; put the file there") from None
        if not target.is_relative_to(home) and target.parent != blobs and not _is_in_dvc_cache(target):
            raise CheckpointError(
                f"{path} is a link out of the model folder, to {target}; put the file itself there (only links of a "
                "hub cache to its blobs, and of DVC into its cache, are followed)"
            )


def _is_in_dvc_cache(path: Path) -> bool:
    *_, files, kind, start, rest = ("", "", "", *path.parts)
    return (files, kind) == ("files", "md5") and re.fullmatch("[0-9a-f]{32}", start + rest) is not None


def read_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Find a model's tensors as stock loading would: in ``model.safetensors`` if it is there, else by the index.

    Args:
        folder: a model folder.
        config: its config.json.

    Returns:
        Tensor name -> where it lies, in the order of the files' names and, within them, of their headers.

    Raises:
        CheckpointError: if a file is missing, damaged or outside the folder, if index and shards disagree, or if stock
            loading would read something beside them.
    """
    refuse_links(folder)
    if config.get("transformers_weights") is not None:
        raise CheckpointError(
            f"{folder}: config.json names weights of its own, transformers_weights {config['transformers_weights']!r}; "
            f"call the file {SINGLE} and take the entry out"
        )
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder}: holds an adapter ({ADAPTER}) beside the model, and stock loading would add it; merge it into "
            f"the weights, or take {ADAPTER} out to leave it away"
        )
    if (folder / SINGLE).is_file():
        return {info.name: info for info in _read_shard(folder, SINGLE)}
    if not (folder / INDEX).is_file():
        raise _missing(folder, [SINGLE], {})
    return _read_shards(folder)


def _read_index(folder: Path) -> dict[str, str]:
    body = read_json(folder / INDEX)
    weight_map = body.get("weight_map")
    if not isinstance(weight_map, dict) or {type(file) for file in weight_map.values()} != {str}:
        raise CheckpointError(f"{folder / INDEX}: has no weight_map")
    if not isinstance(body.get("metadata"), dict):
        raise CheckpointError(
            f'{folder / INDEX}: has no metadata, without which stock loading fails; add "metadata": {{}}'
        )
    for name, file in weight_map.items():
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{folder / INDEX}: {name} is said to be in {file!r}; allowed: names of files in the folder itself"
            )
    return weight_map


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    weight_map = _read_index(folder)
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise _missing(folder, files, weight_map, missing)
    found: dict[str, TensorInfo] = {}
    for info in (info for file in files for info in _read_shard(folder, file)):
        if info.name in found:
            raise _disagree(folder, info.name, f"two shards hold it, {found[info.name].file} and {info.file}")
        if info.name not in weight_map:
            raise _disagree(folder, info.name, f"{info.file} holds it and the index does not list it")
        found[info.name] = info
    for name, file in weight_map.items():
        if name not in found:
            raise _disagree(folder, name, f"the index lists it in {file} and no shard holds it")
        if found[name].file != file:
            raise _disagree(folder, name, f"the index lists it in {file} and {found[name].file} holds it")
    return found


def _disagree(folder: Path, name: str, how: str) -> CheckpointError:
    return CheckpointError(f"{folder}: {INDEX} and shards disagree on {name}: {how}; fetch the model again")


def _missing(
    folder: Path, files: list[str], weight_map: Mapping[str, str], missing: list[str] | None = None
) -> CheckpointError:
    missing = files if missing is None else missing
    hint = "fetch the model again"
    if foreign := sorted(file.name for file in folder.iterdir() if file.suffix in _FOREIGN):
        hint = f"found {foreign[0]}, but only safetensors are read"
    others = [file.name for file in sorted(folder.glob("*.safetensors")) if file.is_file()]
    held: set[str] = set()
    if weight_map:
        with contextlib.suppress(CheckpointError):  # a damaged one, which no index names, is not what is wrong here
            held = {info.name for file in others for info in _read_shard(folder, file)}
    if held and held >= weight_map.keys():
        hint = f"all tensors lie in other files, {others[0]} to {others[-1]}; write an index of those"
    return CheckpointError(f"{folder}: missing shard {missing[0]} ({len(missing)} of {len(files)} missing); {hint}")


def _read_shard(folder: Path, file: str) -> Iterator[TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks the header against the file's length; where tensors lie it does not tell.
        with safe_open(folder / file, framework="numpy") as shard:
            names = list(shard.keys())
        begin, header = read_header(folder / file)
        for name in names:
            entry = header[name]
            yield TensorInfo(name, file, entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder / file}: damaged or truncated safetensors shard ({error}); fetch the model again"
        ) from None
