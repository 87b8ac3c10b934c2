"""randn against torch's own normals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dd_kernels as dd

from .harness import Case

SHAPES = [(1, 3, 32, 32), (64, 3, 32, 32), (64, 3, 64, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_randn(compare: Callable[[Case], dict[str, Any]], shape: tuple[int, ...]) -> None:
    compare(
        Case(
            "randn",
            "normals",
            shape,
            lambda: dd.randn(shape, seed=0),
            [()],
            4 * torch.Size(shape).numel(),
            {"torch.randn": lambda: torch.randn(shape)},
        )
    )


def test_channels_last(compare: Callable[[Case], dict[str, Any]]) -> None:
    shape, layout = (64, 3, 32, 32), torch.channels_last
    compare(
        Case(
            "randn",
            "normals",
            shape,
            lambda: dd.randn(shape, seed=0, memory_format=layout),
            [()],
            4 * torch.Size(shape).numel(),
            {"torch.randn": lambda: torch.empty(shape, memory_format=layout).normal_()},
            layout="channels_last",
        )
    )
