"""diffusers' UnCLIPScheduler, one reverse_step per step, between any two timesteps."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from diffusers.schedulers import scheduling_unclip
from torch import Tensor

from ...ops.reverse_step.table import COLUMNS, DeviceTable
from ...samplers.rows import Transition
from . import rows
from .arguments import Timestep, as_step_count, as_timestep
from .base import Generators, constructor
from .scheduler import FusedScheduler

# Without its types, which differ from version to version of diffusers.
_UnCLIPScheduler: Any = scheduling_unclip.UnCLIPScheduler


class Process:
    """The process of UnCLIP, whose steps go from any timestep to any before it."""

    def __init__(self, *columns: Tensor) -> None:
        """Takes alpha_bar, alpha and beta [T]; adds alpha_bar = 1 before the first, and NaN after the last."""
        values = torch.stack(columns, dim=1)
        self.values = torch.cat((values.new_ones(1, 3), values, values.new_full((1, 3), torch.nan)))
        self._on: dict[torch.device, Process] = {}

    def on(self, device: torch.device) -> Process:
        """Returns the process on ``device``, uploaded at the first call."""
        if device not in self._on:
            self._on[device] = copy.copy(self)
            self._on[device].values = self.values.to(device)
        return self._on[device]

    def step(self, t: Tensor, prev: Tensor) -> Transition:
        """Returns the steps from t to prev, both [S]; with the process's own alpha and beta where they are adjacent."""
        last = len(self.values) - 1
        alpha_bar, alpha, beta = self.values[(t + 1).clamp(0, last)].unbind(1)
        alpha_bar_prev = self.values[(prev + 1).clamp(0, last), 0]
        adjacent = prev == t - 1
        # diffusers computes beta first, then alpha = 1 - beta.
        beta = torch.where(adjacent, beta, Transition.between(alpha_bar, alpha_bar_prev).beta)
        return Transition(torch.where(adjacent, alpha, 1 - beta), beta, alpha_bar, alpha_bar_prev)


def _full(value: Tensor | float, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full(like.shape, value, device=like.device)


class PairTable:
    """Rows for pairs of timesteps that only the device knows, computed there; reverse_step reads it as a StepTable."""

    threshold, history = None, 0

    def __init__(
        self,
        process: Process,
        timestep: int | Tensor,
        prev: int | Tensor,
        options: rows.AncestralOptions,
    ) -> None:
        device = process.values.device
        given = (t if isinstance(t, Tensor) else torch.full((), t, device=device) for t in (timestep, prev))
        t, before = torch.broadcast_tensors(*(t.to(device, torch.int64).reshape(-1) for t in given))
        columns = {"x0_den": 1.0, "x0_clip": torch.inf if options.clip is None else options.clip[1]}
        columns |= rows.ancestral_columns(process.step(t, before), t, options)
        self.rows = torch.stack([_full(columns.get(name, 0.0), t) for name in COLUMNS], dim=1)
        self.index = torch.arange(len(t), device=device)
        self.timesteps, self.learned_variance, self.stochastic = t, options.learned, options.draws

    def on(self, device: torch.device) -> DeviceTable:
        """Returns the rows, which are on ``device``."""
        return DeviceTable(self.rows, self.timesteps, self.timesteps, self.timesteps)


class UnCLIPScheduler(FusedScheduler, _UnCLIPScheduler):
    """diffusers' ``UnCLIPScheduler``: DDPM as Karlo, an open DALL-E 2, takes its steps."""

    __init__ = constructor(_UnCLIPScheduler)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets the timesteps to visit, from T - 1 to 0; at least 2."""
        super().set_timesteps(as_step_count(num_inference_steps, least=2))
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
        timestep = as_timestep(timestep)
        prev_timestep = None if prev_timestep is None else as_timestep(prev_timestep)
        value = self._value(timestep)
        model_output, learned, source = self._ancestral_noise(value, sample, model_output, generator)
        given = len(source) > 0  # torch 2.11 does not trace bool(source)
        self._check_options(given)
        options = rows.AncestralOptions(self.config.prediction_type, self._clip(), self.variance_type, learned, given)
        pairs = self._pairs(value, prev_timestep)
        if pairs is not None or prev_timestep is None:
            result = self._advance(("unclip", pairs, *options), timestep, value, sample, model_output, source)
        else:
            process = self._table(("process",), sample.device).on(sample.device)
            table = PairTable(process, timestep, prev_timestep, options)
            result = self._reverse(table, table.index, sample, model_output, source)
        return scheduling_unclip.UnCLIPSchedulerOutput(*result) if return_dict else result

    def _check_options(self, draws: bool) -> None:
        if draws and self.variance_type not in ("fixed_small_log", "learned_range"):
            raise ValueError(f"variance_type must be fixed_small_log or learned_range; got {self.variance_type!r}")
        if self.config.prediction_type not in ("epsilon", "sample"):
            raise ValueError(f"prediction_type must be epsilon or sample; got {self.config.prediction_type!r}")

    def _pairs(self, value: int | None, prev_timestep: Timestep | None) -> str | tuple[int, int] | None:
        """Returns which steps the table holds.

        That is "adjacent" (t to t - 1), "listed" (to the next in ``timesteps``), one pair, or None where only the
        device knows the timesteps.
        """
        if prev_timestep is None:
            return "adjacent"
        previous = self._value(prev_timestep)
        if torch.compiler.is_compiling() or value is None or previous is None:
            return None
        if previous == value - 1:
            return "adjacent"
        return "listed" if dict(pairwise(self._values)).get(value) == previous else (value, previous)

    def _process(self) -> Process:
        return Process(self._given.cpu(), self.alphas.cpu(), self.betas.cpu())

    def _unclip(self, pairs: str | tuple[int, int], *key: Any) -> rows.StepTable:
        options = rows.AncestralOptions(*key)
        t = self._all_timesteps()
        prev = t - 1
        steps = [pairs] if isinstance(pairs, tuple) else pairwise(self._values) if pairs == "listed" else []
        for now, then in steps:
            prev[now] = then
        columns = rows.ancestral_columns(self._process().step(t, prev), t, options)
        return rows.as_table(columns, options.clip, options.learned)
