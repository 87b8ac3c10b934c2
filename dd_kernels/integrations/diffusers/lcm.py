"""diffusers' LCMScheduler, one reverse_step per step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.schedulers import scheduling_lcm
from torch import Tensor

from ...ops.q_sample.table import MarginalTable
from ...samplers.rows import Columns, Level, boundary_weights, consistency_columns, x0_at
from . import rows
from .base import Generators, constructor, timesteps_setter
from .indexed import IndexedScheduler
from .scheduler import VelocityScheduler

# Without its types, which differ from version to version of diffusers.
_LCM: Any = scheduling_lcm.LCMScheduler
SIGMA_DATA = 0.5


class Given(NamedTuple):
    """A timestep that a step was called with in place of its own in the list."""

    place: int
    timestep: int


def folded_columns(x0: Columns, skip: Any, out: Any) -> Columns:
    """f = skip x_t + out x_0 in the place of x_0, which holds where x_0 is not clipped."""
    denominator = x0.get("x0_den", 1.0)
    from_x = out * x0.get("x0_num_x", 0.0) + skip * denominator
    return {"x0_num_x": from_x, "x0_num_out": out * x0["x0_num_out"], "x0_den": denominator}


class LCMScheduler(IndexedScheduler, VelocityScheduler, _LCM):
    """diffusers' ``LCMScheduler``: multistep sampling of latent consistency models (Luo et al., 2023, algorithm 2)."""

    SOURCES = VelocityScheduler.SOURCES

    __init__ = constructor(_LCM)
    set_timesteps = timesteps_setter(_LCM)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """x at the next timestep from x and the model's output, see :func:`dd_kernels.reverse_step`.

        Args:
            model_output, sample: [N, C, ...]; they broadcast.
            timestep: one of ``timesteps``.
            generator: of the noise, one or a list of one per sample; torch's global one if None.
            return_dict: return an object with ``prev_sample`` and ``denoised``, not a tuple.
        """
        steps, index = self._steps_set(), self._index(timestep)
        draws = isinstance(index, Tensor) or index != steps - 1
        wide = torch.promote_types(sample.dtype, model_output.dtype)
        source = self._noise(model_output, generator, wide) if draws else {}
        given, clip = self._given_timestep(index, timestep), self._clip()
        config = self.config
        key = ("lcm", config.prediction_type, config.timestep_scaling, clip, given, steps if draws else None)
        row = self._row(index, sample.device)
        table = self._table(key, sample.device)
        prev_sample, denoised = self._reverse(table, row, sample, model_output, source)
        if clip is not None:
            weights = ("boundary", self.config.timestep_scaling, given)
            denoised = self._mixed(weights, denoised, sample.to(wide), row, 1)
        self._step_index = index + 1
        if not return_dict:
            return prev_sample, denoised
        return scheduling_lcm.LCMSchedulerOutput(prev_sample=prev_sample, denoised=denoised)

    def _given_timestep(self, index: int | Tensor, timestep: Any) -> Given | None:
        """Returns the timestep that a call names, where the host knows that it is not that of ``index``."""
        if torch.compiler.is_compiling() or isinstance(index, Tensor):
            return None
        if isinstance(timestep, Tensor):
            timestep = timestep if timestep.is_cpu else self._listed(timestep)
        if timestep is None or self._values[index] == timestep:
            return None
        return Given(index, int(timestep))

    def _times(self, given: Given | None) -> Tensor:
        times = torch.tensor(self._values)
        if given is not None:
            times[given.place] = given.timestep
        return times

    def _lcm(
        self, prediction: str, scaling: float, clip: tuple | None, given: Given | None, steps: int | None
    ) -> rows.StepTable:
        """Rows that add noise but for that of step ``steps - 1``, or none that does where ``steps`` is None."""
        times = self._times(given)
        # The last step leads to where it starts, which shows where it is not the last of the number of steps.
        after = torch.cat((torch.tensor(self._values)[1:], times[-1:]))
        alpha_bar = self._given.cpu().double()
        ends = torch.where(after >= 0, alpha_bar[after], self.final_alpha_cumprod.cpu().double())
        draws = (np.arange(len(times)) != steps - 1) if steps else np.zeros(len(times), dtype=bool)
        time, level, end = times.double().numpy(), *(Level.of_alpha_bar(a.numpy()) for a in (alpha_bar[times], ends))
        x0 = x0_at(rows.our_prediction(prediction), level)
        columns = consistency_columns(time, end, SIGMA_DATA, scaling, draws)
        if clip is None:
            skip, out = boundary_weights(time, SIGMA_DATA, scaling)
            x0 = folded_columns(x0, skip, out)
            columns |= {"prev_from_x0": columns["prev_from_x0"] / out, "prev_from_x": 0.0}
        return rows.as_table(x0 | columns, clip, draws=self._draws(self._values))

    def _boundary(self, scaling: float, given: Given | None) -> MarginalTable:
        skip, out = boundary_weights(self._times(given).double(), SIGMA_DATA, scaling)
        return rows.marginal(out, skip)
