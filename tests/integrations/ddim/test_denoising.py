"""generalized_steps and ddpm_steps against loops of their own in float64, equation by equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import dd_kernels as dd
from dd_kernels.integrations.ddim.denoising import compute_alpha, ddpm_steps, generalized_steps

SCHEDULE = dd.linear_schedule(1000)
BETAS = torch.from_numpy(SCHEDULE.beta.copy()).float()
SEQUENCES = {
    "uniform": range(0, 1000, 100),
    # As that repository makes it: 50 steps visit timestep 0 more than once.
    "quad": [int(s) for s in np.linspace(0, np.sqrt(800), 50) ** 2],
    "from 5": [5, 300, 999],
}


def model(x: Tensor, t: Tensor) -> Tensor:
    assert t.dtype == torch.float32
    assert t.shape == x.shape[:1]
    return torch.sin(x + 0.001 * t.reshape(-1, 1, 1, 1).to(x.dtype))


def _levels(seq: list[int]) -> list[tuple[int, float, float]]:
    """(timestep, alpha_bar, alpha_bar after the step) from the noisiest; alpha_bar is float32's, as theirs is."""
    alpha_bar = np.append(1.0, np.cumprod(1 - BETAS.numpy()))
    following = [-1, *seq[:-1]]
    return [(i, float(alpha_bar[i + 1]), float(alpha_bar[j + 1])) for i, j in zip(seq, following, strict=True)][::-1]


def _noise(count: int, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn_like(x).double() for _ in range(count)]


def _check(ours: tuple[list[Tensor], list[Tensor]], xs: list[Tensor], x0s: list[Tensor]) -> None:
    """Up to 50 steps, none of which amplifies a rounding by much; x_0 is divided by sqrt(alpha_bar) >= 0.006."""
    for got, wanted, bound in ((ours[0][1:], xs, 2e-5), (ours[1], x0s, 2e-4)):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert (a.double() - b).abs().max() <= bound * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seq", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_generalized_steps_are_equation_12(seq: list[int], eta: float) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    ours = generalized_steps(x, seq, model, BETAS, eta=eta)
    assert ours[0][0] is x
    state, xs, x0s = x.double(), [], []
    for (t, a, b), z in zip(_levels(list(seq)), _noise(len(seq), x), strict=True):
        epsilon = model(state, torch.full((2,), float(t)))
        x0 = (state - (1 - a) ** 0.5 * epsilon) / a**0.5
        sigma = eta * ((1 - a / b) * (1 - b) / (1 - a)) ** 0.5
        state = b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * epsilon + sigma * z
        xs, x0s = [*xs, state], [*x0s, x0]
    _check(ours, xs, x0s)


@pytest.mark.parametrize("seq", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_ddpm_steps_are_algorithm_2_with_the_larger_variance(seq: list[int]) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    ours = ddpm_steps(x, seq, model, BETAS)
    state, xs, x0s = x.double(), [], []
    for (t, a, b), z in zip(_levels(list(seq)), _noise(len(seq), x), strict=True):
        epsilon, beta = model(state, torch.full((2,), float(t))), 1 - a / b
        x0 = ((state - (1 - a) ** 0.5 * epsilon) / a**0.5).clamp(-1, 1)
        state = (b**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - b) * state) / (1 - a)
        state = state + (beta**0.5 * z if t > 0 else 0)
        xs, x0s = [*xs, state], [*x0s, x0]
    _check(ours, xs, x0s)


def test_the_generator_is_left_where_theirs_leaves_it() -> None:
    x = torch.zeros(1, 3, 2, 2)
    for steps in (generalized_steps, ddpm_steps):
        torch.manual_seed(1)
        steps(x, range(0, 1000, 200), model, BETAS)
        following = torch.randn(2)
        torch.manual_seed(1)
        for _ in range(5):
            torch.randn_like(x)
        assert torch.equal(following, torch.randn(2))


def test_alpha_is_alpha_bar_and_1_before_the_first_timestep() -> None:
    alpha = compute_alpha(BETAS, torch.tensor([-1, 0, 999]))
    assert alpha.shape == (3, 1, 1, 1)
    np.testing.assert_allclose(alpha.flatten(), [1.0, SCHEDULE.alpha_bar[0], SCHEDULE.alpha_bar[999]], rtol=1e-4)


@pytest.mark.parametrize("seq", [[], [-1, 3], [0, 1000]])
def test_a_sequence_out_of_range_is_refused(seq: list[int]) -> None:
    with pytest.raises(ValueError, match="seq must hold at least one timestep"):
        generalized_steps(torch.zeros(1, 3, 2, 2), seq, model, BETAS)
