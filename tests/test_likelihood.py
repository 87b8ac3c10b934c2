"""The bound against what is known in closed form: Gaussian data, affine models, and guided-diffusion's own loop."""

from __future__ import annotations

import itertools
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from float64_runs import check
from torch import Tensor

import dd_kernels as dd
from dd_kernels import likelihood, losses
from dd_kernels.integrations.guided_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType, process
from dd_kernels.integrations.guided_diffusion.gaussian_diffusion import LossType
from dd_kernels.likelihood import Process, split_bound, three_term_bound

SCHEDULE = dd.linear_schedule(20, 1e-3, 0.6)
ALPHA_BAR = torch.tensor(SCHEDULE.alpha_bar)
GREY = np.arange(256) / 127.5 - 1


class GaussianData:
    """Grey levels whose probabilities are those of a Gaussian, and the best affine guess of x_0 from x_t.

    Attributes:
        mean, variance: of the grey levels, exactly.
        entropy: in bits.
    """

    def __init__(self, centre: float = 0.1, spread: float = 0.3) -> None:
        p = np.exp(-0.5 * ((GREY - centre) / spread) ** 2)
        self.p = p / p.sum()
        self.mean = float(self.p @ GREY)
        self.variance = float(self.p @ (GREY - self.mean) ** 2)
        self.entropy = float(-self.p @ np.log2(self.p))

    def draw(self, n: int) -> Tensor:
        levels = np.random.default_rng(0).choice(GREY, p=self.p, size=(n, 1, 2, 2))
        return torch.from_numpy(levels)

    def error(self, alpha_bar: np.ndarray) -> np.ndarray:
        """The variance of x_0 given x_t."""
        return self.variance * (1 - alpha_bar) / (alpha_bar * self.variance + 1 - alpha_bar)

    def guess(self, x: Tensor, t: Tensor) -> Tensor:
        """The mean of x_0 given x_t."""
        alpha_bar = ALPHA_BAR[t].reshape(-1, 1, 1, 1)
        gain = alpha_bar.sqrt() * self.variance / (alpha_bar * self.variance + 1 - alpha_bar)
        return self.mean + gain * (x - alpha_bar.sqrt() * self.mean)

    def model(self, prediction: str):
        """The ideal model of the prediction."""

        def ideal(x: Tensor, t: Tensor) -> Tensor:
            x0, alpha_bar = self.guess(x, t), ALPHA_BAR[t].reshape(-1, 1, 1, 1)
            epsilon = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
            v = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0
            return {"x_start": x0, "epsilon": epsilon, "v": v}[prediction]

        return ideal

    def reverse_variance(self) -> np.ndarray:
        """The variance of x_{t-1} given x_t, [T]; that of x_0 at first."""
        coefficient = SCHEDULE.posterior_mean_coef_x_start
        return SCHEDULE.posterior_variance + coefficient**2 * self.error(SCHEDULE.alpha_bar)


def _fixed(variance: str) -> np.ndarray:
    small = SCHEDULE.posterior_variance_clipped
    return small if variance == "fixed_small" else np.append(small[0], SCHEDULE.beta[1:])


def _decoder(data: GaussianData, variance: float) -> float:
    """E[-log2 p(x_0 | x_1)] by a sum over grey levels and a trapezoidal rule over the noise."""
    noise, step = np.linspace(-9, 9, 4001, retstep=True)
    alpha_bar, scale = SCHEDULE.alpha_bar[0], math.sqrt(variance)
    x = math.sqrt(alpha_bar) * GREY[:, None] + math.sqrt(1 - alpha_bar) * noise
    gain = math.sqrt(alpha_bar) * data.variance / (alpha_bar * data.variance + 1 - alpha_bar)
    off = GREY[:, None] - (data.mean + gain * (x - math.sqrt(alpha_bar) * data.mean))

    def cdf(z: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    below = np.where(GREY[:, None] < -0.999, 0.0, cdf((off - 1 / 255) / scale))
    upto = np.where(GREY[:, None] > 0.999, 1.0, cdf((off + 1 / 255) / scale))
    density = np.exp(-0.5 * noise**2) / math.sqrt(2 * math.pi)
    return float(data.p @ (-np.log2(np.maximum(upto - below, 1e-12)) @ density) * step)


def _within(values: Tensor, expected: float) -> None:
    """Asserts that the mean of independent values is ``expected``, to five standard errors."""
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - expected) < 5 * error + 1e-12


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_every_term_of_gaussian_data_is_the_one_in_closed_form(prediction: str, variance: str) -> None:
    data = GaussianData()
    bound = split_bound(Process(data.model(prediction), SCHEDULE, prediction, variance, clip=None), data.draw(4000))
    assert bound.terms.shape == (4000, 20)
    chosen, posterior = _fixed(variance), SCHEDULE.posterior_variance
    gap = SCHEDULE.posterior_mean_coef_x_start**2 * data.error(SCHEDULE.alpha_bar)
    for t in range(1, 20):
        ratio = posterior[t] / chosen[t]
        expected = 0.5 * (ratio - math.log(ratio) - 1 + gap[t] / chosen[t]) / math.log(2)
        _within(bound.terms[:, t], expected)
    _within(bound.terms[:, 0], _decoder(data, chosen[0]))
    last = SCHEDULE.alpha_bar[-1]
    prior = 0.5 * (last * (data.variance + data.mean**2 - 1) - math.log(1 - last)) / math.log(2)
    _within(bound.prior, prior)
    assert torch.equal(bound.total, bound.terms.sum(dim=1) + bound.prior)


