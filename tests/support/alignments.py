"""What the tests of aligned merging share: walks, models put together from what a walk made, divergences apart."""

import copy

import torch

from mka.alignment.lockstep import Alignment
from mka.plan.plan import identity_layers, keep_layers, take_layers
from support.candidates import build_candidate
from support.models import make_tiny_model

# Layers of one kind whose heads can stand side by side; families with q/k norms have none.
SAME_KIND = {"llama": (1, 2), "mistral": (1, 2), "qwen2": (1, 2), "phi3": (1, 2), "smollm3": (1, 2), "gemma2": (1, 3)}


def make_sharp_model(family, **overrides):
    """A tiny model whose logits are some units apart: those of a random head are nearly equal, whatever goes in."""
    model = make_tiny_model(family, **overrides)
    with torch.no_grad():
        model.model.norm.weight.mul_(30)
    return model


def draw_windows(count, *, length=24, seed=0):
    """Token ids, (count, length); longer than the sliding window of the families that have one."""
    return torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(seed))


def replace(layer, *, count=6):
    """All layers of the base as they are, but for one group that becomes one layer."""
    rest = [x for x in identity_layers(count) if x.sources[0] not in layer.sources]
    return tuple(sorted([*rest, layer], key=lambda x: x.sources))


def without(*deleted, count=6):
    return keep_layers([i for i in range(count) if i not in deleted])


def keep_one(first, last, kept):
    return take_layers(range(first, last + 1), (kept,), (kept,))


def concatenate(first, last, attention):
    return take_layers(range(first, last + 1), attention, range(first, last + 1))


def run_walk(model, windows, layers, *, heldout=0, penalty=1.0):
    walk = Alignment(model, windows, heldout)
    return walk, list(walk.walk(layers, penalty=penalty))


def assemble(model, layers, made):
    """A transformers model of the output layers: tensors of the walk where it made some, the base's elsewhere."""
    heads = keep_layers([layer.leader for layer in layers])
    built = copy.deepcopy(build_candidate(model, heads))
    for layer, aligned in zip(built.model.layers, made):
        if aligned.tensors:
            layer.load_state_dict(aligned.tensors, strict=True)
    return built


@torch.inference_mode()
def diverge(base, other, windows):
    """KL(base || other) over all positions of windows, nats per token, in float64 by torch's own kl_div."""
    logs = [torch.log_softmax(m(windows, use_cache=False).logits.double(), -1).flatten(0, 1) for m in (other, base)]
    return float(torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean"))
