"""How compressed-tensors describes and stores what is rounded: the schemes of a recipe, and embedding and head.

Weights alone are packed into 32-bit words, so many bits each (its format pack-quantized); where inputs are rounded too,
weights are stored as bytes under the weight's own name (int-quantized). An embedding is stored as bytes as well: stock
loading looks for its `weight`, which a packed one has not.
"""

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from mka.model.families import Family
from mka.model.tensors import TensorInfo
from mka.recipe import QuantizeSettings
from mka.transforms import SCHEMES

if TYPE_CHECKING:
    import torch

# What is kept of a weight in its place, by the last part of the name.
PACKED, WEIGHT, SCALE, SHAPE = "weight_packed", "weight", "weight_scale", "weight_shape"


@cache
def describe_scheme(settings: QuantizeSettings) -> Any:
    """Return compressed-tensors' own description of what linear layers become, and how it then stores them.

    Args:
        settings: scheme (not "off") and group size.
    """
    import torch
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    row = SCHEMES[settings.scheme]
    scales = {"strategy": "group", "group_size": settings.group_size} if row.grouped else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=row.bits, type="int", symmetric=True, **scales)
    inputs = None
    if row.activations is not None:
        inputs = QuantizationArgs(num_bits=row.activations, type="int", symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    return scheme


@cache
def describe_embeddings(family: Family) -> Any:
    """Return the same of embedding and head: 8 bits, one scale per row, stored as bytes."""
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=[family.embedding, family.head], weights=weights)
    # Said here, since it would be inferred to be packed.
    scheme.format = CompressionFormat.int_quantized
    return scheme


def describe_config(settings: QuantizeSettings, family: Family) -> dict[str, Any]:
    """Return the groups, the format and what is left alone, for a `QuantizationConfig` of compressed-tensors."""
    layers = describe_scheme(settings)
    if settings.embeddings == "off":
        return {"config_groups": {"group_0": layers}, "format": layers.format, "ignore": [family.head]}
    embeddings = describe_embeddings(family)
    alike = layers.format == embeddings.format
    # The head is a linear layer, too: whoever matches groups in their order has to come to its own first.
    groups = {"embeddings": embeddings, "group_0": layers}
    return {"config_groups": groups, "format": layers.format if alike else "mixed-precision", "ignore": []}


def list_kept(info: TensorInfo, scheme: Any, dtype: str) -> list[TensorInfo]:
    """List what is stored of a weight (R, C), with scales in a dtype."""
    stem = info.name.removesuffix(WEIGHT)
    rows, columns = info.shape
    scale = TensorInfo(stem + SCALE, "", dtype, (rows, columns // (scheme.weights.group_size or columns)))
    if scheme.format.value == "int-quantized":
        return [replace(info, dtype="I8"), scale]
    packed = math.ceil(columns * scheme.weights.num_bits / 32)
    shape = TensorInfo(stem + SHAPE, "", "I64", (2,))
    return [TensorInfo(stem + PACKED, "", "I32", (rows, packed)), scale, shape]


def scale_groups(weight: "torch.Tensor", scheme: Any) -> "torch.Tensor":
    """Return the scales of a weight (R, C), (R, groups) or (R, 1): half the range is a group's largest weight."""
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.unflatten(-1, (-1, scheme.weights.group_size or weight.shape[-1]))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    return scale


def pack_rows(weight: "torch.Tensor", scale: "torch.Tensor", scheme: Any) -> dict[str, "torch.Tensor"]:
    """Round rows of a weight to the nearest multiples of their scales and store them as a scheme says.

    Returns:
        What compressed-tensors keeps of them, by its names.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    zero_point = torch.zeros(scale.shape, dtype=torch.int8)
    return compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}, scheme)
