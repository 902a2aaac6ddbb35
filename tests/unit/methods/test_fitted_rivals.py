"""ReplaceMe, Prune&Comp and LinearPatch against cases solved by hand and what their sources state."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file, save_file
from scipy.linalg import hadamard
from support.evidence import IDS, TOKENIZER, neutralise, score_and_plan
from support.models import LAYERS, make_texts, make_tiny_model, save_model
from transformers import AutoModelForCausalLM

from mka.errors import PlanError
from mka.evidence.cuts import Cut, CutEvidence, CutTokens, find_cuts
from mka.evidence.needs import Evidence
from mka.evidence.residuals import stream_cuts
from mka.evidence.states import HiddenStates
from mka.methods import get_method, method_settings, resolve_method
from mka.methods.linearpatch import PatchSums, rotate_channels
from mka.methods.prune_and_comp import compare_magnitudes, fold_scales
from mka.model.checkpoint import open_checkpoint
from mka.model.decoder import Decoder
from mka.model.families import get_family
from mka.pipeline.merge import write_merged
from mka.pipeline.plan import fit_folds
from mka.plan.plan import MergePlan, Step, identity_layers, keep_layers
from mka.plan.target import Aim
from mka.recipe import CalibrationSettings, MethodChoice, ModelSource
from mka.similarity.blocks import cosine_distance
from mka.terminal import showing
from mka.texts.calibration import CalibrationSet
from mka.texts.rows import digest_texts
from mka.transforms.fold import bind_folds
from mka.transforms.merge import merge_checkpoint

RNG = np.random.default_rng(0)
LLAMA = get_family("llama", "test")
# Post-norms, gains around zero, fused matrices, biases, and the plain case.
FAMILIES = ("llama", "qwen2", "gemma2", "gemma3_text", "phi3")
LOOKING = CalibrationSettings(samples=40, max_tokens=24)


def calibrate(texts):
    return CalibrationSet(tuple(texts), ("test",) * len(texts), digest_texts(texts), "texts.jsonl")


def give(*batches, cut=None, tied=False, family=LLAMA):
    """Evidence of one cut, behind output layer 0, made of arrays."""
    cut = cut or Cut((1, 2), 1)
    return CutEvidence(family, tied, (cut,), lambda: iter([(cut, CutTokens(*batch)) for batch in batches]))


def fit(name, evidence, **settings):
    return get_method(name).fit(evidence, None, method_settings(name, settings))


def stream(model, texts, cut, max_tokens=24):
    """X, Y and M of one cut over all tokens."""
    found = [tokens for _, tokens in stream_cuts(model, TOKENIZER, texts, [cut], max_tokens=max_tokens)]
    return (np.concatenate([getattr(t, field) for t in found]) for field in ("entering", "leaving", "mlp"))


def delete_and_fold(name, folder, layers, texts, out, **settings):
    """Through the stages: fit, write, load."""
    checkpoint, source = open_checkpoint(folder), ModelSource(folder=folder)
    plan = MergePlan(name, "", LAYERS, layers)
    with showing(False):
        planner = resolve_method(MethodChoice(name=name, settings=settings))
        # The tokenizer that transformers makes of these words depends on the family.
        with pytest.MonkeyPatch.context() as patch:
            opened = nullcontext((Decoder(load(folder)), TOKENIZER))
            patch.setattr("mka.model.loading.open_decoder", lambda *_: opened)
            folds = fit_folds(planner, plan, checkpoint, calibrate(texts), LOOKING, source)
        write_merged(bind_folds(plan, folds), checkpoint, out, folds)
    return folds, load(out)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# What is deleted


@pytest.mark.parametrize("name", ["replaceme", "linearpatch"])
def test_the_block_of_least_cosine_distance_goes_and_the_first_layer_stays(name):
    # Two texts turn by other angles, so that the mean of cosines and that of angles choose differently.
    angles = np.array([[0.1, 0.1], [1.0, 0.0], [0.7, 0.62], [0.9, 0.9]])
    pooled = np.zeros((5, 2, 2))
    for text in range(2):
        turned = np.cumsum([0.0, *angles[:, text]])
        pooled[:, text] = 3 * np.stack([np.cos(turned), np.sin(turned)], axis=1)
    planner = resolve_method(MethodChoice(name=name))
    evidence = Evidence(4, "aaaa", HiddenStates(pooled.astype(np.float32), np.zeros(4), np.full(2, 3)))
    scores = planner.method.score(evidence, planner.settings)
    assert scores.values[1, 1] == pytest.approx((1 - (np.cos(1.0) + 1) / 2) / 2, abs=1e-6)
    assert scores.values[1, 2] == pytest.approx((1 - (np.cos(1.7) + np.cos(0.62)) / 2) / 2, abs=1e-6)
    one = planner.plan(evidence, scores, Aim(3))
    # Layer 0 turns least of all and stays. Mean cosines: 0.770 of layer 1, 0.789 of 2; mean angles: 0.5 and 0.66.
    assert one.removed == (2,) and one.steps == (Step((2,), (), pytest.approx(0.10536, abs=1e-4), 0.0),)
    assert planner.plan(evidence, scores, Aim(1)).removed == (1, 2, 3)
    with pytest.raises(PlanError, match="first 1 and last 2 protected"):
        planner.plan(evidence, scores, Aim(2, 0, 2))


def test_cosine_distance_is_its_definition():
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in RNG.normal(size=(2, 50, 6)))
    assert_allclose(cosine_distance(x, y), (1 - (x * y).sum(axis=1)) / 2, atol=1e-15)
    assert cosine_distance(x, x).max() == 0.0 and cosine_distance(x, -x) == pytest.approx(np.ones(50))


def test_prune_and_comp_deletes_what_shortgpt_deletes():
    model, texts = make_tiny_model("llama", seed=5), make_texts(20)
    aim = Aim(3, 1, 1)
    ours, theirs = (score_and_plan(model, name, {}, aim, texts)[1] for name in ("prune_and_comp", "shortgpt"))
    assert ours.layers == theirs.layers and ours.steps == theirs.steps


# ReplaceMe


def test_replaceme_recovers_a_block_that_is_linear_in_the_mlp_output():
    planted, a, m = RNG.normal(size=(8, 8)), RNG.normal(size=(40, 8)), RNG.normal(size=(40, 8))
    y = a + m @ planted
    batches = [(a[part] + m[part], y[part], m[part]) for part in (slice(0, 13), slice(13, 40))]
    folds = fit("replaceme", give(*batches), ridge=0)
    assert list(folds) == ["model.layers.0.mlp.down_proj.weight"]
    assert_allclose(folds["model.layers.0.mlp.down_proj.weight"], planted.T, atol=1e-11)
    # W_down <- T^T W_down: with M = H W^T the folded MLP gives M T.
    hidden, weight = RNG.normal(size=(5, 11)), RNG.normal(size=(8, 11))
    folded = folds["model.layers.0.mlp.down_proj.weight"] @ weight
    assert_allclose(hidden @ folded.T, hidden @ weight.T @ planted, atol=1e-10)


@pytest.mark.parametrize("name", ["replaceme", "linearpatch"])
def test_a_cut_with_no_layer_before_it_is_left_alone(name):
    x = RNG.normal(size=(40, 8))
    assert fit(name, give((x, 2 * x, None), cut=Cut((0,), 0))) == {}


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaceme_brings_the_stream_closer_to_the_base(family, ridge, tmp_path):
    """Measured on the written model: what leaves the layer before the cut against what left the block."""
    model, texts = make_tiny_model(family, seed=5), make_texts(40, seed=1)
    layers = keep_layers([0, 1, 4, 5])
    (cut,) = find_cuts(MergePlan("", "", LAYERS, layers))
    folder = save_model(model, tmp_path / "base")
    x, y, m = stream(model, texts, cut)
    _, candidate = delete_and_fold("replaceme", folder, layers, texts, tmp_path / "out", ridge=ridge)
    after, _, _ = stream(candidate, texts, Cut((2,), 2))
    before_loss, after_loss = ((x - y) ** 2).sum(), ((after - y) ** 2).sum()
    assert after_loss < before_loss
    if ridge:
        return
    # It is the least squares solution, by another solver; per channel behind a post-norm.
    target = y - (x - m)
    if get_family(family, "test").mlp.post_norm:
        best = sum(((m[:, c] * (m[:, c] @ target[:, c]) / (m[:, c] @ m[:, c])) - target[:, c]) ** 2 for c in range(32))
        assert after_loss == pytest.approx(best.sum(), rel=1e-4)
    else:
        assert after_loss == pytest.approx(np.linalg.lstsq(m, target, rcond=None)[1].sum(), rel=1e-4)


# Prune&Comp


def test_the_scale_is_the_mean_of_channel_ratios():
    x = np.array([[1.0, -2.0], [3.0, 0.0]])  # mean magnitudes 2 and 1
    y = np.array([[-4.0, 1.0], [2.0, 1.0]])  # 3 and 1
    assert compare_magnitudes(np.abs(x).mean(0), np.abs(y).mean(0)) == 1.25  # (1.5 + 1) / 2
    folds = fit("prune_and_comp", give((x[:1], y[:1], None), (x[1:], y[1:], None)))
    assert {name: float(fold) for name, fold in folds.items()} == {
        "model.embed_tokens.weight": 1.25,
        "model.layers.0.self_attn.o_proj.weight": 1.25,
        "model.layers.0.mlp.down_proj.weight": 1.25,
    }


def test_scales_of_several_cuts_multiply():
    folds = fold_scales({1: 2.0, 3: 5.0}, get_family("gemma2", "test"), tied=True)
    found = {name.removeprefix("model.").removesuffix(".weight"): float(fold) for name, fold in folds.items()}
    expected = {"embed_tokens": 10.0, "norm": 0.1}
    for layer, scale in ((0, 10.0), (1, 5.0), (2, 5.0)):
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            expected[f"layers.{layer}.{norm}"] = scale
    assert found == pytest.approx(expected)
    # A cut at the very start has the embedding before it.
    start = fold_scales({0: 2.0}, LLAMA, tied=False)
    assert list(start) == ["model.embed_tokens.weight"] and start["model.embed_tokens.weight"] == 2.0


def hidden_states(model):
    raw = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: raw.append(args[0]))
    with torch.inference_mode():
        out = model(IDS, output_hidden_states=True, use_cache=False)
    handle.remove()
    return [*out.hidden_states[:-1], raw[0]], out.logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_scales_scale_the_stream_and_nothing_else(family, tied, tmp_path):
    """Nothing deleted: hidden state k is s_k times the base's; scaled to the end, not a logit changes."""
    # With an epsilon, a norm is not quite free of scale.
    model = make_tiny_model(family, seed=5, rms_norm_eps=1e-12, tie_word_embeddings=tied)
    source = open_checkpoint(save_model(model, tmp_path / "base"))
    assert ("lm_head.weight" not in source.tensors) == tied
    plan = MergePlan("", "", LAYERS, identity_layers(LAYERS))
    states, logits = hidden_states(model)

    def fold(scales):
        folds = fold_scales(scales, source.family, tied=tied)
        merge_checkpoint(plan, source, tmp_path / str(len(scales)), folds=folds)
        return hidden_states(load(tmp_path / str(len(scales))))

    scaled, same = fold({LAYERS: 1.7})
    for state, other in zip(states, scaled, strict=True):
        torch.testing.assert_close(other, 1.7 * state, atol=1e-5 * float(state.abs().max()), rtol=1e-4)
    torch.testing.assert_close(same, logits, atol=1e-5, rtol=1e-4)
    # Up to a cut in the middle: the layer before it writes 1.7 * 0.6 times, the states between the cuts 0.6 times.
    scaled, _ = fold({2: 1.7, 4: 0.6})
    torch.testing.assert_close(scaled[0], 1.02 * states[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scaled[2], 1.02 * states[2], atol=1e-5, rtol=1e-4)


def test_layers_that_only_scale_the_stream_are_compensated_exactly(tmp_path):
    """Texts of one token: attention passes its value on, so a layer with W_o W_v = c - 1 maps x of RMS 1 to c x."""
    factor = 2.5
    options = {"num_key_value_heads": 4, "rms_norm_eps": 1e-12}
    model = neutralise(neutralise(make_tiny_model("llama", seed=5, **options), 0), 1)
    layer = model.model.layers[2]
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table[3:].div_(table[3:].pow(2).mean(dim=1, keepdim=True).sqrt())
        layer.mlp.down_proj.weight.zero_()
        layer.input_layernorm.weight.fill_(1.0)
        layer.self_attn.v_proj.weight.copy_(torch.eye(32))
        layer.self_attn.o_proj.weight.copy_((factor - 1) * torch.eye(32))
    folder = save_model(model, tmp_path / "base")
    texts, ids = [f"w{i}" for i in range(3, 90)], torch.arange(3, 90)[:, None]
    layers = keep_layers([0, 1, 3, 4, 5])
    folds, candidate = delete_and_fold("prune_and_comp", folder, layers, texts, tmp_path / "out")
    assert float(folds["model.embed_tokens.weight"]) == pytest.approx(factor, rel=1e-6)
    assert folds.keys() & {"model.norm.weight"} == set()
    _, plain = delete_and_fold("shortgpt", folder, layers, texts, tmp_path / "plain")
    with torch.inference_mode():
        base, compensated, deleted = (m(ids).logits for m in (model, candidate, plain))
    torch.testing.assert_close(compensated, base, atol=1e-4, rtol=1e-4)
    assert (deleted - base).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_prune_and_comp_meets_the_bases_magnitude_behind_the_cut(family, tmp_path):
    model, texts = make_tiny_model(family, seed=5, rms_norm_eps=1e-12), make_texts(40, seed=1)
    layers = keep_layers([0, 1, 4, 5])
    (cut,) = find_cuts(MergePlan("", "", LAYERS, layers))
    _, y, _ = stream(model, texts, cut)
    _, candidate = delete_and_fold(
        "prune_and_comp", save_model(model, tmp_path / "base"), layers, texts, tmp_path / "out"
    )
    after, _, _ = stream(candidate, texts, Cut((2,), 2))
    assert np.mean(np.abs(y).mean(axis=0) / np.abs(after).mean(axis=0)) == pytest.approx(1.0, rel=1e-4)


def test_a_tied_head_that_is_stored_is_scaled_with_the_embedding(tmp_path):
    model, texts = make_tiny_model("llama", seed=5, tie_word_embeddings=True), make_texts(40, seed=1)
    folder = save_model(model, tmp_path / "base")
    alone, reference = delete_and_fold("prune_and_comp", folder, keep_layers([0, 1, 4, 5]), texts, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stored, candidate = delete_and_fold("prune_and_comp", folder, keep_layers([0, 1, 4, 5]), texts, tmp_path / "both")
    assert stored.keys() - alone.keys() == {"lm_head.weight"} and "model.norm.weight" in alone
    torch.testing.assert_close(hidden_states(candidate)[1], hidden_states(reference)[1])


# LinearPatch


@pytest.mark.parametrize("width", [1, 2, 7, 12, 32, 576])
def test_the_rotation_is_orthogonal(width):
    q = rotate_channels(width)
    assert_allclose(q @ q.T, np.eye(width), atol=1e-12)
    if width == 32:
        assert_allclose(q, hadamard(32) / np.sqrt(32), atol=1e-15)


def patch_sums(x, y, m):
    sums = PatchSums(x.shape[1])
    for part in np.array_split(np.arange(len(x)), 3):
        sums.add(x[part], y[part], m[part])
    return sums


def test_a_planted_patch_is_found_exactly():
    x, m = RNG.normal(size=(2, 60, 12))
    scales, q = np.exp(RNG.normal(size=12)), rotate_channels(12)
    planted = q @ np.diag(scales) @ q.T
    sums = patch_sums(x, x @ planted, m)
    assert_allclose(sums.scales, scales, rtol=1e-12)
    assert_allclose(sums.patch, planted, atol=1e-12)
    assert_allclose(sums.cross, m.T @ (x @ planted - (x - m)), atol=1e-10)
    # Magnitudes do not see signs: a block that mirrors the stream asks for no patch.
    assert_allclose(patch_sums(x, -x, m).patch, np.eye(12), atol=1e-12)


def test_the_patch_is_folded_by_least_squares():
    x, y, m = RNG.normal(size=(3, 60, 12))
    patch = patch_sums(x, y, m).patch
    folds = fit("linearpatch", give((x, y, m)), ridge=0)
    expected = np.linalg.lstsq(m, x @ patch - (x - m), rcond=None)[0]
    assert_allclose(folds["model.layers.0.mlp.down_proj.weight"], expected.T, atol=1e-10)
    # No patch needed: nothing is folded but identity.
    folds = fit("linearpatch", give((x, x, m)))
    assert_allclose(folds["model.layers.0.mlp.down_proj.weight"], np.eye(12), atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_linearpatch_brings_the_stream_closer_to_the_patched_one(family, tmp_path):
    model, texts = make_tiny_model(family, seed=5), make_texts(40, seed=1)
    layers = keep_layers([0, 1, 4, 5])
    (cut,) = find_cuts(MergePlan("", "", LAYERS, layers))
    x, y, m = stream(model, texts, cut)
    patched = x @ patch_sums(x, y, m).patch
    _, candidate = delete_and_fold("linearpatch", save_model(model, tmp_path / "base"), layers, texts, tmp_path / "out")
    after, _, _ = stream(candidate, texts, Cut((2,), 2))
    assert ((after - patched) ** 2).sum() < ((x - patched) ** 2).sum()


# Through the stages


def test_methods_that_fit_nothing_and_plans_that_delete_nothing_have_no_folds(llama_folder):
    checkpoint, source = open_checkpoint(llama_folder), ModelSource(folder=llama_folder)
    deleted = MergePlan("", "", LAYERS, keep_layers(range(4)))
    for name, plan in (("shortgpt", deleted), ("replaceme", MergePlan("", "", LAYERS, identity_layers(LAYERS)))):
        assert fit_folds(resolve_method(MethodChoice(name=name)), plan, checkpoint, None, LOOKING, source) is None
    with pytest.raises(PlanError, match="'replaceme' is fitted on calibration texts; give a calibration set"):
        fit_folds(resolve_method(MethodChoice(name="replaceme")), deleted, checkpoint, None, LOOKING, source)
