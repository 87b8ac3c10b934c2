"""diffusers' schedulers with their arithmetic in the ops: one pass per step, and no wait for the device.

>>> from dd_kernels.integrations.diffusers import DDIMScheduler
>>> pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

Each class is a subclass of diffusers' of the same name: the same configuration, options, files and
noise for the same generator; the same images to rounding. What differs:

- ``step`` reads its coefficients on the device, with a tensor timestep too. Nothing is synchronised, so
  it can be captured in a CUDA graph and by ``torch.compile(fullgraph=True)``.
- A tensor timestep may hold one timestep per sample.
- 16-bit samples are rounded once per step instead of after every operation.
- Where theirs divides by 0 or takes the root of a negative number, the finite value that is meant.
- ``noise="philox"`` (in the constructor or ``from_config``) draws the steps' noise inside the kernel from
  the generator's seed and the timestep: image n of a seed is the same in any batch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddim_inverse, scheduling_ddpm, scheduling_unclip

# Pipelines that are reloaded look for the name SchedulerMixin in the module of the scheduler's class.
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from . import rows as rows
from .scheduler import FusedScheduler, FusedSchedulerWithVelocity, Generators, Timestep, constructor

__all__ = ["DDIMInverseScheduler", "DDIMScheduler", "DDPMScheduler", "SchedulerMixin", "UnCLIPScheduler"]


class DDPMScheduler(FusedSchedulerWithVelocity, diffusers.DDPMScheduler):
    """diffusers' ``DDPMScheduler``: algorithm 2 of DDPM (Ho et al., 2020)."""

    __init__ = constructor(diffusers.DDPMScheduler)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Sets the timesteps to visit, as diffusers' method; ``device`` is where they are kept."""
        super().set_timesteps(num_inference_steps, None, timesteps)
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
            model_output: [N, C, ...], or [N, 2 C, ...] with a learned variance.
            timestep: one of ``timesteps``, an int or a tensor, or a tensor [N] of one per sample.
            sample: x_t, [N, C, ...].
            generator: one generator, or a list of one per sample; torch's global one if None.
            return_dict: return an object with ``prev_sample`` and ``pred_original_sample``, not a tuple.
        """
        self._check_listed(timestep)
        value = self._value(timestep)
        model_output, learned, source = self._ancestral_noise(value, sample, model_output, generator)
        given = len(source) > 0  # torch 2.11 does not trace bool(source)
        key = ("ddpm", self.config.prediction_type, self._clip(), self.variance_type, learned, given)
        result = self._advance(key, timestep, value, sample, model_output, source)
        return scheduling_ddpm.DDPMSchedulerOutput(*result) if return_dict else result

    def _has_list(self) -> bool:
        return bool(self.custom_timesteps or self.num_inference_steps)

    def _check_listed(self, timestep: Timestep) -> None:
        if torch.compiler.is_compiling() or not self._has_list():
            return
        value = self._value(timestep)
        if value is not None and value not in self._values:
            raise ValueError(f"timestep must be one of scheduler.timesteps; got {value}")

    def _ddpm(
        self, prediction: str, clip: tuple | None, variance_type: str, learned: bool, draws: bool
    ) -> rows.StepTable:
        t = self._all_timesteps()
        prev, known = t - 1, torch.ones_like(t, dtype=torch.bool)
        if self._has_list():
            values = self._values
            following = dict(reversed(list(zip(values, [*values[1:], -1], strict=True))))  # of two alike, the first
            known = torch.tensor([value in following for value in t.tolist()])
            prev = torch.tensor([following.get(value, -1) for value in t.tolist()])
        alpha_bar, alpha_bar_prev = self._alpha_bar_of_rows(), self._alpha_bar(prev)
        alpha = alpha_bar / alpha_bar_prev
        coefficients = rows.Coefficients(t, alpha_bar, alpha_bar_prev, alpha, 1 - alpha)
        return rows.posterior_table(coefficients, prediction, clip, variance_type, learned, draws, known)


class UnCLIPScheduler(FusedScheduler, diffusers.UnCLIPScheduler):
    """diffusers' ``UnCLIPScheduler``: DDPM as Karlo, an open DALL-E 2, takes its steps."""

    __init__ = constructor(diffusers.UnCLIPScheduler)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets the timesteps to visit, from T - 1 to 0; at least 2."""
        if num_inference_steps < 2:
            raise ValueError(f"num_inference_steps must be at least 2; got {num_inference_steps}")
        super().set_timesteps(num_inference_steps)
        self._place_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        prev_timestep: Timestep | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> scheduling_unclip.UnCLIPSchedulerOutput | tuple[Tensor, Tensor]:
        """x_{prev} from x_t and the model's output; arguments as :meth:`DDPMScheduler.step`.

        ``prev_timestep``, an int or a tensor, is timestep - 1 if None.
        """
        value = self._value(timestep)
        model_output, learned, source = self._ancestral_noise(value, sample, model_output, generator)
        given = len(source) > 0  # torch 2.11 does not trace bool(source)
        self._check_options(given)
        options = (self.config.prediction_type, self._clip(), self.variance_type, learned, given)
        pairs = self._pairs(value, prev_timestep)
        if pairs is not None:
            result = self._advance(("unclip", pairs, *options), timestep, value, sample, model_output, source)
        else:
            process = self._table(("process",), sample.device).on(sample.device)
            table = rows.PairTable(process, timestep, prev_timestep, *options)
            result = self._reverse(table, table.index, sample, model_output, source)
        return scheduling_unclip.UnCLIPSchedulerOutput(*result) if return_dict else result

    def _check_options(self, draws: bool) -> None:
        if draws and self.variance_type not in ("fixed_small_log", "learned_range"):
            raise ValueError(f"variance_type must be fixed_small_log or learned_range; got {self.variance_type!r}")
        if self.config.prediction_type not in ("epsilon", "sample"):
            raise ValueError(f"prediction_type must be epsilon or sample; got {self.config.prediction_type!r}")

    def _pairs(self, value: int | None, prev_timestep: Timestep | None) -> str | tuple[int, int] | None:
        """Which previous timesteps the table has: "adjacent", "listed", one row's, or those only the device knows."""
        if prev_timestep is None:
            return "adjacent"
        pair = (value, self._value(prev_timestep))
        if torch.compiler.is_compiling() or None in pair:
            return None
        if pair[1] == pair[0] - 1:
            return "adjacent"
        return "listed" if pair in pairwise(self._values) else pair

    def _process(self) -> rows.Process:
        return rows.Process(self._given_alphas_cumprod.cpu(), self.alphas.cpu(), self.betas.cpu())

    def _unclip(self, pairs: str | tuple[int, int], *options: Any) -> rows.StepTable:
        t = self._all_timesteps()
        prev = t - 1
        if pairs != "adjacent":
            for now, then in pairwise(self._values) if pairs == "listed" else [pairs]:
                prev[now] = then
        return rows.posterior_table(self._process().step(t, prev), *options)


