"""GroupNorm, scale-shift and SiLU in one pass over the data, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backend as backends
from .. import checks
from ..activation import Activation, activation_of
from . import kernels, reference

_SMALL = ("weight", "bias", "pre_shift", "scale", "shift")  # [C], [C], [N, C], [N, C], [N, C]
_FLOAT64 = "the kernels take float32, bfloat16 and float16, and an input is float64"
_RARE = "the kernels compute SiLU or no activation"
_READ_TWO = ("cuda",)  # backends whose kernels take a residual or a skip


def _check(
    x: Tensor,
    num_groups: int,
    eps: float,
    small: tuple[Tensor | None, ...],
    skip: Tensor | None = None,
) -> None:
    checks.check_float("x", x)
    shape, device = x.shape, x.device
    if len(shape) < 2:
        raise ValueError(f"x must be [N, C, ...]; got {list(shape)}")
    channels = shape[1]
    if skip is not None:
        checks.check_float("skip", skip)
        if skip.ndim != x.ndim:
            raise ValueError(f"skip must have the {x.ndim} dimensions of x; got {list(skip.shape)}")
        _check_alike("skip", skip, x, (shape[0], skip.shape[1], *shape[2:]))
        channels += skip.shape[1]
    if num_groups < 1 or channels % num_groups != 0:
        of = "x" if skip is None else "x and skip"
        raise ValueError(f"num_groups must divide the {channels} channels of {of}; got {num_groups}")
    if x.numel() == 0 and shape[0] != 0:
        raise ValueError(f"x must have at least one element per sample; got the shape {list(shape)}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0; got {eps}")
    per_channel, per_sample = (channels,), (shape[0], channels)
    for i, v in enumerate(small):
        if v is not None:
            checks.check_shape(_SMALL[i], v, per_channel if i < 2 else per_sample, device)


def _check_alike(name: str, v: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    checks.check_shape(name, v, shape, x.device)
    if v.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}; got {v.dtype}")


def _are_dense_float32(small: tuple[Tensor | None, ...]) -> bool:
    """Whether the kernels can read these few values as they are."""
    for v in small:  # noqa: SIM110 - any() of a generator costs a microsecond more in every call
        if v is not None and (v.dtype != torch.float32 or not v.is_contiguous()):
            return False
    return True


def _of_two(
    x: Tensor,
    residual: Tensor | None,
    skip: Tensor | None,
    num_groups: int,
    small: tuple[Tensor | None, ...],
    eps: float,
    activation: str,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """With a residual or a skip: by one kernel where the backend has it, else by what it stands for."""
    _check(x, num_groups, eps, small, skip)
    if residual is not None:
        _check_alike("residual", residual, x, x.shape)
    obstacle = _FLOAT64 if any(v is not None and v.dtype == torch.float64 for v in (x, *small)) else None
    if activation_of(activation) > Activation.SILU:
        obstacle = obstacle or _RARE
    chosen = backends.choose("group_norm_silu", backend, x.device, obstacle)
    weight, bias, *per_sample = small
    plain = {"activation": activation, "backend": chosen, **dict(zip(_SMALL[2:], per_sample, strict=True))}
    if residual is not None and chosen not in _READ_TWO:
        total = x + residual
        return group_norm_silu(total, num_groups, weight, bias, eps, skip=skip, **plain), total
    if chosen not in _READ_TWO:
        return group_norm_silu(torch.cat([x, skip], 1), num_groups, weight, bias, eps, **plain)

    x = checks.dense(x)
    small = tuple(v if v is None else v.to(torch.float32).contiguous() for v in small)
    act = activation_of(activation)
    if checks.needs_grad(x, residual, skip, *small):
        return kernels.JoinGroupNormSiLU.apply(x, residual, skip, *small, num_groups, eps, act)
    y, total, _, _ = kernels.join_forward(x, residual, skip, (num_groups, *small[:2], eps, *small[2:], act))
    return y if total is None else (y, total)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""GroupNorm (Wu & He, 2018) and SiLU, with the shifts and scales that a U-Net puts around them.

    .. math::
        h &= x + pre\_shift, \qquad
        n = \frac{h - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}}\, weight + bias \\
        y &= \mathrm{silu}\big(n\,(1 + scale) + shift\big), \qquad \mathrm{silu}(v) = v / (1 + e^{-v})

    mu_g and sigma_g^2 are the mean and (biased) variance over the elements of a group: C / G channels
    of one sample. ``pre_shift`` is where DDPM adds the time embedding (and a convolution its bias),
    ``scale`` and ``shift`` are adaptive GroupNorm (Dhariwal & Nichol, 2021, eq. 7).
    Differentiable once in every tensor argument; the backward pass is a kernel too. (Where ``pre_shift`` takes
    means of many deviations away, the gradients of the CUDA and Triton kernels are off by 1e-8 of those deviations.)

    ``residual`` is added first, ``sum = x + residual`` rounded to x's dtype, and ``sum`` takes x's place
    above. It is the second result: what a residual stream carries on, without ``pre_shift``, which is
    the norm's alone. ``skip`` follows x along the channels, as in a U-Net's decoder: the norm is that of
    ``torch.cat([x, skip], 1)``, or of ``torch.cat([sum, skip], 1)``, and groups may straddle the two. The
    CUDA kernels read the tensors in their one pass and write ``sum`` in it, make no concatenation, and
    write the gradients of x and skip apart in the backward pass, that of ``sum`` added; other backends
    add and concatenate first.

    Args:
        x: [N, C, ...], float32, bfloat16 or float16 (float64 on the reference); contiguous and
            channels_last are kept, any strides are right. Statistics are float32 in every case.
        num_groups: G, a divisor of C.
        weight, bias: [C], any float dtype.
        eps: added to the variance. 1e-5 in diffusers' U-Nets, 1e-6 in the original DDPM.
        pre_shift, scale, shift: [N, C], any float dtype.
        residual: of x's shape and dtype.
        skip: [N, C2, ...], of x's dtype. C above is then the sum of both tensors' channels.
        activation: "none", "silu", "mish", "gelu" (exact) or "gelu_tanh".
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        y of x's shape (with ``skip``, of the concatenation's), dtype and layout; with ``residual``, (y, sum).

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option.
        BackendUnavailableError: a backend asked for by name cannot run.
    """
    small = (weight, bias, pre_shift, scale, shift)
    if residual is not None or skip is not None:
        return _of_two(x, residual, skip, num_groups, small, eps, activation, backend)
    _check(x, num_groups, eps, small)
    act = activation_of(activation)
    as_they_are, obstacle = _are_dense_float32(small), None
    if x.dtype == torch.float64 or (not as_they_are and any(v is not None and v.dtype == torch.float64 for v in small)):
        obstacle = _FLOAT64
    if act > Activation.SILU:
        obstacle = obstacle or _RARE
    chosen = backends.choose("group_norm_silu", backend, x.device, obstacle)
    if chosen == "reference":
        return reference.group_norm_silu(x, num_groups, weight, bias, eps, pre_shift, scale, shift, act)

    x = checks.dense(x)
    if not as_they_are:  # the CPU's kernels widen them; for the others autograd casts their gradients back
        small = tuple(v if v is None else (v if chosen == "cpu" else v.to(torch.float32)).contiguous() for v in small)
    if checks.needs_grad(x, *small):
        return kernels.GroupNormSiLU.apply(x, *small, num_groups, eps, act, chosen)
    weight, bias, pre_shift, scale, shift = small
    return kernels.inference(chosen, x, (num_groups, weight, bias, eps, pre_shift, scale, shift, act))
