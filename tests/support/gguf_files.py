"""GGUF files as others read them: transformers' own loader, and the package gguf."""

import gguf
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

# Kinds of layers as llama.cpp takes them: every p-th looks at everything.
REGULAR = {"gemma3_text": {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2}}
TEXT = torch.arange(3, 60).reshape(3, 19)


def read_logits(file, config=None):
    """What a stock loader computes of a file, by its own reading of the config where none is given."""
    options = {"config": config} if config is not None else {}
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    return logits_of(loaded)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(TEXT).logits


def read_fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def read_tensors(file):
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def load_by_hand(file, model):
    """A model with a file's weights, put back by another's inverse of the order that rotary has there."""
    config = model.config
    undo = LlamaTensorProcessor(config.to_dict())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.SMOLLM3, config.num_hidden_layers)
    found = {name: undo.process(weights, name).weights for name, weights in read_tensors(file).items()}
    places = {name: names.get_name(name, try_suffixes=(".weight",)) for name in model.state_dict()}
    state = {name: torch.tensor(found[place]) for name, place in places.items() if place in found}
    twin = type(model)(config)
    assert set(twin.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin
