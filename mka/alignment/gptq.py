"""Rounding that looks at texts: each layer by the second moments of what it is fed, on a walk through the model.

What a layer is rounded to waits on the disk until it is written, since files have an order of their own; in memory is
one layer at a time.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import CalibrationError
from mka.model.checkpoint import Checkpoint
from mka.model.parts import ATTENTION, MLP, check_parts
from mka.model.tensors import TensorInfo, TensorReader, torch_dtype
from mka.recipe import QuantizeSettings
from mka.terminal import show_progress
from mka.transforms import BASE, CALIBRATION, Transform
from mka.transforms.formats import describe_scheme, pack_rows
from mka.transforms.packing import check_roundable, find_linear, foresee_packed, loaded_dtype, write_packed

if TYPE_CHECKING:
    import torch

# Tokens per window, where the model has so many positions.
CONTEXT = 512


def _check(source: Checkpoint, settings: QuantizeSettings) -> None:
    check_roundable(source, settings)
    check_parts(source.family.parts, (ATTENTION, MLP), f"quantize.rounding {settings.rounding}", str(source.path))


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

    scheme = describe_scheme(settings)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.rounded-") as aside:
        files = _round(source, settings, evidence, Path(aside))

        def pack(spec: TensorInfo, info: TensorInfo, read: TensorReader) -> Iterator["torch.Tensor"]:
            with safe_open(files[info.name], "pt") as file:
                leaf = spec.name.rpartition(".")[2]
                kept = {name: file.get_tensor(f"{info.name} {name}") for name in ("weight", "scale")}
            yield pack_rows(kept["weight"], kept["scale"], scheme)[leaf]

        return write_packed(source, output, settings, pack, on_tensor=on_tensor, **options)


def _round(
    source: Checkpoint, settings: QuantizeSettings, evidence: Mapping[str, Any], folder: Path
) -> dict[str, Path]:
    """Round layer after layer, a file each; returns the file that holds each weight.

    Raises:
        CalibrationError: if there is too little text.
        NumericsError: if the model gives numbers that are not finite.
    """
    import torch
    from safetensors.torch import save_file

    from mka.alignment.rounding import Rounding
    from mka.model.loading import open_decoder
    from mka.texts.windows import pack_windows

    model, texts = evidence[BASE][1], evidence[CALIBRATION][0].texts
    context = min(CONTEXT, source.config.get("max_position_embeddings") or CONTEXT)
    scheme, files = describe_scheme(settings), {}
    info = find_linear(source)[0]
    dtype = torch_dtype(replace(info, dtype=loaded_dtype(source, info)))
    with open_decoder(source, model.dtype, model.trust_remote_code) as (decoder, tokenizer):
        windows = pack_windows(tokenizer, texts, context, max(1, settings.tokens // context))
        if not windows:
            raise CalibrationError(
                f"quantize.rounding {settings.rounding}: the calibration texts make no window of {context} tokens; "
                "give more text"
            )
        walk = Rounding(decoder, torch.tensor(windows), scheme, dtype, follows=settings.rounding == "gptaq")
        with show_progress("round layers", source.layers, "layer") as advance:
            for index, made in enumerate(walk.round_layers(advance)):
                file = folder / f"{index}.safetensors"
                kept: dict[str, torch.Tensor] = {}
                for name, (weight, scale) in made.items():
                    stored = source.family.layer_tensor(index, f"{name}.weight")
                    kept |= {f"{stored} weight": weight, f"{stored} scale": scale.to(dtype)}
                    files[stored] = file
                save_file({name: value.contiguous() for name, value in kept.items()}, file)
    return files


TRANSFORM = Transform(
    "gptq", "write rounded weights", _check, foresee_packed, _apply, needs=frozenset({BASE, CALIBRATION})
)
