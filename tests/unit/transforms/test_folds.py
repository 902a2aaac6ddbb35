"""Folds, cuts and the streams they are fitted to, against closed forms and models run by transformers itself."""

import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file
from support.evidence import IDS, TOKENIZER, every_family
from support.models import LAYERS, make_texts, make_tiny_model

from mka.errors import NumericsError, PlanError
from mka.evidence.cuts import Cut, find_cuts
from mka.evidence.residuals import stream_cuts
from mka.model.checkpoint import open_checkpoint
from mka.model.families import get_family
from mka.plan.plan import MergedLayer, MergePlan, identity_layers, keep_layers
from mka.store.sums import file_sha256
from mka.transforms.fold import (
    apply_fold,
    bind_folds,
    digest_folds,
    find_fold,
    fit_output_map,
    folds_path,
    load_folds,
    serialise_folds,
)
from mka.transforms.merge import merge_checkpoint

RNG = np.random.default_rng(0)
M, R = RNG.normal(size=(200, 8)), RNG.normal(size=(200, 8))
GRAM, CROSS = M.T @ M, M.T @ R


def plan_of(layers, count=LAYERS, **fields):
    return MergePlan("test", "test", count, tuple(layers), **fields)


# The fit


def test_a_planted_linear_map_is_recovered():
    planted = RNG.normal(size=(8, 8))
    assert_allclose(fit_output_map(GRAM, M.T @ (M @ planted), 0.0), planted, atol=1e-12)
    scales = RNG.normal(size=8)
    assert_allclose(fit_output_map(GRAM, M.T @ (M * scales), 0.0, diagonal=True), scales, atol=1e-12)
    # Plain least squares, by another solver.
    assert_allclose(fit_output_map(GRAM, CROSS, 0.0), np.linalg.lstsq(M, R, rcond=None)[0], atol=1e-12)


def test_the_ridge_draws_towards_identity():
    # By hand: G = diag(1, 3), mean 2, a = 0.5 * 2 = 1; C = diag(5, 3): (5 + 1) / (1 + 1) and (3 + 1) / (3 + 1).
    expected = np.diag([3.0, 1.0])
    assert_allclose(fit_output_map(np.diag([1.0, 3.0]), np.diag([5.0, 3.0]), 0.5), expected, atol=1e-15)
    assert_allclose(fit_output_map(np.diag([1.0, 3.0]), np.diag([5.0, 3.0]), 0.5, diagonal=True), [3.0, 1.0])
    assert_allclose(fit_output_map(GRAM, CROSS, 1e9), np.eye(8), atol=1e-6)
    # As least squares with a row sqrt(a) I -> sqrt(a) I beneath the tokens.
    root = np.sqrt(0.3 * np.trace(GRAM) / 8) * np.eye(8)
    stacked = np.linalg.lstsq(np.vstack([M, root]), np.vstack([R, root]), rcond=None)[0]
    assert_allclose(fit_output_map(GRAM, CROSS, 0.3), stacked, atol=1e-12)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.1, 1.0, 100.0])
def test_the_fit_never_loses_to_identity(ridge, diagonal):
    fitted = fit_output_map(GRAM, CROSS, ridge, diagonal=diagonal)
    mapped = M * fitted if diagonal else M @ fitted
    assert ((mapped - R) ** 2).sum() < ((M - R) ** 2).sum()


def test_too_few_tokens_without_a_ridge_are_refused():
    few = M[:5]
    with pytest.raises(NumericsError, match=r"least squares for 8 channels is singular with ridge 0; give more tokens"):
        fit_output_map(few.T @ few, few.T @ R[:5], 0.0)
    assert np.isfinite(fit_output_map(few.T @ few, few.T @ R[:5], 0.1)).all()


# The fold


def fold_in(model, folds):
    """Apply folds to a model in memory, as they are applied to tensors on their way to disk."""
    offset = get_family(model.config.model_type, "test").gain_offset
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (fold := find_fold(folds, name)) is not None:
                parameter.copy_(apply_fold(fold, parameter, offset if name.endswith("norm.weight") else 0.0))
    return model