class DDIMScheduler(FusedSchedulerWithVelocity, diffusers.DDIMScheduler):
    """diffusers' ``DDIMScheduler``: DDIM (Song et al., 2021), eq. 12 and 16."""

    __init__ = constructor(diffusers.DDIMScheduler)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets the timesteps to visit, as diffusers' method; ``device`` is where they are kept."""
        super().set_timesteps(num_inference_steps)
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
            model_output, sample: [N, C, ...].
            timestep: an int or a tensor, or a tensor [N] of one per sample.
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
        config = self.config
        key = ("ddim", self._stride(), config.prediction_type, self._clip(), eta, use_clipped_model_output)
        result = self._advance(key, timestep, self._value(timestep), sample, model_output, source)
        return scheduling_ddim.DDIMSchedulerOutput(*result) if return_dict else result

    def _before_first(self) -> Tensor:
        return self.final_alpha_cumprod

    def _ddim(self, stride: int, prediction: str, clip: tuple | None, eta: float, clipped: bool) -> rows.StepTable:
        alpha_bar_prev = self._alpha_bar(self._all_timesteps() - stride)
        columns = rows.ddim_columns(prediction, self._alpha_bar_of_rows(), alpha_bar_prev, eta, clipped)
        return rows.as_table(columns, clip, learned_variance=False)


class DDIMInverseScheduler(FusedScheduler, diffusers.DDIMInverseScheduler):
    """diffusers' ``DDIMInverseScheduler``: from an image to the noise that DDIM makes it of."""

    __init__ = constructor(diffusers.DDIMInverseScheduler)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets the timesteps to visit, increasing; ``device`` is where they are kept."""
        super().set_timesteps(num_inference_steps)
        self._place_timesteps(device)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> scheduling_ddim_inverse.DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x at ``timestep`` from x one step before it; arguments as :meth:`DDIMScheduler.step`."""
        key = ("ddim_inverse", self._stride(), self.config.prediction_type, self._clip())
        result = self._advance(key, timestep, self._value(timestep), sample, model_output, {})
        return scheduling_ddim_inverse.DDIMSchedulerOutput(*result) if return_dict else result

    def _before_first(self) -> Tensor:
        return self.initial_alpha_cumprod

    def _ddim_inverse(self, stride: int, prediction: str, clip: tuple | None) -> rows.StepTable:
        before = self._all_timesteps() - stride
        columns = rows.ddim_inverse_columns(prediction, self._alpha_bar(before), self._alpha_bar_of_rows())
        return rows.as_table(columns, clip, learned_variance=False)
