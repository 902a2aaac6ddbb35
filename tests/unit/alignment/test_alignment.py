"""The walk of teacher and student: against the model itself, against deletion, and where nothing is to be done."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from support.alignments import (
    SAME_KIND,
    assemble,
    concatenate,
    diverge,
    draw_windows,
    keep_one,
    make_sharp_model,
    replace,
    run_walk,
    without,
)
from support.candidates import build_candidate
from support.models import FAMILY_NAMES, LAYERS, save_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mka.alignment.lockstep import Alignment, find_ends
from mka.alignment.refit import token_weights
from mka.model.checkpoint import open_checkpoint
from mka.model.decoder import Decoder
from mka.model.families import get_family
from mka.model.parts import run_part
from mka.plan.plan import MergedLayer, MergePlan, identity_layers, keep_layers, take_layers
from mka.transforms.merge import merge_checkpoint

every_family = pytest.mark.parametrize("family", FAMILY_NAMES)
WINDOWS = draw_windows(24)


def average(*sources):
    return MergedLayer(sources, (1 / len(sources),) * len(sources))


def layer_outputs(model, ids):
    """Raw output of every layer, (L, S, T, D), caught in the model's own forward pass."""
    caught = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: caught.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return caught


# The walk itself


@every_family
def test_sublayers_run_apart_give_the_models_own_layers(family):
    model, ids = make_sharp_model(family), draw_windows(3)
    facts = get_family(family, "test")
    states, contexts = Decoder(model).enter(ids)
    assert len(contexts) == LAYERS
    with torch.inference_mode():
        for layer, context, wanted in zip(model.model.layers, contexts, layer_outputs(model, ids)):
            for part in (facts.attention, facts.mlp):
                states = run_part(layer, part, states, context)
            assert_close(states, wanted, rtol=1e-6, atol=1e-5)
        assert isinstance(model.model.layers[0].get_submodule("mlp.down_proj"), torch.nn.Linear)


@every_family
def test_what_the_walk_made_is_what_a_model_of_its_tensors_does(family):
    """The student's states, and so the divergence, are those of the output model run whole."""
    model, fitted, heldout = make_sharp_model(family), draw_windows(12), draw_windows(4, seed=1)
    windows = torch.cat([fitted, heldout])
    attention = SAME_KIND.get(family, (1,))
    plans = [without(2, 3), replace(keep_one(1, 3, 2)), replace(concatenate(1, 3, attention))]
    if family != "gemma2":  # its neighbours are of different kinds, whose attention has no mean
        plans.append(replace(average(1, 2)))
    for layers in plans:
        walk, made = run_walk(model, windows, layers, heldout=4)
        assert_close(
            walk.measure_divergence(), diverge(model, assemble(model, layers, made), heldout), rtol=1e-4, atol=1e-6
        )


def test_students_with_different_penalties_walk_beside_one_teacher_as_they_would_alone():
    model, layers, penalties = make_sharp_model("llama"), replace(concatenate(1, 3, (1,))), (0.3, 3.0)
    windows = torch.cat([WINDOWS[:8], WINDOWS[8:12]])
    together = Alignment(model, windows, 4)
    made = list(together.walk_students(layers, penalties))
    for index, penalty in enumerate(penalties):
        alone, layers_alone = run_walk(model, windows, layers, heldout=4, penalty=penalty)
        assert together.measure_divergence(index) == alone.measure_divergence()
        for group, single in zip(made, layers_alone, strict=True):
            assert set(group[index].tensors) == set(single.tensors)
            assert all(torch.equal(group[index].tensors[name], tensor) for name, tensor in single.tensors.items())
    assert together.measure_divergence(0) != together.measure_divergence(1)


def test_every_source_layer_of_the_teacher_is_run_once_per_batch(monkeypatch):
    monkeypatch.setattr("mka.alignment.lockstep.BATCH_TOKENS", 5 * 24)
    model = make_sharp_model("llama")
    walk = Alignment(model, WINDOWS[:16], heldout=4)
    calls = [0] * LAYERS
    own = {layer.self_attn: i for i, layer in enumerate(model.model.layers)}

    def count(module, args, output):
        # Copies of a layer, in which the student is fitted, carry its hooks along.
        if module in own:
            calls[own[module]] += 1

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(count)
    for layers in (identity_layers(LAYERS), without(0, 3), replace(concatenate(1, 3, (1, 2)))):
        calls[:] = [0] * LAYERS
        passed = []
        assert len(list(walk.walk(layers, on_layer=passed.append))) == len(layers)
        assert calls == [4] * LAYERS  # 12 windows fitted on in 5 + 5 + 2, and 4 held out
        assert sum(passed) == LAYERS


def test_batches_and_windows_held_out_change_nothing_that_is_fitted(monkeypatch):
    model, layers = make_sharp_model("llama"), replace(concatenate(1, 3, (1,)))
    _, whole = run_walk(model, WINDOWS, layers)
    monkeypatch.setattr("mka.alignment.lockstep.BATCH_TOKENS", 5 * 24)
    _, batched = run_walk(model, torch.cat([WINDOWS, draw_windows(7, seed=5)]), layers, heldout=7)
    for one, other in zip(whole, batched, strict=True):
        assert_close(dict(other.tensors), dict(one.tensors), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("layers", "ends"),
    [
        (identity_layers(4), [0, 1, 2, 3]),
        (without(2, 3, 4), [0, 4, 5]),
        (without(5), [0, 1, 2, 3, 5]),
        (without(0, 1), [2, 3, 4, 5]),
        (keep_layers([3]), [5]),
        ((MergedLayer((0,), (1.0,)), take_layers((1, 2), (1,), (1, 2)), average(4, 5)), [0, 3, 6]),
    ],
)
def test_layers_answer_for_the_gap_behind_them(layers, ends):
    assert find_ends(layers, ends[-1] + 1) == ends


