"""A folder of rounded weights: which are rounded, what is refused, and how it is written and published.

Symmetric, with one scale per group of weights along the input dimension, or per row. Norms, and whatever else is no
linear layer of a part, keep their dtype, and so do embedding and language-model head unless they are asked for. A
quantizer decides what the linear layers' weights are rounded to; how they are stored is `mka.transforms.formats`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import CheckpointError, RecipeError
from mka.kernels import MIXED
from mka.model.checkpoint import Checkpoint
from mka.model.config import build_config, write_config
from mka.model.parts import ATTENTION, MLP, check_parts
from mka.model.shards import BLOCK_BYTES, MAX_SHARD_BYTES, Blocks, split_shards, write_shards
from mka.model.tensors import FLOATS, STORED_NAMES, TensorInfo, TensorReader, is_finite, torch_dtype
from mka.recipe import LEAST_GROUP, QuantizeSettings
from mka.transforms import SCHEMES, list_options
from mka.transforms.allocation import TOLERANCE
from mka.transforms.formats import (
    SCALE,
    SHAPE,
    describe_config,
    describe_embeddings,
    describe_scheme,
    list_kept,
    pack_rows,
    scale_groups,
)
from mka.transforms.rewrite import publish_copy, refuse_overflow
from mka.transforms.serving import check_embeddings, check_kernels, list_group_sizes

if TYPE_CHECKING:
    import torch

# Kinds of parts whose linear layers can be packed.
TREATS = frozenset({ATTENTION, MLP})
# safetensors writes wider dtypes first, so that data stay aligned: 16 bytes of a shape may follow any number of scales.
_WIDEST_FIRST = ("I64", "F64", "F32", "I32", "BF16", "F16")
# Bytes of a matrix rounded at a time; rounding and packing them takes some ten times as many.
_ROUND_BYTES = 1 << 22

# Makes a tensor that is written of a linear layer's weight: what `list_kept` lists, but for a shape.
Pack = Callable[[TensorInfo, TensorInfo, TensorReader], Blocks]


@dataclass(frozen=True)
class Planned:
    """One tensor of the output.

    Attributes:
        spec: what is written.
        info: the source's tensor that it is made of.
        scheme: what that is rounded to; None: it is copied.
    """

    spec: TensorInfo
    info: TensorInfo
    scheme: Any = None


def check_roundable(source: Checkpoint, settings: QuantizeSettings) -> None:
    """Refuse what cannot be rounded, and what the engine it is rounded for cannot run.

    Raises:
        CheckpointError: if the source is quantized already.
        PlanError: if its layers have parts whose weights are not plain linear layers.
        RecipeError: if the group size does not divide the widths, the engine that the settings name has no kernel for
            widths or group size, or stock loading would miss something of a rounded embedding.
    """
    if source.is_quantized:
        raise CheckpointError(f"{source.path}: weights are already quantized")
    check_parts(source.family.parts, TREATS, f"quantize.scheme {settings.scheme}", str(source.path))
    if any(SCHEMES[name].grouped for name in list_options(settings)):
        check_group_size(source, settings)
    check_kernels(source, settings)
    if settings.scheme == MIXED:
        check_bits(source, settings)
    if settings.embeddings != "off":
        check_embeddings(source)


def check_group_size(source: Checkpoint, settings: QuantizeSettings) -> None:
    """Refuse a group size that does not divide the input width of every linear layer.

    Raises:
        RecipeError: naming the width and the group sizes that fit.
    """
    widths = {info.shape[1] for info in find_linear(source)}
    if any(width % settings.group_size for width in widths):
        fitting = ", ".join(map(str, list_group_sizes(widths, settings)))
        raise RecipeError(
            f"quantize.group_size {settings.group_size} does not divide the layer widths {sorted(widths)}; "
            f"sizes that do: {fitting or f'none of {LEAST_GROUP} or more; use scheme: off'}"
        )


def check_bits(source: Checkpoint, settings: QuantizeSettings) -> None:
    """Refuse a budget of mixed schemes below what the smallest takes with its scales, and bits above the largest's.

    Raises:
        RecipeError: naming what can be had.
    """
    weights = sum(info.parameters for info in find_linear(source))
    least, most = bound_linear(source, settings)
    if settings.bytes is not None and settings.bytes < (needed := count_beside(source, settings) + least):
        raise RecipeError(
            f"quantize.bytes {settings.bytes:,.0f}: {source.layers} layers in groups of {settings.group_size} take "
            f"{needed:,} at least; allow as many, or remove layers"
        )
    asked = settings.bits_per_weight
    if asked is not None and not 8 * least * (1 - TOLERANCE) <= asked * weights <= 8 * most * (1 + TOLERANCE):
        # Rounded so that what is told is allowed.
        told = f"{math.ceil(8000 * least / weights) / 1000:.3f} to {math.floor(8000 * most / weights) / 1000:.3f}"
        raise RecipeError(
            f"quantize.bits_per_weight {asked}: in groups of {settings.group_size} weights take {told} bits, scales "
            "included"
        )


def bound_linear(source: Checkpoint, settings: QuantizeSettings) -> tuple[int, int]:
    """Return the fewest and the most bytes that the linear layers' weights can take with their scales."""
    weights, names = find_linear(source), list_options(settings)
    least, most = (sum(count_kept(source, info, name, settings) for info in weights) for name in (names[-1], names[0]))
    return least, most


