"""Sampling of latent consistency models as a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ops.reverse_step.table import DynamicThreshold, StepTable
from ..schedules import Schedule
from . import rows
from .noise_levels import visits
from .solver_table import solver_table


def _distilled(num_timesteps: int, steps: int, original_steps: int) -> np.ndarray:
    """Returns ``steps`` of the timesteps that the model was distilled at, increasing, the noisiest among them."""
    if not 1 <= original_steps <= num_timesteps:
        raise ValueError(f"original_steps must be in [1, {num_timesteps}]; got {original_steps}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= original_steps:
        raise ValueError(f"steps must be an int in [1, {original_steps}], the original steps; got {steps!r}")
    known = np.arange(1, original_steps + 1) * (num_timesteps // original_steps) - 1
    return known[::-1][np.floor(np.linspace(0, original_steps, num=steps, endpoint=False)).astype(np.int64)][::-1]


def lcm(
    schedule: Schedule,
    steps: int = 4,
    *,
    original_steps: int = 50,
    sigma_data: float = 0.5,
    timestep_scaling: float = 10.0,
    prediction: str = "epsilon",
    clip: float | DynamicThreshold | None = None,
    timesteps: Sequence[int] | None = None,
) -> StepTable:
    r"""Multistep sampling of a latent consistency model, algorithm 2 of Luo et al. (2023, arXiv 2310.04378).

    .. math:: f = c_{skip} x_t + c_{out} x_0, \qquad x \leftarrow \sqrt{\bar\alpha_{prev}} f
        + \sqrt{1 - \bar\alpha_{prev}}\, z

    with the boundary condition of eq. 5 (see :func:`dd_kernels.samplers.rows.consistency_columns`): to x_0, and
    back to less noise. The last step gives f.

    Args:
        schedule: the forward process; Stable Diffusion's is :func:`dd_kernels.scaled_linear_schedule`.
        steps: 1 to 8 (ignored when ``timesteps`` is given).
        original_steps: how many timesteps the model was distilled at; the visited ones are among them.
        sigma_data, timestep_scaling: of the boundary condition.
        prediction, clip, timesteps: as in :func:`ddpm`; latents are not clipped.
    """
    if timesteps is None:
        timesteps = _distilled(len(schedule), steps, original_steps).tolist()
    levels = visits(schedule, steps, "leading", timesteps)
    draws = np.arange(len(levels.times)) < len(levels.times) - 1
    columns = rows.consistency_columns(levels.times, levels.after, sigma_data, timestep_scaling, draws)
    return solver_table(levels, columns, prediction, clip)
