"""Rewrite: a 3-D convolution on a CPU is a sum of 2-D ones over the frames of a video.

    conv3d(x, w)[:, :, t]  =  sum over i of conv2d(x[:, :, t + i], w[:, :, i])

In channels_last_3d the frames are images in channels_last, without a copy for one video, and our kernel adds each sum
to the one before as it writes. Equal for a stride of 1 without dilation or groups. It pays for 3 x 3 pixels (1.9 to 6
times PyTorch's, on one thread) from 16 channels on; PyTorch's runs where a gradient is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import backend
from ..ops.checks import transform_reason
from .fused_convolution import Numbers, channels_last_conv2d
from .graph import Calls, argument, elements, equal, hint, tensor

_CONVOLUTIONS = Calls(torch.conv3d, F.conv3d)
_FEWEST_CHANNELS = 16
_FEWEST_PIXELS = 1024  # of a video, from which on each is convolved by itself: its frames need no copy


def _summed(
    frames: Tensor, weight: Tensor, bias: Tensor | None, sides: tuple[int, int, int, int], numbers: Numbers
) -> Tensor:
    """Returns the sums for frames [N, D, H, W, C], as [N, D', H', W', K]."""
    count, y = frames.shape[1] - weight.shape[2] + 1, None
    for i, filters in enumerate(weight.unbind(2)):
        images = frames[:, i : i + count].flatten(0, 1).permute(0, 3, 1, 2)
        y = channels_last_conv2d(images, filters, bias if i == 0 else None, 1, sides, y, numbers)
    assert y is not None
    return y.permute(0, 2, 3, 1).unflatten(0, (frames.shape[0], count))


def frames_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int, int], numbers: Numbers
) -> Tensor:
    """Convolves videos [N, C, D, H, W] frame by frame; the result is in channels_last_3d."""
    if torch.is_grad_enabled() or not backend.is_free() or transform_reason() is not None:
        return F.conv3d(x, weight, bias, 1, padding)
    depth, top, left = padding
    if depth > 0:
        x = F.pad(x, (0, 0, 0, 0, depth, depth))
    frames = x.contiguous(memory_format=torch.channels_last_3d).permute(0, 2, 3, 4, 1)
    one = frames[:1].numel() // frames.shape[4]
    parts = [frames] if one < _FEWEST_PIXELS else list(frames.split(1))
    found = [_summed(part, weight, bias, (left, left, top, top), numbers) for part in parts]
    return (found[0] if len(found) == 1 else torch.cat(found)).permute(0, 4, 1, 2, 3)


def _triple(value: Any) -> tuple[int, ...] | None:
    """Returns a stride, dilation or padding in all directions; None where it is not of plain numbers."""
    sizes = tuple(value) if isinstance(value, list | tuple) else (value,)
    sizes = sizes * 3 if len(sizes) == 1 else sizes
    return sizes if len(sizes) == 3 and all(isinstance(size, int) for size in sizes) else None


def _serves(node: fx.Node) -> bool:
    """Returns whether our kernel computes this convolution, and should."""
    x, weight, result = tensor(argument(node, 0, "input")), tensor(argument(node, 1, "weight")), tensor(node)
    if x is None or weight is None or result is None or x.ndim != 5 or x.device.type != "cpu":
        return False
    if any(v.dtype != torch.float32 for v in (x, weight, result)) or elements(result) * elements(weight) == 0:
        return False
    if _triple(argument(node, 3, "stride", 1)) != (1, 1, 1) or _triple(argument(node, 5, "dilation", 1)) != (1, 1, 1):
        return False
    if _triple(argument(node, 4, "padding", 0)) is None or argument(node, 6, "groups", 1) != 1:
        return False
    return equal(weight.shape[3], 3) and equal(weight.shape[4], 3) and hint(weight.shape[1]) >= _FEWEST_CHANNELS


def find_convolutions3d(graph: fx.Graph) -> list[fx.Node]:
    """Returns the convolutions that :func:`replace_convolutions3d` serves."""
    if backend.unavailable("cpu") is not None:
        return []
    return [node for node in graph.nodes if node in _CONVOLUTIONS and _serves(node)]


def replace_convolutions3d(graph: fx.Graph, nodes: list[fx.Node], numbers: Numbers) -> None:
    """Replaces convolutions that :func:`find_convolutions3d` found."""
    for node in nodes:
        read = (argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias"))
        with graph.inserting_before(node):
            result = graph.call_function(
                frames_conv3d, (*read, _triple(argument(node, 4, "padding", 0)), tuple(numbers))
            )
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
