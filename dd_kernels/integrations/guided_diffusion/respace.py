"""guided-diffusion's module ``respace``: a process on some timesteps of another."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.upload import real
from ...sampling.guidance import Model
from ...schedules import Schedule, from_alpha_bars
from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: Sequence[int] | str) -> set[int]:
    """Returns the timesteps to keep of ``num_timesteps``, by guided-diffusion's rules.

    Args:
        section_counts: how many steps to take, evenly, from each of as many equal sections; a list or
            "10,15,20". "ddimN": N steps of one integer stride. "fast27": GLIDE's 27 steps for DDIM.

    Raises:
        ValueError: a section has fewer timesteps than are asked for, or no stride gives N steps.
    """
    if section_counts == "fast27":
        # With DDIM the noisiest timestep gives artefacts.
        return space_timesteps(num_timesteps, "10,10,3,2,2") - {num_timesteps - 1} | {num_timesteps - 3}
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        wanted = int(section_counts.removeprefix("ddim"))
        strides = (range(0, num_timesteps, stride) for stride in range(1, num_timesteps))
        found = next((steps for steps in strides if len(steps) == wanted), None)
        if found is None:
            raise ValueError(f"section_counts={section_counts!r}: no integer stride takes {wanted} of {num_timesteps}")
        return set(found)
    if isinstance(section_counts, str):
        section_counts = [int(count) for count in section_counts.split(",")]
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(section_counts):
        size = num_timesteps // len(section_counts) + (i < num_timesteps % len(section_counts))
        if count > size:
            raise ValueError(f"section_counts must fit: section {i} has {size} timesteps; got {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        kept |= {start + round(offset) for offset in np.cumsum([0.0] + [stride] * (count - 1))[:count]}
        start += size
    return kept


class _WrappedModel:
    """A model (or cond_fn) of the original process, called with a spaced process's timesteps.

    ``uploads`` keeps ``timestep_map`` on each device, for all the wrappers of one process.
    """

    def __init__(
        self,
        model: Model,
        timestep_map: Sequence[int],
        rescale_timesteps: bool,
        original_num_steps: int,
        uploads: dict[tuple, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps
        self._uploads = {} if uploads is None else uploads

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Any:
        """Calls the model with the original process's timesteps."""
        key = ("timestep_map", ts.device, ts.dtype)
        if key not in self._uploads:
            self._uploads[key] = real(lambda: torch.tensor(self.timestep_map, dtype=ts.dtype).to(ts.device))
        original = self._uploads[key][ts]
        if self.rescale_timesteps:
            original = original.float() * (1000.0 / self.original_num_steps)
        return self.model(x, original, **kwargs)


class SpacedDiffusion(GaussianDiffusion):
    """A process on some timesteps of another, whose alpha_bar it keeps (Nichol & Dhariwal, 2021, eq. 19).

    Args:
        use_timesteps: the timesteps of the original process to keep, as :func:`space_timesteps` gives them.
        kwargs: of the original :class:`GaussianDiffusion`.
    """

    def __init__(self, use_timesteps: Collection[int], *, betas: Sequence[float] | np.ndarray, **kwargs: Any) -> None:
        original = Schedule(betas)
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(original)
        kept = sorted(self.use_timesteps)
        if not kept or kept[0] < 0 or kept[-1] >= len(original):
            raise ValueError(f"use_timesteps must hold at least one timestep in [0, {len(original)}); got {kept}")
        super().__init__(betas=from_alpha_bars(original.alpha_bar[kept]).beta, **kwargs)
        self.timestep_map = kept

    def _wrap_model(self, model: Model) -> Model:
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps, self._uploads)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # the wrapped model scales the original timesteps