def logits(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("family", "options"), [("llama", {"mlp_bias": True}), ("qwen2", {}), ("phi3", {}), ("gemma3_text", {})]
)
def test_a_folded_map_is_the_map_inserted_behind_the_mlp(family, options, dtype, tolerance):
    model = make_tiny_model(family, **options).to(dtype)
    writer = get_family(family, "test").mlp.residual_writer
    # Behind a post-norm the map is diagonal.
    fitted = np.eye(32) + 0.3 * np.random.default_rng(1).normal(size=(32, 32))
    fitted = np.diag(fitted) if family == "gemma3_text" else fitted
    matrix = torch.tensor(fitted if fitted.ndim == 2 else np.diag(fitted), dtype=dtype)
    base = logits(model)
    handle = model.model.layers[2].get_submodule(writer).register_forward_hook(lambda m, a, out: out @ matrix)
    inserted = logits(model)
    handle.remove()
    assert (inserted - base).abs().max() > 1e-2
    if family == "gemma3_text":  # its norms compute in float32
        tolerance = 1e-5
    folded = logits(fold_in(model, {f"model.layers.2.{writer}.weight": fitted.T}))
    torch.testing.assert_close(folded, inserted, atol=tolerance, rtol=tolerance)


def test_a_fold_keeps_dtype_and_means_what_the_gain_means():
    gain = torch.tensor([0.5, -0.25], dtype=torch.bfloat16)
    # Gains 1.5 and 0.75, twice as large: 3 and 1.5, stored as 2 and 0.5.
    folded = apply_fold(np.array(2.0), gain, offset=1.0)
    assert folded.dtype == torch.bfloat16 and folded.tolist() == [2.0, 0.5]
    assert apply_fold(np.array([2.0, 4.0]), gain).tolist() == [1.0, -1.0]
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert apply_fold(np.array([2.0, -1.0]), weight).tolist() == [[2, 4, 6], [-4, -5, -6]]
    assert apply_fold(np.array([[0.0, 1.0], [1.0, 1.0]]), weight).tolist() == [[4, 5, 6], [5, 7, 9]]
    assert apply_fold(np.array([[0.0, 1.0], [1.0, 1.0]]), weight[:, 0]).tolist() == [4, 5]


def test_a_bias_follows_its_weight_and_nothing_else_does():
    folds = {"a.down_proj.weight": np.array(2.0)}
    assert find_fold(folds, "a.down_proj.bias") is find_fold(folds, "a.down_proj.weight") is not None
    assert find_fold(folds, "b.down_proj.weight") is None and find_fold(folds, "a.down_proj.scale") is None


# The file


FOLDS = {
    "model.embed_tokens.weight": np.array(1.5),
    "model.norm.weight": np.linspace(0.5, 2, 32),
    "model.layers.1.mlp.down_proj.weight": np.random.default_rng(2).normal(size=(32, 32)).T,
}


def test_the_file_holds_the_folds_and_the_plan_its_digest(tmp_path):
    plan = bind_folds(plan_of(keep_layers(range(4))), FOLDS)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    folds_path(path).write_bytes(serialise_folds(FOLDS))
    assert folds_path(path).name == "plan.folds.safetensors"
    assert json.loads(path.read_text())["folds"] == file_sha256(folds_path(path)) == digest_folds(FOLDS)
    loaded = load_folds(MergePlan.load(path), path)
    assert loaded.keys() == FOLDS.keys()
    for name, fold in FOLDS.items():
        assert loaded[name].shape == fold.shape
        assert_allclose(loaded[name], fold, rtol=1e-7)
    assert digest_folds(loaded) == plan.folds
    assert MergePlan.from_json(plan.to_json()) == plan


def test_a_plan_without_folds_is_one_of_before_and_asks_for_no_file(tmp_path):
    plan = plan_of(keep_layers(range(4)))
    old = {key: value for key, value in json.loads(plan.to_json()).items() if key != "folds"}
    assert MergePlan.from_json(json.dumps(old)) == plan
    assert bind_folds(plan, None) == bind_folds(plan, {}) == plan
    assert load_folds(plan, tmp_path / "plan.json") is None


@pytest.mark.parametrize("content", [None, b"no safetensors"])
def test_a_folds_file_that_is_missing_or_damaged_is_refused(content, tmp_path):
    plan = bind_folds(plan_of(keep_layers(range(4))), FOLDS)
    if content is not None:
        (tmp_path / "plan.folds.safetensors").write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.folds\.safetensors") as caught:
        load_folds(plan, tmp_path / "plan.json")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def source(llama_folder):
    return open_checkpoint(llama_folder)


