"""Convolution in plain PyTorch, differentiable by autograd any number of times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation import Activation, activate

Padding = tuple[int, int, int, int]  # left, right, top, bottom, as F.pad takes them


def double(x: Tensor) -> Tensor:
    """Returns x [N, C, H, W] with each pixel repeated 2 x 2 times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def prologue(x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: int, doubled: bool = False) -> Tensor:
    """Returns act(scale x + shift) in the dtype of x, computed in float32 (float64 for float64); on request doubled."""
    if scale is not None or shift is not None or activation != Activation.NONE:
        dtype = torch.promote_types(x.dtype, torch.float32)
        z = x.to(dtype)
        if scale is not None:
            z = z * scale.to(dtype)[:, :, None, None]
        if shift is not None:
            z = z + shift.to(dtype)[:, :, None, None]
        x = activate(z, activation).to(x.dtype)
    return double(x) if doubled else x


def padded(x: Tensor, padding: Padding) -> Tensor:
    """Returns x with zeros around it, left, right, top and bottom."""
    return F.pad(x, padding) if any(padding) else x


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding, residual: Tensor | None
) -> Tensor:
    """Returns torch's conv2d in the dtype of x, under autocast too as the kernels do, plus the residual."""
    left, right, top, bottom = padding
    bias = None if bias is None else bias.to(x.dtype)
    device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
    with torch.autocast(device, enabled=False):
        if left == right and top == bottom:
            y = F.conv2d(x, weight.to(x.dtype), bias, stride, (top, left))
        else:
            y = F.conv2d(padded(x, padding), weight.to(x.dtype), bias, stride)
    return y if residual is None else y + residual


def input_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: Padding) -> Tensor:
    """Returns dL/dx by torch's convolution_backward."""
    left, _, top, _ = padding
    z, sides = _torch_padded(x, padding)
    dz = _backward(dy, z, weight, stride, sides, (True, False, False))[0]
    return dz if z is x else dz[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: Padding) -> Tensor:
    """Returns dL/dweight by torch's convolution_backward, in the dtype of weight."""
    z, sides = _torch_padded(x, padding)
    return _backward(dy, z, weight, stride, sides, (False, True, False))[1].to(weight.dtype)


def _torch_padded(x: Tensor, padding: Padding) -> tuple[Tensor, list[int]]:
    """Returns x and the padding as torch takes it, or x padded and none where two sides differ."""
    left, right, top, bottom = padding
    return (x, [top, left]) if left == right and top == bottom else (padded(x, padding), [0, 0])


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, sides: list[int], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        dy, x, weight.to(x.dtype), None, [stride, stride], sides, [1, 1], False, [0, 0], 1, list(wanted)
    )
