"""Rounding that looks at texts: each layer by the second moments of what it is fed, on a walk through the model.

Where schemes are mixed, the bits of every linear layer are chosen before: by how dear noise on it is, times the noise
that rounding makes there, under the budget. What a layer is rounded to waits on the disk until it is written, since
files have an order of their own, stored as it will be; in memory is one layer at a time.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import CalibrationError
from mka.model.checkpoint import Checkpoint
from mka.model.tensors import TensorInfo, TensorReader, torch_dtype
from mka.recipe import QuantizeSettings
from mka.terminal import show_progress
from mka.transforms import BASE, CALIBRATION, MIXED, Transform, list_options
from mka.transforms.formats import describe_scheme, pack_rows
from mka.transforms.packing import (
    budget_linear,
    check_roundable,
    choose_alike,
    count_kept,
    foresee_packed,
    loaded_dtype,
    write_packed,
)
from mka.transforms.rewrite import refuse_overflow

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mka.alignment.sensitivity import Unit
    from mka.model.decoder import Decoder

# Tokens per window, where the model has so many positions.
CONTEXT = 512
# Windows that noise is measured on; every linear layer costs a run of the layers behind it.
MEASURED = 2


def _apply(
    source: Checkpoint,
    settings: QuantizeSettings,
    evidence: Mapping[str, Any],
    output: Path,
    *,
    on_tensor: Callable[[int], Any] | None = None,
    **options: Any,
) -> Any:
    from safetensors import safe_open

    from mka.model.loading import open_decoder

    model, texts = evidence[BASE][1], evidence[CALIBRATION][0].texts
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.rounded-") as aside:
        with open_decoder(source, model.dtype, model.trust_remote_code) as (decoder, tokenizer):
            windows = cut_windows(source, settings, tokenizer, texts)
            chosen, lost = choose_alike(source, settings), {}
            if settings.scheme == MIXED:
                chosen, lost["expected"] = choose_bits(source, settings, decoder, windows[:MEASURED])
            files, lost["measured"] = _round(source, settings, decoder, windows, chosen, Path(aside))

        def pack(spec: TensorInfo, info: TensorInfo, read: TensorReader) -> Iterator["torch.Tensor"]:
            with safe_open(files[info.name], "pt") as file:
                yield file.get_tensor(spec.name)

        found = write_packed(source, output, settings, chosen, pack, on_tensor=on_tensor, **options)
    facts = {"tokens": windows.numel(), "context": windows.shape[1], "bits": _share_bits(source, chosen)}
    facts |= {"lost": lost | {"tokens": windows[:MEASURED].numel()}}
    return found | {"rounding": facts} if isinstance(found, dict) else found


def cut_windows(source: Checkpoint, settings: QuantizeSettings, tokenizer: Any, texts: Any) -> "torch.Tensor":
    """Cut the texts into windows, (S, T) int64, as many as there are and the settings take.

    Raises:
        CalibrationError: if there is not one.
    """
    import torch

    from mka.texts.windows import pack_windows

    context = min(CONTEXT, source.config.get("max_position_embeddings") or CONTEXT)
    windows = pack_windows(tokenizer, texts, context, max(1, settings.tokens // context))
    if not windows:
        raise CalibrationError(
            f"quantize.rounding {settings.rounding}: the calibration texts make no window of {context} tokens; give "
            "more text"
        )
    return torch.tensor(windows)


def _share_bits(source: Checkpoint, chosen: Mapping[str, str]) -> dict[str, float]:
    """Return the share of the linear layers' weights that has each scheme, the most first."""
    counted: Counter[str] = Counter()
    for name, scheme in chosen.items():
        counted[scheme] += source.tensors[name].parameters
    return {scheme: count / counted.total() for scheme, count in counted.most_common()}


