"""What a model predicts and is trained for, and the named beta schedules, under guided-diffusion's names."""

from __future__ import annotations

import enum
from collections.abc import Callable

import numpy as np

from ...schedules import cosine_schedule, from_alpha_bar_function


class ModelMeanType(enum.Enum):
    """What the model's output is."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t): from the model's second half, or fixed.

    LEARNED: the second half is the log-variance. LEARNED_RANGE: it says where the log-variance lies
    between those of FIXED_SMALL (-1) and FIXED_LARGE (1), eq. 15 of Nichol & Dhariwal (2021).
    """

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """MSE of the model's output (plus the bound, where the variance is learned), or the variational bound itself."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Betas [T], float64, whose cumulative product of 1 - beta is the function alpha_bar on [0, 1]."""
    return from_alpha_bar_function(num_diffusion_timesteps, alpha_bar, max_beta).beta.copy()


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Betas [T], float64: "linear", DDPM's range times 1000 / T, or "cosine" (Nichol & Dhariwal, 2021, eq. 17)."""
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return cosine_schedule(num_diffusion_timesteps).beta.copy()
    raise ValueError(f"schedule_name must be 'linear' or 'cosine'; got {schedule_name!r}")
