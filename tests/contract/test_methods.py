"""The same questions to every method, on every family."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file
from support.evidence import ROADS, aligned_tensors, every_family, every_method, score_and_plan
from support.models import FAMILY_NAMES, LAYERS, save_model

from mka.errors import PlanError, RecipeError
from mka.evidence.needs import DIVERGENCE, HIDDEN_STATES, LOSS, OUTPUT_SIMILARITY, REOBSERVE, REPAIRS, TRIALS
from mka.methods import get_method, method_names, method_settings
from mka.model.checkpoint import open_checkpoint
from mka.model.families import get_family, layer_kinds
from mka.model.verification import inspect_checkpoint, require_sound
from mka.plan.plan import MergedLayer, MergePlan, identity_layers, keep_layers
from mka.plan.target import Aim
from mka.transforms.merge import merge_checkpoint


@every_family
@every_method
def test_a_plan_reaches_its_target_and_keeps_the_rules(name, settings, family, models, texts, tmp_path):
    model = models[family]
    kinds = layer_kinds(model.config, get_family(family, "test"))
    aim = Aim(4, protect_first=1, protect_last=0)
    if family == "gemma2" and (name in ("laco", "mka") or settings.get("operator") == "average"):
        # Its kinds alternate: no two neighbours are alike.
        with pytest.raises(PlanError, match=r"no mergeable pair is left at 6 layers|the 0 groups allowed .*: 6.;"):
            score_and_plan(model, name, settings, aim, texts)
        return
    _, plan = score_and_plan(model, name, settings, aim, texts)
    assert plan.method == name and plan.label == get_method(name).label
    assert (plan.layers_in, plan.layers_out) == (LAYERS, 4)
    # Every layer that is not left as it was is accounted for by a step, and no other layer is.
    copied = {layer.sources[0] for layer in plan.layers if layer.is_copy}
    assert {i for step in plan.steps for i in (*step.left, *step.right)} == set(range(LAYERS)) - copied
    assert 1 <= len(plan.steps) <= 2
    assert MergePlan.from_json(plan.to_json()) == plan
    for layer in plan.layers:
        # Attention looks back in the way of its kind; any MLP goes with it.
        assert len({kinds[i] for i in layer.attention or layer.sources}) == 1
        # Differences are added in LaCo; everywhere else a layer is a convex combination.
        assert name == "laco" or all(0.0 <= weight <= 1.0 for weight in layer.weights)
    # Settings in the plan make the same plan again.
    assert method_settings(name, plan.settings) == method_settings(name, settings)

    source = open_checkpoint(save_model(model, tmp_path / "base"))
    aligned = aligned_tensors(model, plan, texts)
    facts = merge_checkpoint(plan, source, tmp_path / "out", aligned=aligned, verify=inspect_checkpoint)
    require_sound(facts, "out")
    assert facts["layers"] == facts["config_layers"] == 4


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
@every_method
def test_a_method_knows_how_few_layers_it_can_leave(name, settings, family, models, texts):
    kinds = layer_kinds(models[family].config, get_family(family, "test"))
    method, chosen = get_method(name), method_settings(name, settings)
    fewest = method.fewest(kinds, Aim(1, 1, 1), chosen)
    # One layer at either end is protected.
    assert (1 if name == "reference_code" else 2) <= fewest <= LAYERS  # which protects nothing
    if name != "reference_code":
        with pytest.raises(PlanError, match="cannot be reached"):
            score_and_plan(models[family], name, settings, Aim(fewest - 1, 1, 1), texts)
    if getattr(chosen, "selection", None) not in ("both", "divergence"):  # these may try too few groups
        _, plan = score_and_plan(models[family], name, settings, Aim(fewest, 1, 1), texts)
        assert plan.layers_out == fewest


@pytest.mark.parametrize("family", ["llama", "smollm3", "gemma3_text"])
@every_method
def test_protected_layers_are_untouched(name, settings, family, models, texts):
    _, plan = score_and_plan(models[family], name, settings, Aim(5, protect_first=1, protect_last=1), texts)
    copies = {layer.sources[0] for layer in plan.layers if layer.is_copy}
    if name == "reference_code":
        assert plan.layers == keep_layers(range(5))  # it knows no protection
        return
    assert {0, LAYERS - 1} <= copies
    assert {i for step in plan.steps for i in (*step.left, *step.right)} <= set(range(1, LAYERS - 1))


@every_method
def test_full_protection_is_refused(name, settings, models, texts):
    aim = Aim(5, protect_first=3, protect_last=3)
    if name == "reference_code":  # it knows no protection
        assert score_and_plan(models["llama"], name, settings, aim, texts)[1].layers == keep_layers(range(5))
        return
    with pytest.raises(PlanError, match=r"cannot be reached: .* first 3 and last 3 protected") as caught:
        score_and_plan(models["llama"], name, settings, aim, texts)
    assert "\n" not in str(caught.value)


@every_method
def test_the_same_evidence_gives_the_same_plan(name, settings, models, texts):
    plans = [score_and_plan(models["qwen3"], name, settings, Aim(3, 1, 1), texts)[1].to_json() for _ in range(2)]
    assert plans[0] == plans[1]


@every_method
def test_a_target_of_all_layers_changes_nothing(name, settings, models, texts):
    _, plan = score_and_plan(models["llama"], name, settings, Aim(LAYERS), texts)
    assert plan.is_identity and plan.layers == identity_layers(LAYERS) and plan.steps == ()


@every_method
def test_a_method_gets_by_with_what_it_asked_for(name, settings, models, texts):
    """``gather`` gives nothing else, so only the names have to be checked; scores are of the documented kind."""
    method, options = get_method(name), method_settings(name, settings)
    needs = method.needs(options)
    assert needs <= {HIDDEN_STATES, DIVERGENCE, LOSS, OUTPUT_SIMILARITY, REOBSERVE, REPAIRS, TRIALS}
    assert (HIDDEN_STATES in needs) == (method.score is not None)
    assert method.plan_settings <= set(method.settings.model_fields)
    scores, _ = score_and_plan(models["llama"], name, settings, Aim(5), texts)
    if scores is None:
        return
    assert scores.layers == LAYERS and scores.method == name
    assert scores.values.dtype == np.float64
    if scores.kind == "pairwise-similarity":
        assert_allclose(scores.values, scores.values.T)
        assert np.array_equal(np.diag(scores.values), np.ones(LAYERS))
        assert scores.values.min() >= 0.0 and scores.values.max() <= 1.0
    elif scores.kind == "block-distance":
        assert np.array_equal(scores.values, scores.values.T)
        assert scores.values.min() >= 0.0 and scores.values.max() <= 1.0
    else:
        assert scores.values.min() >= 0.0 and scores.values.max() <= 2.0


def test_settings_that_only_planning_uses_do_not_change_scores(models, texts):
    reference = score_and_plan(models["llama"], "mka", {}, Aim(LAYERS), texts)[0].values
    for settings in ROADS["mka"]:
        assert set(settings) <= get_method("mka").plan_settings
        assert np.array_equal(score_and_plan(models["llama"], "mka", settings, Aim(LAYERS), texts)[0].values, reference)
    other = score_and_plan(models["llama"], "mka", {"neighbours": 3}, Aim(LAYERS), texts)[0].values
    assert not np.allclose(other, reference)


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(RecipeError) as refused:
        get_method("mak")
    assert str(refused.value) == f"unknown method 'mak' (did you mean 'mka'?); methods: {', '.join(method_names())}"


def test_the_reference_code_deletes_the_tail_whatever_the_model(models, texts):
    for family in ("llama", "gemma2"):
        scores, plan = score_and_plan(models[family], "reference_code", {}, Aim(4, 2, 2), texts)
        assert scores is None
        assert plan.layers == keep_layers([0, 1, 2, 3]) and plan.removed == (4, 5) and not plan.merged
        assert [step.left for step in plan.steps] == [(5,), (4,)]
        assert "tail deletion" in plan.label


def fold(state, layer, gemma):
    """One layer in float64 with its norm gains moved into the linear layers that read them, by hand."""
    prefix = f"model.layers.{layer}."
    tensors = {n.removeprefix(prefix): t.double() for n, t in state.items() if n.startswith(prefix)}
    before_mlp = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
    offset = 1.0 if gemma else 0.0
    for norm, words in (("input_layernorm", ("q_proj", "k_proj", "v_proj", "qkv_proj")), (before_mlp, ("gate", "up_"))):
        gain = tensors[f"{norm}.weight"] + offset
        for name in tensors:
            module = name.split(".")[1]
            if name.endswith("proj.weight") and module.startswith(words):
                tensors[name] = tensors[name] * gain
        tensors[f"{norm}.weight"] = torch.full_like(gain, 1.0 - offset)
    return tensors


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name != "gemma2"])
def test_half_and_half_is_the_mean_of_the_folded_layers_and_is_on_disk(family, models, tmp_path):
    """Weights assigned into ``state_dict()`` would have changed nothing."""
    model = models[family]
    source = open_checkpoint(save_model(model, tmp_path / "base"))
    layers = (*identity_layers(1), MergedLayer((1, 2), (0.5, 0.5)), *keep_layers([3, 4, 5]))
    merge_checkpoint(MergePlan("test", "", LAYERS, layers), source, tmp_path / "out")
    before, after = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    left, right = (fold(before, layer, gemma="gemma" in family) for layer in (1, 2))
    for suffix, value in left.items():
        written = after[f"model.layers.1.{suffix}"]
        mean = (value + right[suffix]) / 2
        assert_allclose(written, mean, atol=4 * torch.finfo(torch.float32).eps * float(mean.abs().max()), rtol=0)
        for parent in (1, 2):
            assert not torch.equal(written, before[f"model.layers.{parent}.{suffix}"])
    assert torch.equal(after["model.layers.2.mlp.down_proj.weight"], before["model.layers.3.mlp.down_proj.weight"])
