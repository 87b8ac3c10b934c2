"""How far a kernel may be from the truth, and tensors that notice being written where they should not."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMAL_ERROR = 1e-6  # absolute error of a kernel's normals against float64; 6.6e-7 is the largest measured
FAST_SINE_ERROR = 2.0**-20.9  # of sin.approx and cos.approx in [-pi, pi] (PTX ISA)
FAST_NORMAL_ERROR = NORMAL_ERROR + 6.67 * FAST_SINE_ERROR  # sqrt(2 ln 2^32) is the largest radius
SENTINEL = 7.0


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    noise_scale: float = 0.0,
    truncated: bool = False,
    normal_error: float = NORMAL_ERROR,
) -> None:
    """The error against float64 is at most twice that of plain PyTorch, plus one rounding of the output.

    ``noise_scale`` is what multiplies normals that the kernel drew itself, each ``normal_error`` off at most;
    ``truncated`` says that the output was cut to its dtype rather than rounded.
    """
    assert actual.dtype == plain.dtype
    assert actual.shape == exact.shape
    assert not actual.isnan().any()
    if actual.numel() == 0:
        return
    error, plain_error = ((x.double() - exact).abs().max() for x in (actual, plain))
    rounding = exact.abs().max() * torch.finfo(actual.dtype).eps / (1 if truncated else 2)
    assert error <= 2 * plain_error + rounding + noise_scale * normal_error


def within_sentinels(shape: tuple[int, ...], dtype: torch.dtype, device: str, fill: float = float("nan")) -> Tensor:
    """A contiguous tensor of ``fill`` in the middle of a storage of sentinels, off any alignment."""
    size = torch.Size(shape).numel()
    storage = torch.full((size + 34,), SENTINEL, dtype=dtype, device=device)
    view = storage[17 : 17 + size].view(shape)
    return view.fill_(fill)


def sentinels_survive(view: Tensor) -> bool:
    """Whether all that :func:`within_sentinels` put around a tensor is still there."""
    storage = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    return bool((storage[:17] == SENTINEL).all() and (storage[-17:] == SENTINEL).all())
