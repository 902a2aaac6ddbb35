"""A model folder on disk: opened lazily, checked before anything is computed from it."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mka.errors import CheckpointError
from mka.model.config import build_config
from mka.model.families import Family, get_family, layer_kinds
from mka.model.tensors import FLOATS, HALF_NBYTES, TensorInfo, TensorReader
from mka.model.weights import list_files, read_json, read_weights
from mka.store.signing import SIGNATURE
from mka.store.sums import SUMS_NAME, file_sha256, read_sums, verify_sums


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
        left_out: stored tensors that every reader makes anew of the config.
        rowless: marks of the tokenizer that no text may hold, since the embedding has no rows for them.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    kinds: tuple[tuple[Any, ...], ...]
    tensors: dict[str, TensorInfo]
    verified: bool = False
    left_out: tuple[str, ...] = ()
    rowless: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """Number of decoder layers, L."""
        return len(self.kinds)

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are packed by a quantizer."""
        return self.config.get("quantization_config") is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def served_nbytes(self) -> int:
        """Bytes of all tensors as they are served: what is stored in more than 16 bits is held in bfloat16."""
        return sum(t.parameters * HALF_NBYTES if t.dtype in FLOATS else t.nbytes for t in self.tensors.values())

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
        """SHA-256 over names and contents of all files that make the model (no card, sums or signature)."""
        listed = read_sums(self.path) if self.verified else {}
        names = [path.relative_to(self.path).as_posix() for path in list_files(self.path)]
        names = [name for name in names if name not in ("README.md", SUMS_NAME, SIGNATURE)]
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
        CheckpointError: if anything is missing, truncated, altered, outside the folder, unsupported, or if config and
            weights disagree on the number of layers.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such model folder")
    config = read_json(path / "config.json")
    family = get_family(config.get("model_type"), str(path))
    stored = _name_as_stock(read_weights(path, config), family, config, path)
    verified = verify and verify_sums(path)
    tensors = {name: info for name, info in stored.items() if not family.is_derived(name)}
    kinds = _kinds(path, config, family, tensors)
    left_out = tuple(name for name in stored if name not in tensors)
    return Checkpoint(path, config, family, kinds, tensors, verified, left_out)


def _name_as_stock(
    stored: dict[str, TensorInfo], family: Family, config: dict[str, Any], path: Path
) -> dict[str, TensorInfo]:
    """Give a backbone's tensors the names they have in the whole model, as stock loading does.

    Only where the head is tied: one that is its own would be missing.
    """
    names = {name: f"{family.backbone}.{name}" for name in stored}
    whole = any(family.split_tensor(name) for name in stored)
    if whole or not any(map(family.split_tensor, names.values())) or not build_config(config, path).tie_word_embeddings:
        return stored
    return {names[name]: replace(info, name=names[name]) for name, info in stored.items()}


def _kinds(
    path: Path, raw: dict[str, Any], family: Family, tensors: dict[str, TensorInfo]
) -> tuple[tuple[Any, ...], ...]:
    found = {place[0] for name in tensors if (place := family.split_tensor(name))}
    claimed = raw.get("num_hidden_layers")
    if not found and (bare := [name for name in tensors if family.split_tensor(f"{family.backbone}.{name}")]):
        raise CheckpointError(
            f"{path}: weights are a backbone's alone: keys such as {bare[0]} lack {family.backbone!r} in front, and no "
            "file holds the head, which is not tied to the embedding; save the whole model, and give that"
        )
    if type(claimed) is not int or claimed != len(found) or found != set(range(len(found))):
        raise CheckpointError(
            f"{path}: config.json says num_hidden_layers={claimed}, the checkpoint holds {len(found)} layers"
            f"{f' (0 to {max(found)})' if found else ''}; the two must agree"
        )
    config = build_config(raw, path)
    try:
        return layer_kinds(config, family)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: config.json is refused: {error}") from None


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return path, digest, model_type, layers, parameters (as unpacked), bytes, bytes as served and dtype."""
    return {"path": str(checkpoint.path), "digest": checkpoint.digest, **describe_headers(checkpoint)}


def describe_headers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `describe_checkpoint` does without reading a tensor: neither path nor digest."""
    parameters = sum(t.parameters for t in checkpoint.tensors.values())
    if checkpoint.is_quantized:
        parameters = _count_unpacked(checkpoint)
    return {
        "model_type": checkpoint.family.model_type,
        "layers": checkpoint.layers,
        "parameters": parameters,
        "bytes": checkpoint.nbytes,
        "served_bytes": checkpoint.served_nbytes,
        "dtype": checkpoint.dtype,
    }


def _count_unpacked(checkpoint: Checkpoint) -> int:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = build_config(checkpoint.config, checkpoint.path)
    del config.quantization_config
    with init_empty_weights():
        sizes = {name: p.numel() for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    if config.tie_word_embeddings:  # without values, a tied head is a parameter of its own
        sizes.pop(checkpoint.family.head_tensor, None)
    return sum(sizes.values())
