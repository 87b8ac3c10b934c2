"""The beta schedules of guided-diffusion, GLIDE and DiT by their names: float64 arrays [T]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...schedules import cosine_schedule, from_alpha_bar_function


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Returns betas whose cumulative product of 1 - beta is the function alpha_bar on [0, 1]."""
    return from_alpha_bar_function(num_diffusion_timesteps, alpha_bar, max_beta).beta.copy()


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Returns the betas of a name.

    That is "linear", DDPM's range times 1000 / T, or "cosine" (Nichol & Dhariwal, 2021, eq. 17), which GLIDE and
    DiT call "squaredcos_cap_v2".
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return get_beta_schedule(
            "linear",
            beta_start=scale * 0.0001,
            beta_end=scale * 0.02,
            num_diffusion_timesteps=num_diffusion_timesteps,
        )
    if schedule_name in ("cosine", "squaredcos_cap_v2"):
        return cosine_schedule(num_diffusion_timesteps).beta.copy()
    raise ValueError(f"schedule_name must be 'linear', 'cosine' or 'squaredcos_cap_v2'; got {schedule_name!r}")


def get_beta_schedule(
    beta_schedule: str, *, beta_start: float, beta_end: float, num_diffusion_timesteps: int
) -> np.ndarray:
    """Returns betas by the names of GLIDE's and DiT's function, and of DDPM's code before them.

    That is "linear", "quad" (the root is linear), "warmup10" and "warmup50" (linear in the first 10 or 50 %, then
    ``beta_end``), "const" (``beta_end``) or "jsd" (1 / T, 1 / (T - 1) .. 1).
    """
    steps = num_diffusion_timesteps
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, steps, dtype=np.float64)
    if beta_schedule == "quad":
        return np.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=np.float64) ** 2
    if beta_schedule == "jsd":
        return 1.0 / np.linspace(steps, 1, steps, dtype=np.float64)
    warmup = {"warmup10": int(steps * 0.1), "warmup50": int(steps * 0.5), "const": 0}
    if beta_schedule not in warmup:
        names = ", ".join(("linear", "quad", "jsd", *warmup))
        raise ValueError(f"beta_schedule must be one of {names}; got {beta_schedule!r}")
    betas = np.full(steps, beta_end, dtype=np.float64)
    betas[: warmup[beta_schedule]] = np.linspace(beta_start, beta_end, warmup[beta_schedule], dtype=np.float64)
    return betas
