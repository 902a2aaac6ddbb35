"""A planned model in memory, sharing every unchanged tensor with its base."""

import copy
from collections.abc import Sequence
from typing import Any

from mka.model.families import LAYER_KEY, get_family, layer_kinds
from mka.plan.plan import LayerRecipe
from mka.transforms.merge import combine_layers, cut_config

# Positions whose logits are in memory at a time.
ROWS = 256


def build_candidate(model: Any, layers: Sequence[LayerRecipe]) -> Any:
    """Build the planned model beside its base.

    Copied layers share their tensors with ``model``; only merged layers take memory. The arithmetic is
    `mka.transforms.merge.combine_layers`, the same that writes checkpoints.

    Args:
        model: the base, a transformers causal language model.
        layers: output layers of a plan.
    """
    from accelerate import init_empty_weights

    family = get_family(model.config.model_type, "model")
    config = copy.deepcopy(model.config)
    for key, value in cut_config({}, layer_kinds(model.config, family), family, layers).items():
        setattr(config, key, value)
    with init_empty_weights(include_buffers=False):
        candidate = type(model)(config)
    state = model.state_dict()
    mapped = {name: tensor for name, tensor in state.items() if not LAYER_KEY.match(name)}
    suffixes = sorted({match[2] for name in state if (match := LAYER_KEY.match(name))})
    for position, layer in enumerate(layers):
        for suffix in suffixes:
            if f"model.layers.{layer.sources[0]}.{suffix}" in state:
                mapped[f"model.layers.{position}.{suffix}"] = combine_layers(
                    layer, suffix, family, lambda i, s: state[f"model.layers.{i}.{s}"]
                )
    candidate.load_state_dict(mapped, strict=True, assign=True)
    candidate.tie_weights()
    candidate.to(model.device)
    return candidate.eval()
