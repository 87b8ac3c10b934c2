"""The losses against sums of their own in float64, and against guided-diffusion's interface."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from bounds import UNIT
from float64_runs import UNIT_OF_FLOAT64, check
from torch import Tensor

import dd_kernels as dd
from dd_kernels import losses, q_sample
from dd_kernels.integrations.guided_diffusion import GaussianDiffusion, LossType, ModelMeanType, process

SCHEDULE = dd.linear_schedule(100, 1e-3, 0.1)
T = torch.tensor([0, 7, 99])
COUNT = 32  # values of a sample, whose sum rounds as often


def _batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_0 on the grid of 8-bit images, noise, x_t and a model's output of twice the channels."""
    generator = torch.Generator().manual_seed(0)
    x_start = (torch.randint(256, (3, 2, 4, 4), generator=generator) / 127.5 - 1).to(dtype)
    noise, out = (torch.randn(3, c, 4, 4, generator=generator, dtype=torch.float64).to(dtype) for c in (2, 4))
    return x_start, noise, q_sample(x_start, T, SCHEDULE, noise), out


def test_simple_loss_is_the_mean_square_of_each_sample() -> None:
    _, noise, _, out = _batch()
    expected = [np.mean((noise[n].numpy() - out[n, :2].numpy()) ** 2) for n in range(3)]
    np.testing.assert_allclose(losses.simple_loss(out[:, :2], noise), expected, rtol=COUNT * UNIT_OF_FLOAT64)


def test_the_bound_is_a_divergence_after_the_first_timestep_and_a_likelihood_at_it() -> None:
    x_start, _, x_t, _ = _batch()
    mean, log_variance = 0.9 * x_t, torch.full_like(x_t, -4.0)
    bound = losses.variational_bound(x_start, x_t, T, mean, log_variance, SCHEDULE)
    likelihood = losses.discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
    assert bound[0] == pytest.approx(-float(likelihood[0].mean()) / math.log(2), rel=COUNT * UNIT_OF_FLOAT64)
    for n in (1, 2):
        t = int(T[n])
        a, b, remaining = SCHEDULE.alpha_bar_prev[t], SCHEDULE.beta[t], 1 - SCHEDULE.alpha_bar[t]
        q_mean = math.sqrt(a) * b / remaining * x_start[n] + math.sqrt(1 - b) * (1 - a) / remaining * x_t[n]
        q = torch.distributions.Normal(q_mean, math.sqrt((1 - a) / remaining * b))
        p = torch.distributions.Normal(mean[n], torch.exp(0.5 * log_variance[n]))
        expected = float(torch.distributions.kl_divergence(q, p).mean()) / math.log(2)
        # 1 - alpha_bar, at least 1e-3, is of either's float64 roundings, a thousand of them at most.
        assert bound[n] == pytest.approx(expected, rel=1e-11)


def test_the_prior_term_is_0_for_a_standard_normal_and_grows_with_the_mean() -> None:
    mean = torch.zeros(2, 3)
    assert losses.prior_term(mean, mean).tolist() == [0, 0]
    # 2 is exact; log 2, and the division by it, round.
    assert losses.prior_term(mean + 2, mean).tolist() == pytest.approx([2 / math.log(2)] * 2, rel=2 * UNIT)


@pytest.mark.parametrize(("prediction", "mean_type"), [("epsilon", "EPSILON"), ("x_start", "START_X")])
def test_the_hybrid_loss_is_guided_diffusions(prediction: str, mean_type: str) -> None:
    """Each is within its bound of float64, where they are the same."""
    diffusion = GaussianDiffusion(
        betas=SCHEDULE.beta, model_mean_type=ModelMeanType[mean_type], loss_type=LossType.RESCALED_MSE
    )
    x_start, noise, _, out = _batch(torch.float32)

    def ours(dtype: torch.dtype) -> dict[str, Tensor]:
        x_0, z, given = (x.to(dtype) for x in (x_start, noise, out))
        x_t = q_sample(x_0, T, SCHEDULE, z)
        target = z if prediction == "epsilon" else x_0
        return {"loss": losses.hybrid_loss(given, target, x_0, x_t, T, SCHEDULE, prediction=prediction)}

    def theirs(dtype: torch.dtype) -> dict[str, Tensor]:
        x_0, z, given = (x.to(dtype) for x in (x_start, noise, out))
        return {"loss": diffusion.training_losses(lambda x, t: given, x_0, T, noise=z)["loss"]}

    exact = theirs(torch.float64)
    check(ours, exact, losses, sys.modules[__name__])
    check(theirs, exact, process)


def test_the_hybrid_loss_trains_the_variance_by_the_bound_and_the_mean_by_the_square() -> None:
    x_start, noise, x_t, out = _batch(torch.float32)
    out.requires_grad_()
    gradients = [
        torch.autograd.grad(losses.hybrid_loss(out, noise, x_start, x_t, T, SCHEDULE, weight=w).sum(), out)[0]
        for w in (0.0, 1.0)
    ]
    assert torch.equal(gradients[0][:, :2], gradients[1][:, :2])
    assert gradients[0][:, 2:].abs().max() == 0
    assert (gradients[1][:, 2:].flatten(1).abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_decoders_bins_of_every_grey_level_add_up_to_1(levels: int) -> None:
    grey = torch.linspace(-1, 1, levels, dtype=torch.float64)
    for mean, scale in ((0.0, 0.3), (-0.97, 0.02), (2.0, 1.0)):
        means, log_scales = torch.full_like(grey, mean), torch.full_like(grey, math.log(scale))
        log_p = losses.discretized_gaussian_log_likelihood(grey, means=means, log_scales=log_scales, levels=levels)
        # Probabilities below 1e-12 count as that.
        assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=levels * 1e-12 + 1e-14)


def test_errors_name_the_argument() -> None:
    x_start, noise, x_t, out = _batch()
    with pytest.raises(ValueError, match="out must have 4 channels"):
        losses.hybrid_loss(out[:, :2], noise, x_start, x_t, T, SCHEDULE)
    with pytest.raises(ValueError, match=r"levels must be in \[2, 1024\]; got 1"):
        losses.discretized_gaussian_log_likelihood(x_start, means=x_start, log_scales=x_start, levels=1)
    with pytest.raises(ValueError, match="prediction must be one of"):
        losses.hybrid_loss(out, noise, x_start, x_t, T, SCHEDULE, prediction="x0")
