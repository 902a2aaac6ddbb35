"""Planted truths that a method has to find, and definitions it has to meet."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from support.candidates import build_candidate
from support.evidence import (
    TOKENIZER,
    every_family,
    gather,
    logits,
    look,
    neutralise,
    score_and_plan,
)
from support.models import LAYERS, make_texts, make_tiny_model

from mka.errors import NumericsError
from mka.evidence.needs import HIDDEN_STATES, Evidence
from mka.evidence.oracles import Divergence
from mka.evidence.states import HiddenStates
from mka.methods import get_method, method_settings
from mka.plan.plan import MergedLayer, identity_layers, keep_layers
from mka.plan.target import Aim
from mka.similarity.npib import embed_layers

NEUTRAL = 3  # layer 3 repeats the output of layer 2


@pytest.fixture(scope="module")
def planted():
    return neutralise(make_tiny_model("llama", seed=5), NEUTRAL)


@pytest.fixture(scope="module")
def many_texts():
    return make_texts(220, seed=2)


@pytest.fixture(scope="module")
def planted_states(planted, many_texts):
    return look(planted, many_texts)


@pytest.fixture(scope="module")
def planted_divergence(planted):
    return Divergence(planted, TOKENIZER, make_texts(30, seed=9), max_tokens=24, tokens=400)


@every_family
def test_identical_outputs_are_exactly_one_and_the_most_similar_neighbours(family):
    model = neutralise(make_tiny_model(family, seed=5), NEUTRAL)
    evidence = gather(model, {HIDDEN_STATES}, make_texts(200, seed=2))
    assert np.array_equal(evidence.states.outputs[NEUTRAL - 1], evidence.states.outputs[NEUTRAL])
    values = get_method("mka").score(evidence, method_settings("mka", {})).values
    neighbours = np.diag(values, 1)
    assert neighbours[NEUTRAL - 1] == 1.0
    assert np.argmax(neighbours) == NEUTRAL - 1
    assert np.delete(neighbours, NEUTRAL - 1).max() < 0.99


@pytest.mark.parametrize(
    "settings", [{}, {"selection": "iterative"}, {"weights": "line-search"}], ids=["similarity", "iterative", "search"]
)
def test_mka_merges_the_planted_pair_first_and_without_loss(settings, planted, planted_divergence, many_texts):
    _, plan = score_and_plan(planted, "mka", settings, Aim(4, 1, 1), many_texts)
    first = plan.steps[0]
    assert (first.left, first.right, first.score) == ((NEUTRAL - 1,), (NEUTRAL,), 1.0)
    pair = MergedLayer((NEUTRAL - 1, NEUTRAL), (first.weight, 1 - first.weight))
    merged = [*identity_layers(NEUTRAL - 1), pair, *keep_layers(range(NEUTRAL + 1, LAYERS))]
    assert_allclose(logits(build_candidate(planted, merged)), logits(planted), atol=1e-4)
    assert abs(planted_divergence(merged)) < 1e-6
    # The measure would have seen a loss: a mean of the pair, and the other deletion, are none without one.
    for weight in (0.5, 0.0):
        pair = MergedLayer((NEUTRAL - 1, NEUTRAL), (weight, 1 - weight))
        assert planted_divergence([*merged[: NEUTRAL - 1], pair, *merged[NEUTRAL:]]) > 1e-3


def test_the_line_search_ends_no_worse_than_both_deletions(models, texts):
    """One merge on a real (if random) model: its divergence is the least of the grid, deletions included."""
    model = models["llama"]
    grid = [0.0, 0.3, 0.7, 1.0]
    _, plan = score_and_plan(model, "mka", {"weights": "line-search", "grid": grid}, Aim(5, 1, 1), texts)
    divergence = Divergence(model, TOKENIZER, texts, max_tokens=24, tokens=200)
    (step,) = plan.steps
    at = {}
    for weight in grid:
        layers = list(identity_layers(LAYERS))
        layers[step.left[0] : step.right[0] + 1] = [MergedLayer(step.left + step.right, (weight, 1 - weight))]
        at[weight] = divergence(layers)
    # Deleting by name gives what weights 0 and 1 give.
    for weight, gone in ((1.0, step.right[0]), (0.0, step.left[0])):
        deleted = keep_layers([i for i in range(LAYERS) if i != gone])
        assert divergence(deleted) == pytest.approx(at[weight], rel=1e-4)
    assert divergence(plan.layers) == pytest.approx(min(at.values()), rel=1e-6)
    assert step.weight == min(grid, key=at.get)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_shortgpt_deletes_a_neutral_layer_first_and_without_loss(family, texts):
    model = neutralise(make_tiny_model(family, seed=5), NEUTRAL)
    scores, plan = score_and_plan(model, "shortgpt", {}, Aim(5, 1, 1), texts)
    assert scores.values[NEUTRAL] == pytest.approx(0.0, abs=1e-6)
    assert np.delete(scores.values, NEUTRAL).min() > 1e-3
    assert plan.layers == keep_layers([i for i in range(LAYERS) if i != NEUTRAL])
    assert_allclose(logits(build_candidate(model, plan.layers)), logits(model), atol=1e-5)


@every_family
def test_block_influence_is_its_definition(family, models):
    """1 - mean over all tokens of cos(input, output), one text at a time, from transformers' own hidden states."""
    model, few = models[family], make_texts(12, seed=4)
    raw = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: raw.append(args[0]))
    cosines = [[] for _ in range(LAYERS)]
    try:
        for text in few:
            ids = torch.tensor([TOKENIZER(text)["input_ids"]])
            with torch.inference_mode():
                hidden = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
            # The last of them is normed; what went into the norm is the last layer's output.
            stream = [h[0].double().numpy() for h in (*hidden[:-1], raw.pop())]
            for layer, (x, y) in enumerate(pairwise(stream)):
                cosines[layer] += [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(x, y)]
    finally:
        handle.remove()
    expected = [1 - np.mean(values) for values in cosines]
    states = look(model, few, batch_size=5)
    assert states.tokens.sum() == len(cosines[0])
    assert_allclose(states.block_influence, expected, atol=1e-6)
    method = get_method("shortgpt")
    scores = method.score(Evidence(LAYERS, "a" * LAYERS, states), method_settings("shortgpt", {}))
    assert_allclose(scores.values, expected, atol=1e-6)


