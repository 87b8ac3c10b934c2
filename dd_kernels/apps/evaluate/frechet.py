"""The Fréchet distance of two sets of feature vectors, each taken as a Gaussian."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def moments(features: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean [D] and the unbiased covariance [D, D], in float64, of features [N, D].

    Raises:
        ValueError: features is not [N, D] with N of at least 2, or not finite.
    """
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 1:
        raise ValueError(f"features must be [N, D] with N of at least 2; got {list(values.shape)}")
    if not np.all(np.isfinite(values)):
        raise ValueError(f"features must be finite; got NaN or inf in {int((~np.isfinite(values)).any(1).sum())} rows")
    return values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False))


def frechet_distance(mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike) -> float:
    r"""Returns the Fréchet distance of two Gaussians, eq. 6 of Heusel et al. (2017); "FID" is its value.

    .. math:: |\mu_a - \mu_b|^2 + Tr(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2})

    The square root of the product has the eigenvalues of the symmetric matrix
    (\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2})^{1/2}. Only their sum enters, so no general matrix root is
    taken, and singular covariances are allowed.

    Args:
        mean_a, mean_b: [D].
        cov_a, cov_b: [D, D], symmetric and positive semi-definite.

    Raises:
        ValueError: the shapes do not fit one another.
    """
    mean_a, cov_a, mean_b, cov_b = (np.asarray(v, dtype=np.float64) for v in (mean_a, cov_a, mean_b, cov_b))
    size = mean_a.size
    for name, value, shape in (
        ("mean_a", mean_a, (size,)),
        ("cov_a", cov_a, (size, size)),
        ("mean_b", mean_b, (size,)),
        ("cov_b", cov_b, (size, size)),
    ):
        if value.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}; got {list(value.shape)}")
    values, vectors = np.linalg.eigh(cov_a)
    # Rounding makes eigenvalues that should be 0 slightly negative.
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov_b @ root)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2.0 * np.sqrt(np.maximum(product, 0.0)).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + max(trace, 0.0))
