"""Rewrite: linear layers on a CPU are 1 x 1 convolutions of tokens, by our kernel with filters that it keeps packed.

    linear(x, weight, bias)      ->  conv2d of the image [1, C, tokens, 1], a view of x
    linear(x, weight, bias) + y  ->  the same with residual=y

Equal for every x [..., C] of float32, where only the sum reads the linear layer. It pays where the weights are
multiplied by more than a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .. import backend
from . import pays
from .convolution import residual_of
from .fused_convolution import Numbers, tokens_linear
from .graph import Calls, argument, known, tensor

LINEAR = Calls(F.linear, torch._C._nn.linear)


def is_linear(node: fx.Node) -> bool:
    """Returns whether a node is a linear layer of float32 on a CPU, of more than one dimension."""
    if node not in LINEAR:
        return False
    x, weight, result = tensor(argument(node, 0, "input")), tensor(argument(node, 1, "weight")), tensor(node)
    if x is None or weight is None or result is None or x.device.type != "cpu" or x.ndim < 2 or weight.ndim != 2:
        return False
    # Autocast shows in the dtype of the result.
    return all(v.dtype == torch.float32 for v in (x, weight, result))


def serves_linear(node: fx.Node) -> bool:
    """Returns whether our kernel computes this linear layer, and should."""
    return is_linear(node) and pays.linear(known(argument(node, 0, "input")), known(argument(node, 1, "weight")))


def layer_of(node: fx.Node) -> tuple[Any, Any]:
    """Returns the weight and the bias of a linear layer."""
    return argument(node, 1, "weight"), argument(node, 2, "bias")


def replace_with_residual(node: fx.Node, call: Callable[[fx.Node | None], fx.Node]) -> None:
    """Puts ``call(residual)`` in the place of a linear layer, or of its sum with a residual in its result's order."""
    pair = residual_of(node)
    total, residual = pair if pair is not None and known(pair[0]).is_contiguous() else (node, None)
    with node.graph.inserting_before(total):
        result = call(residual)
    result.meta = {**node.meta, "example_value": known(total)}
    total.replace_all_uses_with(result)
    node.graph.erase_node(total)
    if total is not node:
        node.graph.erase_node(node)


def _replace(graph: fx.Graph, node: fx.Node, numbers: Numbers) -> None:
    """Puts our call in the place of a linear layer."""
    arguments = (argument(node, 0, "input"), *layer_of(node))
    replace_with_residual(
        node, lambda residual: graph.call_function(tokens_linear, (*arguments, residual, tuple(numbers)))
    )


def replace_linears(graph: fx.Graph, numbers: Numbers) -> int:
    """Replaces linear layers for which it pays; returns how many."""
    if backend.unavailable("cpu") is not None:
        return 0
    nodes = [node for node in graph.nodes if serves_linear(node)]
    for node in nodes:
        _replace(graph, node, numbers)
    return len(nodes)
