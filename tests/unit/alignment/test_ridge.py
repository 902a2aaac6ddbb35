"""The ridge against numpy's least squares, planted solutions, and selections solved by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mka.alignment.ridge import Moments, fit_ridge, select_features
from mka.errors import NumericsError


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(features, targets, weights=None):
    moments = Moments(features.shape[1], targets.shape[1])
    moments.add(features, targets, weights)
    return moments


def penalties_of(features, weights, penalty):
    """The rule as documented: half way between one for all and one by each feature's energy."""
    energy = (weights[:, None] * features.square()).sum(0)
    return penalty * (energy * energy.mean()).sqrt()


def objective(features, targets, weights, prior, penalty, fitted):
    wrong = (weights[:, None] * (features @ fitted - targets).square()).sum()
    return float(wrong + (penalties_of(features, weights, penalty)[:, None] * (fitted - prior).square()).sum())


def orthogonal(energies, tokens=32, seed=0):
    """Features (tokens, F) that are orthogonal and have these energies."""
    basis = torch.linalg.qr(draw(seed, tokens, len(energies))).Q
    return basis * torch.tensor(energies, dtype=torch.float64).sqrt()


# fit_ridge


@pytest.mark.parametrize("tokens", [5, 60])
def test_the_fit_is_least_squares_on_the_augmented_system(tokens):
    # With 5 tokens for 7 features only the penalty makes it regular.
    features = draw(0, tokens, 7) * torch.linspace(0.5, 3, 7).double()
    targets, weights, prior = draw(1, tokens, 3), draw(2, tokens).abs() + 0.1, draw(3, 7, 3)
    fitted = fit_ridge(moments_of(features, targets, weights), prior, 0.3)
    root = penalties_of(features, weights, 0.3).sqrt()
    rows = np.concatenate([(weights.sqrt()[:, None] * features).numpy(), np.diag(root.numpy())])
    wanted = np.concatenate([(weights.sqrt()[:, None] * targets).numpy(), (root[:, None] * prior).numpy()])
    reference = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    assert_close(fitted, torch.from_numpy(reference), rtol=1e-4, atol=1e-5)


def test_moments_add_up_over_batches_and_without_weights_every_token_counts_once():
    features, targets, weights = draw(0, 30, 4), draw(1, 30, 2), draw(2, 30).abs()
    parts = Moments(4, 2)
    for rows in (slice(0, 7), slice(7, 30)):
        parts.add(features[rows], targets[rows], weights[rows])
    assert_close(parts.gram, (features.T * weights) @ features)
    assert_close(parts.cross, (features.T * weights) @ targets)
    ones, plain = moments_of(features, targets, torch.ones(30).double()), moments_of(features, targets)
    assert_close(plain.gram, ones.gram)
    assert_close(plain.cross, ones.cross)


def test_moments_of_some_features_are_those_of_the_features_alone():
    features, targets, columns = draw(0, 30, 6), draw(1, 30, 2), torch.tensor([4, 0, 5])
    taken, alone = moments_of(features, targets).take(columns), moments_of(features[:, columns], targets)
    assert_close(taken.gram, alone.gram)
    assert_close(taken.cross, alone.cross)


def test_a_planted_solution_is_found_as_the_penalty_falls():
    features, planted = draw(0, 80, 6), draw(1, 6, 3)
    moments = moments_of(features, features @ planted)
    errors = [float((fit_ridge(moments, draw(2, 6, 3), p) - planted).abs().max()) for p in (1.0, 1e-3, 1e-6, 1e-12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 < errors[0]


def test_the_prior_is_what_is_left_as_the_penalty_rises():
    features, prior = draw(0, 80, 6), draw(2, 6, 3)
    fitted = fit_ridge(moments_of(features, draw(1, 80, 3)), prior, 1e12)
    assert_close(fitted, prior, rtol=0, atol=1e-9)


def test_a_prior_that_fits_already_is_kept_at_any_penalty():
    features, prior = draw(0, 80, 6), draw(2, 6, 3)
    for penalty in (1e-6, 1.0, 1e3):
        assert_close(fit_ridge(moments_of(features, features @ prior), prior, penalty), prior)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.integers(2, 40))
def test_the_objective_never_rises_above_the_priors_nor_does_a_small_step_lower_it(seed, penalty, tokens):
    features, targets, prior = draw(seed, tokens, 5), draw(seed + 1, tokens, 3), draw(seed + 2, 5, 3)
    weights = draw(seed + 3, tokens).abs() + 0.01
    fitted = fit_ridge(moments_of(features, targets, weights), prior, penalty)

    def value(w):
        return objective(features, targets, weights, prior, penalty, w)

    least = value(fitted)
    assert least <= value(prior) * (1 + 1e-9)
    assert least <= value(fitted + 1e-2 * draw(seed + 4, 5, 3)) * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 0.5, 7.0, 1e4]))
def test_features_of_another_scale_give_the_same_function(seed, scale):
    features, targets, prior = draw(seed, 20, 5), draw(seed + 1, 20, 3), draw(seed + 2, 5, 3)
    plain = fit_ridge(moments_of(features, targets), prior, 0.7)
    scaled = fit_ridge(moments_of(scale * features, targets), prior / scale, 0.7)
    assert_close(scaled * scale, plain)


