"""How far float32 may be off where dd.sample runs: its running error in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bounds import assert_within
from float64_runs import in_float64
from running_error import running_error
from torch import Tensor

import dd_kernels as dd
from dd_kernels.sampling import images, requests, steps


def bounded(call: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
    """Returns the tensors that a call returns in float64, and how far each may be off in float32."""
    with in_float64(), running_error(images, requests, steps) as running:
        result = call()
        tensors = result if isinstance(result, (list, tuple)) else [result]
        return [(x, running.error(x)) for x in tensors]


def bounded_sample(model: Any, shape: Any, table: Any, *, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns what dd.sample draws in float64 from float32 noise, and how far it may be off in float32.

    ``shape`` may be x_T itself. A model must compute in the dtype of x.
    """

    def call() -> Tensor:
        x = shape if isinstance(shape, Tensor) else dd.randn(shape, seed=seed, **first(options))
        return dd.sample(model, x.double(), table, seed=seed, **options)

    return bounded(call)[0]


def first(options: dict[str, Any]) -> dict[str, int]:
    """Returns the option that a sample's noise depends on."""
    return {"first_sample": options.get("first_sample", 0)}


def assert_samples_are(bound: tuple[Tensor, Tensor], *samples: Tensor) -> None:
    """Asserts that samples in float32 are within the bound of those in float64."""
    for x in samples:
        assert x.dtype is torch.float32
        assert_within(x, *bound)
