"""diffusers' EulerDiscreteScheduler and EulerAncestralDiscreteScheduler, one reverse_step per step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_euler_discrete
from diffusers.utils import logging
from torch import Tensor

from ...samplers.rows import Columns, Level, ancestral_columns, line_columns, x0_at
from . import rows
from .base import Generators, constructor, timesteps_setter
from .indexed import Index, PerStep, SigmaScheduler

# Without their types, which differ from version to version of diffusers.
_Euler: Any = scheduling_euler_discrete.EulerDiscreteScheduler
_Ancestral: Any = scheduling_euler_ancestral_discrete.EulerAncestralDiscreteScheduler
_logger = logging.get_logger(__name__)


class Churn(NamedTuple):
    """Noise that is added before a step, which then starts from a higher level: algorithm 2 of Karras et al. (2022)."""

    gamma: float
    smallest: float
    largest: float
    scale: float

    def raised(self, sigma: np.ndarray) -> np.ndarray:
        """Returns the levels that the steps start from."""
        return np.where((self.smallest <= sigma) & (sigma <= self.largest), sigma * (1 + self.gamma), sigma)


def check_no_index(timestep: Any) -> None:
    """Raises for an integer, which a caller may mean as a step's place in the list, as diffusers does."""
    if isinstance(timestep, Tensor):
        wrong = timestep.is_cpu and timestep.dtype in (torch.int32, torch.int64)
    else:
        wrong = isinstance(timestep, int)
    if wrong:
        raise ValueError(f"timestep must be one of scheduler.timesteps, not an integer index; got {timestep}")


class _EulerBase(SigmaScheduler):
    """x is not of unit variance: it is x_0 + sigma epsilon, and the model is given x / sqrt(1 + sigma^2)."""

    is_scale_input_called: bool

    def _scale(self) -> PerStep:
        return PerStep((self._sigmas() ** 2 + 1) ** 0.5)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """x / sqrt(1 + sigma^2) of the step that is due, in one pass, which no step before can do: x itself is kept."""
        index = self._index(timestep)
        self.is_scale_input_called = True
        scale = self._table(("scale",), sample.device).on(sample.device)
        return sample / (scale[index].reshape(()) if isinstance(index, Tensor) else scale[index])

    def _x0_columns(self, kind: str, sigma: np.ndarray) -> Columns:
        """x_0 of x and of the output, which the model gives for x / sqrt(1 + sigma^2)."""
        signal = 1 / (sigma**2 + 1) ** 0.5
        prediction = rows.our_prediction("sample" if kind == "original_sample" else kind)
        columns = x0_at(prediction, Level(signal, sigma * signal))
        return columns | {"x0_num_x": columns.get("x0_num_x", 0.0) * signal}

    def _stepped(
        self, key: tuple, index: Index, sample: Tensor, model_output: Tensor, source: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Takes the step ``index`` by the table of a key; the next sample is of the output's dtype, as diffusers'."""
        if not self.is_scale_input_called and not torch.compiler.is_compiling():
            _logger.warning(
                "scale_model_input should be called before step, so that the model is given what it expects"
            )
        row, dtype = self._row(index, sample.device), model_output.dtype
        prev_sample, x0 = self._reverse(self._table(key, sample.device), row, sample, model_output, source)
        self._step_index = index + 1
        return prev_sample.to(dtype), x0


class EulerDiscreteScheduler(_EulerBase, _Euler):
    """diffusers' ``EulerDiscreteScheduler``: Euler's method of Karras et al. (2022)."""

    __init__ = constructor(_Euler)
    set_timesteps = timesteps_setter(_Euler)

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
        return_dict: bool = True,
    ) -> Any:
        """x at the next noise level from x and the model's output, see :func:`dd_kernels.reverse_step`.

        Args:
            model_output, sample: [N, C, ...]; they broadcast.
            timestep: one of ``timesteps``; read at the first step alone.
            s_churn, s_tmin, s_tmax, s_noise: noise that is added before the step, in a pass of its own.
            generator: of that noise, one or a list of one per sample; torch's global one if None.
            return_dict: return an object with ``prev_sample`` and ``pred_original_sample``, not a tuple.
        """
        check_no_index(timestep)
        index, churn = self._index(timestep), None
        if s_churn > 0:
            gamma = min(s_churn / (len(self._sigma_values) - 1), 2**0.5 - 1)
            churn = Churn(gamma, s_tmin, s_tmax, s_noise)
            sample = self._churned(churn, index, sample, model_output, generator)
        key = ("euler", self.config.prediction_type, churn)
        result = self._stepped(key, index, sample, model_output, {})
        return scheduling_euler_discrete.EulerDiscreteSchedulerOutput(*result) if return_dict else result

    def _churned(self, churn: Churn, index: Index, sample: Tensor, like: Tensor, generator: Generators) -> Tensor:
        """Returns ``sample`` with its noise, which is drawn where the level is raised or only the device knows."""
        if isinstance(index, int):
            sigma = np.array(self._sigma_values[:-1])
            if churn.raised(sigma)[index] == sigma[index]:
                return sample
        table, row = self._table(("churn", churn), sample.device), self._row(index, sample.device)
        return self._reverse(table, row, sample, like, self._noise(like, generator), return_x0=False)

    def _churn(self, churn: Churn) -> rows.StepTable:
        """Row i adds the noise of step i."""
        sigma = self._levels()[0].noise
        added = churn.scale * (churn.raised(sigma) ** 2 - sigma**2) ** 0.5
        return self._as_table({"prev_from_x": 1.0, "sigma": added})

    def _euler(self, prediction: str, churn: Churn | None) -> rows.StepTable:
        level, after = self._levels()
        start = level.noise if churn is None else churn.raised(level.noise)
        # diffusers reads v at the level before the noise was added.
        columns = self._x0_columns(prediction, level.noise if prediction == "v_prediction" else start)
        return self._as_table(columns | line_columns(Level(level.signal, start), after))


class EulerAncestralDiscreteScheduler(_EulerBase, _Ancestral):
    """diffusers' ``EulerAncestralDiscreteScheduler``: k-diffusion's ``euler_ancestral``."""

    __init__ = constructor(_Ancestral)
    set_timesteps = timesteps_setter(_Ancestral)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """x at the next noise level; arguments as :meth:`EulerDiscreteScheduler.step`, of the noise of the step."""
        check_no_index(timestep)
        index = self._index(timestep)
        source = self._noise(model_output, generator)
        key = ("ancestral", self.config.prediction_type)
        result = self._stepped(key, index, sample, model_output, source)
        output = scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput
        return output(*result) if return_dict else result

    def _ancestral(self, prediction: str) -> rows.StepTable:
        level, after = self._levels()
        return self._as_table(self._x0_columns(prediction, level.noise) | ancestral_columns(level, after))
