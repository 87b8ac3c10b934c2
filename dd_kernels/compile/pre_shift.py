"""Rewrite: what is added per sample and channel before a norm is added in the norm's pass.

    norm(conv(x) + bias + embedding)  ->  group_norm_silu(conv(x), pre_shift=bias + embedding)

Equal where only the norm reads the sum and the embedding is [N, C, 1, ...] or [1, C, 1, ...]. A convolution's own
bias comes along where the convolution has no other reader and the bias would cost a pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .graph import ADD, Calls, argument, mutates, only_user, operands, per_channel, same_shape, tensor

_CONVOLUTIONS = Calls(torch.conv1d, torch.conv2d, torch.conv3d)


@dataclass
class PreShift:
    """What is left for the norm to read, and the nodes that it adds: [N or 1, C, 1, ...], and a bias [C]."""

    x: fx.Node
    embedding: fx.Node | None = None
    convolution: fx.Node | None = None  # whose bias the norm adds
    nodes: list[fx.Node] = field(default_factory=list)


def _may_be_written(x: Any, total: fx.Node) -> bool:
    """Returns whether nothing sees that ``total`` is added to x in place: a convolution's result, read by it alone."""
    return x in _CONVOLUTIONS and total.all_input_nodes[0] is x and len(x.users) == 1


def _embedding_of(total: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Returns (x, embedding) of a sum of both, or None."""
    pair: tuple[Any, Any] | None = operands(total)
    if total not in ADD or pair is None:
        return None
    like = tensor(total)
    for x, embedding in (pair, pair[::-1]):
        value = tensor(x)
        if like is None or value is None or value.dtype != like.dtype or not per_channel(embedding, like):
            continue
        if same_shape(value, like) and (not mutates(total) or _may_be_written(x, total)):
            return x, embedding
    return None


def _has_bias(node: fx.Node, like: Tensor) -> bool:
    bias = tensor(argument(node, 2, "bias")) if node in _CONVOLUTIONS else None
    return bias is not None and bias.device == like.device


def pre_shift_of(norm: fx.Node, x: fx.Node, takes_bias: bool) -> PreShift | None:
    """Returns what can be added within ``norm``, which reads ``x``, or None; ``takes_bias``: of a convolution, too."""
    found, reader = PreShift(x), norm
    if only_user(x) is reader and (pair := _embedding_of(x)) is not None:
        found.nodes.append(x)
        reader = x
        found.x, found.embedding = pair
    like = tensor(found.x)
    if takes_bias and like is not None and only_user(found.x) is reader and _has_bias(found.x, like):
        found.convolution = found.x
    return found if found.nodes or found.convolution is not None else None
