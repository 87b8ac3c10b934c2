"""Rewrite: linear layers that read the same few tokens on a CPU are one.

    linear(x, W_1, b_1), linear(x, W_2, b_2), ...  ->  the parts of linear(x, [W_1; W_2; ...], [b_1; b_2; ...])

Equal where nothing is written to between the first and the last. A U-Net's time embedding passes a layer in every
block: one product of all reads their weights as fast as memory gives them, which calls of their own do not. Where a
gradient may be asked for, each layer is PyTorch's.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, fx

from .. import backend
from . import pays
from .derived_weights import Layer, stacked
from .fused_convolution import Numbers, records, tokens_linear
from .graph import argument, is_barrier, known
from .linear import is_linear, layer_of

_FEWEST = 4  # layers


def joined_linears(x: Tensor, layers: Sequence[Layer], numbers: Numbers) -> list[Tensor]:
    """Returns ``F.linear(x, weight, bias)`` of each layer."""
    layers = [Layer(*layer) for layer in layers]
    joined = None if records() else stacked(layers)
    if joined is None:
        return [F.linear(x, *layer) for layer in layers]
    parts = tokens_linear(x, *joined, None, numbers).split([layer.weight.shape[0] for layer in layers], -1)
    return [part.flatten().view(part.shape) for part in parts]  # dense, in the strides of a result of its own


def _serves(node: fx.Node) -> bool:
    """Returns whether a node is a linear layer of few tokens whose weights are inputs of the graph."""
    if not is_linear(node):
        return False
    x, (weight, bias) = argument(node, 0, "input"), layer_of(node)
    inputs = all(value is None or value.op in ("placeholder", "get_attr") for value in (weight, bias))
    return inputs and not pays.linear(known(x), known(weight))


def _groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """Returns the layers that may be joined, by what they read."""
    groups: list[list[fx.Node]] = []
    open_: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if is_barrier(node):  # a change of autocast is one
            open_.clear()
        elif _serves(node):
            x = argument(node, 0, "input")
            if x not in open_:
                groups.append(open_.setdefault(x, []))
            open_[x].append(node)
    return [group for group in groups if len(group) >= _FEWEST]


def join_linears(graph: fx.Graph, numbers: Numbers) -> int:
    """Joins linear layers of few tokens; returns how many."""
    if backend.unavailable("cpu") is not None:
        return 0
    groups = _groups(graph)
    for group in groups:
        layers = tuple(map(layer_of, group))
        with graph.inserting_before(group[0]):
            joined = graph.call_function(joined_linears, (argument(group[0], 0, "input"), layers, tuple(numbers)))
            parts = [graph.call_function(operator.getitem, (joined, i)) for i in range(len(group))]
        for node, part in zip(group, parts, strict=True):
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
            graph.erase_node(node)
    return sum(map(len, groups))
