"""The schedule of latent-diffusion's DDIMSampler: its timesteps, its buffers, and the tables of its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.reverse_step.table import StepTable, from_columns
from ...samplers import rows
from ...schedules import Schedule, from_alpha_bars


class TimestepError(ValueError, IndexError):
    """A number of steps whose last timestep does not exist; latent-diffusion runs into IndexError."""


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """Returns the timesteps, one later than they were chosen.

    They are chosen ``uniform``, every (T // S)-th, which can be more than S of them, or ``quad``, i^2 up to 0.8 T.
    """
    steps, count = num_ddpm_timesteps, num_ddim_timesteps
    if not 1 <= count <= steps:
        raise ValueError(f"ddim_num_steps must be in [1, {steps}]; got {count}")
    if ddim_discr_method not in ("uniform", "quad"):
        raise ValueError(f"ddim_discretize must be 'uniform' or 'quad'; got {ddim_discr_method!r}")
    uniform = ddim_discr_method == "uniform"
    chosen = np.arange(0, steps, steps // count) if uniform else np.linspace(0, np.sqrt(0.8 * steps), count) ** 2
    timesteps = chosen.astype(int) + 1
    if timesteps[-1] >= steps:
        raise TimestepError(f"ddim_num_steps must leave the last timestep below {steps}; got {count}")
    if verbose:
        print(f"Selected timesteps for ddim sampler: {timesteps}")
    return timesteps


class DDIMSchedule:
    """The part of DDIMSampler that needs no model output: make_schedule and what it leaves behind.

    Attributes, after make_schedule, as in latent-diffusion:
        ddim_timesteps: [S] int64 (numpy).
        ddim_alphas, ddim_sqrt_one_minus_alphas: float32 tensors [S].
        ddim_alphas_prev: float64 array [S]; ddim_sigmas: float64 tensor [S].
        betas, alphas_cumprod, alphas_cumprod_prev, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod,
        log_one_minus_alphas_cumprod, sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod,
        ddim_sigmas_for_original_num_steps: float32 tensors [T] on the model's device.
    """

    ddim_timesteps: np.ndarray

    def __init__(self, model: Any, schedule: str = "linear", device: Any = None, **_: Any) -> None:
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self.schedule = schedule
        self.device = model.betas.device if device is None else device
        self.parameterization = getattr(model, "parameterization", "eps")
        if self.parameterization not in ("eps", "v"):
            raise ValueError(f"model.parameterization must be 'eps' or 'v'; got {self.parameterization!r}")

    def register_buffer(self, name: str, attr: Any) -> None:
        """Sets an attribute, a tensor on the sampler's device."""
        setattr(self, name, attr.to(self.device) if isinstance(attr, Tensor) else attr)

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Chooses the timesteps, see :func:`make_ddim_timesteps`, and sets the attributes."""
        self.ddim_timesteps = make_ddim_timesteps(ddim_discretize, ddim_num_steps, self.ddpm_num_timesteps, verbose)
        self.ddim_eta = ddim_eta
        alpha_bar = self.model.alphas_cumprod.double().cpu().numpy()
        before = self.model.alphas_cumprod_prev.double().cpu().numpy()
        chosen = self.ddim_timesteps
        # (alpha_bar, alpha_bar before) of the steps chosen, and of all of the original process
        self._alpha_bars = {
            False: (alpha_bar[chosen], np.append(alpha_bar[0], alpha_bar[chosen[:-1]])),
            True: (alpha_bar, before),
        }
        self._tables: dict[tuple, StepTable] = {}
        self._schedules: dict[bool, Schedule] = {}
        self._register_buffers()

    def _register_buffers(self) -> None:
        given = {name: getattr(self.model, name) for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev")}
        alpha_bar = given["alphas_cumprod"].detach().float().cpu()
        (chosen, before), original = self._alpha_bars[False], self._alpha_bars[True]
        buffers: dict[str, Any] = {
            **{name: value.detach().clone().float() for name, value in given.items()},
            "sqrt_alphas_cumprod": alpha_bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
            "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
            "ddim_sigmas": torch.from_numpy(rows.ddim_sigma(chosen, before, self.ddim_eta)),
            "ddim_alphas": alpha_bar[torch.from_numpy(self.ddim_timesteps)],
            "ddim_alphas_prev": before,
            "ddim_sqrt_one_minus_alphas": (1 - alpha_bar[torch.from_numpy(self.ddim_timesteps)]).sqrt(),
            "ddim_sigmas_for_original_num_steps": torch.from_numpy(rows.ddim_sigma(*original, self.ddim_eta)).float(),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def _forward_process(self, original: bool) -> Schedule:
        """Returns the steps chosen, or all of the original process, as a schedule."""
        if original not in self._schedules:
            self._schedules[original] = from_alpha_bars(self._alpha_bars[original][0])
        return self._schedules[original]

    def _table(self, kind: str, original: bool, temperature: float = 1.0) -> StepTable:
        """Returns the table "sample" or "encode" of the model's output, or "of_x0", with epsilon in the place of x."""
        key = (kind, original, temperature)
        if key not in self._tables:
            columns = getattr(self, f"_{kind}_columns")(*self._alpha_bars[original], temperature)
            self._tables[key] = from_columns(np.arange(len(self._alpha_bars[original][0])), **columns)
        return self._tables[key]

    def _of_x0_columns(self, alpha_bar: np.ndarray, before: np.ndarray, temperature: float) -> rows.Columns:
        """Eq. 12 of DDIM, epsilon and x_0 being given."""
        return {"x0_num_out": 1.0, **self._to(alpha_bar, before, temperature, rows.Epsilon(0.0, 1.0, 0.0))}

    def _sample_columns(self, alpha_bar: np.ndarray, before: np.ndarray, temperature: float) -> rows.Columns:
        """Eq. 12 of DDIM, epsilon and x_0 being those of x_t and the model's output."""
        prediction = {"eps": "epsilon", "v": "v"}[self.parameterization]
        epsilon = rows.epsilon_of_output(prediction, alpha_bar)
        return rows.x0_columns(prediction, alpha_bar) | self._to(alpha_bar, before, temperature, epsilon)

    def _to(self, alpha_bar: np.ndarray, before: np.ndarray, temperature: float, epsilon: rows.Epsilon) -> rows.Columns:
        columns = rows.ddim_columns(before, epsilon, rows.ddim_sigma(alpha_bar, before, self.ddim_eta))
        return columns | {"sigma": columns["sigma"] * temperature}

    def _encode_columns(self, alpha_bar: np.ndarray, before: np.ndarray, _: float) -> rows.Columns:
        """DDIM's ODE in the direction of noise."""
        return rows.ode_columns(before, alpha_bar)
