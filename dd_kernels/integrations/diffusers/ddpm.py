"""diffusers' DDPMScheduler, one reverse_step per step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from ...samplers.rows import Transition
from . import rows
from .arguments import Timestep, TimestepValueError, as_step_count, as_timestep
from .base import Generators, constructor
from .scheduler import FusedSchedulerWithVelocity

# Without its types, which differ from version to version of diffusers.
_DDPMScheduler: Any = scheduling_ddpm.DDPMScheduler


class DDPMScheduler(FusedSchedulerWithVelocity, _DDPMScheduler):
    """diffusers' ``DDPMScheduler``: algorithm 2 of DDPM (Ho et al., 2020)."""

    __init__ = constructor(_DDPMScheduler)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Sets the timesteps to visit, as diffusers' method; ``device`` is where they are kept."""
        super().set_timesteps(as_step_count(num_inference_steps), None, timesteps)
        self._place_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> scheduling_ddpm.DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_{t-1} from x_t and the model's output, see :func:`dd_kernels.reverse_step`.

        Args:
            model_output: [N, C, ...], or [N, 2 C, ...] with a learned variance; it broadcasts with ``sample``.
            timestep: one of ``timesteps``, an int, array or tensor, or a tensor or list [N] of one per sample.
            sample: x_t, [N, C, ...].
            generator: one generator, or a list of one per sample; torch's global one if None.
            return_dict: return an object with ``prev_sample`` and ``pred_original_sample``, not a tuple.
        """
        timestep = as_timestep(timestep)
        value = self._value(timestep)
        self._check_listed(timestep, value)
        model_output, learned, source = self._ancestral_noise(value, sample, model_output, generator)
        given = len(source) > 0  # torch 2.11 does not trace bool(source)
        options = rows.AncestralOptions(self.config.prediction_type, self._clip(), self.variance_type, learned, given)
        result = self._advance(("ddpm", *options), timestep, value, sample, model_output, source)
        return scheduling_ddpm.DDPMSchedulerOutput(*result) if return_dict else result

    def _has_list(self) -> bool:
        return bool(self.custom_timesteps or self.num_inference_steps)

    def _check_listed(self, timestep: Timestep, value: int | None) -> None:
        """Raises where a timestep, if it is known without asking the device, is not in the list."""
        if torch.compiler.is_compiling() or not self._has_list():
            return
        if value is not None:
            wrong = [] if value in self._values else [value]
        elif isinstance(timestep, Tensor) and timestep.is_cpu:
            wrong = [one for one in timestep.tolist() if one not in self._values]
        else:
            return
        if wrong:
            raise TimestepValueError(f"timestep must be one of scheduler.timesteps; got {wrong[0]}")

    def _ddpm(self, *key: Any) -> rows.StepTable:
        """Row t steps to the timestep after t in ``timesteps``, or to t - 1 where none are set."""
        options = rows.AncestralOptions(*key)
        t = self._all_timesteps()
        prev, known = t - 1, torch.ones_like(t, dtype=torch.bool)
        if self._has_list():
            values = self._values
            # Reversed, so that the first of equal timesteps counts.
            following = dict(reversed(list(zip(values, [*values[1:], -1], strict=True))))
            known = torch.tensor([value in following for value in t.tolist()])
            prev = torch.tensor([following.get(value, -1) for value in t.tolist()])
        step = Transition.between(self._alpha_bar_of_rows(), self._alpha_bar(prev))
        table = rows.as_table(rows.ancestral_columns(step, t, options), options.clip, options.learned)
        table.rows[~known] = torch.nan
        return table
