"""The algebra from alpha_bar and a prediction to the columns of a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ops.reverse_step.table import DynamicThreshold

PREDICTIONS = ("epsilon", "x_start", "v")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def x0_columns(prediction: str, alpha_bar: np.ndarray) -> dict[str, object]:
    """x_0 from x_t and the output: epsilon (eq. 15 of DDPM), x_start, or v (eq. of Salimans & Ho, 2022, appendix D)."""
    signal, sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
    if prediction == "epsilon":
        return {"x0_num_x": 1.0, "x0_num_out": -sigma, "x0_den": signal}
    if prediction == "x_start":
        return {"x0_num_x": 0.0, "x0_num_out": 1.0}
    return {"x0_num_x": signal, "x0_num_out": -sigma}


def clip_columns(clip: float | DynamicThreshold | None) -> dict[str, object]:
    if isinstance(clip, DynamicThreshold):
        return {"threshold": clip}
    if clip is None:
        return {}
    if not clip > 0:
        raise ValueError(f"clip must be a positive number, a DynamicThreshold or None; got {clip!r}")
    return {"x0_clip": float(clip)}