def choose_bits(
    source: Checkpoint, settings: QuantizeSettings, decoder: "Decoder", windows: "torch.Tensor"
) -> tuple[dict[str, str], float]:
    """Return the scheme of every linear layer's weight that together lose least within the budget, and what they lose.

    That is in nats per token, as expected of rounding to the nearest.

    Args:
        source: what is rounded.
        settings: the budget and the group size.
        decoder: of the source.
        windows: token ids that noise is measured on, (S, T).
    """
    from mka.transforms.allocation import allocate, sum_damage

    names, family = list_options(settings), source.family
    units, damage, taken = measure_damage(source, settings, decoder, windows)
    found = allocate(damage, taken, 8 * budget_linear(source, settings))
    chosen = {
        family.layer_tensor(index, f"{name}.weight"): names[option]
        for (index, own), option in zip(units, found)
        for name in own
    }
    return chosen, sum_damage(damage, found)


def measure_damage(
    source: Checkpoint, settings: QuantizeSettings, decoder: "Decoder", windows: "torch.Tensor"
) -> tuple[list["Unit"], "np.ndarray", "np.ndarray"]:
    """Return what is rounded alike, what each loses under every scheme, and the bits it takes, scales included.

    Args:
        source: what is rounded.
        settings: the group size, and which schemes there are.
        decoder: of the source.
        windows: token ids that noise is measured on, (S, T).

    Returns:
        U units; nats per token, as expected of rounding to the nearest, (U, K); bits, (U, K).
    """
    import numpy as np

    from mka.alignment.sensitivity import measure_sensitivity
    from mka.transforms.columns import measure_noise

    names, family = list_options(settings), source.family
    schemes = [describe_scheme(name, settings.group_size) for name in names]
    with show_progress("measure noise", source.layers, "layer") as advance:
        dear = measure_sensitivity(decoder, windows, on_layer=advance)
    infos = [[source.tensors[family.layer_tensor(index, f"{name}.weight")] for name in own] for index, own in dear]
    with source.reader() as read:
        noise = [measure_noise([read(info.name) for info in unit], schemes) for unit in infos]
    damage = np.array(list(dear.values()))[:, None] * np.array(noise)
    taken = [[8 * sum(count_kept(source, info, name, settings) for info in unit) for name in names] for unit in infos]
    return list(dear), damage, np.array(taken)


def _round(
    source: Checkpoint,
    settings: QuantizeSettings,
    decoder: "Decoder",
    windows: "torch.Tensor",
    chosen: Mapping[str, str],
    folder: Path,
) -> tuple[dict[str, Path], float]:
    """Round layer after layer, a file each; returns the file that holds each weight, and the nats per token lost.

    Raises:
        NumericsError: if the model gives numbers that are not finite, or a rounded weight is beyond the stored dtype.
    """
    from safetensors.torch import save_file

    from mka.alignment.rounding import Rounding

    files: dict[str, Path] = {}

    def describe(index: int, name: str) -> tuple[Any, "torch.dtype"]:
        info = source.tensors[source.family.layer_tensor(index, f"{name}.weight")]
        dtype = torch_dtype(replace(info, dtype=loaded_dtype(source, info)))
        return describe_scheme(chosen[info.name], settings.group_size), dtype

    walk = Rounding(decoder, windows, describe, follows=settings.rounding == "gptaq", compared=MEASURED)
    with show_progress("round layers", source.layers, "layer") as advance:
        for index, made in enumerate(walk.round_layers(advance)):
            file = folder / f"{index}.safetensors"
            kept: dict[str, torch.Tensor] = {}
            for name, (weight, scale) in made.items():
                stem = source.family.layer_tensor(index, name)
                scheme, dtype = describe(index, name)
                refuse_overflow(weight, f"{stem}.weight", dtype)
                packed = pack_rows(weight.contiguous(), scale.to(dtype).float(), scheme)
                packed["weight_scale"] = scale.to(dtype).contiguous()
                kept |= {f"{stem}.{leaf}": value for leaf, value in packed.items()}
                files[f"{stem}.weight"] = file
            save_file(kept, file)
    return files, walk.measure_loss()


TRANSFORM = Transform(
    "gptq", "write rounded weights", check_roundable, foresee_packed, _apply, needs=frozenset({BASE, CALIBRATION})
)
