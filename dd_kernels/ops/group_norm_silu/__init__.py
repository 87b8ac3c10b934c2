"""GroupNorm, scale-shift and an activation in one pass over the data, forward and backward."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from ... import backend as backends
from ..activation import activation_of
from ..checks import image_of
from . import op, reference
from .arguments import Arguments, check


def _of_image(
    chosen: str, a: Arguments, image: Tensor, ready: bool, needs_grad: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the results for a video or tokens, of which ``image`` is a view."""
    sizes = a.x.shape[2:-1]  # of a video; tokens are an image of one row

    def laid_out(y: Tensor) -> Tensor:
        return y.unflatten(2, sizes) if sizes else y.squeeze(2)

    residual, skip = (None if v is None else v.reshape(*v.shape[:2], *image.shape[2:]) for v in (a.residual, a.skip))
    result = _run(chosen, a._replace(x=image, residual=residual, skip=skip), ready, needs_grad)
    return laid_out(result) if isinstance(result, Tensor) else (laid_out(result[0]), laid_out(result[1]))


def _run(chosen: str, a: Arguments, ready: bool, needs_grad: bool) -> Tensor | tuple[Tensor, Tensor]:
    return reference.group_norm_silu(a) if chosen == "reference" else op.group_norm_silu(chosen, a, ready, needs_grad)


@overload
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
    residual: None = None,
    skip: Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor: ...


@overload
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
    residual: Tensor,
    skip: Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


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
    Differentiable in every tensor argument: first gradients are a kernel's, further ones, forward mode and
    ``torch.func`` run the reference. (Where ``pre_shift`` takes means of many deviations away, the gradients of the
    CUDA and Triton kernels are off by 1e-8 of those deviations.) ``activation`` takes SiLU's place in the equation.

    Squares are summed in float32: where a group's deviation times the root of its size exceeds 1e19, the group's y and
    gradients are NaN (by the reference, as by ``torch.group_norm``, the bias or NaN), not the ordinary numbers that
    float64 would give. Those would take a scale of each group, from its largest number before the first square, and
    again for the gradient, whose 1 / sigma_g^2 float32 does not hold either: passes over x, or products per element.

    ``residual`` is added first, ``sum = x + residual`` rounded to x's dtype, and ``sum`` takes x's place
    above. It is the second result: what a residual stream carries on, without ``pre_shift``, which is
    the norm's alone. ``skip`` follows x along the channels, as in a U-Net's decoder: the norm is that of
    ``torch.cat([x, skip], 1)``, or of ``torch.cat([sum, skip], 1)``, and groups may straddle the two. The
    CUDA kernels read the tensors in their one pass and write ``sum`` in it, make no concatenation, and
    write the gradients of x and skip apart in the backward pass, that of ``sum`` added; other backends
    add and concatenate first.

    Args:
        x: [N, C, ...], float32, bfloat16 or float16 (float64 on the reference); contiguous and channels_last, that of
            tokens [N, C, L] and of videos [N, C, D, H, W] too, are kept, any strides are right. Statistics are float32
            in every case.
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
    act = activation_of(activation)
    a = Arguments(x, num_groups, weight, bias, eps, pre_shift, scale, shift, act, residual, skip)
    reason, ready, needs_grad = check(a)
    chosen = backends.choose("group_norm_silu", backend, x.device, reason)
    if x.ndim != 4 and (image := image_of(x)) is not None:
        return _of_image(chosen, a, image, ready, needs_grad)
    return _run(chosen, a, ready, needs_grad)
