"""2-D convolution in channels_last on a CPU: Winograd's for 3 x 3, direct for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backend as backends
from .. import checks
from ..activation import activation_of
from . import op, reference
from .reference import Padding

ACCURACIES = ("default", "high", "fast")


def method_of(accuracy: str, products: str) -> op.Method:
    """Returns the methods that the cost model may choose among; see :func:`conv2d`."""
    exact = accuracy == "high" or (accuracy == "default" and products == "bfloat16")
    return op.Method.ACCURATE if exact else op.Method.FASTEST


def _padding_of(padding: int | Sequence[int]) -> Padding:
    """Returns (left, right, top, bottom)."""
    sizes = (padding, padding) if isinstance(padding, int) else tuple(padding)
    if len(sizes) == 2:
        sizes = (sizes[1], sizes[1], sizes[0], sizes[0])
    if len(sizes) != 4 or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(
            "padding must be an int, (vertical, horizontal) or (left, right, top, bottom), none below 0; "
            f"got {padding!r}"
        )
    return sizes


def _check_sizes(x: Tensor, weight: Tensor, stride: int, padding: Padding, doubled: bool) -> tuple[int, int, int, int]:
    """Returns the result's shape."""
    checks.check_float("x", x)
    checks.check_float("weight", weight)
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]; got {list(x.shape)}")
    if weight.ndim != 4 or weight.shape[1] != x.shape[1] or 0 in weight.shape[1:]:
        raise ValueError(f"weight must be [K, {x.shape[1]}, height, width]; got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of x, {x.device}; got {weight.device}")
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"weight must have the dtype of x, {x.dtype}, or float32; got {weight.dtype}")
    if not isinstance(stride, int) or isinstance(stride, bool) or stride < 1:
        raise ValueError(f"stride must be an int of at least 1; got {stride!r}")
    if not isinstance(doubled, bool):
        raise ValueError(f"input_doubled must be a bool; got {doubled!r}")
    height, width = op.out_size(x, weight, stride, padding, doubled)
    if height < 1 or width < 1:
        raise ValueError(
            f"x must be at least as large as weight after padding; got {list(x.shape)}, {list(weight.shape)}, "
            f"padding (left, right, top, bottom) {padding}"
        )
    return x.shape[0], weight.shape[0], height, width


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Padding,
    scale: Tensor | None,
    shift: Tensor | None,
    doubled: bool,
    residual: Tensor | None,
) -> None:
    shape = _check_sizes(x, weight, stride, padding, doubled)
    checks.check_shape("bias", bias, (weight.shape[0],), x.device)
    if (scale is None) != (shift is None):
        raise ValueError("input_scale and input_shift must be given together; got one of them")
    checks.check_shape("input_scale", scale, (x.shape[0], x.shape[1]), x.device)
    checks.check_shape("input_shift", shift, (x.shape[0], x.shape[1]), x.device)
    checks.check_shape("residual", residual, shape, x.device)
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual must have the dtype of x, {x.dtype}; got {residual.dtype}")


