"""conv2d beside PyTorch's, which is oneDNN's on a CPU: in channels_last, and with weights that it has packed before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dd_kernels.ops.conv2d import conv2d

from . import variants
from .harness import Case, Plan, Row, Target, dtype_name, rms_error

# [N, C, H, W] of the cifar10 U-Net at batch 16 and 1, and one layer of Stable Diffusion's.
SHAPES = [(16, 128, 32, 32), (16, 256, 16, 16), (1, 256, 16, 16), (1, 256, 8, 8), (1, 256, 4, 4), (2, 320, 64, 64)]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Variant(variants.Variant):
    """A convolution that keeps the number of channels unless told otherwise."""

    layout: str = "channels_last"
    outputs: str = variants.option("", "output channels, those of the input unless given")
    kernel: str = variants.option("3", "height and width of the filters", ("1", "3"))
    stride: str = variants.option("1", "stride of both directions", ("1", "2"))
    accuracy: str = variants.option("default", "accuracy of ours", ("default", "high"))

    def __str__(self) -> str:
        of = f"{self.kernel} x {self.kernel}, stride {self.stride}, accuracy {self.accuracy}"
        return f"conv2d {of} {super().__str__()}"


def _prepacked(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Function | str:
    """Returns oneDNN's convolution with weights that it has laid out for this shape; or why it is missing."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    pads, strides, ones = [padding] * 2, [stride] * 2, [1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, pads, strides, ones, 1, list(x.shape))
    run = torch.ops.mkldnn._convolution_pointwise.default
    return lambda x: run(x, packed, bias, pads, strides, ones, 1, "none", [], "")


def _case(target: Target, variant: Variant) -> Case:
    n, channels, height, width = variant.shape
    outputs, size, stride = int(variant.outputs or channels), int(variant.kernel), int(variant.stride)
    padding, memory_format = size // 2, variants.LAYOUTS[variant.layout]
    x = torch.randn(variant.shape).to(variant.dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(outputs, channels, size, size) / math.sqrt(channels * size * size)
    weight = weight.to(variant.dtype).contiguous(memory_format=memory_format)
    bias = torch.randn(outputs).to(variant.dtype)

    def ours(x: Tensor) -> Tensor:
        return conv2d(x, weight, bias, stride, padding, accuracy=variant.accuracy)

    def eager(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding)

    def inspect() -> Row:
        exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
        products = exact.numel() * channels * size * size
        return {
            "products": products,
            "rms_error": rms_error(ours(x), exact),
            "eager_rms_error": rms_error(eager(x), exact),
        }

    moved = x.numel() + weight.numel() + n * outputs * (height // stride) * (width // stride)
    return Case(
        "conv2d",
        f"{size} x {size}, stride {stride}" + ("" if variant.accuracy == "default" else ", high accuracy"),
        variant.shape,
        ours,
        [(x,)],
        moved * variant.dtype.itemsize,
        {"eager": eager, "oneDNN, weights packed": _prepacked(x, weight, bias, stride, padding)},
        dtype_name(variant.dtype),
        variant.layout,
        target.device,
        hot=True,
        inspect=inspect,
    )


def plans(target: Target) -> list[Plan]:
    """Returns plans for the layers of two U-Nets on a CPU, and none elsewhere: conv2d has no other kernels."""
    if target.kind != "cpu":
        return []
    layers = [Variant(shape) for shape in SHAPES]
    layers += [replace(layers[i], accuracy="high") for i in (0, 1)]
    layers += [Variant(SHAPES[1], kernel="1"), Variant(SHAPES[0], stride="2"), Variant(SHAPES[1], torch.bfloat16)]
    return variants.plans_of(target, layers, _case)


def test_conv2d(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)


if __name__ == "__main__":
    variants.main(Variant, _case, __doc__)
