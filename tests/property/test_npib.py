"""What NPIB must do on any data: its range, its symmetries, and agreement with the definition written out plainly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.special import digamma
from threadpoolctl import threadpool_limits

from mka.similarity.diffusion import diffusion_map
from mka.similarity.information import information_ceiling, mutual_information, npib, npib_matrix

SEEDS = st.integers(0, 2**32 - 1)
PRIME = 101


def related_layers(seed, layers=4, n=60, k=2, step=0.5):
    """Layers that drift apart: each is the one before plus noise."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(layers, n, k)) * np.array([1.0, *[step] * (layers - 1)])[:, None, None], axis=0)


def plain_mutual_information(x, y, k):
    """Kraskov's first estimator as its definition reads, one sample at a time."""
    n, spent = len(x), 0.0
    for i in range(n):
        others = [j for j in range(n) if j != i]
        dx = [max(abs(a - b) for a, b in zip(x[i], x[j])) for j in others]
        dy = [max(abs(a - b) for a, b in zip(y[i], y[j])) for j in others]
        radius = sorted(max(a, b) for a, b in zip(dx, dy))[k - 1]
        spent += digamma(sum(d < radius for d in dx) + 1) + digamma(sum(d < radius for d in dy) + 1)
    return digamma(k) + digamma(n) - spent / n


@given(
    seed=SEEDS,
    n=st.integers(8, 25),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    k=st.integers(1, 6),
    whole=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_estimator_is_its_definition(seed, n, shape, k, whole):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, shape[0])), rng.normal(size=(n, shape[1]))
    if whole:
        # Whole numbers: many equal distances, yet no two samples at the same place.
        x, y = np.rint(2 * x), np.rint(2 * y)
        x[:, 0] = rng.permutation(n)
    assert mutual_information(x, y, neighbours=k) == pytest.approx(plain_mutual_information(x, y, k), abs=1e-12)


@given(seed=SEEDS, n=st.integers(10, 80), k=st.integers(1, 8), noise=st.floats(0.0, 3.0))
@settings(max_examples=50, deadline=None)
def test_information_never_exceeds_its_ceiling(seed, n, k, noise):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    assert mutual_information(x, x + noise * rng.normal(size=(n, 2)), neighbours=k) <= information_ceiling(n, k) + 1e-12


@given(seed=SEEDS, n=st.integers(20, 80), k=st.integers(1, 3), step=st.floats(0.0, 3.0), neighbours=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_range_symmetry_and_diagonal(seed, n, k, step, neighbours):
    similarity = npib_matrix(related_layers(seed, n=n, k=k, step=step), neighbours=neighbours)
    assert np.isfinite(similarity).all()
    assert ((similarity >= 0) & (similarity <= 1)).all()
    assert (similarity == similarity.T).all()
    assert (np.diag(similarity) == 1.0).all()


@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_strictly_monotone_maps_change_nothing(seed):
    layers = related_layers(seed)
    mapped = layers.copy()
    mapped[0] = np.exp(layers[0])
    mapped[1, :, 0] = layers[1, :, 0] ** 3
    mapped[2] = 5.0 * layers[2] - 40.0
    assert (npib_matrix(mapped) == npib_matrix(layers)).all()


@given(seed=SEEDS, ties=st.booleans())
@settings(max_examples=25, deadline=None)
def test_signs_and_order_of_coordinates_change_nothing(seed, ties):
    layers = related_layers(seed, k=3)
    if ties:
        layers = np.round(layers, 1)
    turned = layers.copy()
    turned[0] *= [-1.0, 1.0, -1.0]
    turned[1] = layers[1][:, [2, 0, 1]]
    turned[2] *= -1.0
    assert (npib_matrix(turned) == npib_matrix(layers)).all()


@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_order_of_samples_changes_nothing_but_breaking_the_pairing_does(seed):
    layers = related_layers(seed, step=0.1)
    order = np.random.default_rng(seed).permutation(layers.shape[1])
    assert_allclose(npib_matrix(layers[:, order]), npib_matrix(layers), atol=1e-12)
    assert npib(layers[0][order], layers[1]) < npib(layers[0], layers[1])


@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_layers_are_permuted_as_they_come(seed):
    layers = related_layers(seed)
    order = np.random.default_rng(seed).permutation(len(layers))
    assert_allclose(npib_matrix(layers[order]), npib_matrix(layers)[np.ix_(order, order)], atol=1e-12)


@pytest.mark.parametrize("n", [PRIME, 250])
def test_identical_layers_are_one_and_independent_layers_near_zero(n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, n, 2))
    similarity = npib_matrix([x, y, x])
    assert similarity[0, 2] == 1.0
    assert similarity[0, 1] == similarity[2, 1] < 0.1


def test_similarity_falls_with_noise():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 250, 2))
    similarity = [npib(x, x + level * noise) for level in (0.0, 0.01, 0.1, 0.5, 2.0)]
    assert similarity == sorted(similarity, reverse=True)
    assert similarity[0] == 1.0
    assert similarity[0] > similarity[-1] + 0.5


@pytest.mark.parametrize("n", [PRIME, 250])
@pytest.mark.parametrize("exponent", [2.0, 0.5])
def test_planted_copy_is_found_through_the_diffusion_map(n, exponent):
    # Hidden states to similarity, as a method does it: layer 2 is layer 1 turned and scaled, the others are unrelated.
    rng = np.random.default_rng(n)
    scales = np.array([6.0, 3.0, *[0.5] * 14])
    states = rng.normal(size=(4, n, 16)) * scales
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    states[2] = 40.0 * states[1] @ rotation + 1.0
    similarity = npib_matrix([diffusion_map(layer, exponent=exponent).coordinates for layer in states])
    assert similarity[1, 2] == pytest.approx(1.0, abs=1e-3)
    others = similarity[np.triu_indices(4, 1)]
    assert np.sort(others)[-2] < 0.1


def test_number_of_threads_changes_nothing():
    states = np.random.default_rng(0).normal(size=(3, 250, 64)) * np.array([6.0, 3.0, *[0.5] * 62])
    states[1:] += states[:1]
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(npib_matrix([diffusion_map(layer).coordinates for layer in states]))
    assert_allclose(found[1], found[0], atol=1e-12)
    assert 0.05 < found[0][0, 1] < 1.0
