"""How compressed-tensors describes and stores what is rounded: the schemes of a recipe, and embedding and head.

Weights alone are packed into 32-bit words, so many bits each (its format pack-quantized); where inputs are rounded too,
weights are stored as bytes under the weight's own name (int-quantized). An embedding is stored as bytes as well: stock
loading looks for its `weight`, which a packed one has not.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
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
def describe_scheme(name: str, group_size: int) -> Any:
    """Return compressed-tensors' own description of what linear layers become, and how it then stores them.

    Args:
        name: a scheme of `mka.transforms.SCHEMES`.
        group_size: weights that share one scale, where the scheme has groups.
    """
    import torch
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    row = SCHEMES[name]
    scales = {"strategy": "group", "group_size": group_size} if row.grouped else {"strategy": "channel"}
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


def describe_config(settings: QuantizeSettings, family: Family, schemes: Mapping[str, str]) -> dict[str, Any]:
    """Return the groups, the format and what is left alone, for a `QuantizationConfig` of compressed-tensors.

    Args:
        settings: group size, and whether embeddings are rounded.
        family: of the model.
        schemes: weight of a linear layer -> its scheme.
    """
    # Whoever matches groups in their order comes to what is named before what is a linear layer, as the head is, too.
    groups = {} if settings.embeddings == "off" else {"embeddings": describe_embeddings(family)}
    names = Counter(schemes.values()).most_common()
    for place, (name, _) in enumerate(reversed(names)):
        scheme = describe_scheme(name, settings.group_size)
        if place < len(names) - 1:
            own = [weight for weight, other in schemes.items() if other == name]
            scheme = scheme.model_copy(update={"targets": match_names(own, family)})
        groups[f"group_{place}"] = scheme
    formats = {scheme.format for scheme in groups.values()}
    form = formats.pop() if len(formats) == 1 else "mixed-precision"
    return {"config_groups": groups, "format": form, "ignore": [family.head] if settings.embeddings == "off" else []}


def match_names(weights: Iterable[str], family: Family) -> list[str]:
    """Return patterns that match the linear layers of these weights and no other.

    Engines that fuse the readers of a norm ask that one pattern matches all of them.
    """
    layers: dict[tuple[str, ...], set[int]] = {}
    for layer, suffix in filter(None, map(family.split_tensor, weights)):
        layers.setdefault(find_fused(suffix.removesuffix(f".{WEIGHT}"), family), set()).add(layer)
    return [
        rf"re:{re.escape(family.layers)}\.({'|'.join(map(str, sorted(found)))})\.({'|'.join(map(re.escape, names))})$"
        for names, found in layers.items()
    ]


def find_fused(name: str, family: Family) -> tuple[str, ...]:
    """Return the linear layers that engines make one product of with this one, itself included."""
    return next(names for part in family.parts for names in part.fused if name in names)


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