def count_beside(source: Checkpoint, settings: QuantizeSettings) -> int:
    """Return the bytes of everything that is written beside the linear layers' weights and their scales."""
    name = list_options(settings)[-1]
    planned = plan_packed(source, settings, {info.name: name for info in find_linear(source)})
    return sum(tensor.spec.nbytes for tensor in planned) - bound_linear(source, settings)[0]


def budget_linear(source: Checkpoint, settings: QuantizeSettings) -> float:
    """Return the most bytes that a budget of mixed schemes leaves the linear layers' weights and their scales."""
    if settings.bytes is not None:
        return settings.bytes - count_beside(source, settings)
    return (settings.bits_per_weight or 0.0) * sum(info.parameters for info in find_linear(source)) / 8


def raise_bytes(source: Checkpoint, settings: QuantizeSettings) -> QuantizeSettings:
    """Return settings whose budget of bytes this checkpoint can be held to: their own, or the least that it takes."""
    if settings.bytes is None:
        return settings
    least = count_beside(source, settings) + bound_linear(source, settings)[0]
    return settings.model_copy(update={"bytes": max(settings.bytes, float(least))})


def count_kept(source: Checkpoint, info: TensorInfo, scheme: str, settings: QuantizeSettings) -> int:
    """Return the bytes of what a scheme keeps of a linear layer's weight, but for its shape."""
    kept = list_kept(info, describe_scheme(scheme, settings.group_size), loaded_dtype(source, info))
    return sum(spec.nbytes for spec in kept if not spec.name.endswith(SHAPE))


def find_linear(source: Checkpoint) -> list[TensorInfo]:
    """List the weights of the linear layers of all decoder layers: what is rounded."""
    family = source.family
    suffixes = [f"{name}.weight" for part in family.parts for name in part.linear]
    names = (family.layer_tensor(index, suffix) for index in range(source.layers) for suffix in suffixes)
    return [source.tensors[name] for name in names if name in source.tensors]


def choose_alike(source: Checkpoint, settings: QuantizeSettings) -> dict[str, str]:
    """Return the scheme of every linear layer's weight, where all have the one that the settings name."""
    return {info.name: settings.scheme for info in find_linear(source)}


def plan_packed(source: Checkpoint, settings: QuantizeSettings, chosen: Mapping[str, str]) -> list[Planned]:
    """List the output's tensors in the source's order, given the scheme of every linear layer's weight."""
    family, tied = source.family, False
    schemes = {weight: describe_scheme(name, settings.group_size) for weight, name in chosen.items()}
    if settings.embeddings != "off":
        tied = build_config(source.config, source.path).tie_word_embeddings
        schemes |= dict.fromkeys((family.embedding_tensor, family.head_tensor), describe_embeddings(family))
    planned: list[Planned] = []
    for info in source.tensors.values():
        dtype, scheme = loaded_dtype(source, info), schemes.get(info.name)
        if scheme is None:
            planned.append(Planned(info, info))
        elif not (tied and info.name == family.head_tensor):
            planned += [Planned(spec, info, scheme) for spec in list_kept(info, scheme, dtype)]
        if tied and info.name == family.embedding_tensor:
            # Stock loading ties the weights alone, before it unpacks them: the head needs the scales once more.
            kept = list_kept(replace(info, name=family.head_tensor), scheme, dtype)
            planned += [Planned(spec, info, scheme) for spec in kept if spec.name.endswith(SCALE)]
    return planned


def loaded_dtype(source: Checkpoint, info: TensorInfo) -> str:
    """Return the dtype that a stock loader gives a tensor, config.json's: a scale cast later would be another scale."""
    named = STORED_NAMES.get(source.config.get("dtype") or source.config.get("torch_dtype") or "")
    return named if named and info.dtype in FLOATS else info.dtype


