"""The refit of half a layer: solutions known beforehand, biases, heads, and what is refused."""

import copy

import pytest
import torch
from support.alignments import (
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
from support.evidence import neutralise
from support.models import FAMILY_NAMES
from torch.testing import assert_close

from mka.alignment.lockstep import Alignment
from mka.alignment.refit import CLIP, Refit, token_weights
from mka.errors import NumericsError, PlanError
from mka.model.families import get_family
from mka.model.parts import read_features, read_norm
from mka.plan.plan import take_layers

WINDOWS = draw_windows(24)
# Without norms behind the writers, where a fit that is possible is found exactly.
PRE_NORM = ("llama", "qwen2", "phi3", "smollm3")


def function_of(tensors, family, part):
    """A half's linear maps as the residual stream sees them: readers with the norm's gains folded in, then the rest."""
    gains = family.gain_offset + tensors[f"{part.norm}.weight"]
    readers = {f"{name}.weight": tensors[f"{name}.weight"] * gains for name in part.readers}
    rest = {n: t for n, t in tensors.items() if part.owns(n) and n not in readers and not n.startswith(part.norm)}
    return readers | rest


def test_tokens_of_massive_activation_weigh_least_and_none_owns_the_sums():
    energies = torch.tensor([[1.0, 1.0, 1e6], [1.0, 1e-9, 4.0]])
    directions = torch.nn.functional.normalize(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    weights = token_weights(directions * energies.sqrt()[..., None])
    # The median energy is 1, so that 1e-9 counts as 0.1.
    expected = torch.tensor([[1.0, 1.0, 1e-6], [1.0, 1 / CLIP, 0.25]])
    assert_close(weights, expected / expected.mean())
    assert float(weights.mean()) == pytest.approx(1.0)
    assert int(weights.argmin()) == 2


def assert_recovered(model, made, sources):
    """Every output layer computes what its source layer does."""
    facts = get_family(model.config.model_type, "test")
    for output, source in zip(made, sources, strict=True):
        for part in (facts.attention, facts.mlp):
            fitted, kept = (
                function_of(tensors, facts, part)
                for tensors in (output.tensors, model.model.layers[source].state_dict())
            )
            for name, tensor in kept.items():
                error = float((fitted[name] - tensor).norm() / tensor.norm())
                assert error < 5e-3, (source, name, error)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("operator", ["delete", "keep"])
def test_a_layer_that_does_nothing_is_merged_away_without_a_trace(family, operator):
    """What is wanted is what the layer kept gives already, so that every fit ends at its prior, norms included."""
    model = neutralise(make_sharp_model(family), 3)
    layers = without(3) if operator == "delete" else replace(keep_one(2, 3, 2))
    walk, made = run_walk(model, torch.cat([WINDOWS, draw_windows(4, seed=1)]), layers, heldout=4)
    assert walk.measure_divergence() < 1e-6
    assert_recovered(model, made[2:], (2, 4, 5))


@pytest.mark.parametrize("family", PRE_NORM)
def test_neurons_that_write_nothing_lose_to_those_that_do(family):
    model = neutralise(make_sharp_model(family), 2)
    layers = replace(concatenate(2, 3, (3,)))
    walk, made = run_walk(model, torch.cat([WINDOWS, draw_windows(4, seed=1)]), layers, heldout=4)
    assert made[2].facts["mlp units"] == {"2": 0, "3": 64}
    assert walk.measure_divergence() < 1e-6
    assert_recovered(model, made[2:], (3, 4, 5))


@pytest.mark.parametrize("family", PRE_NORM)
def test_of_three_layers_the_neurons_of_those_that_write_nothing_are_not_even_listed(family):
    model = neutralise(neutralise(make_sharp_model(family), 1), 2)
    walk, made = run_walk(model, torch.cat([WINDOWS, WINDOWS[:4]]), replace(concatenate(1, 3, (3,))), heldout=4)
    assert made[1].facts["mlp units"] == {"1": 0, "2": 0, "3": 64}
    assert walk.measure_divergence() < 1e-6


# Known solutions


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_readers_undo_a_linear_change_of_what_they_read(family, half):
    """A rotation Q of the residual stream passes the norm: x Q is read as n diag(1/g) Q diag(g)."""
    model, facts = make_sharp_model(family), get_family(family, "test")
    walk, part = Alignment(model, WINDOWS), getattr(facts, half)
    before = walk.start
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    layer, made = model.model.layers[2], copy.deepcopy(model.model.layers[2])
    with torch.inference_mode():
        student = before @ rotation
        Refit(walk, made, part, (2,)).fit_readers(student, {2: before}, 1e-6)
        for name in part.readers:
            seen, mapped, wanted = (
                x.get_submodule(name)(read_norm(x, part, states))
                for x, states in ((layer, student), (made, student), (layer, before))
            )
            assert float((seen - wanted).norm()) > 0.5 * float(wanted.norm())
            assert float((mapped - wanted).norm()) < 1e-2 * float(wanted.norm())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gains_behind_a_writer_are_fitted_channel_by_channel(family):
    """Layers 2 and 3 write the same, 2 at no gain. Deleting 3, its gains g are the solution for 2; shrunk towards the
    zeros they were by a tenth of the mean energy, g_c E_c / (E_c + 0.1 mean E).
    """
    model = make_sharp_model(family)
    second, third = model.model.layers[2], model.model.layers[3]
    part = get_family(family, "test").mlp
    with torch.no_grad():
        third.mlp.load_state_dict(second.mlp.state_dict())
        third.pre_feedforward_layernorm.load_state_dict(second.pre_feedforward_layernorm.state_dict())
        third.self_attn.o_proj.weight.zero_()
        second.post_feedforward_layernorm.weight.fill_(-1.0)  # stored around zero
    gains = 1 + third.post_feedforward_layernorm.weight.detach()
    walk, made = run_walk(model, WINDOWS, without(3))
    with torch.inference_mode():
        group = walk.run_teacher(walk.run_teacher(walk.start, 0, 1, ()).after, 2, 3, (2,))
        written = read_features(third, part, read_norm(third, part, group.between[2]), {})
        written = torch.nn.functional.linear(written, third.mlp.down_proj.weight)
        written = written / written.square().mean(-1, keepdim=True).sqrt()
        energy = (token_weights(group.after)[..., None] * written.square()).sum((0, 1))
    expected = gains * energy / (energy + 0.1 * energy.mean())
    assert_close(1 + made[2].tensors["post_feedforward_layernorm.weight"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.parametrize("operator", ["delete", "keep", "concatenate"])
def test_an_mlp_the_layer_kept_can_stand_in_for_is_recovered(family, operator):
    """Layer 2 computes neurons and writes none of them; layer 3 reads the same and writes. Deleting 3 loses its MLP,
    but its down projection is the exact solution for layer 2.
    """
    model = make_sharp_model(family)
    second, third = model.model.layers[2], model.model.layers[3]
    facts = get_family(family, "test")
    with torch.no_grad():
        down = third.mlp.down_proj.weight.clone()
        third.mlp.load_state_dict(second.mlp.state_dict())
        third.get_submodule(facts.mlp.norm).load_state_dict(second.get_submodule(facts.mlp.norm).state_dict())
        second.mlp.down_proj.weight.zero_()
        third.mlp.down_proj.weight.copy_(down)
        third.self_attn.o_proj.weight.zero_()
    group = {"keep": keep_one(2, 3, 2), "concatenate": concatenate(2, 3, (2,))}
    layers = without(3) if operator == "delete" else replace(group[operator])
    # Small, so that it does not hold the fit at what layer 2 writes, which is nothing.
    walk, made = run_walk(model, torch.cat([WINDOWS, WINDOWS[:4]]), layers, heldout=4, penalty=1e-4)
    lost = diverge(model, build_candidate(model, without(3)), WINDOWS[:4])
    assert lost > 0.05
    assert walk.measure_divergence() < 1e-3 * lost
    if operator != "concatenate":  # there the duplicates compete, and either will do
        assert_close(made[2].tensors["mlp.down_proj.weight"], down, rtol=0, atol=0.02 * float(down.abs().max()))


# Biases, heads, refusals


def test_biases_of_readers_are_kept():
    model = make_sharp_model("qwen2")
    _, made = run_walk(model, WINDOWS[:8], without(3))
    for aligned, source in zip(made[2:], (2, 4, 5)):
        for name in "qkv":
            bias = model.model.layers[source].get_submodule(f"self_attn.{name}_proj").bias
            assert bias.abs().max() > 0
            assert torch.equal(aligned.tensors[f"self_attn.{name}_proj.bias"], bias)


def test_biases_go_with_the_heads_that_were_chosen():
    model = make_sharp_model("qwen2")
    _, made = run_walk(model, WINDOWS, replace(take_layers((2, 3), (2, 3), (2,))))
    counts = made[2].facts["self_attn units"]
    # Groups of layer 2 first. Which of a layer's groups they are shows in the values, and is the same for q, k and v.
    owners = [2] * counts["2"] + [3] * counts["3"]
    assert len(owners) == 2
    for place, owner in enumerate(owners):
        found = []
        for name, width in (("q", 16), ("k", 8), ("v", 8)):
            bias = made[2].tensors[f"self_attn.{name}_proj.bias"][place * width : (place + 1) * width]
            theirs = model.model.layers[owner].get_submodule(f"self_attn.{name}_proj").bias.view(2, width)
            found.append([group for group in range(2) if torch.equal(bias, theirs[group])])
        assert found[0] in ([0], [1]) and found == [found[0]] * 3


def test_writers_with_biases_of_their_own_are_fitted_around_them():
    model = neutralise(make_sharp_model("llama", attention_bias=True, mlp_bias=True), 3)
    assert model.model.layers[2].mlp.down_proj.bias.abs().max() > 0  # and zero in layer 3
    walk, made = run_walk(model, torch.cat([WINDOWS, WINDOWS[:2]]), without(3), heldout=2)
    assert walk.measure_divergence() < 1e-6
    for name, tensor in model.model.layers[2].state_dict().items():
        assert_close(made[2].tensors[name], tensor, rtol=0, atol=5e-3)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_heads_of_several_layers_are_refused_where_each_layer_norms_its_own(family):
    layers = replace(take_layers((1, 2), (1, 2), (1, 2)))
    with pytest.raises(PlanError, match="q/k norms") as caught:
        run_walk(make_sharp_model(family), WINDOWS[:4], layers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("half", ["o_proj", "down_proj"])
@pytest.mark.parametrize("operator", ["delete", "concatenate"])
def test_a_base_that_is_not_finite_is_refused_in_one_line(half, operator):
    model = make_sharp_model("llama")
    with torch.no_grad():
        for name, parameter in model.model.layers[3].named_parameters():
            if half in name:
                parameter[0, 0] = float("nan")
    layers = without(3) if operator == "delete" else replace(concatenate(2, 3, (2,)))
    with pytest.raises(NumericsError, match="NaN or infinite") as caught:
        run_walk(model, WINDOWS[:4], layers)
    assert "\n" not in str(caught.value)
