"""Healing layer by layer: against closed forms, against the models run whole, and where nothing is to be done."""

import copy

import pytest
import torch
from support.alignments import assemble, diverge, draw_windows, make_sharp_model, replace, without
from support.candidates import build_candidate
from support.models import FAMILY_NAMES, LAYERS, make_tiny_model, save_model
from torch.testing import assert_close

from mka.alignment.lockstep import find_ends
from mka.alignment.refit import token_weights
from mka.alignment.ridge import Moments, fit_ridge
from mka.errors import NumericsError, PlanError
from mka.healing import local
from mka.healing.local import Lesson, estimate_memory, heal_locally, train_layer
from mka.model.checkpoint import open_checkpoint
from mka.model.decoder import Decoder
from mka.model.families import FAMILIES, Family
from mka.model.loading import load_model, open_decoder
from mka.model.parts import ATTENTION, Part
from mka.plan.plan import MergedLayer, identity_layers
from mka.recipe import HealFit

every_family = pytest.mark.parametrize("family", FAMILY_NAMES)
FITTED, HELDOUT = draw_windows(16), draw_windows(8, seed=1)
SETTINGS = HealFit(rate=3e-3, batch=4, patience=4)


def heal(model, layers, *, student=None, settings=SETTINGS, **options):
    """The base as a decoder or a model, and what was made of it if that is not the plan's own candidate."""
    base = model if isinstance(model, Decoder) else Decoder(model)
    student = student or Decoder(build_candidate(model, layers))
    ends = find_ends(layers, len(base.layers))
    return list(heal_locally(base, student, ends, FITTED, HELDOUT, settings, **options))


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


def weigh(output, wanted):
    """The relative squared error as the documentation says it."""
    weights = token_weights(wanted)
    return float(((output - wanted).square().sum(-1) * weights).sum() / (wanted.square().sum(-1) * weights).sum())


def same(one, other):
    assert [dict(layer.facts) | {"seconds": 0} for layer in one] == [dict(y.facts) | {"seconds": 0} for y in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(mine.tensors[name], theirs.tensors[name]) for name in mine.tensors)


def held(decoder):
    return [i for i, layer in enumerate(decoder.layers) if not next(layer.parameters()).is_meta]


# Models


@every_family
def test_the_base_itself_is_left_alone(family):
    model = make_tiny_model(family)
    healed = heal(model, identity_layers(LAYERS))
    assert [(dict(layer.tensors), dict(layer.facts)) for layer in healed] == [({}, {})] * LAYERS


@every_family
def test_after_a_deletion_every_layer_comes_nearer_to_the_base(family):
    """Before and after are those of the models run whole: the healed one layer for layer, up to each layer's change."""
    model, layers = make_sharp_model(family), without(2, 3)
    deleted = build_candidate(model, layers)
    healed = heal(model, layers)
    whole = assemble(model, layers, healed)
    wanted, found = layer_outputs(model, HELDOUT), layer_outputs(whole, HELDOUT)
    assert healed[0].tensors == {} == healed[0].facts
    for layer, end in zip(healed[1:], (3, 4, 5), strict=True):
        assert set(layer.tensors) == set(model.model.layers[end].state_dict())
        assert layer.facts["after"] == pytest.approx(weigh(found[layer.position], wanted[end]), rel=1e-4)
        assert layer.facts["after"] < layer.facts["before"]
        unhealed = copy.deepcopy(whole)
        unhealed.model.layers[layer.position].load_state_dict(deleted.model.layers[layer.position].state_dict())
        before = weigh(layer_outputs(unhealed, HELDOUT)[layer.position], wanted[end])
        assert layer.facts["before"] == pytest.approx(before, rel=1e-4)
    assert diverge(model, whole, HELDOUT) < diverge(model, deleted, HELDOUT)


def test_what_was_merged_is_healed_too():
    model, layers = make_sharp_model("llama"), replace(MergedLayer((1, 2), (0.5, 0.5)))
    healed = heal(model, layers)
    assert [bool(layer.tensors) for layer in healed] == [False, True, True, True, True]
    merged = build_candidate(model, layers)
    assert diverge(model, assemble_on(merged, healed), HELDOUT) < diverge(model, merged, HELDOUT)


