"""diffusers' DPMSolverMultistepScheduler, one reverse_step per step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ...samplers.multistep import half_log_snr, multistep_columns
from ...samplers.rows import Columns, Level, x0_at
from . import rows
from .base import Generators, constructor, timesteps_setter
from .indexed import SigmaScheduler

# Without its types, which differ from version to version of diffusers.
_DPMSolver: Any = scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler


class Options(NamedTuple):
    """What the rows depend on beside the noise levels; the configuration's options of the same names."""

    algorithm_type: str
    prediction_type: str
    solver_type: str
    solver_order: int
    lower_order_final: bool
    euler_at_final: bool
    final_sigmas_type: str
    use_flow_sigmas: bool

    def orders(self, taken: int, steps: int) -> np.ndarray:
        """Returns each step's order where ``taken`` steps came before it, or more."""
        place, few = np.arange(steps), self.lower_order_final and steps < 15
        orders = np.full(steps, min(self.solver_order, taken + 1))
        if few:
            orders = np.where(place == steps - 2, np.minimum(orders, 2), orders)
        if few or self.euler_at_final or self.final_sigmas_type == "zero":
            orders[-1:] = 1
        return orders


def solver_columns(options: Options, level: Level, after: Level, orders: np.ndarray) -> Columns:
    """What a step makes of the converted outputs, x_0 in DPM-Solver++ and epsilon in DPM-Solver.

    DPM-Solver (Lu et al., 2022) is DPM-Solver++ with signal and noise, and x_0 and epsilon, in each other's places.
    """
    stochastic = options.algorithm_type.startswith("sde")
    solver: dict[str, Any] = {"solver": options.solver_type, "as_diffusers": True}
    if options.algorithm_type.endswith("++"):
        return multistep_columns(level, after, orders, stochastic=stochastic, **solver)
    swapped, swapped_after = (Level(noise, signal) for signal, noise in (level, after))
    columns = multistep_columns(swapped, swapped_after, orders, **solver)
    if stochastic:
        # Their SDE moves twice as far along epsilon, and adds noise.
        columns |= {k: 2 * columns[k] for k in ("prev_from_x0", "prev_from_last", "prev_from_older")}
        h = half_log_snr(after) - half_log_snr(level)
        columns["sigma"] = after.noise * np.expm1(2 * h) ** 0.5
    return columns


class DPMSolverMultistepScheduler(SigmaScheduler, _DPMSolver):
    """diffusers' ``DPMSolverMultistepScheduler``: DPM-Solver and DPM-Solver++ (Lu et al., 2022), multistep."""

    ABSENT_IS_LAST = True

    lower_order_nums: int
    _slots: tuple[Tensor, ...] = ()

    __init__ = constructor(_DPMSolver)
    set_timesteps = timesteps_setter(_DPMSolver)

    def _place_timesteps(self, device: torch.device | str | None) -> None:
        super()._place_timesteps(device)
        self._slots = ()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x at the next noise level from x and the model's outputs up to now, see :func:`dd_kernels.reverse_step`.

        Args:
            model_output: [N, C, ...], or [N, 2 C, ...] with a learned variance, which plays no part.
            timestep: one of ``timesteps``; read at the first step alone.
            sample: x, [N, C, ...].
            generator: of the noise of the stochastic solvers, one or a list of one per sample.
            variance_noise: the noise itself, instead of ``generator``.
            return_dict: return an object with ``prev_sample``, not a tuple.
        """
        self._steps_set()
        index, config = self._index(timestep), self.config
        thresholds_epsilon = config.thresholding and not config.algorithm_type.endswith("++")
        if thresholds_epsilon or (self.lower_order_nums > 0 and config.solver_order > 1 and not self._slots):
            # diffusers' own step: a threshold of x_0 where these solvers combine epsilon has no row, and the first
            # outputs are not here where a caller has set model_outputs and lower_order_nums.
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        if config.prediction_type == "epsilon" and config.variance_type in ("learned", "learned_range"):
            model_output = model_output[:, : sample.shape[1]]
        source: dict[str, Any] = {}
        if config.algorithm_type.startswith("sde"):
            source = self._sde_noise(model_output, generator, variance_noise)
        prev_sample = self._solve(index, sample, model_output, source)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _sde_noise(self, like: Tensor, generator: Generators, variance_noise: Tensor | None) -> dict[str, Any]:
        if variance_noise is not None:
            return {"noise": variance_noise.to(like.device, torch.float32)}
        return self._noise(like, generator, torch.float32)

    def _solve(self, index: int | Tensor, sample: Tensor, model_output: Tensor, source: dict[str, Any]) -> Tensor:
        config = self.config
        options = Options(*[config[name] for name in Options._fields])
        block = min(self.lower_order_nums, config.solver_order - 1)
        row = self._row(block * self._block_size() + index, sample.device)
        dtype = model_output.dtype
        if config.prediction_type != ("sample" if config.algorithm_type.endswith("++") else "epsilon"):
            # diffusers returns the dtype of the converted output, which has a part of the sample in it here.
            dtype = torch.promote_types(dtype, sample.dtype)
        table = self._table(("dpm_solver", options, self._clip()), sample.device)
        prev_sample = self._reverse(table, row, sample, model_output, source, return_x0=False).to(dtype)
        self.lower_order_nums = min(self.lower_order_nums + 1, config.solver_order)
        self._step_index = index + 1
        return prev_sample

    def _block_size(self) -> int:
        """Returns how many rows there are per number of steps taken before; even, as reverse_step's history asks."""
        return len(self._values) + len(self._values) % 2

    def _history(self, table: Any, sample: Tensor) -> tuple[Tensor, ...]:
        if self.lower_order_nums == 0:
            self._slots = table.history_like(sample)
        return self._slots

    def _level(self, sigma: np.ndarray) -> Level:
        if self.config.get("use_flow_sigmas"):
            return Level.of_flow(sigma)
        signal = 1 / (sigma**2 + 1) ** 0.5
        return Level(signal, sigma * signal)

    def _dpm_solver(self, options: Options, clip: tuple | None) -> rows.StepTable:
        """Rows in blocks, of no, one, and two or more steps taken before: the order of a step grows with them."""
        level, after = self._levels()
        steps, size = len(self._values), self._block_size()
        columns = self._x0_columns(options, level)
        blocks = [
            columns | solver_columns(options, level, after, options.orders(taken, steps))
            for taken in range(options.solver_order)
        ]
        padded = {
            name: np.concatenate([np.resize(np.broadcast_to(block[name], steps), size) for block in blocks])
            for name in blocks[0]
        }
        draws = np.tile(np.resize(self._draws(self._values), size), len(blocks))
        return rows.as_table(padded, clip, draws=draws)

    def _x0_columns(self, options: Options, level: Level) -> Columns:
        """Returns x_0 of x and the output, or epsilon in DPM-Solver, in the columns of x_0."""
        if options.prediction_type == "flow_prediction" and options.algorithm_type.endswith("++"):
            return {"x0_num_x": 1.0, "x0_num_out": -self._sigmas()[: len(level.noise)]}
        prediction = rows.our_prediction(options.prediction_type)
        if options.algorithm_type.endswith("++"):
            return x0_at(prediction, level)
        # epsilon from x_0 is as x_0 from epsilon, with signal and noise in each other's places; v changes its sign.
        swapped = Level(level.noise, level.signal)
        if prediction == "v":
            return {"x0_num_x": level.noise, "x0_num_out": level.signal}
        return x0_at({"epsilon": "x_start", "x_start": "epsilon"}[prediction], swapped)
