"""guided-diffusion's module ``losses``: the terms of the variational bound, which are in :mod:`dd_kernels.losses`."""

from ...losses import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, mean_flat, normal_kl

__all__ = ["approx_standard_normal_cdf", "discretized_gaussian_log_likelihood", "mean_flat", "normal_kl"]
