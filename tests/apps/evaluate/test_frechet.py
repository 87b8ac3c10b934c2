"""The Fréchet distance against closed forms."""

import numpy as np
import pytest
import torch

from dd_kernels.apps.evaluate import frechet_distance, moments


def random_gaussian(size, seed):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((size, size + 2))
    return rng.standard_normal(size), factor @ factor.T


class TestFrechet:
    def test_one_dimension(self):
        """In one dimension the distance is (m - m')^2 + (s - s')^2."""
        assert frechet_distance([1.0], [[4.0]], [-2.0], [[9.0]]) == pytest.approx(9 + 1)

    def test_commuting_covariances(self):
        """With common eigenvectors, |m - m'|^2 + sum (sqrt(a) - sqrt(b))^2; an eigenvalue may be 0."""
        rng = np.random.default_rng(0)
        basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
        a, b = np.array([0.0, 1, 2, 3, 4, 50]), np.array([3.0, 0, 2, 1, 9, 2])
        mean_a, mean_b = rng.standard_normal((2, 6))
        wanted = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
        found = frechet_distance(mean_a, basis * a @ basis.T, mean_b, basis * b @ basis.T)
        # The 0 comes back as +-1e-15, whose root counts.
        assert found == pytest.approx(wanted, rel=1e-7)

    def test_any_covariances(self):
        """The distance equals that from eigenvalues of the unsymmetric product, as the formula stands in the paper."""
        (mean_a, cov_a), (mean_b, cov_b) = random_gaussian(8, 0), random_gaussian(8, 1)
        root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
        wanted = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * root
        assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(wanted, rel=1e-9)

    def test_symmetric_and_zero_for_equals(self):
        a, b = random_gaussian(8, 0), random_gaussian(8, 1)
        assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-12)
        assert 0 <= frechet_distance(*a, *a) < 1e-11 * np.trace(a[1])

    def test_moves_with_both(self):
        """A rotation, a reflection and a shift of both sets of features change nothing; a scale c is c^2."""
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((50, 5)), 1 + rng.standard_normal((70, 5)) * [1, 2, 3, 4, 5]
        basis, _ = np.linalg.qr(rng.standard_normal((5, 5)))
        before = frechet_distance(*moments(a), *moments(b))
        moved = frechet_distance(*moments(3 * a @ basis + 7), *moments(3 * b[::-1] @ basis + 7))
        assert moved == pytest.approx(9 * before, rel=1e-10)

    def test_moments(self):
        features = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
        mean, cov = moments(torch.from_numpy(features))
        centred = features.astype(np.float64) - features.astype(np.float64).mean(0)
        np.testing.assert_allclose(cov, centred.T @ centred / 6, rtol=1e-12)
        assert mean.dtype == cov.dtype == np.float64
        assert moments(features[:, :1])[1].shape == (1, 1)

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (np.zeros((1, 3)), r"features must be \[N, D\] with N of at least 2; got \[1, 3\]"),
            (np.zeros(3), r"got \[3\]"),
            (np.array([[0.0], [np.nan], [np.inf]]), "features must be finite; got NaN or inf in 2 rows"),
        ],
    )
    def test_bad_features(self, features, message):
        with pytest.raises(ValueError, match=message):
            moments(features)

    def test_bad_shapes(self):
        with pytest.raises(ValueError, match=r"cov_b must have the shape \[2, 2\]; got \[3, 3\]"):
            frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(3))
