"""Rewrite: images on a CPU are concatenated along their channels into memory that the graph keeps.

    cat([h, skip], 1)  ->  cat([h, skip], 1, out=...)

Equal where all parts have one dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..ops.checks import transform_reason
from . import workspace
from .graph import Calls, argument, known, tensor

_CAT = Calls(torch.cat, torch.concat, torch.concatenate)


def concatenated(images: Sequence[Tensor]) -> Tensor:
    """Returns ``torch.cat(images, 1)`` of images on the CPU."""
    parts, first = list(images), images[0]
    free = not workspace.is_running() or torch.is_grad_enabled() or transform_reason() is not None
    if free or not first.is_contiguous(memory_format=torch.channels_last):
        return torch.cat(parts, 1)
    n, _, height, width = first.shape
    channels = sum(part.shape[1] for part in parts)
    return torch.cat(parts, 1, out=workspace.empty_image(n, channels, height, width, first.dtype))


def parts_of(node: fx.Node) -> list[fx.Node] | None:
    """Returns what ``node`` concatenates along the channels, if that is tensors of one dtype into a new one."""
    if node not in _CAT or "out" in node.kwargs or argument(node, 1, "dim", 0) != 1:
        return None
    parts, value = argument(node, 0, "tensors"), tensor(node)
    if not isinstance(parts, list | tuple) or value is None:
        return None
    tensors = [tensor(part) for part in parts]
    if any(t is None or t.dtype != value.dtype or t.ndim != value.ndim for t in tensors):
        return None
    return list(parts)


def replace_concatenations(graph: fx.Graph) -> None:
    """Rewrites all concatenations of images in ``graph``."""
    for node in graph.nodes:
        parts = parts_of(node)
        if parts is not None and known(node).ndim == 4 and known(node).device.type == "cpu":
            node.args, node.kwargs, node.target = (parts,), {}, concatenated
