"""How dear noise on a linear layer's weights is, in nats per token: what bits are shared out by.

By the linearity theorem of HIGGS (Malinovskii et al., arXiv 2411.17525), a small error of relative squared size t² on
the weights of one linear layer costs ``alpha t²``, whatever makes it, and those of several layers add up. So alpha is
measured once for each layer, with noise of one size, and serves every number of bits.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

from mka.model.decoder import as_decoder
from mka.model.readout import read_out, refuse_overflow, sum_divergence
from mka.model.walk import run_layer

# Relative squared size of the noise: some three bits' rounding.
NOISE = 0.02

# Linear layers that are rounded alike, since engines fuse them: the layer they are in, and their names there.
Unit = tuple[int, tuple[str, ...]]


@torch.inference_mode()
def measure_sensitivity(
    model: Any, windows: torch.Tensor, *, seed: int = 0, on_layer: Callable[[int], Any] | None = None
) -> dict[Unit, float]:
    """Return alpha of the linear layers of every layer, the readers of one norm together.

    Every model that differs from the base in one of them runs from its layer on; those of one layer run together.

    Args:
        model: a transformers causal language model or a `mka.model.decoder.Decoder`.
        windows: token ids, (S, T).
        seed: of the noise.
        on_layer: called with 1 for every layer that was measured, for a progress bar.

    Raises:
        NumericsError: if hidden states or logits are not finite.
    """
    decoder = as_decoder(model)
    generator = torch.Generator().manual_seed(seed)
    states, contexts = decoder.enter(windows)[0], decoder.enter(windows[:1])[1]
    entering = []  # (S, T, D) each
    for index, context in enumerate(contexts):
        entering.append(states)
        with decoder.hold(index):
            states = run_layer(decoder.layers[index], states, context)
        refuse_overflow(states, f"mixed bits: hidden states behind layer {index}", "the model is damaged")
    with decoder.hold_head():
        base = [read_out(decoder, decoder.norm(x)) for x in states]  # (T, V) each
    found: dict[Unit, float] = {}
    for index in range(len(contexts)):
        units = [names for part in decoder.family.parts for names in part.fused]
        with decoder.hold(index):
            changed = [
                run_layer(_add_noise(decoder.layers[index], names, generator), entering[index], contexts[index])
                for names in units
            ]
        states = torch.cat(changed)  # (units S, T, D)
        for later in range(index + 1, len(contexts)):
            with decoder.hold(later):
                states = run_layer(decoder.layers[later], states, contexts[later])
        with decoder.hold_head():
            for names, own in zip(units, states.unflatten(0, (len(units), -1))):
                logits = (read_out(decoder, decoder.norm(x)) for x in own)
                total = sum(sum_divergence(one, other) for one, other in zip(base, logits))
                found[index, names] = total / windows.numel() / NOISE
        if on_layer:
            on_layer(1)
    return found


def _add_noise(layer: Any, names: tuple[str, ...], generator: torch.Generator) -> Any:
    changed = copy.deepcopy(layer)
    for name in names:
        weight = changed.get_submodule(name).weight
        size = (NOISE * weight.float().square().mean()).sqrt()
        drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
        weight.add_((size * drawn).to(weight.dtype))
    return changed
