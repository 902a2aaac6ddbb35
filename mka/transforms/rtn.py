"""Weight-only rounding of the linear layers, in the compressed-tensors format that stock loaders read.

Round to nearest, symmetric, one scale per group of `group_size` weights along the input dimension. Embeddings, the
language-model head and norms keep their dtype. Data-free, so nothing has to be run.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mka.errors import CheckpointError, RecipeError
from mka.model.checkpoint import Checkpoint
from mka.model.shards import copy_companions
from mka.recipe import QuantizeSettings
from mka.store.publishing import publish
from mka.store.sums import write_sums
from mka.terminal import quiet_libraries

BITS = {"int8": 8, "int4": 4}


def check_group_size(source: Checkpoint, group_size: int) -> None:
    """Refuse a group size that does not divide the input width of every linear layer.

    Raises:
        RecipeError: naming the width and the group sizes that fit.
    """
    widths = {t.shape[1] for i in range(source.layers) for t in source.layer_tensors(i).values() if len(t.shape) == 2}
    if any(width % group_size for width in widths):
        fitting = [size for size in (16, 32, 64, 128, 256) if not any(w % size for w in widths)]
        raise RecipeError(
            f"quantize.group_size {group_size} does not divide the layer widths {sorted(widths)}; "
            f"sizes that do: {', '.join(map(str, fitting)) or 'none of 16 to 256; use scheme: off'}"
        )


def quantize_checkpoint(
    source: Checkpoint,
    output: str | Path,
    settings: QuantizeSettings,
    *,
    verify: Callable[[Path], Any] | None = None,
    on_module: Callable[[int], Any] | None = None,
) -> Any:
    """Write a quantized copy of a checkpoint; publish it only once it is whole.

    Args:
        source: an unquantized checkpoint.
        output: folder to publish; must not exist.
        settings: scheme (not "off") and group size.
        verify: called with the finished folder before it is published.
        on_module: called with 1 per linear layer rounded (for a progress bar).

    Returns:
        What ``verify`` returned.

    Raises:
        RecipeError: if the group size does not divide the widths.
        CheckpointError: if the source is quantized already.
        OutputError: if the folder cannot be written.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if source.is_quantized:
        raise CheckpointError(f"{source.path}: weights are already quantized")
    check_group_size(source, settings.group_size)
    with publish(output, needed_bytes=source.nbytes) as partial:
        with quiet_libraries(quantized=True), torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(source.path, dtype="auto")
            compressor = _round_weights(model, source.family.head, settings, on_module)
            model.save_pretrained(partial, max_shard_size="5GB")
        compressor.update_config(str(partial))
        _restore_config(source, partial)
        copy_companions(source.path, partial)
        result = verify(partial) if verify else None
        write_sums(partial)
        return result


def _round_weights(model: Any, head: str, settings: QuantizeSettings, on_module: Callable[[int], Any] | None) -> Any:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized

    args = QuantizationArgs(
        num_bits=BITS[settings.scheme], type="int", symmetric=True, strategy="group", group_size=settings.group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=[head]))
    for module in model.modules():
        if is_module_quantized(module):
            rows, columns = module.weight.shape
            groups = module.weight.reshape(rows, columns // settings.group_size, settings.group_size)
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            module.weight_scale.data.copy_(scale)
            if on_module:
                on_module(1)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor


def _restore_config(source: Checkpoint, folder: Path) -> None:
    """Keep the source's config.json and add the quantization entry; the rest is not this step's business."""
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = source.config | {"quantization_config": written["quantization_config"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
