"""The base of the schedulers whose rows are timesteps, of alpha_bar: DDPM, DDIM and unCLIP."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ...ops.q_sample.table import MarginalTable
from ...samplers.rows import Level
from . import rows
from .arguments import ShapeError, Timestep, TimestepValueError, check_values
from .base import FusedBase, Generators


class AlphaScheduler(FusedBase):
    """Makes noisy samples and velocities of alpha_bar at timesteps."""

    SOURCES = ("betas", "alphas", "alphas_cumprod", "one", "final_alpha_cumprod", "initial_alpha_cumprod", "timesteps")

    # Attributes that diffusers' class sets.
    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor

    def _diffused(self, sign: int, x: Tensor, y: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar) x + sign sqrt(1 - alpha_bar) y, broadcast as diffusers does."""
        timesteps = timesteps.flatten()
        result = self._mixed(("marginal", sign), x, y, timesteps, len(timesteps))
        self._move_alphas_cumprod(x.device)
        return result

    def _move_alphas_cumprod(self, device: torch.device) -> None:
        """Moves alphas_cumprod as diffusers does, whose users index it there afterwards; the tables stay."""
        if self.alphas_cumprod.device != device:
            object.__setattr__(self, "alphas_cumprod", self.alphas_cumprod.to(device))
            self._watch(self.alphas_cumprod)

    def _marginal(self, sign: int) -> MarginalTable:
        level = Level.of_alpha_bar(self._given.cpu())
        return rows.marginal(level.signal, sign * level.noise)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) original_samples + sqrt(1 - alpha_bar_t) noise, see :func:`dd_kernels.q_sample`."""
        return self._diffused(1, original_samples, noise, timesteps)


class VelocityScheduler(AlphaScheduler):
    """Adds the velocity, which diffusers gives to DDPM, DDIM and LCM alone."""

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) sample: v of Salimans & Ho (2022)."""
        return self._diffused(-1, noise, sample, timesteps)


class FusedScheduler(AlphaScheduler):
    """The base of the schedulers that step from any timestep, mixed into diffusers' class of the same name."""

    one: Tensor
    variance_type: str

    def _ends_below_0(self) -> bool:
        """Returns whether timestep -1 is among the timesteps, as in some of diffusers' "trailing" spacings."""
        return -1 in self._values[:1] + self._values[-1:]

    def _all_timesteps(self) -> Tensor:
        """Returns the timestep of each row of a table: 0 .. T-1, and -1 where ``timesteps`` has it."""
        steps = torch.arange(len(self.alphas_cumprod))
        return torch.cat((steps, torch.tensor([-1]))) if self._ends_below_0() else steps

    def _value(self, timestep: Timestep) -> int | None:
        """Returns a timestep as an int, or None for a tensor whose value only the device knows."""
        if not isinstance(timestep, Tensor):
            return timestep if torch.compiler.is_compiling() else operator.index(timestep)
        if torch.compiler.is_compiling() or timestep.numel() != 1:
            return None
        if timestep.device.type == "cpu":
            return operator.index(timestep)
        return self._listed(timestep)

    def _row(self, timestep: Timestep, value: int | None, device: torch.device) -> int | Tensor:
        """Returns the table's row of a timestep: t itself, T for timestep -1."""
        below, steps = self._ends_below_0(), len(self.alphas_cumprod)
        if value is None:
            if isinstance(timestep, Tensor) and timestep.is_cpu and not torch.compiler.is_compiling():
                check_values(timestep, -below, steps)
            return timestep % (steps + 1) if below else timestep
        if torch.compiler.is_compiling():
            # As a tensor, so that another timestep is not another graph.
            return torch.full((1,), value, device=device) % (steps + 1)
        if not -below <= value < steps:
            raise TimestepValueError(f"timestep must be in [{-below}, {steps}); got {value}")
        return value % (steps + 1)

    def _before_first(self) -> Tensor:
        """Returns alpha_bar before timestep 0."""
        return self.one

    def _alpha_bar(self, timesteps: Tensor) -> Tensor:
        """Returns alpha_bar at ``timesteps``, and that before the first for those below 0."""
        alpha_bar = self._given.cpu()
        return torch.where(timesteps >= 0, alpha_bar[timesteps.clamp(min=0)], self._before_first().cpu())

    def _alpha_bar_of_rows(self) -> Tensor:
        """Returns alpha_bar of each row; for timestep -1 theirs is, by Python's indexing, that of T - 1."""
        return self._given.cpu()[self._all_timesteps()]

    def _stride(self) -> int:
        """Returns how far DDIM steps: T // N, whatever the list of timesteps says."""
        return self.config.num_train_timesteps // self._steps_set()

    def _advance(
        self,
        key: tuple,
        timestep: Timestep,
        value: int | None,
        sample: Tensor,
        model_output: Tensor,
        source: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Returns (previous sample, x_0) by the row of a timestep in the table of a key."""
        row = self._row(timestep, value, sample.device)
        return self._reverse(self._table(key, sample.device), row, sample, model_output, source)

    def _ancestral_noise(
        self, value: int | None, sample: Tensor, model_output: Tensor, generator: Generators
    ) -> tuple[Tensor, bool, dict[str, Any]]:
        """Prepares a step of DDPM: (model_output, whether the variance is learned, reverse_step's noise argument).

        Timestep 0 has no noise. For a timestep whose value only the device knows noise is drawn, and the row of
        timestep 0 leaves it out.
        """
        draws = value is None or value > 0
        channels = sample.shape[1]
        can_learn = self.variance_type in ("learned", "learned_range")
        learned = can_learn and model_output.shape[1] == 2 * channels
        if can_learn and draws and not learned:
            raise ShapeError(
                f"model_output must have {2 * channels} channels, half of them the variance, for "
                f"variance_type={self.variance_type!r}; got {model_output.shape[1]}"
            )
        if learned and self.variance_type == "learned":
            # diffusers' model gives the variance itself, reverse_step takes its logarithm.
            model_output = torch.cat((model_output[:, :channels], model_output[:, channels:].log()), dim=1)
        return model_output, learned, self._noise(model_output[:, :channels], generator) if draws else {}


class FusedSchedulerWithVelocity(VelocityScheduler, FusedScheduler):
    """Of DDPM and DDIM."""
