"""Trials against models built whole and run by transformers, their divergence computed apart."""

import copy

import pytest
import torch
from support.alignments import (
    assemble,
    concatenate,
    diverge,
    draw_windows,
    keep_one,
    make_sharp_model,
    replace,
    run_walk,
)
from support.evidence import neutralise

from mka.alignment.trials import AlignedTrials
from mka.plan.plan import MergedLayer, take_layers

FAMILIES = ("llama", "qwen2", "gemma2", "gemma3_text", "smollm3")
HELDOUT = 3
WINDOWS = draw_windows(12)


@pytest.fixture(scope="module", params=FAMILIES)
def tried(request):
    model = make_sharp_model(request.param)
    return model, AlignedTrials(model, WINDOWS, HELDOUT)


def test_an_attention_left_out_is_one_that_writes_nothing(tried):
    model, trials = tried
    for layer in (0, 3, 5):
        silent = copy.deepcopy(model)
        with torch.no_grad():
            silent.model.layers[layer].self_attn.o_proj.weight.zero_()
        expected = diverge(model, silent, WINDOWS[-HELDOUT:])
        assert expected > 1e-3
        assert trials.measure_attention(layer) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "group", [keep_one(2, 3, 3), concatenate(0, 2, (1,)), keep_one(4, 5, 4)], ids=["keep", "concatenate", "last"]
)
def test_a_group_is_replaced_by_the_layer_a_walk_makes_and_the_rest_of_the_base_stays(tried, group):
    model, trials = tried
    layers = replace(group)
    place = layers.index(group)
    _, made = run_walk(model, WINDOWS, layers, heldout=HELDOUT)
    changed = assemble(model, layers, made[: place + 1])
    expected = diverge(model, changed, WINDOWS[-HELDOUT:])
    assert expected > 1e-3
    assert trials.measure_group(group) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_an_average_is_tried_too():
    model, group = make_sharp_model("llama"), MergedLayer((2, 3), (0.5, 0.5))
    layers = replace(group)
    _, made = run_walk(model, WINDOWS, layers, heldout=HELDOUT)
    expected = diverge(model, assemble(model, layers, made[:3]), WINDOWS[-HELDOUT:])
    assert AlignedTrials(model, WINDOWS, HELDOUT).measure_group(group) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_an_mlp_left_out_is_one_that_writes_nothing(tried):
    model, trials = tried
    for layer in (1, 4):
        silent = copy.deepcopy(model)
        with torch.no_grad():
            silent.model.layers[layer].mlp.down_proj.weight.zero_()
        expected = diverge(model, silent, WINDOWS[-HELDOUT:])
        assert trials.measure_mlp(layer) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_what_does_nothing_costs_nothing():
    model = neutralise(make_sharp_model("llama"), 3)
    trials = AlignedTrials(model, WINDOWS, HELDOUT)
    assert abs(trials.measure_attention(3)) < 1e-6 < 1e-3 < trials.measure_attention(2)
    assert abs(trials.measure_group(keep_one(2, 3, 2))) < 1e-6 < 1e-3 < trials.measure_group(keep_one(1, 2, 1))


def test_a_trial_is_fitted_on_the_first_windows_only():
    model, group = make_sharp_model("llama"), keep_one(2, 3, 3)
    alone = AlignedTrials(model, torch.cat([WINDOWS[:-HELDOUT], WINDOWS[:HELDOUT]]), HELDOUT)
    one = alone.measure_group(group)
    _, made = run_walk(model, WINDOWS[:-HELDOUT], replace(group))
    changed = assemble(model, replace(group), made[:3])
    assert one == pytest.approx(diverge(model, changed, WINDOWS[:HELDOUT]), rel=1e-3)


def test_results_are_remembered_and_the_base_is_left_as_it_was(monkeypatch):
    model = make_sharp_model("llama")
    before = copy.deepcopy(model.state_dict())
    trials = AlignedTrials(model, WINDOWS, HELDOUT)
    group = take_layers((2, 3), (3,), (2, 3))
    first = trials.measure_group(group), trials.measure_attention(2)
    monkeypatch.setattr(trials, "_finish", None)  # would fail if called again
    assert (trials.measure_group(group), trials.measure_attention(2)) == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tokens_said_twice_add_their_share():
    model = make_sharp_model("llama")
    texts = AlignedTrials(model, WINDOWS[:-1], HELDOUT - 1)
    twice = AlignedTrials(model, torch.cat([WINDOWS[: -HELDOUT - 1], WINDOWS[-HELDOUT - 1 :][-1:]]), 1)
    both = AlignedTrials(model, WINDOWS, HELDOUT, copies=1, copying=0.25)
    expected = texts.measure_attention(2) + 0.25 * twice.measure_attention(2)
    assert both.measure_attention(2) == pytest.approx(expected, rel=1e-5)
