"""Weight-only rounding of the linear layers, in the compressed-tensors format that stock loaders read.

Round to nearest, symmetric, one scale per group of `group_size` weights along the input dimension. Embeddings, the
language-model head and norms keep their dtype. Data-free, so nothing has to be run: weights are read, rounded by
compressed-tensors' own functions and written a block of rows at a time.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import CheckpointError, RecipeError
from mka.model.checkpoint import Checkpoint
from mka.model.shards import BLOCK_BYTES, MAX_SHARD_BYTES, Blocks, copy_companions, split_shards, write_shards
from mka.model.tensors import TORCH_NAMES, TensorInfo, TensorReader, torch_dtype
from mka.recipe import QuantizeSettings
from mka.store.publishing import publish
from mka.store.sums import write_sums
from mka.transforms import BITS, Transform

if TYPE_CHECKING:
    import torch

# What compressed-tensors keeps of a linear layer in the place of its weight.
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
# safetensors writes wider dtypes first, so that data stay aligned: 16 bytes of a shape may follow any number of scales.
_WIDEST_FIRST = ("I64", "F64", "F32", "I32", "BF16", "F16")
# Bytes of a matrix rounded at a time; rounding and packing them takes some ten times as many.
_ROUND_BYTES = 1 << 22


def check_roundable(source: Checkpoint, settings: QuantizeSettings) -> None:
    """Refuse what cannot be rounded.

    Raises:
        CheckpointError: if the source is quantized already.
        RecipeError: if the group size does not divide the widths.
    """
    if source.is_quantized:
        raise CheckpointError(f"{source.path}: weights are already quantized")
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
    layers = (source.layer_tensors(i).values() for i in range(source.layers))
    return [info for layer in layers for info in layer if len(info.shape) == 2]


def plan_rounded(source: Checkpoint, settings: QuantizeSettings) -> list[tuple[TensorInfo, TensorInfo]]:
    """List the output's tensors in the source's order, each with the source's tensor that it is made of."""
    linear = {info.name for info in find_linear(source)}
    planned: list[tuple[TensorInfo, TensorInfo]] = []
    for info in source.tensors.values():
        dtype = _loaded_dtype(source, info)
        if info.name not in linear:
            planned.append((replace(info, dtype=dtype), info))
            continue
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


def _loaded_dtype(source: Checkpoint, info: TensorInfo) -> str:
    """Return the dtype that a stock loader gives a tensor, config.json's: a scale cast later would be another scale."""
    stored = {name: short for short, name in TORCH_NAMES.items()}
    named = stored.get(source.config.get("dtype") or source.config.get("torch_dtype") or "")
    return named if named and info.dtype in ("F64", "F32", "F16", "BF16") else info.dtype


def quantize_checkpoint(
    source: Checkpoint,
    output: str | Path,
    settings: QuantizeSettings,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: Callable[[Path], Any] | None = None,
    on_tensor: Callable[[int], Any] | None = None,
) -> Any:
    """Write a quantized copy of a checkpoint; publish it only once it is whole.

    Args:
        source: an unquantized checkpoint.
        output: folder to publish; must not exist.
        settings: scheme (not "off") and group size.
        max_shard_bytes: largest shard.
        verify: called with the finished folder before it is published.
        on_tensor: called with the bytes of each tensor written (for a progress bar).

    Returns:
        What ``verify`` returned.

    Raises:
        RecipeError: if the group size does not divide the widths.
        CheckpointError: if the source is quantized already.
        OutputError: if the folder cannot be written.
    """
    check_roundable(source, settings)
    planned = {spec.name: (spec, info) for spec, info in plan_rounded(source, settings)}
    specs = [spec for spec, _ in planned.values()]
    shards = [sorted(shard, key=_place) for shard in split_shards(specs, max_shard_bytes)]
    # Verification unpacks the model beside the folder.
    needed = sum(spec.nbytes for spec in specs) + (source.nbytes if verify else 0) + 64_000_000
    with publish(output, needed_bytes=needed) as partial:
        with source.reader() as read:
            stream = _stream(
                [planned[spec.name] for shard in shards for spec in shard], source, read, settings, on_tensor
            )
            sums = write_shards(partial, shards, stream)
        _write_config(source, settings, partial)
        copy_companions(source.path, partial)
        result = verify(partial) if verify else None
        write_sums(partial, sums)
        return result


def _place(spec: TensorInfo) -> tuple[int, str]:
    order = _WIDEST_FIRST
    return order.index(spec.dtype) if spec.dtype in order else len(order), spec.name


def _stream(
    planned: Sequence[tuple[TensorInfo, TensorInfo]],
    source: Checkpoint,
    read: TensorReader,
    settings: QuantizeSettings,
    on_tensor: Callable[[int], Any] | None,
) -> Iterator[Blocks]:
    """Yield the output's tensors in order; a weight is read once for its scale and once more to be packed.

    Scales kept from the first time would be memory that grows with the model.
    """
    import torch

    for spec, info in planned:
        leaf = spec.name.rpartition(".")[2]
        dtype = torch_dtype(replace(info, dtype=_loaded_dtype(source, info)))
        if leaf == SHAPE:
            yield [torch.tensor(info.shape)]
        elif leaf in (PACKED, SCALE):
            yield (_round(rows, settings)[leaf] for rows in _read_rows(info, read, dtype, _ROUND_BYTES))
        else:
            yield _read_rows(info, read, dtype, BLOCK_BYTES)
        if on_tensor:
            on_tensor(spec.nbytes)


def _read_rows(info: TensorInfo, read: TensorReader, dtype: "torch.dtype", nbytes: int) -> Iterator["torch.Tensor"]:
    for rows in read.blocks(info.name, nbytes):
        yield rows.to(dtype)


def _round(weight: "torch.Tensor", settings: QuantizeSettings) -> dict[str, "torch.Tensor"]:
    """Round rows of a weight and pack them: what compressed-tensors keeps of them, by its names."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = _scheme(settings)
    groups = weight.unflatten(-1, (-1, settings.group_size))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point.to(torch.int8)}
    return compressor.compress(state, scheme)


@cache
def _scheme(settings: QuantizeSettings) -> Any:
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

    scheme = _scheme(settings)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=[source.family.head],
        format=scheme.format,
        quantization_status="compressed",
    )
    ModelCompressor(config).update_config(str(folder))
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    document = source.config | {"quantization_config": written["quantization_config"]}
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _foresee(source: Checkpoint, settings: QuantizeSettings) -> int:
    return sum(spec.nbytes for spec, _ in plan_rounded(source, settings))


def _apply(
    source: Checkpoint, settings: QuantizeSettings, evidence: Mapping[str, Any], output: Path, **options: Any
) -> Any:
    return quantize_checkpoint(source, output, settings, **options)


TRANSFORM = Transform("rtn", "round weights", check_roundable, _foresee, _apply)