def test_a_feature_that_never_fires_keeps_its_prior_and_leaves_the_others_as_they_are():
    features, targets, prior = draw(0, 40, 4), draw(1, 40, 2), draw(2, 5, 2)
    dead = torch.cat([features, torch.zeros(40, 1, dtype=torch.float64)], dim=1)
    fitted = fit_ridge(moments_of(dead, targets), prior, 1e-9)
    assert_close(fitted[4], prior[4])
    assert_close(fitted[:4], fit_ridge(moments_of(features, targets), prior[:4], 1e-9))
    silent = fit_ridge(moments_of(0 * dead, targets), prior, 1.0)
    assert_close(silent, prior)


def bad_moments(where, value):
    features, targets = draw(0, 9, 3), draw(1, 9, 2)
    (features if where == "features" else targets)[4, 1] = value
    return moments_of(features, targets)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["features", "targets"])
def test_what_is_not_finite_is_refused_in_one_line(where, value):
    with pytest.raises(NumericsError, match="NaN or infinite") as caught:
        fit_ridge(bad_moments(where, value), draw(2, 3, 2), 1.0)
    assert "\n" not in str(caught.value)


def test_a_system_that_the_penalty_does_not_make_regular_is_refused():
    twice = draw(0, 9, 1).sign().repeat(1, 2)
    with pytest.raises(NumericsError, match="not positive definite; give more tokens or a larger penalty"):
        fit_ridge(moments_of(twice, draw(1, 9, 2)), draw(2, 2, 2), 1e-30)


# select_features


def select(features, targets, keep, *, units=None, prior=None, **options):
    units = torch.arange(features.shape[1]) if units is None else torch.tensor(units)
    prior = torch.zeros(features.shape[1], targets.shape[1]) if prior is None else prior
    return select_features(moments_of(features, targets), prior, units, keep, **options).tolist()


def test_orthogonal_features_are_charged_their_energy_times_their_weight():
    energies = [100.0, 1.0, 9.0, 25.0, 4.0]
    sizes = [0.1, 3.0, 0.5, 1.0, 2.0]  # energy * |W|^2 = 1, 9, 2.25, 25, 16
    planted = torch.tensor(sizes, dtype=torch.float64)[:, None] * torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    features = orthogonal(energies)
    kept = [select(features, features @ planted, keep, penalty=1e-9) for keep in (1, 2, 3, 4, 5)]
    assert kept == [[3], [3, 4], [1, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_the_prior_counts_where_the_targets_say_little():
    # W = (C + P W0) / (G + P) with G = 1, P = penalty: feature 0 by the targets, feature 1 by its prior.
    features = orthogonal([1.0, 1.0])
    targets = features @ torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    prior = torch.tensor([[0.0], [2.0]])
    # penalty 0.5: 1/1.5 against 1/1.5; below it the targets win, above it the prior.
    assert select(features, targets, 1, prior=prior, penalty=0.4) == [0]
    assert select(features, targets, 1, prior=prior, penalty=0.6) == [1]


def test_one_of_two_duplicates_goes_before_a_weaker_feature_that_is_unique():
    features = orthogonal([1.0, 1.0, 1.0])
    targets = features @ torch.tensor([[5.0], [1.0], [0.5]], dtype=torch.float64)
    doubled = torch.cat([features, features[:, :1]], dim=1)
    kept = select(doubled, targets, 3, penalty=1e-6)
    assert {1, 2} < set(kept) and len({0, 3} & set(kept)) == 1


def test_refits_between_the_rounds_keep_the_second_of_two_duplicates():
    features = orthogonal([1.0, 1.0, 1.0])
    targets = features @ torch.tensor([[5.0], [1.0], [0.5]], dtype=torch.float64)
    doubled = torch.cat([features, features[:, :1]], dim=1)
    # Each of the two can be spared while the other is there. In one round both go.
    assert select(doubled, targets, 2, penalty=1e-6, rounds=1) == [1, 2]
    kept = select(doubled, targets, 2, penalty=1e-6)
    assert 1 in kept and len({0, 3} & set(kept)) == 1


def test_units_of_several_features_are_charged_the_sum_and_stay_whole():
    # Charges 6 + 0, 4 + 4, 5 + 5: the unit with the best single feature goes. Numbers of units need not be dense.
    features = orthogonal([1.0] * 6)
    weight = torch.tensor([6.0, 0, 4, 4, 5, 5], dtype=torch.float64).sqrt()[:, None]
    assert select(features, features @ weight, 2, units=[1, 1, 4, 4, 7, 7], penalty=1e-9) == [4, 7]
    assert select(features, features @ weight, 1, units=[7, 4, 1, 1, 4, 7], penalty=1e-9) == [7]  # 6 + 5, 0 + 5, 4 + 4


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 12), st.integers(1, 9))
def test_as_many_units_are_kept_as_were_asked_for(data, seed, width, count, rounds):
    keep = data.draw(st.integers(1, count))
    features = draw(seed, 10, count * width)
    units = torch.arange(count * width) // width
    kept = select_features(
        moments_of(features, draw(seed + 1, 10, 3)), draw(seed + 2, count * width, 3), units, keep, rounds=rounds
    )
    assert len(kept) == keep == len(set(kept.tolist()) & set(range(count)))
    assert kept.tolist() == sorted(kept.tolist())


@pytest.mark.parametrize("where", ["features", "targets"])
def test_selection_refuses_what_is_not_finite(where):
    with pytest.raises(NumericsError, match="NaN or infinite"):
        select_features(bad_moments(where, float("nan")), torch.zeros(3, 2), torch.arange(3), 2)
