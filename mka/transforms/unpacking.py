"""A folder of rounded weights read back, a tensor at a time: the whole numbers and their scales, as they are stored.

What is read is what compressed-tensors keeps of symmetric integers, packed or a byte each, with one scale per group of
a row's weights or per row; whatever else a folder may have been rounded to is refused.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mka.errors import CheckpointError
from mka.model.checkpoint import Checkpoint
from mka.model.config import build_config
from mka.model.tensors import FLOATS, TensorInfo, TensorReader
from mka.transforms.formats import PACKED, SCALE, SHAPE, WEIGHT

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RoundedTensor:
    """A weight (R, C) that is stored as whole numbers.

    Attributes:
        info: the weight as it is once unpacked, in the dtype of its scales.
        bits: of a whole number, which is signed.
        numbers: what holds them, (R, words) packed or (R, C) a byte each.
        scale: (R, groups).
    """

    info: TensorInfo
    bits: int
    numbers: TensorInfo
    scale: TensorInfo

    @property
    def group(self) -> int:
        """Weights, one behind the other in a row, that share a scale."""
        return self.info.shape[1] // self.scale.shape[1]

    def blocks(self, read: TensorReader, nbytes: int) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
        """Read some rows at a time: whole numbers (rows, C) int8 and scales (rows, groups) float32.

        Args:
            read: reads the folder's tensors.
            nbytes: that as many rows take in float32, but it is one row at least.
        """
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        count, width = self.info.shape
        step = max(1, nbytes // (4 * width))
        for first in range(0, count, step):
            rows = slice(first, first + step)
            found = read(self.numbers.name, rows)
            if self.numbers.name.endswith(PACKED):
                found = unpack_from_int32(found, self.bits, (len(found), width))
            yield found, read(self.scale.name, rows).float()


def find_rounded(source: Checkpoint) -> dict[str, RoundedTensor]:
    """Return the weights of a folder that are stored as whole numbers, by the name of the weight; few bytes are read.

    Raises:
        CheckpointError: if they were rounded by something else than is read here, or stored otherwise than config.json
            says.
    """
    schemes = _read_schemes(source)
    found = {}
    with source.reader() as read:
        for name, info in source.tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == PACKED or (leaf == WEIGHT and info.dtype not in FLOATS):
                found[f"{module}.{WEIGHT}"] = _describe(source, module, info, schemes, read)
    return found


def rounds_inputs(source: Checkpoint) -> bool:
    """Whether a folder says that what goes into its products is rounded, too, while it runs.

    Raises:
        CheckpointError: as `find_rounded` does.
    """
    return source.is_quantized and any(scheme.input_activations for scheme in _read_schemes(source).values())


def list_unpacked(source: Checkpoint, rounded: Mapping[str, RoundedTensor]) -> dict[str, TensorInfo]:
    """Return name -> tensor of a folder as it is once unpacked, in the order it is stored in.

    Args:
        source: the folder.
        rounded: what `find_rounded` returns of it.

    Raises:
        CheckpointError: if a tied head has other scales than the embedding it is.
    """
    family = source.family
    whole = {tensor.numbers.name: tensor.info for tensor in rounded.values()}
    beside = {tensor.scale.name for tensor in rounded.values()}
    beside |= {name.removesuffix(WEIGHT) + SHAPE for name in rounded}
    head = family.head_tensor.removesuffix(WEIGHT) + SCALE
    embedding = rounded.get(family.embedding_tensor)
    if embedding and head in source.tensors and build_config(source.config, source.path).tie_word_embeddings:
        # Stock loading wants the scales of a tied head once more.
        with source.reader() as read:
            if not (read(head) == read(embedding.scale.name)).all():
                raise CheckpointError(f"{source.path}: {head} is not {embedding.scale.name}, which it is tied to")
        beside.add(head)
    tensors = (whole.get(name, info) for name, info in source.tensors.items() if name not in beside)
    return {info.name: info for info in tensors}


def _read_schemes(source: Checkpoint) -> Any:
    """Return target -> scheme of compressed-tensors."""
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    config = source.config.get("quantization_config") or {}
    method = config.get("quant_method")
    if method != "compressed-tensors":
        raise CheckpointError(f"{source.path}: its weights are rounded by {method!r}; allowed: 'compressed-tensors'")
    try:
        read = QuantizationConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{source.path}: quantization_config.{where}: {first['msg']}") from None
    if read.kv_cache_scheme is not None or config.get("transform_config"):
        raise CheckpointError(
            f"{source.path}: quantization_config rounds keys and values, or rotates what it rounds; allowed: weights "
            "alone"
        )
    return {target: scheme for scheme in read.config_groups.values() for target in scheme.targets}


def _describe(
    source: Checkpoint, module: str, numbers: TensorInfo, schemes: Mapping[str, Any], read: TensorReader
) -> RoundedTensor:
    name = f"{module}.{WEIGHT}"
    args = _find_args(source, module, schemes)
    if args is None:
        raise CheckpointError(f"{source.path}: {name} is rounded, and no group of quantization_config names it")
    if args.type != "int" or not args.symmetric or args.strategy not in ("group", "channel"):
        even = "symmetric" if args.symmetric else "asymmetric"
        raise CheckpointError(
            f"{source.path}: {name} is rounded to {even} {args.type}, one scale per {args.strategy}; allowed: "
            "symmetric int, one scale per group or channel"
        )
    packed, scale = numbers.name.endswith(PACKED), source.tensors.get(f"{module}.{SCALE}")
    rows, width = (*numbers.shape, 0, 0)[:2]
    if packed:
        shape = source.tensors.get(f"{module}.{SHAPE}")
        width = int(read(shape.name)[1]) if shape is not None and shape.shape == (2,) else 0
    group = args.group_size or max(width, 1)
    due = ("I32", (rows, math.ceil(width * args.num_bits / 32))) if packed else ("I8", (rows, width))
    if (numbers.dtype, numbers.shape) != due or scale is None or scale.shape != (rows, width // group) or width % group:
        raise CheckpointError(
            f"{source.path}: {name} is not stored as config.json says, {args.num_bits} bits with a scale per {group} "
            "weights; fetch or make the model again"
        )
    return RoundedTensor(TensorInfo(name, "", scale.dtype, (rows, width)), args.num_bits, numbers, scale)


def _find_args(source: Checkpoint, module: str, schemes: Mapping[str, Any]) -> Any:
    """Return what stock loading takes the weights of a module to be rounded to; None if it takes them as they are."""
    import torch
    from compressed_tensors.utils.match import match_targets

    embedding = f"{module}.{WEIGHT}" == source.family.embedding_tensor
    kind = torch.nn.Embedding if embedding else torch.nn.Linear
    matched = match_targets(module, kind(1, 1, device="meta"), schemes)
    return schemes[matched[0]].weights if matched else None
