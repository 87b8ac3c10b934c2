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
from .graph import Calls, argument, tensor

CAT = Calls(torch.cat, torch.concat, torch.concatenate)


def concatenated(images: Sequence[Tensor]) -> Tensor:
    """Returns ``torch.cat(images, 1)`` of images on the CPU."""
    parts, first = list(images), images[0]
    free = not workspace.is_running() or torch.is_grad_enabled() or transform_reason() is not None
    if free or not first.is_contiguous(memory_format=torch.channels_last):
        return torch.cat(parts, 1)
    n, _, height, width = first.shape
    channels = sum(part.shape[1] for part in parts)
    return torch.cat(parts, 1, out=workspace.empty_image(n, channels, height, width, first.dtype))


def _is_of_images(node: fx.Node) -> bool:
    if node not in CAT or "out" in node.kwargs or argument(node, 1, "dim", 0) != 1:
        return False
    value, parts = tensor(node), [tensor(part) for part in argument(node, 0, "tensors")]
    if value is None or value.ndim != 4 or value.device.type != "cpu":
        return False
    return all(part is not None and part.ndim == 4 and part.dtype == value.dtype for part in parts)


def replace_concatenations(graph: fx.Graph) -> None:
    """Rewrites all concatenations of images in ``graph``."""
    for node in graph.nodes:
        if _is_of_images(node):
            node.args, node.kwargs, node.target = (argument(node, 0, "tensors"),), {}, concatenated
