"""A model folder on disk: opened lazily, checked before anything is computed from it, written shard by shard."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mka.errors import CheckpointError
from mka.model.families import Family, get_family, layer_kinds
from mka.model.tensors import TensorInfo, TensorReader, read_header
from mka.store.sums import SUMS_NAME, file_sha256, verify_sums

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checked model folder; tensors stay on disk.

    Attributes:
        path: the folder.
        config: config.json as read.
        family: its architecture.
        kinds: one tuple per layer, see `mka.model.families.layer_kinds`.
        tensors: name -> `TensorInfo`, in the order of the shards.
        verified: its files were compared with its SHA256SUMS when it was opened.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    kinds: tuple[tuple[Any, ...], ...]
    tensors: dict[str, TensorInfo]
    verified: bool = False

    @property
    def layers(self) -> int:
        """Number of decoder layers, L."""
        return len(self.kinds)

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are packed by a quantizer."""
        return "quantization_config" in self.config

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The dtype most bytes are in, by safetensors' name."""
        totals: dict[str, int] = {}
        for tensor in self.tensors.values():
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
        return max(totals, key=lambda name: totals[name])

    def layer_tensors(self, layer: int) -> dict[str, TensorInfo]:
        """Return suffix -> tensor of one decoder layer, e.g. ``"mlp.up_proj.weight"``."""
        prefix = self.family.layer_tensor(layer, "")
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    @property
    def layer_nbytes(self) -> tuple[int, ...]:
        """Bytes per decoder layer, (L,)."""
        return tuple(sum(t.nbytes for t in self.layer_tensors(i).values()) for i in range(self.layers))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and contents of all files that make the model (not the card, not the sums)."""
        listed: dict[str, str] = {}
        if self.verified:
            lines = (self.path / SUMS_NAME).read_text(encoding="utf-8").splitlines()
            listed = {name: value for value, name in (line.split("  ", 1) for line in lines)}
        names = sorted(f.name for f in self.path.iterdir() if f.is_file() and f.name not in ("README.md", SUMS_NAME))
        with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock
            found = pool.map(lambda name: listed.get(name) or file_sha256(self.path / name), names)
            pairs = [f"{value}  {name}" for value, name in zip(found, names)]
        return hashlib.sha256("\n".join(pairs).encode()).hexdigest()

    def reader(self) -> TensorReader:
        """Return ``read(name) -> tensor``, to be used in a ``with``; each tensor is read when asked for."""
        return TensorReader(self.path, self.tensors)


def open_checkpoint(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """Open a folder and check that it is whole, consistent and supported.

    Args:
        path: folder with config.json and model.safetensors, or shards with their index.
        verify: compare files with the folder's SHA256SUMS where it has one (a flipped bit inside a tensor shows
            only there).

    Raises:
        CheckpointError: if anything is missing, truncated, altered, unsupported, or if config and weights disagree
            on the number of layers.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such model folder")
    config = _read_json(path / "config.json")
    family = get_family(config.get("model_type"), str(path))
    files = _weight_files(path)
    verified = verify and verify_sums(path)
    tensors = {t.name: t for file in files for t in _read_header(path, file)}
    kinds = _kinds(path, config, family, tensors)
    return Checkpoint(path, config, family, kinds, tensors, verified)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing; is this a model folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(body, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return body


def _weight_files(path: Path) -> list[str]:
    if (path / INDEX).exists():
        weight_map = _read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or {type(file) for file in weight_map.values()} != {str}:
            raise CheckpointError(f"{path / INDEX}: has no weight_map")
        files = sorted(set(weight_map.values()))
    else:
        files = [SINGLE]
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        other = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f"; found {other[0]}, but only safetensors are read" if other else "; fetch the model again"
        raise CheckpointError(f"{path}: missing shard {missing[0]} ({len(missing)} of {len(files)} missing){hint}")
    return files


def _read_header(path: Path, file: str) -> Iterator[TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks the header against the file's length; where tensors lie it does not tell.
        with safe_open(path / file, framework="numpy") as shard:
            names = list(shard.keys())
        begin, header = read_header(path / file)
        for name in names:
            entry = header[name]
            yield TensorInfo(name, file, entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path / file}: damaged or truncated safetensors shard ({error}); fetch the model again"
        ) from None


def _kinds(
    path: Path, raw: dict[str, Any], family: Family, tensors: dict[str, TensorInfo]
) -> tuple[tuple[Any, ...], ...]:
    from transformers import AutoConfig

    found = {place[0] for name in tensors if (place := family.split_tensor(name))}
    claimed = raw.get("num_hidden_layers")
    if found != set(range(claimed if isinstance(claimed, int) else -1)):
        raise CheckpointError(
            f"{path}: config.json says num_hidden_layers={claimed}, the checkpoint holds {len(found)} layers"
            f"{f' (0 to {max(found)})' if found else ''}; the two must agree"
        )
    try:
        return layer_kinds(AutoConfig.from_pretrained(path), family)
    except Exception as error:
        raise CheckpointError(f"{path}: config.json is refused: {' '.join(str(error).split())[:300]}") from None


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return path, digest, model_type, layers, parameters (as unpacked), bytes and dtype of a checkpoint."""
    parameters = sum(t.parameters for t in checkpoint.tensors.values())
    if checkpoint.is_quantized:
        parameters = _count_unpacked(checkpoint)
    return {
        "path": str(checkpoint.path),
        "digest": checkpoint.digest,
        "model_type": checkpoint.family.model_type,
        "layers": checkpoint.layers,
        "parameters": parameters,
        "bytes": checkpoint.nbytes,
        "dtype": checkpoint.dtype,
    }


def _count_unpacked(checkpoint: Checkpoint) -> int:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.path)
    del config.quantization_config
    with init_empty_weights():
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
