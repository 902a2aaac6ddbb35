"""How far a ranking of pairs hangs on the texts: by hand, against SciPy, and through the score stage."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr

from mka.errors import NumericsError
from mka.evidence.states import HiddenStates, LayerScores, Stability
from mka.methods import resolve_method
from mka.pipeline.score import score_layers
from mka.recipe import MethodChoice
from mka.similarity.stability import FEWEST_TEXTS, compare_rankings, describe_stability, draw_halves

FOUND = Stability(256, 8, 0.834, 0.581, 0.949, 3, 1)


def test_halves_are_distinct_texts_drawn_again_under_a_seed():
    halves = draw_halves(101)
    assert len(halves) == 8 and all(len(half) == 50 == len(set(half)) for half in halves)
    assert all(np.array_equal(half, np.sort(half)) and half[0] >= 0 and half[-1] < 101 for half in halves)
    assert len({tuple(half) for half in halves}) == 8
    assert all(np.array_equal(a, b) for a, b in zip(halves, draw_halves(101)))
    assert not np.array_equal(halves[0], draw_halves(101, seed=1)[0])
    assert draw_halves(FEWEST_TEXTS - 1) == [] and len(draw_halves(FEWEST_TEXTS, halves=3)) == 3


def test_rankings_compared_by_hand():
    whole = np.array([0.1, 0.4, 0.3, 0.2])
    halves = [
        np.array([0.2, 0.9, 0.8, 0.5]),  # the same order: 1; best and best two stay
        np.array([0.4, 0.1, 0.2, 0.3]),  # the opposite: -1
        np.array([0.1, 0.3, 0.4, 0.2]),  # the first two changed places: 1 - 6 * 2 / (4 * 15) = 0.8
        np.array([0.3, 0.4, 0.1, 0.2]),  # squared rank differences 4 + 0 + 4 + 0: 1 - 48 / 60 = 0.2; the best stays
    ]
    found = compare_rankings(whole, halves, 200)
    assert (found.texts, found.halves, found.best, found.best_two) == (200, 4, 2, 2)
    assert found.correlation == pytest.approx((1 - 1 + 0.8 + 0.2) / 4)
    assert (found.correlation_least, found.correlation_most) == (pytest.approx(-1), pytest.approx(1))


def test_the_correlation_is_spearmans_with_ties_too():
    random = np.random.default_rng(0)
    whole = random.integers(0, 6, 12) / 6
    halves = [random.integers(0, 6, 12) / 6 for _ in range(5)]
    expected = [spearmanr(whole, half).statistic for half in halves]
    found = compare_rankings(whole, halves, 200)
    assert found.correlation == pytest.approx(np.mean(expected))
    assert (found.correlation_least, found.correlation_most) == (
        pytest.approx(min(expected)),
        pytest.approx(max(expected)),
    )


def test_of_equal_pairs_the_deeper_one_is_the_best():
    whole = np.array([0.9, 0.1, 0.9, 0.2])
    found = compare_rankings(whole, [np.array([0.1, 0.2, 0.9, 0.9]), np.array([0.9, 0.3, 0.9, 0.2])], 200)
    # Best two of all: 2, 0. Of the halves: 3, 2 and 2, 0.
    assert (found.best, found.best_two) == (1, 1)


def test_no_order_agrees_with_none_and_two_pairs_are_not_ranked():
    found = compare_rankings(np.array([0.1, 0.2, 0.3]), [np.ones(3)], 200)
    assert (found.correlation, found.correlation_least, found.correlation_most) == (0.0, 0.0, 0.0)
    assert compare_rankings(np.array([0.1, 0.2]), [np.array([0.1, 0.2])], 200) is None
    assert compare_rankings(np.array([0.1, 0.2, 0.3]), [], 200) is None


def scores_with(stability, kind="pairwise-similarity"):
    values = np.eye(5) if kind == "pairwise-similarity" else np.zeros(5)
    return LayerScores(kind, values, "high means alike", "mka", {}, stability)


def test_it_is_told_in_one_sentence():
    assert describe_stability(scores_with(FOUND)) == (
        "Which neighbours are most alike depends on the texts: over 8 half-samples of 256 texts the best pair stays "
        "the best in 3, the best two stay the best two in 1, and the rank correlation with all texts is 0.83 (0.58 to "
        "0.95)."
    )
    settled = describe_stability(scores_with(Stability(256, 8, 1.0, 1.0, 1.0, 8, 8)))
    assert settled.startswith("Which neighbours are most alike does not depend on the texts: over 8")
    assert "was not measured: that takes 100 texts" in describe_stability(scores_with(None))
    assert describe_stability(scores_with(None, "layer-importance")) is None


def test_scores_keep_it_on_disk_and_files_without_it_are_read(tmp_path):
    path = tmp_path / "scores.json"
    scores_with(FOUND).save(path)
    body = json.loads(path.read_text())
    assert body["stability"] == {
        "texts": 256,
        "halves": 8,
        "correlation": 0.834,
        "correlation_least": 0.581,
        "correlation_most": 0.949,
        "best": 3,
        "best_two": 1,
    }
    assert LayerScores.load(path).stability == FOUND
    del body["stability"]
    path.write_text(json.dumps(body))
    assert LayerScores.load(path).stability is None
    path.write_text(json.dumps(body | {"stability": {"texts": 3}}))
    with pytest.raises(NumericsError, match="cannot be read"):
        LayerScores.load(path)


# Through the score stage, on made-up hidden states


def wander(texts, *, layers=6, width=8, seed=0):
    """Hidden states that wander from layer to layer: neighbours share some information, not the same everywhere."""
    random = np.random.default_rng(seed)
    pooled = np.cumsum(random.normal(size=(layers + 1, texts, width)), axis=0).astype(np.float32)
    return HiddenStates(pooled, np.full(layers, 0.5), np.full(texts, 4))


def score(states, name="mka", **settings):
    checkpoint = SimpleNamespace(layers=states.layers, kinds="a" * states.layers)
    return score_layers(resolve_method(MethodChoice(name=name, settings=settings)), checkpoint, states)


@pytest.mark.parametrize("name", ["mka", "aligned"])
def test_the_halves_are_scored_as_the_whole_is(name):
    states = wander(120)
    found = score(states, name).stability
    halves = []
    for rows in draw_halves(120):
        part = HiddenStates(states.pooled[:, rows], states.block_influence, states.tokens[rows])
        # Fewer texts than halves are drawn of: nothing but the scores of these.
        scored = score(part, name)
        assert scored.stability is None
        halves.append(np.diag(scored.values, 1))
    assert found == compare_rankings(np.diag(score(states, name).values, 1), halves, 120)
    assert -1 <= found.correlation_least < found.correlation_most <= 1


def test_what_is_not_ranked_by_pairs_is_not_resampled():
    states = wander(120)
    assert score(states, "uidl").stability is None and score(states, "shortgpt").stability is None


def test_halves_that_cannot_be_scored_leave_it_unmeasured():
    # 55 neighbours are there among 100 texts, not among 50.
    states = wander(100)
    assert score(states, neighbours=55).stability is None
    assert score(states, neighbours=45).stability is not None
