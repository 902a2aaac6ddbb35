"""Tiny models asked by a method: what several test files share."""

import dataclasses

import pytest
import torch

from mka.alignment.lockstep import Alignment
from mka.evidence.gather import make_oracles
from mka.evidence.needs import HIDDEN_STATES, Evidence
from mka.evidence.observe import observe_tokens
from mka.methods import method_names, resolve_method
from mka.model.families import get_family, layer_kinds
from mka.recipe import CalibrationSettings, MethodChoice
from mka.texts.tokens import tokenize
from mka.texts.windows import pack_windows
from support.models import FAMILY_NAMES, make_tokenizer

TOKENIZER = make_tokenizer()
LOOKING = CalibrationSettings(samples=40, max_tokens=24, search_tokens=200)
IDS = (torch.arange(1, 25) * 31 % 97).reshape(2, 12)
# Settings under which a method takes another road; a method not named here has one.
SMALL = {"tokens": 256, "heldout_tokens": 64, "context": 16}
SEARCH = {"budget": 2500, "tokens": [32, 64], "aligned_tokens": 128, "context": 16, "offspring": 4, "survivors": 2}
SEARCH |= {"finalists": 0, "heal_tokens": 16}  # seconds each, and another test's
ROADS = {
    "aligned": (
        SMALL,
        {**SMALL, "operator": "keep", "selection": "divergence"},
        {**SMALL, "operator": "average", "proposed": 1.0},
        {"selection": "similarity"},
    ),
    "evolution": (
        SEARCH,
        {**SEARCH, "repair": "none"},
        {**SEARCH, "proposal": "random"},
    ),
    "mka": (
        {},
        {"weights": "fixed", "weight": 0.5},
        {"weights": "line-search", "grid": [0, 0.5, 1]},
        {"selection": "iterative"},
    ),
    "policy_gradient": ({"budget": 5000}, {"budget": 5000, "start": "uniform", "objective": "divergence"}),
}
METHODS = [(name, settings) for name in method_names() for settings in ROADS.get(name, ({},))]
METHOD_IDS = [
    "-".join([name, *(str(v) for k, v in settings.items() if k not in SMALL | SEARCH)]) for name, settings in METHODS
]
every_method = pytest.mark.parametrize(("name", "settings"), METHODS, ids=METHOD_IDS)
every_family = pytest.mark.parametrize("family", FAMILY_NAMES)


def logits(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def observe(model, tokenizer, texts, *, max_tokens, **options):
    """Hidden states of all layers on texts cut to so many tokens."""
    return observe_tokens(model, tokenize(tokenizer, texts, max_tokens), **options)


def look(model, texts, **options):
    return observe(model, TOKENIZER, texts, max_tokens=24, **options)


def gather(model, needs, texts, settings=None):
    """What the method asked for, and nothing else."""
    kinds = layer_kinds(model.config, get_family(model.config.model_type, "test"))
    evidence = Evidence(model.config.num_hidden_layers, kinds)
    if HIDDEN_STATES in needs:
        evidence = dataclasses.replace(evidence, states=look(model, texts))
    return dataclasses.replace(evidence, **make_oracles(needs, settings, model, TOKENIZER, texts, LOOKING))


def aligned_tensors(model, plan, texts):
    """What an alignment of the plan makes of each output layer; None where the plan needs none."""
    if not any(layer.selects for layer in plan.layers):
        return None
    windows = torch.tensor(pack_windows(TOKENIZER, texts, 16))
    return (made.tensors for made in Alignment(model, windows).walk(plan.layers))


def score_and_plan(model, name, settings, aim, texts):
    planner = resolve_method(MethodChoice(name=name, settings=settings))
    evidence = gather(model, planner.needs, texts, planner.settings)
    scores = planner.method.score(evidence, planner.settings) if planner.method.score else None
    return scores, planner.plan(evidence, scores, aim)


def neutralise(model, layer):
    """Make one layer add nothing to the residual stream: its output is its input, bit for bit."""
    with torch.no_grad():
        for name, parameter in model.model.layers[layer].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    return model