def plain_diffusion(points, coordinates=2):
    """The diffusion map of docs/method.md written out: exponent 0.5, median bandwidth, alpha 0.5."""
    n = len(points)
    distance = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in points] for a in points.astype(np.float64)])
    sigma = np.median(distance[np.triu_indices(n, 1)])
    kernel = np.exp(-np.sqrt(distance / sigma))
    q = kernel.sum(axis=1)
    kernel = kernel / np.sqrt(np.outer(q, q))
    v = np.sqrt(kernel.sum(axis=1))
    _, vectors = np.linalg.eigh(kernel / np.outer(v, v))
    return np.stack([vectors[:, -1 - k] / vectors[:, -1] for k in range(1, coordinates + 1)], axis=1)


def align(coordinates, reference):
    """Flip each column to the sign it has in the reference."""
    return coordinates * np.sign((coordinates * reference).sum(axis=0))


@pytest.mark.parametrize("count", [101, 250])
def test_the_kernel_is_over_texts_for_any_number_of_them(count, models, many_texts):
    """A prime above 100 gave all-zero distances, 250 gave false zeros, and only one tile was ever used."""
    states = look(models["llama"], make_texts(count, seed=6))
    embedded = embed_layers(states, method_settings("mka", {}))
    assert embedded.shape == (LAYERS, count, 2)
    for layer in (0, LAYERS - 1):
        expected = plain_diffusion(states.outputs[layer])
        assert_allclose(align(embedded[layer], expected), expected, atol=1e-8)
        assert len(np.unique(embedded[layer][:, 0])) == count


def test_every_text_counts_and_their_order_does_not(planted_states):
    settings = method_settings("mka", {})
    score = get_method("mka").score

    def scored(states):
        return score(Evidence(LAYERS, "a" * LAYERS, states), settings).values

    reference = scored(planted_states)
    order = np.random.default_rng(0).permutation(len(planted_states.tokens))
    shuffled = HiddenStates(
        planted_states.pooled[:, order], planted_states.block_influence, planted_states.tokens[order]
    )
    assert_allclose(scored(shuffled), reference, atol=1e-9)
    # Other hidden states for the last text alone change every pair but the identical one.
    pooled = planted_states.pooled.copy()
    pooled[:, -1] = 2 * pooled[:, -1] + pooled[:, 0]
    changed = scored(HiddenStates(pooled, planted_states.block_influence, planted_states.tokens))
    moved = np.abs(changed - reference) > 1e-9
    moved[NEUTRAL - 1, NEUTRAL] = moved[NEUTRAL, NEUTRAL - 1] = True
    assert moved[~np.eye(LAYERS, dtype=bool)].all()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_padded_text_has_the_embedding_of_an_unpadded_one(pooling, models):
    varied = make_texts(60, seed=8, low=3, high=24)
    together = look(models["qwen2"], varied, batch_size=60, pooling=pooling)
    alone = look(models["qwen2"], varied, batch_size=1, pooling=pooling)
    assert_allclose(together.pooled, alone.pooled, atol=2e-4)
    settings = method_settings("mka", {})
    for padded, unpadded in zip(embed_layers(together, settings), embed_layers(alone, settings)):
        assert_allclose(align(padded, unpadded), unpadded, atol=1e-3)


def test_hidden_states_of_single_tokens_never_reach_the_kernel(planted_states):
    tokens = np.repeat(planted_states.pooled[:, :, None], 3, axis=2)
    with pytest.raises(NumericsError, match="expected"):
        HiddenStates(tokens, planted_states.block_influence, planted_states.tokens)


def test_a_layer_is_represented_by_its_output_not_its_input(planted_states):
    """The planted layer repeats its predecessor's output; by inputs, the pair after it would be the twins."""
    method = get_method("mka")
    values = method.score(Evidence(LAYERS, "a" * LAYERS, planted_states), method_settings("mka", {})).values
    assert values[NEUTRAL - 1, NEUTRAL] == 1.0 > values[NEUTRAL, NEUTRAL + 1]