def test_merging_multiplies_folds_into_named_tensors_and_leaves_the_rest(source, tmp_path):
    layers = keep_layers([0, 2, 3, 5])
    merge_checkpoint(bind_folds(plan_of(layers), FOLDS), source, tmp_path / "folded", folds=FOLDS)
    merge_checkpoint(plan_of(layers), source, tmp_path / "plain")
    folded, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("folded", "plain"))
    assert {name for name in plain if not torch.equal(plain[name], folded[name])} == FOLDS.keys()
    name = "model.layers.1.mlp.down_proj.weight"
    assert_allclose(folded[name], FOLDS[name] @ plain[name].double().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, PlanError, "none were given"),
        ({"model.norm.weight": np.array(2.0)}, PlanError, "those given have"),
    ],
)
def test_folds_that_are_not_the_plans_are_refused(given, error, message, source, tmp_path):
    with pytest.raises(error, match=message) as caught:
        merge_checkpoint(bind_folds(plan_of(keep_layers(range(4))), FOLDS), source, tmp_path / "out", folds=given)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fold", "error", "message"),
    [
        ({"model.layers.4.mlp.down_proj.weight": np.eye(32)}, PlanError, "the output has no such tensor"),
        ({"model.layers.3.mlp.down_proj.weight": np.eye(64)}, PlanError, r"shape \(64, 64\); allowed: \(\), \(32,\)"),
        ({"model.norm.weight": np.array(np.nan)}, NumericsError, "fold of model.norm.weight is NaN or infinite"),
        ({"model.norm.weight": np.array(1e39)}, NumericsError, "NaN or infinite after its fold, which F32 cannot"),
    ],
)
def test_folds_that_fit_no_tensor_are_refused(fold, error, message, source, tmp_path):
    with pytest.raises(error, match=message):
        merge_checkpoint(plan_of(keep_layers(range(4))), source, tmp_path / "out", folds=fold)
    assert not (tmp_path / "out").exists()


# Cuts and streams


def test_cuts_are_the_maximal_runs_of_deleted_layers():
    assert find_cuts(plan_of(keep_layers([1, 2, 5, 6]), 9)) == (Cut((0,), 0), Cut((3, 4), 2), Cut((7, 8), 4))
    assert find_cuts(plan_of(identity_layers(4), 4)) == ()
    with pytest.raises(PlanError, match=r"plan merges layers \[1, 2\]"):
        find_cuts(plan_of((*identity_layers(1), MergedLayer((1, 2), (0.5, 0.5))), 3))


@every_family
def test_streams_are_the_models_own_hidden_states_without_padding(family):
    model, texts = make_tiny_model(family), make_texts(7, seed=3)
    cuts = (Cut((0,), 0), Cut((2, 3), 1), Cut((5,), 2))
    found = {cut: [] for cut in cuts}
    counted = []
    for cut, tokens in stream_cuts(model, TOKENIZER, texts, cuts, max_tokens=16, batch_size=3, on_layer=counted.append):
        found[cut].append(tokens)
    # Nothing is left behind on the model.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # One text at a time, in the order of the batches: the longest first.
    raw, norm_inputs = [], {1: [], 4: []}
    handles = [model.model.norm.register_forward_pre_hook(lambda module, args: raw.append(args[0]))]
    norm = next(n for n, read in get_family(family, "test").folds.items() if "mlp" in read[0])
    for layer, place in norm_inputs.items():
        module = model.model.layers[layer].get_submodule(norm)
        handles.append(module.register_forward_pre_hook(lambda m, args, place=place: place.append(args[0][0])))
    ids = sorted((TOKENIZER(text)["input_ids"][:16] for text in texts), key=len, reverse=True)
    hidden = []
    with torch.inference_mode():
        for row in ids:
            states = model.model(torch.tensor([row]), output_hidden_states=True, use_cache=False).hidden_states
            hidden.append([h[0] for h in (*states[:-1], raw.pop())])
    for handle in handles:
        handle.remove()
    assert counted == [sum(map(len, ids))] * LAYERS

    def whole(index):
        return torch.cat([h[index] for h in hidden]).double().numpy()

    for cut in cuts:
        got = found[cut]
        assert_allclose(np.concatenate([t.entering for t in got]), whole(cut.deleted[0]), atol=1e-4)
        assert_allclose(np.concatenate([t.leaving for t in got]), whole(cut.deleted[-1] + 1), atol=1e-4)
    assert all(tokens.mlp is None for tokens in found[cuts[0]])
    for cut in cuts[1:]:
        attention = np.concatenate([t.entering - t.mlp for t in found[cut]])
        assert_allclose(attention, torch.cat(norm_inputs[cut.deleted[0] - 1]).double().numpy(), atol=1e-4)