def _unsupported_reason(x: Tensor, *others: Tensor | None) -> str | None:
    if x.device.type != "cpu":
        return f"conv2d's kernels take CPU tensors, and x is on {x.device}"
    if any(v is not None and v.dtype == torch.float64 for v in (x, *others)):
        return "the kernels take float32, bfloat16 and float16, and an input is float64"
    return checks.transform_reason()


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int | Sequence[int] = 0,
    *,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    input_activation: str = "none",
    input_doubled: bool = False,
    residual: Tensor | None = None,
    accuracy: str = "default",
    products: str = "float32",
    backend: str = "auto",
) -> Tensor:
    r"""2-D convolution, with what a U-Net puts before and after it.

    .. math::
        y_{n,k,i,j} = b_k + r_{n,k,i,j} + \sum_{c,u,v} w_{k,c,u,v}\, z_{n,c,\,s i + u - top,\,s j + v - left},
        \qquad z_{n,c} = \mathrm{act}(scale_{n,c}\, x_{n,c} + shift_{n,c})

    with zeros around z. scale, shift and act are a GroupNorm and its activation, applied as the kernel reads x; the
    residual r is added as it writes y. ``input_doubled`` stands for nearest up-sampling: each pixel of z is 2 x 2, of
    which the kernel reads one.

    The CPU kernel computes 3 x 3 convolutions of stride 1 by Winograd's minimal filtering (Lavin & Gray, 2016),
    F(4 x 4) or F(2 x 2), others directly, whichever a cost model of shape, threads and instruction set finds faster.
    Sums go over 64 input channels at a time. F(4 x 4)'s points are 0, +-sqrt(1/2), +-sqrt(2) and infinity: at 256
    channels its RMS error in float32 is that of one long direct sum. ``accuracy="high"`` leaves F(4 x 4) out: the
    error is then below a direct sum's. Winograd's transforms mix the inputs of a tile, so one NaN or infinity in x
    makes NaN of the outputs of its tile, 4 x 4 at most, not only of those whose filter covers it.

    Differentiable. First derivatives of a stride 1 are kernels; others are torch's.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16 (float64 on the reference). channels_last is what the kernels
            read; other layouts are copied.
        weight: [K, C, height, width], of the dtype of x or float32, contiguous or channels_last.
        bias: [K], any float dtype.
        stride: of both directions.
        padding: zeros around z: an int, (vertical, horizontal), or (left, right, top, bottom) as
            ``torch.nn.functional.pad`` has it; (0, 1, 0, 1) is what diffusers' encoders take with stride 2.
        input_scale, input_shift: [N, C], both or neither.
        input_activation: "none", "silu", "mish", "gelu" or "gelu_tanh".
        input_doubled: whether z is repeated 2 x 2 times, to [N, C, 2 H, 2 W], before the zeros are put around it.
        residual: of the result's shape, of x's dtype.
        accuracy: "default", "high" (see above), or "fast", which differs from the default in letting products of
            bfloat16 take F(4 x 4) too, at almost three times the error.
        products: "float32" or "bfloat16". With the latter, on processors with AVX-512 BF16 and nowhere else, the
            kernel rounds what it multiplies to bfloat16 and adds in float32, whatever the dtype of x: a relative
            error of 4e-3 a layer, at up to twice the speed.
        backend: "auto", "cpu" or "reference"; where no kernel serves, "auto" runs ``torch.nn.functional.conv2d``.

    Returns:
        y [N, K, H', W'] of x's dtype and layout.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option.
        BackendUnavailableError: a backend asked for by name cannot run.
    """
    sides = _padding_of(padding)
    _check(x, weight, bias, stride, sides, input_scale, input_shift, input_doubled, residual)
    if accuracy not in ACCURACIES:
        raise ValueError(f"accuracy must be 'default', 'high' or 'fast'; got {accuracy!r}")
    if products not in ("float32", "bfloat16"):
        raise ValueError(f"products must be 'float32' or 'bfloat16'; got {products!r}")
    activation = activation_of(input_activation)
    options = (bias, input_scale, input_shift, residual)
    chosen = backends.choose("conv2d", backend, x.device, _unsupported_reason(x, weight, *options))
    before = input_scale, input_shift, activation
    if chosen == "reference":
        z = reference.prologue(x, *before, input_doubled)
        return reference.conv2d(z, weight, bias, stride, sides, residual)

    method, bfloat16 = method_of(accuracy, products), products == "bfloat16"
    if checks.needs_grad(x, weight, *options):
        x = reference.prologue(x, *before, input_doubled)
        y: Tensor = op.Conv2d.apply(x, weight, bias, residual, stride, sides, method, bfloat16)
    else:
        y = op.forward(x, weight, bias, *before, residual, stride, sides, method, bfloat16, doubled=input_doubled)
    return y.contiguous(memory_format=checks.memory_format(x))
