"""Rewrite: convolutions on a CPU run in channels_last by our kernel, with the norm before them and the sum after.

    conv2d(x, weight, bias, stride, padding)      ->  conv2d in channels_last
    conv2d(h, weight, bias, stride, padding) + x  ->  conv2d with residual=x
    conv2d(act(norm(x)), weight, ...)             ->  conv2d of x, which applies the norm as it reads x

Equal without dilation or groups, where only the sum reads the convolution, and only the convolution the norm. It pays
for 3 x 3 filters of stride 1; for others PyTorch's convolution is up to a fifth faster, and in channels_last less
exact: they are ours where accuracy="high" is asked for, or products of bfloat16, which take half the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .. import backend
from .fused_convolution import Numbers, channels_last_conv2d, norm_conv2d
from .fused_norm import checked_norm
from .graph import (
    ADD,
    Calls,
    argument,
    between,
    elements,
    equal,
    hint,
    is_barrier,
    mutates,
    only_user,
    operands,
    same_shape,
    tensor,
)

_CONVOLUTIONS = Calls(torch.conv2d, F.conv2d)
_FEWEST_CHANNELS = 16  # of the input: below, a vector of channels is mostly padding, and PyTorch's is faster


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


def _serves(node: fx.Node, numbers: Numbers) -> bool:
    """Returns whether our kernel computes this convolution, and should."""
    x, weight, result = tensor(argument(node, 0, "input")), tensor(argument(node, 1, "weight")), tensor(node)
    if x is None or weight is None or result is None or x.ndim != 4 or x.device.type != "cpu":
        return False
    if any(v.dtype != torch.float32 for v in (x, weight, result)):  # autocast shows in the dtype of the result
        return False
    stride, padding = _pair(argument(node, 3, "stride", 1)), _pair(argument(node, 4, "padding", 0))
    dilation, groups = _pair(argument(node, 5, "dilation", 1)), argument(node, 6, "groups", 1)
    if stride is None or stride[0] != stride[1] or padding is None or dilation != (1, 1) or groups != 1:
        return False
    winograd = stride == (1, 1) and equal(weight.shape[2], 3) and equal(weight.shape[3], 3)
    pays = winograd or numbers.accuracy == "high" or numbers.products == "bfloat16"
    return pays and hint(weight.shape[1]) >= _FEWEST_CHANNELS


def _residual_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
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


def find_convolutions(graph: fx.Graph, numbers: Numbers) -> list[fx.Node]:
    """Returns the convolutions that :func:`replace_convolutions` serves."""
    if backend.unavailable("cpu") is not None:
        return []
    return [node for node in graph.nodes if node in _CONVOLUTIONS and _serves(node, numbers)]


def _norm_before(node: fx.Node, last: fx.Node) -> fx.Node | None:
    """Returns the norm whose result only this convolution reads, if it may be computed at ``last``."""
    norm, weight = argument(node, 0, "input"), tensor(argument(node, 1, "weight"))
    if norm.target is not checked_norm or only_user(norm) is not node or weight is None or elements(weight) == 0:
        return None
    read = tensor(norm.args[0])
    if read is None or read.dtype != torch.float32 or elements(read) == 0:
        return None
    return None if any(is_barrier(other) for other in between(norm, last)) else norm


def _replace(graph: fx.Graph, found: Convolution, numbers: Numbers) -> None:
    """Puts our convolution in the place of the node, or of its sum with the residual."""
    node, last = found.node, found.total or found.node
    x, filters = argument(node, 0, "input"), (argument(node, 1, "weight"), argument(node, 2, "bias"))
    stride, padding = _pair(argument(node, 3, "stride", 1)), _pair(argument(node, 4, "padding", 0))
    assert stride is not None
    arguments = (*filters, stride[0], padding, found.residual, tuple(numbers))
    norm = _norm_before(node, last)
    with graph.inserting_before(last):
        if norm is None:
            result = graph.call_function(channels_last_conv2d, (x, *arguments))
        else:
            result = graph.call_function(norm_conv2d, (norm.args, dict(norm.kwargs), *arguments))
    result.meta = {**node.meta, "example_value": tensor(last)}
    last.replace_all_uses_with(result)
    for covered in (last, node, norm):
        if covered is not None and not covered._erased:
            graph.erase_node(covered)


def replace_convolutions(graph: fx.Graph, nodes: list[fx.Node], numbers: Numbers) -> None:
    """Replaces convolutions that :func:`find_convolutions` found."""
    for node in nodes:
        pair = _residual_of(node)
        _replace(graph, Convolution(node, *pair) if pair else Convolution(node), numbers)
