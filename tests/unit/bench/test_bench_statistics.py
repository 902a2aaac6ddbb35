"""Ratios of perplexities and their intervals: closed forms, and cases solved by hand."""

import math
from itertools import product

import numpy as np
import pytest

from mka.bench.statistics import BASE, draw_scores
from mka.errors import GuardError
from mka.evaluation.bootstrap import bound_levels
from mka.evaluation.scores import Score

Z975 = 1.959963984540054


def text(nll, tokens=100, name="prose"):
    counts = tokens if isinstance(tokens, list) else [tokens] * len(nll)
    items = tuple((float(a), b) for a, b in zip(nll, counts, strict=True))
    return Score(name, "perplexity", math.exp(sum(nll) / sum(counts)), 0.1, len(nll), False, items)


def task(items, name="piqa"):
    return Score(name, "acc", sum(items) / len(items), 0.1, len(items), True, tuple(items), {"items_digest": "d"})


def draw(resamples=2000, seed=0, **scores):
    return draw_scores({model: [score] for model, score in scores.items()}, seed=seed, resamples=resamples)


def recover_tasks(base, other, *, seed, resamples):
    return draw_scores({BASE: base, "other": other}, seed=seed, resamples=resamples).ratio("other")


def test_a_model_compared_with_itself_is_exactly_1_without_any_width():
    nll = np.random.default_rng(0).normal(300, 80, 16)
    draws = draw(**{BASE: text(nll), "same": text(nll)})
    for estimate in (draws.ratio("same"), draws.ratio("same", "same"), draws.ratio(BASE)):
        assert (estimate.value, estimate.lower, estimate.upper) == (1, 1, 1)
        assert not estimate.excludes_one


def test_nats_lost_alike_in_every_token_have_no_uncertainty_however_windows_differ():
    rng = np.random.default_rng(1)
    tokens = [int(t) for t in rng.integers(50, 200, 12)]
    base = rng.normal(3, 1, 12) * tokens
    worse, worst = (text(base + nats * np.array(tokens), tokens) for nats in (0.2, 0.5))
    draws = draw(**{BASE: text(base, tokens), "worse": worse, "worst": worst})
    for estimate, nats in ((draws.ratio("worse"), 0.2), (draws.ratio("worse", "worst"), -0.3)):
        assert [estimate.value, estimate.lower, estimate.upper] == pytest.approx([math.exp(nats)] * 3)
        assert estimate.excludes_one


def test_three_windows_give_the_quantiles_of_all_27_resamples():
    losses = [10.0, 30.0, 80.0]
    draws = draw(40_000, **{BASE: text([300.0] * 3), "other": text([300.0 + loss for loss in losses])})
    means = sorted(sum(resample) / 300 for resample in product(losses, repeat=3))
    low, high = bound_levels(3, 0.025)
    # With 3 windows the levels leave less than a resample outside: the bounds are the extremes.
    assert low < 1 / 27 and high > 26 / 27
    estimate = draws.ratio("other")
    assert estimate.value == pytest.approx(math.exp(sum(losses) / 300))
    assert [estimate.lower, estimate.upper] == pytest.approx([math.exp(means[0]), math.exp(means[-1])])


def test_bounds_agree_with_the_normal_interval_of_the_paired_difference_at_large_n():
    rng = np.random.default_rng(2)
    n = 2000
    base = rng.normal(300, 200, n)
    ours, rival = base + rng.normal(20, 30, n), base + rng.normal(22, 30, n)
    estimate = draw(4000, **{BASE: text(base), "ours": text(ours), "rival": text(rival)}).ratio("ours", "rival")
    difference = (ours - rival) / 100
    centre, half = difference.mean(), Z975 * difference.std(ddof=1) / math.sqrt(n)
    assert math.log(estimate.value) == pytest.approx(centre)
    assert math.log(estimate.lower) == pytest.approx(centre - half, abs=0.1 * half)
    assert math.log(estimate.upper) == pytest.approx(centre + half, abs=0.1 * half)


def test_an_interval_does_not_depend_on_which_other_models_are_compared():
    rng = np.random.default_rng(3)
    base = rng.normal(300, 50, 16)
    scores = {BASE: text(base), "a": text(base + rng.normal(5, 9, 16)), "b": text(base + rng.normal(50, 90, 16))}
    alone = draw(**{name: scores[name] for name in (BASE, "a")}).ratio("a")
    assert draw(**scores).ratio("a") == alone
    assert draw(seed=1, **scores).ratio("a") != alone


def test_models_measured_on_other_windows_are_refused():
    with pytest.raises(GuardError, match="tokens per window"):
        draw(**{BASE: text([300, 310]), "other": text([300, 310], [100, 90])})


def test_task_recovery_is_a_ratio_of_means_in_which_every_task_weighs_the_same():
    base = [task([1, 0], "a"), task([1, 1, 1, 1, 0], "b")]
    other = [task([0, 0], "a"), task([1, 1, 1, 0, 0], "b")]
    estimate = recover_tasks(base, other, seed=0, resamples=500)
    assert estimate.value == pytest.approx(0.6 / 1.3)
    assert estimate.lower <= estimate.value <= estimate.upper
    same = recover_tasks(base[1:], base[1:], seed=0, resamples=500)
    assert (same.value, same.lower, same.upper) == (1, 1, 1)


def test_task_bounds_agree_with_the_binomial_interval_at_large_n():
    n, solved = 4000, 3000
    estimate = recover_tasks([task([1] * n)], [task([1] * solved + [0] * (n - solved))], seed=0, resamples=4000)
    half = Z975 * math.sqrt(0.75 * 0.25 / n)
    assert estimate.lower == pytest.approx(0.75 - half, abs=0.15 * half)
    assert estimate.upper == pytest.approx(0.75 + half, abs=0.15 * half)
