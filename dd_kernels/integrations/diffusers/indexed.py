"""The bases of the schedulers whose rows are the steps of a loop: Euler, LCM, flow matching, DPM-Solver."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.q_sample.table import MarginalTable
from ...ops.upload import PerDevice
from ...samplers.noise_levels import distinct_draws
from ...samplers.rows import Columns, Level
from . import rows
from .arguments import TimestepValueError
from .base import FusedBase

Index = int | Tensor


def _first_or_second(matches: Tensor, absent: int) -> Tensor:
    """Returns where each row of booleans [N, S] is true the second time, or the only time; ``absent`` where never."""
    count = matches.sum(1)
    place = torch.where(count > 1, (matches.cumsum(1) == 2).int().argmax(1), matches.int().argmax(1))
    return torch.where(count > 0, place, absent)


class IndexedScheduler(FusedBase):
    """Counts steps: the first looks its timestep up or starts at ``begin_index``, and each is one further.

    The index is an int wherever the host knows the first timestep, and a tensor [1] on the device where it does not.
    """

    SOURCES: tuple[str, ...] = ("timesteps",)
    ABSENT_IS_LAST = False  # whether a timestep that is not in the list counts as the last one

    _step_index: Index | None
    _begin_index: int | None

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> Index:
        """Returns where ``timesteps`` has ``timestep``: the second place of two, so that no noise level is skipped."""
        if schedule_timesteps is not None and schedule_timesteps is not self.timesteps:
            return super().index_for_timestep(timestep, schedule_timesteps)  # type: ignore[misc]
        return self._index_of(timestep)

    def _index_of(self, timestep: Any) -> Index:
        if torch.compiler.is_compiling():
            on_device = isinstance(timestep, Tensor)
            return self._places(timestep if on_device else torch.full((), timestep, device=self.timesteps.device))
        if isinstance(timestep, Tensor):
            value = timestep.item() if timestep.is_cpu else self._listed(timestep)
            if value is None:
                return self._places(timestep)
        else:
            value = timestep
        if self.timesteps.dtype is torch.float32:
            value = float(np.float32(value))
        places = [place for place, listed in enumerate(self._values) if listed == value]
        if not places and not self.ABSENT_IS_LAST:
            raise TimestepValueError(f"timestep must be one of scheduler.timesteps; got {timestep}")
        return places[min(len(places) - 1, 1)] if places else len(self._values) - 1

    def _places(self, timesteps: Tensor) -> Tensor:
        """Returns where the list has ``timesteps``, int64 [N], without asking the device; past its end if nowhere."""
        matches = self.timesteps == timesteps.to(self.timesteps.device).reshape(-1, 1)
        return _first_or_second(matches, len(self._values) - self.ABSENT_IS_LAST)

    def _init_step_index(self, timestep: Any) -> None:
        self._step_index = self._begin_index if self._begin_index is not None else self._index_of(timestep)

    def _index(self, timestep: Any) -> Index:
        """Returns the index of the step that is due."""
        if self._step_index is None:
            self._init_step_index(timestep)
        index = self._step_index
        assert index is not None
        steps = len(self._values)
        if isinstance(index, int) and not torch.compiler.is_compiling() and not 0 <= index < steps:
            raise TimestepValueError(
                f"timestep must be one of the {steps} steps that set_timesteps has set, which begins them anew; "
                f"got that of step {index}"
            )
        return index

    def _row(self, index: Index, device: torch.device) -> Index:
        """Returns an index for reverse_step; in torch.compile a tensor, so that another step is not another graph."""
        if torch.compiler.is_compiling() and not isinstance(index, Tensor):
            return torch.full((1,), index, device=device)
        return index

    def _draws(self, times: Any) -> np.ndarray:
        """Returns the coordinate of each step's noise: its timestep, rounded, or more where two are alike."""
        return distinct_draws(np.nan_to_num(np.asarray(times, dtype=np.float64)).clip(0, 2**31))


class PerStep(PerDevice[Tensor]):
    """A number per step."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self._copies = values, {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.values,)

    def copy_to(self, device: torch.device) -> Tensor:
        """Uploads the numbers in float32."""
        return torch.from_numpy(self.values).float().to(device)


class SigmaScheduler(IndexedScheduler):
    """Steps between ``sigmas``, noise levels of which there is one more than timesteps."""

    SOURCES = ("timesteps", "sigmas")
    WATCHED = "sigmas"

    sigmas: Tensor

    def _sigmas(self) -> np.ndarray:
        return self._given.detach().cpu().double().numpy()

    def _level(self, sigma: np.ndarray) -> Level:
        """Returns the signal and the noise at ``sigma``: here that of Karras et al. (2022), x_0 + sigma epsilon."""
        return Level(np.ones_like(sigma), sigma)

    def _levels(self) -> tuple[Level, Level]:
        """Returns where each step starts and ends."""
        sigma = self._sigmas()[: len(self._values) + 1]
        return self._level(sigma[:-1]), self._level(sigma[1:])

    def _as_table(self, columns: Columns, clip: tuple | None = None) -> rows.StepTable:
        return rows.as_table(columns, clip, draws=self._draws(self._values[: len(self._sigma_values) - 1]))

    def _marginal(self) -> MarginalTable:
        level = self._level(self._sigmas())
        return rows.marginal(torch.from_numpy(level.signal), torch.from_numpy(level.noise))

    def _noised(self, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns signal x + noise's level z: at ``timesteps`` in training, at the loop's step while it samples."""
        timesteps = timesteps.flatten()
        index: Index | None = self._step_index if self._step_index is not None else self._begin_index
        if self._begin_index is None:
            known = timesteps.is_cpu and not torch.compiler.is_compiling()
            at = [self._index_of(t) for t in timesteps] if known else None
            index = self._places(timesteps) if at is None else torch.tensor(at, dtype=torch.int64)
        assert index is not None
        return self._mixed(("marginal",), x, noise, self._row(index, x.device), len(timesteps))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Makes ``original_samples`` as noisy as at ``timesteps``, or at the loop's step once it has a begin index."""
        return self._noised(original_samples, noise, timesteps)
