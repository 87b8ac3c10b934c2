"""Holds float32 results to another package's in float64, by the running error of ours.

Both run in float64 though code says ``float()`` or ``torch.float32``, with one noise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "ops"))  # holds the error bounds

from bounds import UNIT
from running_error import running_error

# A coefficient, which float32 rounds once, is made by so many float64 operations at most, in theirs and in ours.
OPERATIONS_OF_A_COEFFICIENT = 16
UNIT_OF_FLOAT64 = 2.0**-53
FLOAT64 = OPERATIONS_OF_A_COEFFICIENT * UNIT_OF_FLOAT64 / UNIT  # times a bound of float32: that of float64

Results = dict[str, Tensor]


@contextmanager
def same_noise(dtype: torch.dtype) -> Iterator[None]:
    """Gives torch's normal noise values whose bits are the same on every machine and in every dtype: uniform ones.

    Their deviation is 1. torch's normal numbers differ in the last bit between instruction sets.
    """
    float32 = torch.float32

    def draw(*size: Any, dtype: torch.dtype = dtype, **options: Any) -> Tensor:
        return ((torch.rand(*size, dtype=float32, **options) - 0.5) * 12**0.5).to(dtype)

    with (
        patch.object(torch, "randn", draw),
        patch.object(torch, "randn_like", lambda x: draw(x.shape, dtype=x.dtype)),
    ):
        yield


@contextmanager
def in_float64() -> Iterator[None]:
    """Keeps float64 where code says ``float()``, with :func:`same_noise`."""
    with same_noise(torch.float64), patch.object(Tensor, "float", Tensor.double):
        yield


@contextmanager
def theirs_in_float64() -> Iterator[None]:
    """As :func:`in_float64`, and keeps float64 where code makes tensors of numbers or says ``torch.float32``."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with in_float64(), patch.object(torch, "float32", torch.float64):
            yield
    finally:
        torch.set_default_dtype(default)


def in_float32(cases: Callable[[torch.dtype], Results]) -> Results:
    """Returns results in float32, of the noise that the others are of."""
    with same_noise(torch.float32):
        return cases(torch.float32)


def bounded(cases: Callable[[torch.dtype], Results], *modules: ModuleType) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns results in float64, and how far they may be off in float32; ``modules`` are those that call the ops."""
    with in_float64(), running_error(*modules) as running:
        return {name: (value, running.error(value)) for name, value in cases(torch.float64).items()}


def differences(cases: Callable[[torch.dtype], Results], theirs: Results, *modules: ModuleType) -> Iterator[str]:
    """Yields which float32 results are beyond their bound of theirs, in float64, or float64 ones beyond roundings."""
    ours, exact = in_float32(cases), bounded(cases, *modules)
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, their in theirs.items():
        value, (in_float64, error) = ours[name], exact[name]
        if value.shape != their.shape:
            yield f"{name} is {list(value.shape)}; theirs {list(their.shape)}"
            continue
        if not ((in_float64 - their).abs() <= FLOAT64 * error).all():
            yield f"{name} is of another equation than theirs"
        if not ((value - their).abs() <= (1 + FLOAT64) * error).all():
            yield f"{name} is {((value - their).abs() / error).max():.3g} times its bound from theirs"


def check(cases: Callable[[torch.dtype], Results], theirs: Results, *modules: ModuleType) -> None:
    """Asserts that :func:`differences` finds none, and that results are float32."""
    assert list(differences(cases, theirs, *modules)) == []
    for name, value in in_float32(cases).items():
        assert value.dtype is (torch.float32 if theirs[name].dtype is torch.float64 else theirs[name].dtype), name
