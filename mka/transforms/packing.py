"""Packed weights: linear layers rounded to few bits, in the compressed-tensors format that stock loaders read.

Symmetric, one scale per group of `group_size` weights along the input dimension. Embeddings, the language-model head,
norms and whatever else is no linear layer of a part keep their dtype. A quantizer decides what weights are rounded to;
format and folder are made here.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import CheckpointError, RecipeError
from mka.model.checkpoint import Checkpoint
from mka.model.config import write_config
from mka.model.parts import ATTENTION, MLP, check_parts
from mka.model.shards import BLOCK_BYTES, MAX_SHARD_BYTES, Blocks, split_shards, write_shards
from mka.model.tensors import STORED_NAMES, TensorInfo, TensorReader, torch_dtype
from mka.recipe import QuantizeSettings
from mka.transforms import BITS
from mka.transforms.rewrite import publish_copy

if TYPE_CHECKING:
    import torch

# Kinds of parts whose linear layers can be packed.
TREATS = frozenset({ATTENTION, MLP})
# What compressed-tensors keeps of a linear layer in the place of its weight.
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
# safetensors writes wider dtypes first, so that data stay aligned: 16 bytes of a shape may follow any number of scales.
_WIDEST_FIRST = ("I64", "F64", "F32", "I32", "BF16", "F16")

# Makes a tensor that is written, a weight's `PACKED` or `SCALE`, of the weight in the source.
Pack = Callable[[TensorInfo, TensorInfo, TensorReader], Blocks]


def check_roundable(source: Checkpoint, settings: QuantizeSettings) -> None:
    """Refuse what cannot be rounded.

    Raises:
        CheckpointError: if the source is quantized already.
        PlanError: if its layers have parts whose weights are not plain linear layers.
        RecipeError: if the group size does not divide the widths.
    """
    if source.is_quantized:
        raise CheckpointError(f"{source.path}: weights are already quantized")
    check_parts(source.family.parts, TREATS, f"quantize.scheme {settings.scheme}", str(source.path))
    check_group_size(source, settings.group_size)


def check_group_size(source: Checkpoint, group_size: int) -> None:
    """Refuse a group size that does not divide the input width of every linear layer.

    Raises:
        RecipeError: naming the width and the group sizes that fit.
    """
    widths = {info.shape[1] for info in find_linear(source)}
    if any(width % group_size for width in widths):
        fitting = [size for size in (16, 32, 64, 128, 256) if not any(w % size for w in widths)]
        raise RecipeError(
            f"quantize.group_size {group_size} does not divide the layer widths {sorted(widths)}; "
            f"sizes that do: {', '.join(map(str, fitting)) or 'none of 16 to 256; use scheme: off'}"
        )


def find_linear(source: Checkpoint) -> list[TensorInfo]:
    """List the weights of the linear layers of all decoder layers: what is rounded."""
    family = source.family
    suffixes = [f"{name}.weight" for part in family.parts for name in part.linear]
    names = (family.layer_tensor(index, suffix) for index in range(source.layers) for suffix in suffixes)
    return [source.tensors[name] for name in names if name in source.tensors]


def plan_packed(source: Checkpoint, settings: QuantizeSettings) -> list[tuple[TensorInfo, TensorInfo]]:
    """List the output's tensors in the source's order, each with the source's tensor that it is made of."""
    linear = {info.name for info in find_linear(source)}
    planned: list[tuple[TensorInfo, TensorInfo]] = []
    for info in source.tensors.values():
        if info.name not in linear:
            planned.append((info, info))
            continue
        dtype = loaded_dtype(source, info)
        stem = info.name.removesuffix("weight")
        rows, columns = info.shape
        packed = math.ceil(columns * BITS[settings.scheme] / 32)
        specs = (
            TensorInfo(stem + PACKED, "", "I32", (rows, packed)),
            TensorInfo(stem + SCALE, "", dtype, (rows, columns // settings.group_size)),
            TensorInfo(stem + SHAPE, "", "I64", (2,)),
        )
        planned += [(spec, info) for spec in specs]
    return planned


def loaded_dtype(source: Checkpoint, info: TensorInfo) -> str:
    """Return the dtype that a stock loader gives a tensor, config.json's: a scale cast later would be another scale."""
    named = STORED_NAMES.get(source.config.get("dtype") or source.config.get("torch_dtype") or "")
    return named if named and info.dtype in ("F64", "F32", "F16", "BF16") else info.dtype


def write_packed(
    source: Checkpoint,
    output: str | Path,
    settings: QuantizeSettings,
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
        pack: makes the packed tensors, each asked for once, in the order they are stored.
        max_shard_bytes: largest shard.
        verify: called with the finished folder before it is published.
        on_tensor: called with the bytes of each tensor written (for a progress bar).

    Returns:
        What ``verify`` returned.

    Raises:
        OutputError: if the folder cannot be written.
    """
    planned = {spec.name: (spec, info) for spec, info in plan_packed(source, settings)}
    specs = [spec for spec, _ in planned.values()]
    shards = [sorted(shard, key=_place) for shard in split_shards(specs, max_shard_bytes)]

    def stream(read: TensorReader) -> Iterator[Blocks]:
        import torch

        for spec, info in (planned[spec.name] for shard in shards for spec in shard):
            leaf = spec.name.rpartition(".")[2]
            if leaf == SHAPE:
                yield [torch.tensor(info.shape)]
            elif leaf in (PACKED, SCALE):
                yield pack(spec, info, read)
            else:
                yield read.blocks(info.name, BLOCK_BYTES)
            if on_tensor:
                on_tensor(spec.nbytes)

    def write(folder: Path) -> Mapping[str, str]:
        with source.reader() as read:
            sums = write_shards(folder, shards, stream(read))
        _write_config(source, settings, folder)
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
        yield rows.to(dtype)


def scale_groups(weight: "torch.Tensor", settings: QuantizeSettings) -> "torch.Tensor":
    """Return the scale of each group of a weight (R, C), (R, C / group_size): half the range is its largest weight."""
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.unflatten(-1, (-1, settings.group_size))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), describe_scheme(settings).weights)
    return scale


def pack_rows(weight: "torch.Tensor", scale: "torch.Tensor", settings: QuantizeSettings) -> dict[str, "torch.Tensor"]:
    """Round rows of a weight to the nearest multiples of their scales and pack them.

    Returns:
        What compressed-tensors keeps of them, by its names.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor

    scheme = describe_scheme(settings)
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    zero_point = torch.zeros(scale.shape, dtype=torch.int8)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    return compressor.compress(state, scheme)


@cache
def describe_scheme(settings: QuantizeSettings) -> Any:
    """Return compressed-tensors' own description of the rounding, and how it then packs a linear layer."""
    import torch
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=BITS[settings.scheme], type="int", symmetric=True, strategy="group", group_size=settings.group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    return scheme


def _write_config(source: Checkpoint, settings: QuantizeSettings, folder: Path) -> None:
    """Write the source's config.json with the quantization entry added; the rest is not this step's business."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme = describe_scheme(settings)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=[source.family.head],
        format=scheme.format,
        quantization_status="compressed",
    )
    ModelCompressor(config).update_config(str(folder))
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_config(folder, source.config | {"quantization_config": written["quantization_config"]})


def foresee_packed(source: Checkpoint, settings: QuantizeSettings) -> int:
    """Return the bytes of the tensors that will be written."""
    return sum(spec.nbytes for spec, _ in plan_packed(source, settings))
