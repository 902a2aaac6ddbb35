"""Diffusion map against circulant closed forms, invariances, and its refusals."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from threadpoolctl import threadpool_limits

from mka.errors import NumericsError, RecipeError
from mka.similarity.diffusion import diffusion_map, pairwise_distances


def circle(angles):
    return np.column_stack([np.cos(angles), np.sin(angles)])


def uniform_circle(n=200):
    return circle(2 * np.pi * np.arange(n) / n)


def projector(coordinates):
    """Orthogonal projector on the span of the columns: what is left of a map when a rotation is arbitrary."""
    basis = np.linalg.qr(coordinates)[0]
    return basis @ basis.T


@pytest.fixture
def cloud():
    return np.random.default_rng(7).normal(size=(90, 6)) * np.array([5.0, 3.0, 1.0, 1.0, 1.0, 1.0])


class TestPairwiseDistances:
    def test_3_4_5(self):
        assert_allclose(pairwise_distances([[0, 0], [3, 0], [0, 4]]), [[0, 3, 4], [3, 0, 5], [4, 5, 0]], rtol=1e-15)

    # The sizes on which the authors' chunked routine wrote false zeros: a prime above 100, and several chunks.
    @pytest.mark.parametrize("n", [101, 250])
    def test_no_false_zeros(self, n):
        x = np.random.default_rng(n).normal(size=(n, 3))
        d = pairwise_distances(x)
        assert d.dtype == np.float64
        assert np.count_nonzero(d == 0.0) == n
        assert_allclose(d, np.linalg.norm(x[:, None] - x[None], axis=2), atol=1e-13)
        assert (d == d.T).all()

    @pytest.mark.parametrize("shape", [(4,), (4, 5, 6), (1, 3), (4, 0)])
    def test_refuses_other_shapes(self, shape):
        with pytest.raises(NumericsError) as refusal:
            pairwise_distances(np.zeros(shape))
        assert str(shape) in str(refusal.value)
        assert "allowed" in str(refusal.value)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_refuses_nan_and_infinity(self, bad):
        x = np.zeros((4, 3))
        x[2, 1] = bad
        with pytest.raises(NumericsError, match=r"1 values of shape \(4, 3\).*first in sample 2"):
            pairwise_distances(x)


class TestCircle:
    """On equally spaced points of a circle every matrix is circulant, so that Fourier modes solve it."""

    @pytest.mark.parametrize(("exponent", "known"), [(2.0, (0.977235, 0.912049)), (0.5, (0.434449, 0.250170))])
    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
    def test_eigenvalues(self, exponent, known, alpha):
        n, sigma = 200, 0.3
        angles = 2 * np.pi * np.arange(n) / n
        row = np.exp(-((2 * np.abs(np.sin(angles / 2)) / sigma) ** exponent))
        exact = [float(row @ np.cos(m * angles) / row.sum()) for m in range(3)]
        assert_allclose(exact[1:], known, atol=1e-6)
        found = diffusion_map(
            uniform_circle(n), coordinates=4, exponent=exponent, bandwidth=sigma, alpha=alpha
        ).eigenvalues
        assert_allclose(found, [exact[0], exact[1], exact[1], exact[2], exact[2]], atol=1e-12)

    @pytest.mark.parametrize("exponent", [2.0, 0.5])
    def test_embeds_as_a_circle_of_radius_root_two(self, exponent):
        x = uniform_circle()
        psi = diffusion_map(x, exponent=exponent, bandwidth=0.3).coordinates
        assert psi.shape == (200, 2)
        assert_allclose(np.linalg.norm(psi, axis=1), np.sqrt(2), atol=1e-9)
        # The eigenvalues coincide, so only the plane is determined, and it is the plane of the circle itself.
        assert_allclose(projector(psi), projector(x), atol=1e-9)

    def test_alpha_divides_the_density_out(self):
        x = circle(2 * np.pi * np.random.default_rng(0).beta(2, 2, size=400))
        variation = {}
        for alpha in (0.0, 0.5, 1.0):
            radius = np.linalg.norm(diffusion_map(x, bandwidth=0.2, alpha=alpha).coordinates, axis=1)
            variation[alpha] = radius.std() / radius.mean()
        assert variation[0.0] > 1.3 * variation[0.5]
        assert variation[0.5] > 0.25
        # Divided out entirely, the circle comes back as a circle.
        assert variation[1.0] < 0.1


class TestEigenproblem:
    @pytest.mark.parametrize(("exponent", "alpha"), [(2.0, 0.5), (0.5, 0.5), (1.0, 0.0), (2.0, 1.0)])
    def test_coordinates_are_eigenvectors_of_the_markov_matrix(self, cloud, exponent, alpha):
        found = diffusion_map(cloud, coordinates=3, exponent=exponent, alpha=alpha)
        d = np.linalg.norm(cloud[:, None] - cloud[None], axis=2)
        kernel = np.exp(-((d / np.median(d[np.triu_indices(len(d), 1)])) ** exponent))
        q = kernel.sum(axis=1)
        kernel = kernel / np.outer(q, q) ** alpha
        # psi = u / u_0 are the right eigenvectors of the random walk, which has the eigenvalues of A.
        walk = kernel / kernel.sum(axis=1, keepdims=True)
        assert_allclose(walk @ found.coordinates, found.coordinates * found.eigenvalues[1:], atol=1e-10)
        assert_allclose(found.eigenvalues, np.sort(np.linalg.eigvals(walk).real)[::-1][:4], atol=1e-10)

    def test_first_eigenvalue_is_one_and_all_are_in_the_unit_interval(self, cloud):
        for exponent in (0.5, 1.0, 2.0):
            values = diffusion_map(cloud, coordinates=20, exponent=exponent).eigenvalues
            assert values.shape == (21,)
            assert values[0] == pytest.approx(1.0, abs=1e-12)
            assert (np.diff(values) <= 0).all()
            assert values[-1] > 0.0

    def test_coordinates_are_orthonormal_in_the_stationary_measure(self, cloud):
        psi = diffusion_map(cloud, coordinates=3, alpha=0.0).coordinates
        kernel = np.exp(-((pairwise_distances(cloud) / diffusion_map(cloud).bandwidth) ** 2))
        measure = kernel.sum(axis=1) / kernel.sum()
        assert_allclose(psi.T @ (measure[:, None] * psi), np.eye(3), atol=1e-10)
        assert_allclose(measure @ psi, 0.0, atol=1e-10)


class TestBandwidth:
    def test_median_heuristic(self, cloud):
        found = diffusion_map(cloud)
        distances = pairwise_distances(cloud)[np.triu_indices(len(cloud), 1)]
        assert found.bandwidth == np.median(distances)
        # An odd number of pairs (90 * 89 / 2) has its median pair at D = sigma.
        assert len(distances) % 2 == 1
        assert found.kernel_median == pytest.approx(np.exp(-1.0), abs=1e-12)

    def test_given_value_is_used(self, cloud):
        assert diffusion_map(cloud, bandwidth=4.5).bandwidth == 4.5
        assert diffusion_map(cloud, bandwidth=4.5).kernel_median != pytest.approx(np.exp(-1.0), abs=1e-3)


class TestInvariance:
    def test_isometry(self, cloud):
        rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0]
        a, b = diffusion_map(cloud), diffusion_map(cloud @ rotation + 3.0)
        assert_allclose(b.eigenvalues, a.eigenvalues, atol=1e-12)
        assert_allclose(np.abs(b.coordinates), np.abs(a.coordinates), atol=1e-9)

    def test_joint_scale_of_data_and_bandwidth(self, cloud):
        a, b = diffusion_map(cloud, bandwidth=4.0), diffusion_map(cloud * 1000, bandwidth=4000.0)
        assert_allclose(b.eigenvalues, a.eigenvalues, atol=1e-12)
        assert_allclose(np.abs(b.coordinates), np.abs(a.coordinates), atol=1e-9)

    def test_order_of_samples(self, cloud):
        order = np.random.default_rng(1).permutation(len(cloud))
        a, b = diffusion_map(cloud), diffusion_map(cloud[order])
        assert_allclose(np.abs(b.coordinates), np.abs(a.coordinates[order]), atol=1e-9)

    def test_number_of_threads(self, cloud):
        with threadpool_limits(1):
            a = diffusion_map(cloud)
        with threadpool_limits(2):
            b = diffusion_map(cloud)
        assert_allclose(np.abs(b.coordinates), np.abs(a.coordinates), atol=1e-10)


class TestRefusals:
    def test_identity_kernel(self):
        # The released code's sigma with Coifman & Lafon's exponent, in the width of an 8-billion-parameter model.
        x = np.random.default_rng(0).normal(size=(40, 4096))
        with pytest.raises(NumericsError, match=r"identity.*sigma 8, exponent 2.*bandwidth 'median'"):
            diffusion_map(x, bandwidth=8.0)
        assert diffusion_map(x, bandwidth=8.0, exponent=0.5).kernel_median > 0.01

    def test_all_ones_kernel(self, cloud):
        with pytest.raises(NumericsError, match=r"all ones.*sigma 1e\+09"):
            diffusion_map(cloud, bandwidth=1e9)

    def test_identical_samples(self):
        with pytest.raises(NumericsError, match="median distance of 30 samples is 0"):
            diffusion_map(np.ones((30, 4)))
        with pytest.raises(NumericsError, match="all ones"):
            diffusion_map(np.ones((30, 4)), bandwidth=8.0)

    def test_parts_that_do_not_see_each_other(self, cloud):
        with pytest.raises(NumericsError, match="parts that do not see each other"):
            diffusion_map(np.vstack([cloud, cloud + 1e6]), bandwidth=5.0)

    def test_outlying_samples_are_named(self, cloud):
        # Mean pooling over a massive activation makes such samples in real models.
        cloud[[17, 42]] += 400.0
        with pytest.raises(NumericsError, match=r"2 of 90 samples: 17, 42\).*use a smaller exponent"):
            diffusion_map(cloud)
        assert diffusion_map(cloud, exponent=0.5).coordinates.shape == (90, 2)

    @pytest.mark.parametrize("pairs", [2, 30, 100])
    def test_many_parts(self, pairs):
        # Each pair is a part with eigenvalue 1, more of them than the partial eigen-solver can count.
        x = (
            np.random.default_rng(0).uniform(0.5, 1.5, size=(pairs, 1)) * [[0.0, 1.0]]
            + 1000 * np.arange(pairs)[:, None]
        )
        with pytest.raises(NumericsError, match=r"second eigenvalue 1 with sigma 1,.*parts that do not see each other"):
            diffusion_map(x.reshape(-1, 1), bandwidth=1.0)

    def test_fewer_places_than_coordinates(self):
        # Two places have one coordinate between them.
        x = np.repeat([[0.0, 0.0], [1.0, 0.0]], 10, axis=0)
        assert diffusion_map(x, coordinates=1).coordinates.shape == (20, 1)
        with pytest.raises(NumericsError, match="only 1 of 2 coordinates"):
            diffusion_map(x, coordinates=2)

    def test_too_few_samples(self):
        x = np.random.default_rng(0).normal(size=(3, 5))
        assert diffusion_map(x, coordinates=2).coordinates.shape == (3, 2)
        with pytest.raises(NumericsError, match="3 samples for 3 coordinates; allowed: at least 4"):
            diffusion_map(x, coordinates=3)

    def test_samples_by_tokens_by_width(self):
        # The authors' routine flattened this and kept the first prompt's tokens.
        with pytest.raises(NumericsError, match=r"\(8, 512, 16\).*pool"):
            diffusion_map(np.zeros((8, 512, 16)))

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("coordinates", 0),
            ("exponent", 0.0),
            ("exponent", 2.5),
            ("exponent", np.nan),
            ("alpha", -0.1),
            ("alpha", 1.1),
            ("bandwidth", 0.0),
            ("bandwidth", np.inf),
            ("bandwidth", "mean"),
        ],
    )
    def test_options(self, cloud, option, value):
        with pytest.raises(RecipeError, match=f"{option} is .*allowed"):
            diffusion_map(cloud, **{option: value})
