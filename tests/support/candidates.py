"""A planned model built whole by transformers, beside which the walks of the library are measured."""

import copy
import re

from accelerate import init_empty_weights

from mka.model.families import get_family, layer_kinds
from mka.transforms.merge import cut_config
from mka.transforms.verbs import make_tensor

LAYER_KEY = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


def build_candidate(model, layers):
    """Build the planned model beside its base; copied layers share their tensors with it."""
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
                mapped[f"model.layers.{position}.{suffix}"] = make_tensor(
                    layer, suffix, family, lambda i, s: state[f"model.layers.{i}.{s}"]
                )
    candidate.load_state_dict(mapped, strict=True, assign=True)
    candidate.tie_weights()
    candidate.to(model.device)
    return candidate.eval()
