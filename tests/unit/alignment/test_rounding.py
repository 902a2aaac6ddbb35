"""The walk that rounds: what it feeds, what it gives, and what it saves."""

import copy

import pytest
import torch
from support.alignments import diverge, draw_windows, make_sharp_model
from support.models import FAMILY_NAMES, make_tiny_model

from mka.alignment.rounding import Rounding
from mka.model.parts import read_norm
from mka.transforms.columns import round_columns, round_to
from mka.transforms.formats import describe_scheme, scale_groups

every_family = pytest.mark.parametrize("family", FAMILY_NAMES)
WINDOWS = draw_windows(48)
UNSEEN = draw_windows(16, seed=1)


def scheme_of(name):
    return describe_scheme(name, 16)


def round_model(model, scheme, follows, windows=WINDOWS):
    """A copy of a model with what the walk rounds its layers to, and the walk's values, layer by layer."""
    walk = Rounding(model, windows, lambda *_: (scheme_of(scheme), torch.float32), follows=follows)
    found, rounded = list(walk.round_layers()), copy.deepcopy(model)
    with torch.no_grad():
        for layer, made in zip(rounded.model.layers, found):
            for name, (weight, _) in made.items():
                layer.get_submodule(name).weight.copy_(weight)
    return rounded, found


def round_nearest(model, scheme):
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                scale = scale_groups(module.weight, scheme_of(scheme))
                groups = module.weight.unflatten(-1, (scale.shape[1], -1))
                module.weight.copy_(round_to(groups, scale[..., None], scheme_of(scheme)).flatten(1))
    return rounded


@every_family
@pytest.mark.parametrize("follows", [False, True], ids=["gptq", "gptaq"])
def test_every_linear_layer_is_rounded_to_multiples_of_its_scales_and_no_other_weight_moves(family, follows):
    model = make_tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    rounded, found = round_model(model, "int4", follows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    names = {name for name, module in model.model.layers[0].named_modules() if isinstance(module, torch.nn.Linear)}
    for made in found:
        assert made.keys() == names
        for weight, scale in made.values():
            steps = weight.unflatten(-1, (scale.shape[1], -1)) / scale[..., None]
            assert (steps - steps.round()).abs().max() < 1e-4
            assert steps.min() > -8.001 and steps.max() < 7.001
    moved = {n for n, value in rounded.state_dict().items() if not torch.equal(value, before[n])}
    assert moved == {f"model.layers.{i}.{name}.weight" for i in range(len(found)) for name in names}


@every_family
@pytest.mark.parametrize("follows", [False, True], ids=["gptq", "gptaq"])
def test_the_student_is_the_rounded_model(family, follows, monkeypatch):
    """What the walk feeds a layer is what the rounded layers before it give; nothing in between is lost."""
    model, seen = make_tiny_model(family), []

    def note(layer, part, states):
        seen.append(states.detach().clone())
        return read_norm(layer, part, states)

    monkeypatch.setattr("mka.alignment.rounding.read_norm", note)
    rounded, _ = round_model(model, "int3", follows)
    caught = []
    last = rounded.model.layers[-1]
    handle = last.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.inference_mode():
        rounded(WINDOWS, use_cache=False)
    handle.remove()
    # The last layer's attention reads twice: for its moments (student, then teacher), and for its features.
    width = [states for states in seen if states.shape == caught[0].shape]
    assert any(torch.allclose(states, caught[0], atol=2e-4, rtol=1e-3) for states in width[-8:])


def test_of_the_first_layer_readers_are_rounded_by_what_they_read():
    model = make_tiny_model("llama")
    _, found = round_model(model, "int3", follows=False)
    layer, names = model.model.layers[0], [f"self_attn.{name}_proj" for name in "qkv"]
    with torch.no_grad():
        read = layer.input_layernorm(model.model.embed_tokens(WINDOWS)).flatten(0, 1)
    gram = read.double().T @ read.double()
    for name in names:
        weight, scale = found[0][name]
        wanted = round_columns(layer.get_submodule(name).weight.detach(), gram, scale, scheme_of("int3"))
        # Moments are summed in float32 here and there; a tie may fall the other way.
        assert ((weight - wanted).abs() > 1e-4).double().mean() < 0.01


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_rounding_that_looks_loses_less_than_to_the_nearest_on_windows_it_has_not_seen(family):
    model = make_sharp_model(family)
    lost = {follows: diverge(model, round_model(model, "int3", follows)[0], UNSEEN) for follows in (False, True)}
    assert lost[False] < diverge(model, round_nearest(model, "int3"), UNSEEN)
    assert lost[True] < diverge(model, round_nearest(model, "int3"), UNSEEN)


def test_eight_bits_towards_the_teacher_lose_next_to_nothing():
    model = make_sharp_model("llama")
    assert diverge(model, round_model(model, "int8", follows=True)[0], UNSEEN) < 1e-3


def test_the_same_windows_give_the_same_bytes():
    model = make_tiny_model("llama")
    (_, one), (_, two) = (round_model(model, "int3", follows=True) for _ in range(2))
    for first, second in zip(one, two):
        assert all(torch.equal(first[name][part], second[name][part]) for name in first for part in (0, 1))


@pytest.mark.parametrize("follows", [False, True], ids=["gptq", "gptaq"])
def test_windows_that_are_held_out_are_compared_and_change_nothing(follows):
    """What is lost on them is the divergence of the models; the weights are those of a walk without them."""
    model = make_sharp_model("llama")
    rounded, found = round_model(model, "int3", follows)
    both = torch.cat([WINDOWS, UNSEEN])
    options = {"follows": follows, "heldout": len(UNSEEN)}
    walk = Rounding(model, both, lambda *_: (scheme_of("int3"), torch.float32), **options)
    for made, wanted in zip(walk.round_layers(), found, strict=True):
        for name, (weight, _) in made.items():
            assert torch.allclose(weight, wanted[name][0], atol=1e-5)
    assert walk.measure_loss() == pytest.approx(float(diverge(model, rounded, UNSEEN)), rel=1e-3)