def assemble_on(student, healed):
    built = copy.deepcopy(student)
    for layer, made in zip(built.model.layers, healed, strict=True):
        layer.load_state_dict(made.tensors or layer.state_dict())
    return built


def test_a_layer_that_was_changed_and_a_changed_embedding_are_the_first_change():
    model = make_sharp_model("llama")
    layers = identity_layers(LAYERS)
    bent, entered = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        bent.model.layers[4].mlp.up_proj.weight[0, 0] += 1.0
        entered.model.embed_tokens.weight.mul_(1.1)
    for student, count in ((bent, 4), (entered, 0)):
        assert [bool(x.facts) for x in heal(model, layers, student=Decoder(student))] == [i >= count for i in range(6)]


@every_family
def test_from_disk_the_tensors_are_those_of_loaded_models_to_the_bit(tmp_path, family, monkeypatch):
    model, layers = make_sharp_model(family), without(3)
    folders = save_model(model, tmp_path / "base"), save_model(build_candidate(model, layers), tmp_path / "student")
    loaded = [Decoder(load_model(folder, "float32")[0]) for folder in folders]
    wanted = heal(loaded[0], layers, student=loaded[1])
    train, seen = local.train_layer, []
    with (
        open_decoder(open_checkpoint(folders[0]), "float32") as (base, _),
        open_decoder(open_checkpoint(folders[1]), "float32") as (student, _),
    ):
        monkeypatch.setattr(local, "train_layer", lambda *a: seen.append((held(base), held(student))) or train(*a))
        same(heal(base, layers, student=student), wanted)
        assert held(base) == [] == held(student)
    assert seen == [([], [])] * 3


def test_in_half_precision_layers_are_trained_in_float32():
    model = make_sharp_model("llama", dtype=torch.bfloat16)
    for layer in heal(model, without(3))[2:]:
        assert {tensor.dtype for tensor in layer.tensors.values()} == {torch.float32}
        assert layer.facts["after"] < layer.facts["before"]


def test_a_seed_decides_and_whoever_asks_in_inference_mode_gets_the_same():
    model, layers = make_sharp_model("llama"), without(3)
    first = heal(model, layers, seed=5)
    same(heal(model, layers, seed=5), first)
    with torch.inference_mode():
        same(heal(model, layers, seed=5), first)
    assert not torch.equal(
        heal(model, layers, seed=6)[2].tensors["mlp.up_proj.weight"], first[2].tensors["mlp.up_proj.weight"]
    )


