"""Rewrite: convolutions on a CPU run in channels_last by our kernel, with the norm before them and the sum after.

    conv2d(x, weight, bias, stride, padding)      ->  conv2d in channels_last
    conv2d(h, weight, bias, stride, padding) + x  ->  conv2d with residual=x
    conv2d(act(norm(x)), weight, ...)             ->  conv2d of x, which applies the norm as it reads x
    conv2d(pad(x, sides), weight, ...)            ->  conv2d of x with more zeros around it
    conv2d(interpolate(x, scale_factor=2), ...)   ->  conv2d of x, which repeats each pixel 2 x 2 times as it reads x
    conv2d(x.contiguous(), weight, ...)           ->  conv2d of x; diffusers makes such copies in training

Equal without dilation or groups, where only the sum reads the convolution, only the convolution the norm, and x is not
written to between. Nearest up-sampling may have other readers, which keep it; filters are 3 x 3 there, as for 1 x 1 the
kernel reads pixels where they lie.

Of models in 16 bits only 3 x 3 filters of stride 1 run so: Winograd's algorithm in float32 needs a quarter of the
products, which is more than PyTorch gains by 16 bits without AMX's tiles, and it rounds less.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import backend
from ..ops.conv2d.reference import Padding
from .fused_convolution import Numbers, channels_last_conv2d, norm_conv2d
from .fused_norm import checked_norm
from .graph import (
    ADD,
    Calls,
    argument,
    between,
    elements,
    equal,
    is_barrier,
    known,
    mutates,
    only_user,
    operands,
    same_shape,
    tensor,
)

_CONVOLUTIONS = Calls(torch.conv2d, F.conv2d)
_PAD = Calls(F.pad, torch._C._nn.pad)
_INTERPOLATE = Calls(F.interpolate)
_CONTIGUOUS = Calls("contiguous")


@dataclass(frozen=True)
class Convolution:
    """A convolution that our kernel computes, and the sum with a residual, if any."""

    node: fx.Node
    total: fx.Node | None = None
    residual: fx.Node | None = None


def _pair(value: Any) -> tuple[int, int] | None:
    """Returns a stride, dilation or padding in both directions; None where it is not of plain numbers."""
    sizes = tuple(value) if isinstance(value, list | tuple) else (value, value)
    sizes = sizes * 2 if len(sizes) == 1 else sizes
    return (sizes[0], sizes[1]) if len(sizes) == 2 and all(isinstance(size, int) for size in sizes) else None


def _is_3x3(weight: Tensor) -> bool:
    return all(equal(size, 3) for size in weight.shape[2:])


def _gains_in_16_bits() -> bool:
    """Returns whether this processor multiplies float32 in vectors, and 16 bits not in tiles."""
    return torch.cpu._is_avx2_supported() and not torch.cpu._is_amx_tile_supported()


def _serves_dtype(x: Tensor, weight: Tensor, result: Tensor, stride: tuple[int, int] | None) -> bool:
    """Returns whether our kernel should compute a convolution of these dtypes."""
    if not x.dtype == weight.dtype == result.dtype:  # autocast shows in the dtype of the result
        return False
    if x.dtype == torch.float32:
        return True
    winograd = stride == (1, 1) and _is_3x3(weight)
    return x.dtype in (torch.bfloat16, torch.float16) and winograd and _gains_in_16_bits()


def _serves(node: fx.Node) -> bool:
    """Returns whether our kernel computes this convolution."""
    x, weight, result = tensor(argument(node, 0, "input")), tensor(argument(node, 1, "weight")), tensor(node)
    if x is None or weight is None or result is None or x.ndim != 4 or x.device.type != "cpu":
        return False
    stride, padding = _pair(argument(node, 3, "stride", 1)), _pair(argument(node, 4, "padding", 0))
    if not _serves_dtype(x, weight, result, stride):
        return False
    dilation, groups = _pair(argument(node, 5, "dilation", 1)), argument(node, 6, "groups", 1)
    square = stride is not None and stride[0] == stride[1] and elements(weight) > 0
    return square and padding is not None and dilation == (1, 1) and groups == 1


def residual_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Returns the sum that alone reads ``node``, and its other term of the same shape, or None."""
    total, value = only_user(node), tensor(node)
    pair = operands(total) if total in ADD and total is not None else None
    if total is None or pair is None or value is None or mutates(total):
        return None
    other = pair[1] if pair[0] is node else pair[0]
    beside = tensor(other)
    if other is node or beside is None or beside.dtype != value.dtype or not same_shape(beside, value):
        return None
    if beside.device != value.device or any(is_barrier(other_node) for other_node in between(node, total)):
        return None
    return total, other