# Nothing to do


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_identity_writes_every_tensor_byte_for_byte(tmp_path, family, dtype):
    folder = save_model(make_sharp_model(family, dtype=dtype), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    walk = Alignment(model, torch.cat([WINDOWS[:8], WINDOWS[:2]]), heldout=2)
    layers = identity_layers(LAYERS)
    assert [dict(made.tensors) for made in walk.walk(layers)] == [{}] * LAYERS
    assert walk.measure_divergence() == 0.0
    plan = MergePlan("test", "", LAYERS, layers)
    refitted = (made.tensors for made in walk.walk(layers))
    merge_checkpoint(plan, open_checkpoint(folder), tmp_path / "out", aligned=refitted)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@every_family
def test_layers_in_front_of_the_first_change_are_left_alone(family):
    _, made = run_walk(make_sharp_model(family), WINDOWS[:8], without(3))
    assert [bool(layer.tensors) for layer in made] == [False] * 2 + [True] * 3


@every_family
def test_attention_reads_as_before_where_what_it_reads_is_as_before_and_is_mapped_where_it_is_not(family):
    model = make_sharp_model(family)
    _, made = run_walk(model, WINDOWS, without(3))
    for aligned, source, same in zip(made[2:], (2, 4, 5), (True, False, False)):
        for name in get_family(family, "test").attention.readers:
            original = model.model.layers[source].get_submodule(name).weight
            assert torch.equal(aligned.tensors[f"{name}.weight"], original) == same


def test_a_sum_of_layers_reads_what_the_sum_says():
    model = make_sharp_model("llama")
    _, made = run_walk(model, WINDOWS, (*identity_layers(3)[:1], average(2, 3), *identity_layers(6)[4:]))
    gains = [model.model.layers[i].input_layernorm.weight for i in (2, 3)]
    weights = [model.model.layers[i].self_attn.q_proj.weight for i in (2, 3)]
    mean = sum(weight * gain for weight, gain in zip(weights, gains)) / 2
    assert_close(made[1].tensors["self_attn.q_proj.weight"], mean)


# Against deletion


@every_family
@pytest.mark.parametrize("operator", ["delete", "keep", "concatenate"])
def test_on_what_it_was_fitted_on_alignment_beats_deletion(family, operator):
    model = make_sharp_model(family)
    group = {"keep": keep_one(2, 3, 2), "concatenate": concatenate(2, 3, (2,))}
    layers = without(3) if operator == "delete" else replace(group[operator])
    walk, made = run_walk(model, torch.cat([WINDOWS, WINDOWS]), layers, heldout=len(WINDOWS))
    deleted = build_candidate(model, without(3))
    assert walk.measure_divergence() < 0.9 * diverge(model, deleted, WINDOWS)
    # Layer by layer as well: the states behind every output layer are nearer to the base's.
    for aligned, theirs, end in zip(made[2:], layer_outputs(deleted, WINDOWS)[2:], (3, 4, 5)):
        wanted = layer_outputs(model, WINDOWS)[end]
        weights = token_weights(wanted)
        wrong = ((theirs - wanted).square().sum(-1) * weights).sum() / (wanted.square().sum(-1) * weights).sum()
        assert aligned.facts["error"] < float(wrong)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "smollm3"])
def test_without_end_of_penalty_alignment_is_plain_deletion(family):
    model = make_sharp_model(family)
    walk, made = run_walk(model, torch.cat([WINDOWS[:8], WINDOWS[:4]]), without(2, 3), heldout=4, penalty=1e12)
    for aligned, source in zip(made[1:], (1, 4, 5)):
        assert_close(dict(aligned.tensors), dict(model.model.layers[source].state_dict()), rtol=1e-6, atol=1e-6)
    deleted = build_candidate(model, without(2, 3))
    assert walk.measure_divergence() == pytest.approx(diverge(model, deleted, WINDOWS[:4]), rel=1e-4)


# Targets


@every_family
def test_the_last_layer_is_fitted_to_raw_states_which_know_nothing_of_the_final_norm(family):
    model, layers = make_sharp_model(family), without(4, 5)
    walk, made = run_walk(model, WINDOWS[:8], layers)
    assert_close(walk.teacher, layer_outputs(model, WINDOWS[:8])[-1], rtol=1e-6, atol=1e-5)
    extreme = copy.deepcopy(model)
    with torch.no_grad():
        extreme.model.norm.weight.copy_(1e4 * torch.randn(32, generator=torch.Generator().manual_seed(0)))
    _, same = run_walk(extreme, WINDOWS[:8], layers)
    assert made[-1].tensors
    for one, other in zip(made, same, strict=True):
        assert all(torch.equal(other.tensors[name], tensor) for name, tensor in one.tensors.items())


def test_layers_deleted_at_the_start_are_made_up_for_by_the_first_kept():
    model = make_sharp_model("llama")
    walk, made = run_walk(model, torch.cat([WINDOWS, WINDOWS]), without(0), heldout=len(WINDOWS))
    assert all(layer.tensors for layer in made)
    assert walk.measure_divergence() < 0.9 * diverge(model, build_candidate(model, without(0)), WINDOWS)
