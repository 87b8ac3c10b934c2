"""GroupNorm, scale-shift and SiLU in one pass over the data, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend as backends
from .. import checks
from . import reference

_SMALL = ("weight", "bias", "pre_shift", "scale", "shift")  # [C], [C], [N, C], [N, C], [N, C]
_OPTIONS = "int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? pre_shift, Tensor? scale, Tensor? shift"

torch.library.define(
    "dd_kernels::group_norm_silu",
    f"(Tensor x, {_OPTIONS}, bool silu, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()",
)
torch.library.define(
    "dd_kernels::group_norm_silu_backward",
    f"(Tensor dy, Tensor x, Tensor mean, Tensor rstd, {_OPTIONS}, bool silu, Tensor(a!) dx, "
    "Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dpre_shift, Tensor(e!)? dscale, Tensor(f!)? dshift) -> ()",
)


@torch.library.register_fake("dd_kernels::group_norm_silu")
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("dd_kernels::group_norm_silu_backward")
def _(*args: Any) -> None:
    return None


_OPS = {  # the overloads themselves: choosing one costs a microsecond per call
    "group_norm_silu": torch.ops.dd_kernels.group_norm_silu.default,
    "group_norm_silu_backward": torch.ops.dd_kernels.group_norm_silu_backward.default,
}


def _run(chosen: str, name: str, arguments: tuple) -> None:
    """Calls the op ``name`` of the backend; outputs are among the arguments."""
    if chosen == "triton":
        from . import triton

        getattr(triton, name)(*arguments)
    else:
        _OPS[name](*arguments)


def _forward(chosen: str, x: Tensor, options: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd [N, G] (float32) for the backward pass."""
    y = torch.empty_like(x)
    mean = torch.empty(x.shape[0], options[0], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    _run(chosen, "group_norm_silu", (x, *options, y, mean, rstd))
    return y, mean, rstd


class _GroupNormSiLU(torch.autograd.Function):
    """Keeps x and the statistics, and recomputes the rest: 2 reads and 1 write in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        pre_shift: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        num_groups: int,
        eps: float,
        silu: bool,
        chosen: str,
    ) -> Tensor:
        y, mean, rstd = _forward(chosen, x, (num_groups, weight, bias, eps, pre_shift, scale, shift, silu))
        ctx.save_for_backward(x, mean, rstd, weight, bias, pre_shift, scale, shift)
        ctx.options = (num_groups, eps, silu, chosen)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, pre_shift, scale, shift = ctx.saved_tensors
        num_groups, eps, silu, chosen = ctx.options
        small = (weight, bias, pre_shift, scale, shift)
        gradients = [
            torch.empty_like(v) if needed and v is not None else None
            for v, needed in zip(small, ctx.needs_input_grad[1:6], strict=True)
        ]
        dx = torch.empty_like(x)
        dy = checks.laid_out_like(checks.dense(dy), x)
        if dy.stride() != x.stride():
            dy = dy.contiguous(memory_format=checks.memory_format(x))
        _run(
            chosen,
            "group_norm_silu_backward",
            (dy, x, mean, rstd, num_groups, weight, bias, eps, pre_shift, scale, shift, silu, dx, *gradients),
        )
        return (dx if ctx.needs_input_grad[0] else None, *gradients, None, None, None, None)


def _check(x: Tensor, num_groups: int, eps: float, activation: str, small: tuple[Tensor | None, ...]) -> None:
    checks.check_float("x", x)
    shape, device = x.shape, x.device
    if len(shape) < 2:
        raise ValueError(f"x must be [N, C, ...]; got {list(shape)}")
    if num_groups < 1 or shape[1] % num_groups != 0:
        raise ValueError(f"num_groups must divide the {shape[1]} channels of x; got {num_groups}")
    if x.numel() == 0 and shape[0] != 0:
        raise ValueError(f"x must have at least one element per sample; got the shape {list(shape)}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0; got {eps}")
    if activation not in ("silu", "none"):
        raise ValueError(f"activation must be 'silu' or 'none'; got {activation!r}")
    per_channel, per_sample = (shape[1],), (shape[0], shape[1])
    for i, v in enumerate(small):
        if v is not None:
            checks.check_shape(_SMALL[i], v, per_channel if i < 2 else per_sample, device)


def _are_dense_float32(small: tuple[Tensor | None, ...]) -> bool:
    """Whether the kernels can read these few values as they are."""
    for v in small:  # noqa: SIM110 - any() of a generator costs a microsecond more in every call
        if v is not None and (v.dtype != torch.float32 or not v.is_contiguous()):
            return False
    return True


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
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    r"""GroupNorm (Wu & He, 2018) and SiLU, with the shifts and scales that a U-Net puts around them.

    .. math::
        h &= x + pre\_shift, \qquad
        n = \frac{h - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}}\, weight + bias \\
        y &= \mathrm{silu}\big(n\,(1 + scale) + shift\big), \qquad \mathrm{silu}(v) = v / (1 + e^{-v})

    mu_g and sigma_g^2 are the mean and (biased) variance over the elements of a group: C / G channels
    of one sample. ``pre_shift`` is where DDPM adds the time embedding (and a convolution its bias),
    ``scale`` and ``shift`` are adaptive GroupNorm (Dhariwal & Nichol, 2021, eq. 7).
    Differentiable once in every tensor argument; the backward pass is a kernel too.

    Args:
        x: [N, C, ...], float32, bfloat16 or float16 (float64 on the reference); contiguous and
            channels_last are kept, any strides are right. Statistics are float32 in every case.
        num_groups: G, a divisor of C.
        weight, bias: [C], any float dtype.
        eps: added to the variance. 1e-5 in diffusers' U-Nets, 1e-6 in the original DDPM.
        pre_shift, scale, shift: [N, C], any float dtype.
        activation: "silu" or "none".
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        y of x's shape, dtype and layout.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option.
        BackendUnavailableError: a backend asked for by name cannot run.
    """
    small = (weight, bias, pre_shift, scale, shift)
    _check(x, num_groups, eps, activation, small)
    as_they_are, obstacle = _are_dense_float32(small), None
    if x.dtype == torch.float64 or (not as_they_are and any(v is not None and v.dtype == torch.float64 for v in small)):
        obstacle = "the kernels take float32, bfloat16 and float16, and an input is float64"
    chosen = backends.choose("group_norm_silu", backend, x.device, obstacle)
    silu = activation == "silu"
    if chosen == "reference":
        return reference.group_norm_silu(x, num_groups, weight, bias, eps, pre_shift, scale, shift, silu)

    x = checks.dense(x)
    if not as_they_are:  # autograd casts their gradients back
        small = tuple(v if v is None else v.to(torch.float32).contiguous() for v in small)
    if checks.needs_grad(x, *small):
        return _GroupNormSiLU.apply(x, *small, num_groups, eps, silu, chosen)
    weight, bias, pre_shift, scale, shift = small
    return _forward(chosen, x, (num_groups, weight, bias, eps, pre_shift, scale, shift, silu))[0]