def find_convolutions(graph: fx.Graph) -> list[fx.Node]:
    """Returns the convolutions that :func:`replace_convolutions` serves."""
    if backend.unavailable("cpu") is not None:
        return []
    return [node for node in graph.nodes if node in _CONVOLUTIONS and _serves(node)]


def _norm_before(x: fx.Node, reader: fx.Node, last: fx.Node) -> fx.Node | None:
    """Returns the norm whose result ``x`` is, if only ``reader`` reads it and it may be computed at ``last``."""
    if x.target is not checked_norm or only_user(x) is not reader:
        return None
    read, result = tensor(x.args[0]), tensor(x)
    if read is None or result is None or read.dtype != result.dtype or elements(read) == 0:
        return None
    return None if any(is_barrier(other) for other in between(x, last)) else x


def _without_layout(x: fx.Node, last: fx.Node, covered: list[fx.Node]) -> fx.Node:
    """Returns what ``x`` is a contiguous copy of, if it is one and that may be read at ``last``; else ``x``.

    Our kernel converts what it reads, where that is needed; ``covered`` takes the calls that it makes needless.
    """
    if x not in _CONTIGUOUS or any(is_barrier(other) for other in between(x, last)):
        return x
    covered.append(x)
    source: fx.Node = argument(x, 0, "input")
    return source


def _zeros_before(x: fx.Node, last: fx.Node) -> Padding | None:
    """Returns the sides of the zeros that the call ``x`` puts around its input, if it may be done at ``last``."""
    if x not in _PAD or argument(x, 2, "mode", "constant") != "constant" or argument(x, 3, "value") not in (None, 0):
        return None
    sides = argument(x, 1, "pad")
    if len(sides) != 4 or not all(isinstance(size, int) and size >= 0 for size in sides):
        return None
    if any(is_barrier(other) for other in between(x, last)):
        return None
    return sides[0], sides[1], sides[2], sides[3]


def _half_size(x: fx.Node, weight: fx.Node, last: fx.Node) -> fx.Node | None:
    """Returns what the call ``x`` repeats 2 x 2 times for a 3 x 3 convolution, if it may be read at ``last``."""
    if x not in _INTERPOLATE or argument(x, 3, "mode", "nearest") not in ("nearest", "nearest-exact"):
        return None
    small: fx.Node = argument(x, 0, "input")
    # A factor between 2 and 2.5 may make an image twice as large too, but repeats others of its pixels.
    if argument(x, 2, "scale_factor") not in (None, 2, (2, 2), [2, 2]):
        return None
    if not _is_3x3(known(weight)):
        return None
    if not all(equal(large, 2 * size) for large, size in zip(known(x).shape[2:], known(small).shape[2:], strict=True)):
        return None
    return None if any(is_barrier(other) for other in between(x, last)) else small


def _replace(graph: fx.Graph, found: Convolution, numbers: Numbers) -> None:
    """Puts our convolution in the place of the node, or of its sum with the residual."""
    node, last = found.node, found.total or found.node
    x, filters = argument(node, 0, "input"), (argument(node, 1, "weight"), argument(node, 2, "bias"))
    stride, padding = _pair(argument(node, 3, "stride", 1)), _pair(argument(node, 4, "padding", 0))
    assert stride is not None
    assert padding is not None
    sides, covered = (padding[1], padding[1], padding[0], padding[0]), [last, node]
    x = _without_layout(x, last, covered)
    if (zeros := _zeros_before(x, last)) is not None:
        covered.append(x)
        sides = (sides[0] + zeros[0], sides[1] + zeros[1], sides[2] + zeros[2], sides[3] + zeros[3])
        x = _without_layout(argument(x, 0, "input"), last, covered)
    if (small := _half_size(x, filters[0], last)) is not None:
        covered.append(x)
        x = _without_layout(small, last, covered)
    arguments = (*filters, stride[0], sides, found.residual, tuple(numbers), small is not None)
    alone = all(only_user(other) is reader for reader, other in pairwise(covered[1:]))
    norm = _norm_before(x, covered[-1], last) if alone else None
    with graph.inserting_before(last):
        if norm is None:
            result = graph.call_function(channels_last_conv2d, (x, *arguments))
        else:
            result = graph.call_function(norm_conv2d, (norm.args, dict(norm.kwargs), *arguments))
            covered.append(norm)
    result.meta = {**node.meta, "example_value": tensor(last)}
    last.replace_all_uses_with(result)
    for other in covered:
        if not other._erased and not other.users:
            graph.erase_node(other)


def replace_convolutions(graph: fx.Graph, nodes: list[fx.Node], numbers: Numbers) -> None:
    """Replaces convolutions that :func:`find_convolutions` found."""
    for node in nodes:
        pair = residual_of(node)
        _replace(graph, Convolution(node, *pair) if pair else Convolution(node), numbers)