def write_packed(
    source: Checkpoint,
    output: str | Path,
    settings: QuantizeSettings,
    chosen: Mapping[str, str],
    pack: Pack,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: Callable[[Path], Any] | None = None,
    on_tensor: Callable[[int], Any] | None = None,
) -> Any:
    """Write a copy of a checkpoint whose linear layers are packed; publish it only once it is whole.

    Args:
        source: an unquantized checkpoint.
        output: folder to publish; must not exist.
        settings: scheme (not "off") and group size.
        chosen: weight of a linear layer -> its scheme.
        pack: makes what is kept of linear layers, each tensor asked for once, in the order they are stored; an
            embedding and a head are rounded here.
        max_shard_bytes: largest shard.
        verify: called with the finished folder before it is published.
        on_tensor: called with the bytes of each tensor written (for a progress bar).

    Returns:
        What ``verify`` returned.

    Raises:
        OutputError: if the folder cannot be written.
    """
    planned = {tensor.spec.name: tensor for tensor in plan_packed(source, settings, chosen)}
    specs = [tensor.spec for tensor in planned.values()]
    shards = [sorted(shard, key=_place) for shard in split_shards(specs, max_shard_bytes)]
    embeddings = (source.family.embedding_tensor, source.family.head_tensor)

    def stream(read: TensorReader) -> Iterator[Blocks]:
        import torch

        for tensor in (planned[spec.name] for shard in shards for spec in shard):
            spec, info = tensor.spec, tensor.info
            if tensor.scheme is None:
                yield read.blocks(info.name, BLOCK_BYTES)
            elif spec.name.endswith(SHAPE):
                yield [torch.tensor(info.shape)]
            elif info.name in embeddings:
                yield round_rows(source, tensor.scheme, spec, info, read)
            else:
                yield pack(spec, info, read)
            if on_tensor:
                on_tensor(spec.nbytes)

    def write(folder: Path) -> Mapping[str, str]:
        with source.reader() as read:
            sums = write_shards(folder, shards, stream(read))
        _write_config(source, settings, chosen, folder)
        return sums

    # Verification unpacks the model beside the folder.
    needed = sum(spec.nbytes for spec in specs) + (source.nbytes if verify else 0)
    return publish_copy(source, output, write, needed_bytes=needed, verify=verify)


def _place(spec: TensorInfo) -> tuple[int, str]:
    order = _WIDEST_FIRST
    return order.index(spec.dtype) if spec.dtype in order else len(order), spec.name


def read_rows(source: Checkpoint, info: TensorInfo, read: TensorReader, nbytes: int) -> Iterator["torch.Tensor"]:
    """Read a tensor some rows at a time, as many as ``nbytes`` hold but at least one, in the dtype it is loaded in."""
    dtype = torch_dtype(replace(info, dtype=loaded_dtype(source, info)))
    for rows in read.blocks(info.name, nbytes):
        refuse_overflow(rows, info.name, dtype)
        yield rows.to(dtype)


def round_rows(
    source: Checkpoint, scheme: Any, spec: TensorInfo, info: TensorInfo, read: TensorReader
) -> Iterator["torch.Tensor"]:
    """Round a weight to the nearest multiples of its scales, some rows at a time; yields what `spec` keeps of them.

    A weight is read once for its scales and once more to be packed: scales kept from the first time would be memory
    that grows with the model.
    """
    leaf = spec.name.rpartition(".")[2]
    from mka.transforms.columns import round_to

    half = 1 << (scheme.weights.num_bits - 1)
    for rows in read_rows(source, info, read, _ROUND_BYTES):
        scale = scale_groups(rows, scheme)
        # One number more is below 0 than above: a weight may be rounded to more than it was.
        if not is_finite((half * scale.float()).to(rows.dtype)):
            grouped = rows.float().unflatten(-1, (scale.shape[1], -1))  # (R, G, C / G)
            refuse_overflow(round_to(grouped, scale.float()[..., None], scheme), info.name, rows.dtype)
        yield pack_rows(rows, scale, scheme)[leaf]


def _write_config(source: Checkpoint, settings: QuantizeSettings, chosen: Mapping[str, str], folder: Path) -> None:
    """Write the source's config.json with the quantization entry added; the rest is not this step's business."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig(
        **describe_config(settings, source.family, chosen),
        quantization_status="compressed",
    )
    ModelCompressor(config).update_config(str(folder))
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_config(folder, source.config | {"quantization_config": written["quantization_config"]})


def foresee_packed(source: Checkpoint, settings: QuantizeSettings) -> int:
    """Return the bytes of the tensors that will be written; of mixed schemes, what the budget allows at most."""
    if settings.scheme != MIXED:
        return sum(tensor.spec.nbytes for tensor in plan_packed(source, settings, choose_alike(source, settings)))
    most = bound_linear(source, settings)[1]
    return count_beside(source, settings) + min(int(budget_linear(source, settings)), most)