@pytest.mark.parametrize("variance", ["learned_range", "learned"])
def test_with_the_true_variances_the_bound_is_the_entropy(variance: str) -> None:
    data, ideal = GaussianData(), GaussianData().model("epsilon")
    log = torch.from_numpy(np.log(data.reverse_variance()))
    if variance == "learned_range":
        low, high = SCHEDULE.posterior_log_variance_clipped, np.log(SCHEDULE.beta)
        log = 2 * (log - torch.from_numpy(low)) / torch.from_numpy(high - low) - 1

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((ideal(x, t), log[t].reshape(-1, 1, 1, 1).expand(x.shape)), dim=1)

    bound = split_bound(Process(model, SCHEDULE, variance=variance, clip=None), data.draw(20_000))
    last = SCHEDULE.alpha_bar[-1]
    # The divergence of x_T's distribution from the prior is in the bound, and in nothing else that it is made of.
    spread = last * data.variance + 1 - last
    off = 0.5 * (spread + last * data.mean**2 - 1 - math.log(spread)) / math.log(2)
    error = float(bound.total.std()) / math.sqrt(len(bound.total))
    # The grey levels are a Gaussian's to a bin, 0.026 spreads wide, and the decoder's tanh is within 3e-4 of its bins'
    # probabilities of 0.1: 2 * 3e-4 / 0.1 / log 2 = 0.009 bits.
    assert abs(float(bound.total.mean()) - data.entropy - off) < 5 * error + 0.009
    fixed = split_bound(Process(ideal, SCHEDULE, clip=None), data.draw(20_000))
    assert float(fixed.total.mean()) > float(bound.total.mean()) + 0.01


def _affine(t_max: int):
    """An affine model of x, another at every timestep."""
    slopes, offsets = torch.linspace(0.9, 0.2, t_max).double(), torch.linspace(-0.3, 0.4, t_max).double()
    return lambda x, t: slopes[t].reshape(-1, 1) * x + offsets[t].reshape(-1, 1)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_both_ways_to_write_the_bound_have_the_same_expectation(variance: str) -> None:
    """Each term is a quadratic in the noise of an affine model, which three nodes of Gauss and Hermite integrate."""
    schedule = dd.linear_schedule(4, 0.1, 0.6)
    process, x_start = Process(_affine(4), schedule, variance=variance, clip=None), 0.4
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    weights = weights / weights.sum()

    def average(term, draws: int) -> float:
        """Returns E[term(z_1, z_2 ...)] over independent normal noise."""
        z = torch.tensor(list(itertools.product(nodes, repeat=draws)))
        share = torch.tensor([math.prod(each) for each in itertools.product(weights, repeat=draws)])
        return float(share @ term(*(column[:, None] for column in z.unbind(1))))

    def at(t: int, x: Tensor) -> Tensor:
        return torch.full((len(x),), t)

    def split(t: int):
        def term(z: Tensor) -> Tensor:
            x_0 = torch.full_like(z, x_start)
            x_t = dd.q_sample(x_0, at(t, z), schedule, z)
            p = process.reverse(x_t, at(t, z))
            return losses.variational_bound(x_0, x_t, at(t, z), p.mean, p.log_variance, schedule)

        return average(term, 1)

    def step(x: Tensor, t: int, z: Tensor) -> Tensor:
        return math.sqrt(schedule.alpha[t]) * x + math.sqrt(schedule.beta[t]) * z

    def consistency(t: int):
        def term(z_before: Tensor, z: Tensor, z_after: Tensor) -> Tensor:
            before = torch.full_like(z, x_start)
            if t > 0:
                before = dd.q_sample(before, at(t - 1, z), schedule, z_before)
            x = step(before, t, z)
            p = process.reverse(step(x, t + 1, z_after), at(t + 1, z))
            return losses.consistency_term(before, x, at(t, z), p.mean, p.log_variance, schedule)

        return average(term, 3)

    def prior(z: Tensor) -> Tensor:
        before = dd.q_sample(torch.full_like(z, x_start), at(2, z), schedule, z)
        q = schedule.q_step(before, at(3, z))
        return losses.prior_term(q.mean, q.log_variance.expand(z.shape))

    q = schedule.q_mean_variance(torch.full((1, 1), x_start, dtype=torch.float64), torch.tensor([3]))
    one = sum(split(t) for t in (1, 2, 3)) + float(losses.prior_term(q.mean, q.log_variance))
    other = sum(consistency(t) for t in (0, 1, 2)) + average(prior, 1)
    # Ten averages of up to 27 terms, each of some tens of float64 roundings.
    assert other == pytest.approx(one, rel=1e-12)
    assert one > 0.1


