"""k-nearest-neighbour estimators against closed forms, hand-solved cases and independent implementations."""

import threading
import time

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.spatial.distance import cdist
from scipy.special import digamma
from scipy.stats import rankdata
from sklearn.feature_selection import mutual_info_regression

from mka.errors import NumericsError, RecipeError
from mka.similarity import information
from mka.similarity.information import (
    entropy,
    information_ceiling,
    mutual_information,
    npib,
    npib_matrix,
    rank_transform,
)


def gaussian_pair(rho, n=1000, d=1, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x, rho * x + np.sqrt(1 - rho**2) * rng.normal(size=(n, d))


def drifting_layers(layers, n, k):
    """Each is the one before, plus noise."""
    return np.cumsum(np.random.default_rng(0).normal(size=(layers, n, k)), axis=0)


def plain_npib_matrix(layers, neighbours):
    """NPIB as its definition reads, from all distances of all pairs of samples."""
    count, n = len(layers), len(layers[0])
    # Doubled ranks are whole numbers, so that equal distances are equal.
    distances = [cdist(ranks, ranks, "chebyshev") for ranks in (2 * rankdata(layer, axis=0) for layer in layers)]
    information = np.empty((count, count))
    for i, j in np.ndindex(count, count):
        radii = np.sort(np.maximum(distances[i], distances[j]), axis=1)[:, neighbours, None]
        # A sample is among its own nearest, at distance 0: as the 1 in psi(m + 1).
        spent = sum(digamma((d < radii).sum(axis=1)).mean() for d in (distances[i], distances[j]))
        information[i, j] = digamma(neighbours) + digamma(n) - spent
    own = np.diag(information)
    return np.clip(information / np.sqrt(np.outer(own, own)), 0.0, 1.0)


class TestRankTransform:
    def test_hand_solved_with_ties(self):
        x = [[3.0, 1.0], [-2.0, 1.0], [10.0, 1.0], [3.0, 7.0]]
        # First column: ranks 2.5, 1, 4, 2.5; second: 2, 2, 2, 4.
        assert_allclose(rank_transform(x), [[0.5, 0.375], [0.125, 0.375], [0.875, 0.375], [0.5, 0.875]], rtol=1e-15)

    def test_is_the_uniform_grid_without_ties(self):
        x = np.random.default_rng(0).normal(size=(50, 3))
        assert_allclose(np.sort(rank_transform(x), axis=0), np.repeat((np.arange(50)[:, None] + 0.5) / 50, 3, axis=1))

    def test_refuses_more_dimensions(self):
        with pytest.raises(NumericsError, match=r"\(2, 3, 4\)"):
            rank_transform(np.zeros((2, 3, 4)))


class TestMutualInformation:
    def test_hand_solved(self):
        # k = 1. Neighbours in max-norm of (0,0), (1,3), (4,4), (6,0): 3, 3, 3, 4 away; strictly closer in x: 1 (the
        # second), 1 (the first), 1 (the fourth), 1 (the third); in y: 1 (the fourth), 1 (the third), 1 (the second),
        # 2 (the first at 0, the second at 3).
        x, y = [[0.0], [1.0], [4.0], [6.0]], [[0.0], [3.0], [4.0], [0.0]]
        psi_2, psi_3 = 1 - np.euler_gamma, 1.5 - np.euler_gamma
        expected = digamma(1) + digamma(4) - (4 * psi_2 + 3 * psi_2 + psi_3) / 4
        assert mutual_information(x, y, neighbours=1) == pytest.approx(expected, abs=1e-13)

    @pytest.mark.parametrize("rho", [0.0, 0.3, 0.6, 0.9, 0.99])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_bivariate_gaussian(self, rho, seed):
        x, y = gaussian_pair(rho, seed=seed)
        assert mutual_information(x, y) == pytest.approx(-0.5 * np.log(1 - rho**2), abs=0.1)

    def test_joint_information_of_vectors_adds_up(self):
        # Two independent pairs carry twice the information of one: the joint estimate, not a mean over coordinates.
        estimates = [mutual_information(*gaussian_pair(0.6, d=2, seed=seed)) for seed in range(5)]
        assert np.mean(estimates) == pytest.approx(-np.log(1 - 0.6**2), abs=0.05)

    def test_information_between_coordinates_counts(self):
        # Sum of two independent coordinates: neither alone tells much, both together nearly all.
        rng = np.random.default_rng(0)
        x = rng.normal(size=(1000, 2))
        y = x.sum(axis=1, keepdims=True) + 0.1 * rng.normal(size=(1000, 1))
        assert mutual_information(x, y) > 1.0 + mutual_information(x[:, :1], y) + mutual_information(x[:, 1:], y)

    def test_independent_variables_average_to_zero(self):
        estimates = [mutual_information(*gaussian_pair(0.0, n=300, seed=seed)) for seed in range(40)]
        assert abs(np.mean(estimates)) < 0.02
        assert min(estimates) < 0.0, "the estimator must not be clipped"

    @pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
    @pytest.mark.parametrize("neighbours", [3, 5, 10])
    def test_agrees_with_scikit_learn(self, rho, neighbours):
        x, y = gaussian_pair(rho, n=400, seed=3)
        # Its estimator divides by the standard deviation; noise of 1e-10 moves no neighbour here.
        x, y = x / x.std(), y / y.std()
        reference = mutual_info_regression(x, y[:, 0], discrete_features=False, n_neighbors=neighbours, random_state=0)
        assert max(0.0, mutual_information(x, y, neighbours=neighbours)) == pytest.approx(reference[0], abs=1e-9)

    @pytest.mark.parametrize(("n", "neighbours", "known"), [(1000, 5, 5.401), (57, 5, 2.528)])
    def test_self_information_is_the_ceiling(self, n, neighbours, known):
        x = np.random.default_rng(n).normal(size=(n, 2))
        assert information_ceiling(n, neighbours) == pytest.approx(known, abs=1e-3)
        assert information_ceiling(n, neighbours) == pytest.approx(digamma(n) - digamma(neighbours), abs=1e-14)
        assert mutual_information(x, x, neighbours=neighbours) == pytest.approx(
            digamma(n) - digamma(neighbours), abs=1e-12
        )

    def test_symmetric(self):
        x, y = gaussian_pair(0.7, n=300, d=2)
        assert mutual_information(x, y[:, :1]) == pytest.approx(mutual_information(y[:, :1], x), abs=1e-12)

    def test_invariant_under_affine_maps_when_standardised(self):
        x, y = gaussian_pair(0.7, n=300)

        def standardise(v):
            return (v - v.mean(axis=0)) / v.std(axis=0)

        plain = mutual_information(standardise(x), standardise(y))
        assert mutual_information(standardise(40 * x - 3), standardise(-0.01 * y)) == pytest.approx(plain, abs=1e-12)

    def test_duplicating_a_variable_adds_no_information(self):
        x, y = gaussian_pair(0.7, n=300)
        assert mutual_information(np.hstack([x, x]), y) == pytest.approx(mutual_information(x, y), abs=1e-12)

    def test_constant_tells_nothing(self):
        y = np.random.default_rng(0).normal(size=(100, 1))
        assert mutual_information(np.zeros((100, 1)), y) == pytest.approx(0.0, abs=1e-12)

    def test_refusals(self):
        x = np.random.default_rng(0).normal(size=(20, 2))
        with pytest.raises(NumericsError, match="20 samples of x, 19 of y"):
            mutual_information(x, x[:19])
        with pytest.raises(NumericsError, match="20 neighbours among 20 samples"):
            mutual_information(x, x, neighbours=20)
        with pytest.raises(RecipeError, match="neighbours is 0"):
            mutual_information(x, x, neighbours=0)
        with pytest.raises(NumericsError, match="NaN or infinite"):
            mutual_information(x, np.full((20, 1), np.nan))
        with pytest.raises(NumericsError, match="20 of 20 samples coincide with 5 or more others"):
            mutual_information(np.zeros((20, 1)), np.zeros((20, 1)))


class TestEntropy:
    def test_hand_solved(self):
        # k = 1 on 0, 1, 3: distances 1, 1, 2; the unit ball of the line has length 2.
        expected = digamma(3) - digamma(1) + np.log(2) + np.log(2) / 3
        assert entropy([[0.0], [1.0], [3.0]], neighbours=1) == pytest.approx(expected, abs=1e-13)

    @pytest.mark.parametrize(("d", "tolerance"), [(1, 0.1), (2, 0.1), (5, 0.2)])
    def test_gaussian(self, d, tolerance):
        x = np.random.default_rng(d).normal(size=(1000, d))
        assert entropy(x) == pytest.approx(0.5 * d * np.log(2 * np.pi * np.e), abs=tolerance)

    def test_uniform_square_and_gaussian_copula(self):
        square = np.random.default_rng(0).uniform(size=(2000, 2))
        assert entropy(square) == pytest.approx(0.0, abs=0.1)
        copula = rank_transform(np.hstack(gaussian_pair(0.9)))
        assert entropy(copula) == pytest.approx(0.5 * np.log(1 - 0.9**2), abs=0.1)

    @pytest.mark.parametrize("d", [1, 2, 3])
    def test_scaling_adds_its_logarithm_per_dimension(self, d):
        x = np.random.default_rng(0).normal(size=(200, d))
        assert entropy(-7.0 * x) == pytest.approx(entropy(x) + d * np.log(7.0), abs=1e-12)

    def test_rotation_changes_nothing(self):
        x = np.random.default_rng(0).normal(size=(200, 2))
        c, s = np.cos(0.7), np.sin(0.7)
        assert entropy(x @ np.array([[c, -s], [s, c]])) == pytest.approx(entropy(x), abs=1e-12)

    def test_refuses_coincident_samples(self):
        x = np.random.default_rng(0).normal(size=(50, 2))
        x[:6] = x[0]
        with pytest.raises(NumericsError, match=r"6 of 50 samples coincide with 5 or more others.*drop repeated"):
            entropy(x)
        assert np.isfinite(entropy(x, neighbours=6))


class TestPaperNormalisation:
    def test_is_information_over_mean_entropy(self):
        # Independent uniform layers: the boundary makes the estimated entropies positive, so that the form is defined.
        layers = np.random.default_rng(3).uniform(size=(3, 150, 2))
        ranks = [rank_transform(layer) for layer in layers]
        # Whole numbers, so that equal distances are equal also here.
        whole = [np.rint(300 * r) for r in ranks]
        similarity = npib_matrix(layers, normalisation="paper")
        for i in range(3):
            assert similarity[i, i] == 1.0
            for j in range(i):
                h = entropy(ranks[i]), entropy(ranks[j])
                assert min(h) > 0
                expected = mutual_information(whole[i], whole[j]) / np.sqrt(h[0] * h[1])
                assert similarity[i, j] == similarity[j, i] == pytest.approx(expected, abs=1e-12)
                assert npib(layers[i], layers[j], normalisation="paper") == pytest.approx(expected, abs=1e-12)

    def test_refuses_entropies_that_are_not_positive(self):
        x, y = gaussian_pair(0.0, n=250, seed=5)
        line = np.hstack([x, x + 0.01 * y])
        with pytest.raises(
            NumericsError, match=r"'paper', layer 0 and layer 1: I .* H -.* nats; allowed: entropies above 0"
        ):
            npib_matrix([line, line[::-1]], normalisation="paper")
        # One negative entropy makes the product negative.
        square = np.random.default_rng(0).uniform(size=(250, 2))
        with pytest.raises(NumericsError, match=r"'paper', x and y: .*; use normalisation 'self'"):
            npib(square, line, normalisation="paper")

    def test_refuses_similarities_outside_the_unit_interval(self):
        square, other = (np.random.default_rng(seed).uniform(size=(150, 2)) for seed in (3, 4))
        with pytest.raises(NumericsError, match=r"layer 0 and layer 1: similarity \d.*allowed: 0 to 1"):
            npib_matrix([square, square], normalisation="paper")
        # Independent layers, whose estimate happens to fall below 0.
        assert mutual_information(rank_transform(square), rank_transform(other)) < 0.0
        with pytest.raises(NumericsError, match=r"x and y: similarity -\d.*allowed: 0 to 1"):
            npib(square, other, normalisation="paper")


class TestNpibMatrix:
    def test_is_the_ratio_of_estimates_on_ranks(self):
        layers = np.stack([np.hstack(gaussian_pair(0.5, n=130, seed=s)) for s in range(3)])
        layers[1] += 2 * layers[0]
        whole = [np.rint(260 * rank_transform(layer)) for layer in layers]
        found = npib_matrix(layers, neighbours=4)
        for i in range(3):
            for j in range(i):
                own = (
                    mutual_information(whole[i], whole[i], neighbours=4),
                    mutual_information(whole[j], whole[j], neighbours=4),
                )
                expected = mutual_information(whole[i], whole[j], neighbours=4) / np.sqrt(own[0] * own[1])
                assert found[i, j] == pytest.approx(np.clip(expected, 0, 1), abs=1e-12)
                assert npib(layers[i], layers[j], neighbours=4) == pytest.approx(found[i, j], abs=1e-12)

    @pytest.mark.parametrize("n", [2, 3, 4, 15, 16, 17, 63, 64, 65, 150])
    @pytest.mark.parametrize("coordinates", [1, 2, 3])
    @pytest.mark.parametrize("ties", [False, True])
    def test_is_its_definition(self, n, coordinates, ties):
        # Enough layers that the nearest samples are listed, some alike and some unrelated, so that lists do and do not
        # reach far enough; sizes on both sides of a block's edge.
        layers, neighbours = drifting_layers(14, n, coordinates), min(5, n - 1)
        layers[7:] = layers[:6:-1]
        if ties:
            layers = np.rint(2 * layers)
            layers[:, :, 0] = np.random.default_rng(1).permuted(np.tile(np.arange(n), (14, 1)), axis=1)
        layers[3] = layers[2]
        layers[3, :, 0] *= -1.0
        found = npib_matrix(layers, neighbours=neighbours)
        assert_allclose(found, plain_npib_matrix(layers, neighbours), atol=1e-12)
        assert found[2, 3] == 1.0

    def test_layers_may_differ_in_coordinates(self):
        x, y = gaussian_pair(0.8, n=120, d=3)
        plane, line = x[:, :2], y[:, :1]
        whole = [np.rint(240 * rank_transform(points)) for points in (plane, line)]
        own = [mutual_information(points, points) for points in whole]
        assert npib(plane, line) == pytest.approx(mutual_information(*whole) / np.sqrt(own[0] * own[1]), abs=1e-12)

    @pytest.mark.parametrize("coordinates", [2, 3])
    def test_number_of_threads_changes_no_bit(self, monkeypatch, coordinates):
        layers, found, steps = drifting_layers(13, 130, coordinates), [], []
        for threads in (1, 2, 5):
            monkeypatch.setattr("mka.similarity.information._count_cores", lambda: threads)  # noqa: B023
            steps.append([])
            found.append(npib_matrix(layers, progress=steps[-1].append))
        assert (found[1] == found[0]).all() and (found[2] == found[0]).all()
        assert steps == [list(range(13, 0, -1))] * 3

    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_refuses_the_first_layer_whichever_thread_is_first(self, monkeypatch, threads):
        layers, steps = drifting_layers(12, 60, 2), []
        layers[2, :7], layers[4] = layers[2, 0], 1.0

        def fill_slowly(radii, i, *given):
            # A later row is refused well before this one.
            time.sleep(0.2 if i == 2 else 0.0)
            fill(radii, i, *given)

        fill = information.fill_row
        monkeypatch.setattr(information, "fill_row", fill_slowly)
        monkeypatch.setattr(information, "_count_cores", lambda: threads)
        with pytest.raises(NumericsError, match=r"^NPIB, layer 2: 7 of 60 samples coincide with 5 or more others"):
            npib_matrix(layers, progress=steps.append)
        assert steps == [12, 11]

    def test_progress_comes_from_the_calling_thread(self):
        callers = set()
        npib_matrix(drifting_layers(12, 40, 2), progress=lambda _: callers.add(threading.get_ident()))
        assert callers == {threading.get_ident()}

    def test_a_failing_progress_leaves_no_thread_behind(self):
        def fail(pairs):
            raise KeyboardInterrupt

        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            npib_matrix(drifting_layers(12, 40, 2), progress=fail)
        assert threading.active_count() == before

    def test_progress_adds_up(self):
        steps = []
        npib_matrix(np.random.default_rng(0).normal(size=(5, 40, 2)), progress=steps.append)
        assert sum(steps) == 15
        assert len(steps) == 5

    @pytest.mark.parametrize("coordinates", [2, 3])
    def test_blocks_of_rows_change_nothing(self, monkeypatch, coordinates):
        layers = np.random.default_rng(0).normal(size=(3, 101, coordinates))
        whole = npib_matrix(layers)
        monkeypatch.setattr("mka.similarity.neighbours._BLOCK", 700)
        assert (npib_matrix(layers) == whole).all()

    @pytest.mark.parametrize("neighbours", [5, 30])
    def test_length_of_lists_changes_nothing(self, monkeypatch, neighbours):
        layers = drifting_layers(13, 130, 2)
        whole = npib_matrix(layers, neighbours=neighbours)
        monkeypatch.setattr("mka.similarity.neighbours._LISTED", 20)
        assert (npib_matrix(layers, neighbours=neighbours) == whole).all()
        monkeypatch.setattr("mka.similarity.neighbours._LISTING_PAYS", 13)
        assert (npib_matrix(layers, neighbours=neighbours) == whole).all()

    def test_refusals(self):
        layers = np.random.default_rng(0).normal(size=(3, 40, 2))
        with pytest.raises(NumericsError, match=r"\(40, 2\); allowed: \(layers, samples, coordinates\)"):
            npib_matrix(layers[0])
        with pytest.raises(RecipeError, match="normalisation is 'none'; allowed: self, paper"):
            npib_matrix(layers, normalisation="none")
        with pytest.raises(NumericsError, match=r"layer 1: .*NaN"):
            npib_matrix(np.where(np.arange(3)[:, None, None] == 1, np.nan, layers))
        with pytest.raises(NumericsError, match="40 neighbours among 40 samples"):
            npib_matrix(layers, neighbours=40)
        layers[2] = 1.0
        with pytest.raises(NumericsError, match="layer 2: 40 of 40 samples coincide"):
            npib_matrix(layers)
        with pytest.raises(NumericsError, match="40 samples of x, 39 of y"):
            npib(layers[0], layers[1, :39])
        with pytest.raises(NumericsError, match=r"NPIB, x: got shape \(2, 40, 2\)"):
            npib(layers[:2], layers[0])
