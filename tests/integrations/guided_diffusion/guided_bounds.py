"""How far results of GaussianDiffusion may be from guided-diffusion's in float64: by the running error of ours."""

from __future__ import annotations

from collections.abc import Callable

import guided_cases
import torch
from bounds import UNIT
from running_error import running_error
from torch import Tensor

from dd_kernels.integrations import guided_diffusion as diffusion
from dd_kernels.integrations.guided_diffusion import process, sampling

# A coefficient, which float32 rounds once, is made by so many float64 operations at most, in theirs and in ours.
OPERATIONS_OF_A_COEFFICIENT = 16
UNIT_OF_FLOAT64 = 2.0**-53


def bounded(cases: Callable[..., dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the results of the cases in float64, and how far they may be off in float32."""
    with guided_cases.in_float64(), running_error(process, sampling) as running:
        results = cases(diffusion, torch.float64)
        return {name: (value, running.error(value)) for name, value in results.items()}


def check(cases: Callable[..., dict[str, Tensor]], theirs: dict[str, Tensor]) -> None:
    """Float32 is within its bound of theirs in float64, and our float64 as near for its own roundings."""
    ours = cases(diffusion)
    assert ours.keys() == theirs.keys()
    for name, (exact, error) in bounded(cases).items():
        value, their = ours[name], theirs[name]
        assert (value.shape, value.dtype) == (their.shape, torch.float32), name
        of_float64 = OPERATIONS_OF_A_COEFFICIENT * UNIT_OF_FLOAT64 / UNIT * error
        assert ((exact - their).abs() <= of_float64).all(), f"{name}: the equation is another than theirs"
        assert ((value - their).abs() <= error + of_float64).all(), f"{name}: {(value - their).abs().max()}"
