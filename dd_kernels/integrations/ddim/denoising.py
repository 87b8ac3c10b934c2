"""The module ``functions.denoising`` of DDIM's own repository: whole loops of DDIM and DDPM.

The same ``torch.manual_seed`` gives the same noise, which is drawn at every step, and so the same samples to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...ops.reverse_step import reverse_step
from ...ops.reverse_step.table import StepTable, from_columns
from ...samplers import rows

Model = Callable[[Tensor, Tensor], Tensor]


def compute_alpha(beta: Tensor, t: Tensor) -> Tensor:
    """Returns alpha_bar [N, 1, 1, 1] at the timesteps t [N]; 1 at -1."""
    return _alpha_bar(beta).index_select(0, t + 1).view(-1, 1, 1, 1)


def _alpha_bar(beta: Tensor) -> Tensor:
    """Returns alpha_bar [T + 1] of the timesteps -1 .. T - 1, in the dtype of the betas as in that repository."""
    return (1 - torch.cat((torch.zeros_like(beta[:1]), beta))).cumprod(dim=0)


def _levels(beta: Tensor, seq: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the timesteps from the noisiest to the first, alpha_bar at them, and alpha_bar after each step."""
    timesteps = np.array(list(seq), dtype=np.int64)
    if timesteps.size == 0 or timesteps.min() < 0 or timesteps.max() >= len(beta):
        raise ValueError(f"seq must hold at least one timestep in [0, {len(beta)}); got {list(seq)}")
    alpha_bar = _alpha_bar(beta).double().cpu().numpy()
    following = np.append(-1, timesteps[:-1])
    return timesteps[::-1], alpha_bar[timesteps + 1][::-1], alpha_bar[following + 1][::-1]


def _run(x: Tensor, model: Model, table: StepTable, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Returns x and what every step made of it, and the x_0 of every step; on the CPU but for x itself."""
    xs, x0_preds = [x], []
    state = x.to(device)
    for index, timestep in enumerate(table.timesteps.tolist()):
        t = torch.full((len(state),), float(timestep), device=device)
        out = model(state, t)
        # DDIM's code draws at every step, also where sigma is 0: a later draw finds the generator in the same state.
        noise = torch.randn_like(state)
        state, x0 = reverse_step(state, out, table, index, noise=noise if table.stochastic else None, return_x0=True)
        xs.append(state.to("cpu"))
        x0_preds.append(x0.to("cpu"))
    return xs, x0_preds


@torch.no_grad()
def generalized_steps(
    x: Tensor, seq: Sequence[int], model: Model, b: Tensor, *, eta: float = 0.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Samples by DDIM (Song et al., 2021, eq. 12 with sigma of eq. 16), from the last of ``seq`` to its first.

    Args:
        x: x_T, [N, C, H, W].
        seq: timesteps that do not decrease; one that comes again leaves x where it is.
        model: model(x, t) -> epsilon; t is float32 [N].
        b: betas [T] on the device to run on.
        eta: 0 adds no noise, 1 that of DDPM.

    Returns:
        ([x, x after each step ...], [x_0 predicted at each step ...]), on the CPU.
    """
    timesteps, alpha_bar, alpha_bar_prev = _levels(b, seq)
    sigma = rows.ddim_sigma(alpha_bar, alpha_bar_prev, eta)
    columns = rows.x0_columns("epsilon", alpha_bar)
    columns |= rows.ddim_columns(alpha_bar_prev, rows.GIVEN_EPSILON, sigma)
    return _run(x, model, from_columns(timesteps, **columns), b.device)


@torch.no_grad()
def ddpm_steps(x: Tensor, seq: Sequence[int], model: Model, b: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Samples by DDPM (Ho et al., 2020, algorithm 2) with the larger variance, beta of the steps taken.

    x_0 is clipped to [-1, 1]; timestep 0 adds no noise. Arguments and results as :func:`generalized_steps`.
    """
    timesteps, alpha_bar, alpha_bar_prev = _levels(b, seq)
    step = rows.Transition.between(alpha_bar, alpha_bar_prev)
    columns = rows.x0_columns("epsilon", alpha_bar) | rows.posterior_columns(step)
    columns |= rows.variance_columns("fixed_large", step.beta, step.beta, draws=timesteps > 0)
    return _run(x, model, from_columns(timesteps, x0_clip=1.0, **columns), b.device)
