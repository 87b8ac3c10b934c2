"""diffusers' DDIMScheduler and DDIMInverseScheduler, one reverse_step per step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddim_inverse
from torch import Tensor

from . import rows
from .arguments import Timestep, as_step_count, as_timestep
from .base import Generators, constructor
from .scheduler import FusedScheduler, FusedSchedulerWithVelocity

# Without its types, which differ from version to version of diffusers.
_DDIMScheduler: Any = scheduling_ddim.DDIMScheduler
_DDIMInverseScheduler: Any = scheduling_ddim_inverse.DDIMInverseScheduler


class DDIMScheduler(FusedSchedulerWithVelocity, _DDIMScheduler):
    """diffusers' ``DDIMScheduler``: DDIM (Song et al., 2021), eq. 12 and 16."""

    __init__ = constructor(_DDIMScheduler)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets the timesteps to visit, as diffusers' method; ``device`` is where they are kept."""
        super().set_timesteps(as_step_count(num_inference_steps))
        self._place_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> scheduling_ddim.DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_{prev} from x_t and the model's output, see :func:`dd_kernels.reverse_step`.

        Args:
            model_output, sample: [N, C, ...]; they broadcast.
            timestep: an int, array or tensor, or a tensor or list [N] of one per sample.
            eta: 0 adds no noise, 1 that of DDPM.
            use_clipped_model_output: re-derive epsilon from the clipped x_0.
            generator: one generator, or a list of one per sample; torch's global one if None.
            variance_noise: the noise itself, instead of ``generator``.
            return_dict: return an object with ``prev_sample`` and ``pred_original_sample``, not a tuple.
        """
        source: dict[str, Any] = {}
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("only one of generator and variance_noise may be given; got both")
            source = {"noise": variance_noise} if variance_noise is not None else self._noise(model_output, generator)
        timestep, config = as_timestep(timestep), self.config
        key = ("ddim", self._stride(), config.prediction_type, self._clip(), eta, use_clipped_model_output)
        result = self._advance(key, timestep, self._value(timestep), sample, model_output, source)
        return scheduling_ddim.DDIMSchedulerOutput(*result) if return_dict else result

    def _before_first(self) -> Tensor:
        return self.final_alpha_cumprod

    def _ddim(self, stride: int, prediction: str, clip: tuple | None, eta: float, clipped: bool) -> rows.StepTable:
        prev = self._all_timesteps() - stride
        # Some versions of diffusers step to the next timestep in the list, as DDPM does.
        if hasattr(self, "previous_timestep"):
            for value in self._values:
                prev[value] = int(self.previous_timestep(value))
        alpha_bar_prev = self._alpha_bar(prev)
        columns = rows.ddim_columns(prediction, self._alpha_bar_of_rows(), alpha_bar_prev, eta, clipped)
        return rows.as_table(columns, clip)


class DDIMInverseScheduler(FusedScheduler, _DDIMInverseScheduler):
    """diffusers' ``DDIMInverseScheduler``: from an image to the noise that DDIM makes it of."""

    __init__ = constructor(_DDIMInverseScheduler)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets the timesteps to visit, increasing; ``device`` is where they are kept."""
        super().set_timesteps(as_step_count(num_inference_steps))
        self._place_timesteps(device)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> scheduling_ddim_inverse.DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x at ``timestep`` from x one step before it; arguments as :meth:`DDIMScheduler.step`."""
        timestep = as_timestep(timestep)
        key = ("ddim_inverse", self._stride(), self.config.prediction_type, self._clip())
        result = self._advance(key, timestep, self._value(timestep), sample, model_output, {})
        return scheduling_ddim_inverse.DDIMSchedulerOutput(*result) if return_dict else result

    def _before_first(self) -> Tensor:
        return self.initial_alpha_cumprod

    def _ddim_inverse(self, stride: int, prediction: str, clip: tuple | None) -> rows.StepTable:
        before = self._all_timesteps() - stride
        columns = rows.ddim_inverse_columns(prediction, self._alpha_bar(before), self._alpha_bar_of_rows())
        return rows.as_table(columns, clip)