def test_the_estimates_of_both_ways_agree_to_their_errors() -> None:
    schedule = dd.linear_schedule(5, 0.05, 0.5)
    process = Process(_affine(5), schedule, clip=None)
    x_start = torch.from_numpy(np.random.default_rng(1).choice(GREY, (40_000, 1)))
    one, other = split_bound(process, x_start), three_term_bound(process, x_start, seed=1)
    assert other.consistency.shape == (40_000, 4)
    assert torch.equal(other.total, other.reconstruction + other.consistency.sum(1) + other.prior)
    difference = one.total - other.total
    assert abs(float(difference.mean())) < 5 * float(difference.std()) / 200
    # Reconstruction is L_0 itself, at other noise.
    difference = one.terms[:, 0] - other.reconstruction
    assert abs(float(difference.mean())) < 5 * float(difference.std()) / 200
    alone = three_term_bound(Process(_affine(1), dd.linear_schedule(1, 0.5, 0.5), clip=None), x_start[:3])
    assert torch.equal(alone.total, alone.reconstruction + alone.prior)


@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE", "LEARNED"])
def test_the_bound_is_guided_diffusions(variance: str) -> None:
    """Each is within its bound of float64, where they are the same."""
    schedule = dd.linear_schedule(12, 1e-3, 0.3)
    x_start = (torch.randint(256, (3, 2, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).float()
    channels = 4 if variance.startswith("LEARNED") else 2
    mix = 0.3 * torch.randn(channels, 2, generator=torch.Generator().manual_seed(1))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.einsum("oc,nchw->nohw", mix.to(x.dtype), x) + 0.01 * t.reshape(-1, 1, 1, 1)

    def ours(dtype: torch.dtype) -> dict[str, Tensor]:
        bound = split_bound(
            Process(model, schedule, variance=variance.lower()), x_start.to(dtype), seed=4, first_sample=7
        )
        return {"vb": bound.terms.flip(1), "total_bpd": bound.total}

    diffusion = GaussianDiffusion(
        betas=schedule.beta,
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType[variance],
        loss_type=LossType.MSE,
    )

    def theirs(dtype: torch.dtype) -> dict[str, Tensor]:
        draws = (dd.randn((3, 2, 4, 4), seed=4, first_sample=7, draw=t, stream=9) for t in reversed(range(12)))
        with patch.object(torch, "randn_like", lambda x: next(draws).to(x.dtype)):
            terms = diffusion.calc_bpd_loop(model, x_start.to(dtype))
        return {name: terms[name] for name in ("vb", "total_bpd")}

    exact = theirs(torch.float64)
    check(ours, exact, losses, likelihood)
    check(theirs, exact, process)


def test_a_bound_does_not_depend_on_the_batch_but_on_the_seed() -> None:
    schedule, x_start = dd.linear_schedule(5), torch.rand(5, 1, 2, 2) * 2 - 1
    process = Process(lambda x, t: 0.5 * x, schedule)
    for bound in (split_bound, three_term_bound):
        whole = bound(process, x_start, seed=3).total
        parts = [bound(process, x_start[:2], seed=3).total, bound(process, x_start[2:], seed=3, first_sample=2).total]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, bound(process, x_start, seed=4).total)


def test_what_changes_the_model_changes_the_bound() -> None:
    schedule, x_start = dd.linear_schedule(5, 0.1, 0.6), torch.rand(3, 1, 2, 2) * 2 - 1

    def model(x: Tensor, t: Tensor, y: float = 2.0) -> Tensor:
        return y * x

    plain = split_bound(Process(model, schedule), x_start).total
    for changes in ({"clip": None}, {"levels": 17}, {"kwargs": {"y": 3.0}}, {"prediction": "v"}):
        assert not torch.equal(plain, split_bound(Process(model, schedule)._replace(**changes), x_start).total), changes


def test_errors_name_the_argument() -> None:
    schedule, x_start = dd.linear_schedule(5), torch.zeros(1, 1, 2, 2)
    for changes, message in (
        ({"prediction": "x0"}, "prediction must be one of"),
        ({"variance": "small"}, "variance must be one of"),
        ({"variance": "learned"}, "out must have 2 channels, twice those of x_t; got 1"),
        ({"model": lambda x, t: torch.cat((x, x), 1)}, "out must have 1 channels; got 2"),
        ({"clip": 0.0}, "clip must be a positive number"),
    ):
        process = Process(lambda x, t: x, schedule)._replace(**changes)
        for bound in (split_bound, three_term_bound):
            with pytest.raises(ValueError, match=message):
                bound(process, x_start)
