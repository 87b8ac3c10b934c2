"""diffusers' FlowMatchEulerDiscreteScheduler, one reverse_step per step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from torch import Tensor

from ...samplers.rows import Level, flow_columns, renoised_columns
from . import rows
from .base import Generators, constructor, timesteps_setter
from .euler import check_no_index
from .indexed import SigmaScheduler

# Without its types, which differ from version to version of diffusers.
_Flow: Any = scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler


class FlowMatchEulerDiscreteScheduler(SigmaScheduler, _Flow):
    """diffusers' ``FlowMatchEulerDiscreteScheduler``: Euler's method for rectified flows (Liu et al., 2022, eq. 1)."""

    __init__ = constructor(_Flow)
    set_timesteps = timesteps_setter(_Flow)

    def _place_timesteps(self, device: torch.device | str | None) -> None:
        """Moves ``sigmas`` too, which diffusers keeps on the device here."""
        super()._place_timesteps(device)
        object.__setattr__(self, "sigmas", self.sigmas.to(device))
        self._watch(self.sigmas)

    def _level(self, sigma: np.ndarray) -> Level:
        return Level.of_flow(sigma)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x at the next noise level from x and the model's output, see :func:`dd_kernels.reverse_step`.

        Args:
            model_output, sample: [N, ...]; they broadcast.
            timestep: one of ``timesteps``; read at the first step alone.
            s_churn, s_tmin, s_tmax, s_noise: without effect, as in diffusers.
            generator: of the noise with ``stochastic_sampling``, one or a list of one per sample.
            per_token_timesteps: a timestep per token [N, L] of samples [N, L, C]; a step by diffusers' own code.
            return_dict: return an object with ``prev_sample``, not a tuple.
        """
        check_no_index(timestep)
        index = self._index(timestep)
        if per_token_timesteps is not None:
            options = {"generator": generator, "per_token_timesteps": per_token_timesteps, "return_dict": return_dict}
            return super().step(model_output, timestep, sample, **options)
        stochastic, dtype = self.config.get("stochastic_sampling", False), model_output.dtype
        source = self._noise(sample, generator, torch.float32) if stochastic else {}
        table, row = self._table(("flow", stochastic), sample.device), self._row(index, sample.device)
        prev_sample = self._reverse(table, row, sample, model_output, source, return_x0=False).to(dtype)
        self._step_index = index + 1
        output = scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput
        return output(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _flow(self, stochastic: bool) -> rows.StepTable:
        level, after = self._levels()
        columns = flow_columns(level.noise, after.noise)
        if stochastic:
            columns |= renoised_columns(after)
        return self._as_table(columns)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) x + sigma z at ``timestep``, or at the loop's step once it has a begin index."""
        return self._noised(sample, noise, timestep)