def test_models_given_are_as_before_and_progress_counts_every_source_layer():
    model = make_sharp_model("llama")
    student = build_candidate(model, without(3))
    states = [copy.deepcopy(x.state_dict()) for x in (model, student)]
    passed = []
    heal(model, without(3), student=Decoder(student), on_tokens=passed.append)
    assert passed == [x * FITTED.numel() for x in (1, 1, 2, 1, 1)]
    for before, after in zip(states, (model.state_dict(), student.state_dict()), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


# One layer


class Affine(torch.nn.Module):
    """A layer that adds a linear map of what it reads: its best weights are those of a least-squares fit."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())

    def forward(self, states, scale=1.0):
        return states + scale * states @ self.weight.T


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_linear_layer_goes_from_the_closed_form_to_the_optimum(monkeypatch):
    """Weighted least squares solved by the normal equations; the ridge of the alignment is where it starts."""
    monkeypatch.setattr(local, "PASSES", 150)
    given = draw(12, 10, 8, seed=0)
    wanted = given + given @ draw(8, 8, seed=1).T + 0.3 * draw(12, 10, 8, seed=2)
    weights = token_weights(wanted).flatten()
    phi, rest = given.flatten(0, 1).double(), (wanted - given).flatten(0, 1).double()
    optimum = torch.linalg.solve(phi.T @ (phi * weights[:, None]), phi.T @ (rest * weights[:, None])).T.float()
    moments = Moments(8, 8, torch.device("cpu"))
    moments.add(phi.float(), rest.float(), weights)
    closed = fit_ridge(moments, torch.zeros(8, 8), 1.0).T.float()
    layer = Affine(closed)
    lesson = Lesson(torch.cat([given, given]), torch.cat([wanted, wanted]), {}, len(given))
    settings = HealFit(rate=0.03, batch=12, patience=1000)
    tensors, facts = train_layer(layer, lesson, settings, torch.Generator(), "layer 0")
    best, start = weigh(given + given @ optimum.T, wanted), weigh(given + given @ closed.T, wanted)
    assert facts["before"] == pytest.approx(start, rel=1e-5)
    assert best * (1 - 1e-5) <= facts["after"] < best + 0.01 * (start - best)
    assert_close(tensors["weight"], optimum, rtol=0, atol=0.02)
    assert_close(layer.weight, tensors["weight"], rtol=0, atol=0)
    assert (facts["steps"], facts["stopped"]) == (150, "end")


def test_what_the_decoder_hands_over_reaches_the_layer():
    given = draw(4, 3, 8, seed=0)
    lesson = Lesson(given, given + 2.0 * given, {"scale": 2.0}, 2)
    _, facts = train_layer(Affine(torch.eye(8)), lesson, SETTINGS, torch.Generator(), "layer 0")
    assert facts["before"] == 0.0


@pytest.mark.parametrize("patience", [1, 3])
def test_where_nothing_is_better_the_layer_stays_and_patience_ends_the_training(patience, monkeypatch):
    """The held-out windows want what the layer does already, the others something else."""
    monkeypatch.setattr(local, "PASSES", 12)
    given, weight = draw(8, 5, 8, seed=0), draw(8, 8, seed=1)
    wanted = torch.cat([given[:4], given[4:] + given[4:] @ weight.T])
    layer = Affine(weight)
    settings = HealFit(rate=0.01, batch=2, patience=patience)
    tensors, facts = train_layer(layer, Lesson(given, wanted, {}, 4), settings, torch.Generator(), "layer 0")
    assert tensors == {} and torch.equal(layer.weight, weight) and not layer.weight.requires_grad
    assert facts["before"] == facts["after"] < 1e-12
    # 12 passes of 2 steps, measured every 2 steps.
    assert (facts["steps"], facts["stopped"]) == (2 * patience, "patience")


def test_the_rate_rises_falls_and_ends_at_its_floor():
    shares = [local._share_of_peak(step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert shares[10] == 1.0 and shares[55] == pytest.approx(0.55)
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert local._share_of_peak(100, 100) == pytest.approx(0.1)
    assert local._share_of_peak(0, 1) == 1.0


# Refusals


def test_an_absurd_rate_is_refused_by_layer_and_rate():
    words = r"layer 2: healing diverges at rate 1e\+06, .*; lower heal.rate \(the default is"
    with pytest.raises(NumericsError, match=words):
        heal(make_sharp_model("llama"), without(3), settings=HealFit(rate=1e6))


def test_states_that_are_no_numbers_are_refused():
    model = make_sharp_model("llama")
    student = copy.deepcopy(build_candidate(model, without(3)))
    with torch.no_grad():
        student.model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="layer 3: healing diverges"):
        heal(model, without(3), student=Decoder(student))


def test_a_plan_of_another_base_or_student_is_refused():
    model = make_tiny_model("llama")
    base, student = Decoder(model), Decoder(build_candidate(model, without(3)))
    for ends in ([0, 1, 3, 4, 6], [0, 1, 3, 5]):
        words = f"a plan of {ends[-1] + 1} layers made {len(ends)}, the base has 6 and the student 5"
        with pytest.raises(PlanError, match=words):
            list(heal_locally(base, student, ends, FITTED, HELDOUT, SETTINGS))


def test_parts_nobody_knows_how_to_heal_are_refused_by_name(monkeypatch):
    parts = (
        Part(ATTENTION, "self_attn", "input_layernorm", (), "self_attn.o_proj"),
        Part("experts", "mlp", "post_attention_layernorm", ("mlp.gate",), "mlp"),
    )
    monkeypatch.setitem(FAMILIES, "llama", Family("llama", parts))
    with pytest.raises(PlanError, match="llama: healing cannot treat experts; allowed: attention, mlp"):
        heal(make_tiny_model("llama"), without(3), student=Decoder(make_tiny_model("llama")))


def test_memory_is_states_and_one_layer_six_times(tmp_path):
    checkpoint = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    # q, k, v, o; gate, up, down; two norms.
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert estimate_memory(100, checkpoint, "float32") == 6 * 100 * 32 * 4 + 6 * layer * 4
    assert estimate_memory(100, checkpoint, "bfloat16") == 6 * 100 * 32 * 2 + 6 * layer * 4
