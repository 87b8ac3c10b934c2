"""Rewrite: calls that return their input are taken out of the graph.

    x / 1, x * 1                 where the quotient or product has x's dtype
    dropout(x)                   in evaluation, or with probability 0
    x.to(dtype), x.float() ...   where x has that dtype already

Equal where the result is not written to afterwards: x / 1 is a copy, and dropout and casts may be.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

from .graph import CASTS, MUL, VIEWS, Calls, argument, equal, mutates, operands, tensor

_DIV = Calls(operator.truediv, torch.div, torch.true_divide, "div", "true_divide")
_DROPOUT = Calls(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)


def is_eval_dropout(node: object) -> bool:
    """Returns whether a node is a dropout that drops nothing."""
    if not isinstance(node, fx.Node) or node not in _DROPOUT:
        return False
    return argument(node, 1, "p", 0.5) == 0 or argument(node, 2, "training", True) is False


def _source(node: fx.Node) -> fx.Node | None:
    """Returns the node whose value this one repeats, or None."""
    pair = operands(node)
    if node in _DIV and pair is not None and pair[1] == 1:
        source = pair[0]
    elif node in MUL and pair is not None and 1 in pair:
        source = pair[0] if pair[1] == 1 else pair[1]
    elif node in CASTS or is_eval_dropout(node):
        source = node.args[0] if node.args else None
    else:
        return None
    before, after = tensor(source), tensor(node)
    if before is None or after is None:
        return None
    alike = before.dtype == after.dtype and before.device == after.device and before.ndim == after.ndim
    strides = zip(before.stride(), after.stride(), strict=True) if alike else ()
    return source if alike and all(equal(a, b) for a, b in strides) else None


def root(node: fx.Node) -> fx.Node:
    """Returns the node whose memory a chain of views, or of calls that return their input, shows."""
    while (node in VIEWS or node in CASTS or _source(node) is not None) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def written_roots(graph: fx.Graph) -> set[fx.Node]:
    """Returns the nodes whose memory a call of the graph may write to."""
    return {root(a) for node in graph.nodes if mutates(node) for a in node.all_input_nodes}


def relax_views(graph: fx.Graph) -> None:
    """Turns ``x.view(sizes)`` into ``x.reshape(sizes)``, so that x may have other strides than when it was captured."""
    written = written_roots(graph)
    for node in graph.find_nodes(op="call_method", target="view"):
        if not any(isinstance(a, torch.dtype) for a in node.args) and not node.kwargs and root(node) not in written:
            node.target = "reshape"


def remove_identities(graph: fx.Graph) -> int:
    """Takes the calls that return their input out of ``graph``; returns how many there were."""
    written = written_roots(graph)
    removed = 0
    for node in list(graph.nodes):
        source = _source(node) if not mutates(node) else None
        returned = any(user.op == "output" for user in node.users)
        if source is None or returned or root(source) in written or not node.users:
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        removed += 1
    return removed
