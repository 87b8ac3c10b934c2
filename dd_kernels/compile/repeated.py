"""Rewrite: a call made again of the same arguments is made once.

    silu(embedding) in every block of a U-Net  ->  silu(embedding) once

Equal for elementwise calls that write nothing, between which nothing that they read is written to, of whose results
none is written to or leaves the graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from .graph import MUL, Calls, is_barrier, mutates, tensor
from .identity import root, written_roots

_ELEMENTWISE = Calls(F.silu, F.mish, F.gelu, torch._C._nn.gelu, F.relu, torch.sigmoid, F.sigmoid, "sigmoid")


def _may_be_shared(node: fx.Node, written: set[fx.Node]) -> bool:
    if not (node in _ELEMENTWISE or node in MUL) or tensor(node) is None or mutates(node):
        return False
    touched = {root(v) for v in (node, *node.all_input_nodes)}
    return not touched & written and not any(user.op == "output" for user in node.users)


def share_repeated(graph: fx.Graph) -> int:
    """Takes repeated calls out of ``graph``; returns how many there were."""
    written, count = written_roots(graph), 0
    first: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        if is_barrier(node):  # a change of autocast is one
            first.clear()
        if not _may_be_shared(node, written):
            continue
        key = (node.op, node.target, repr(node.args), repr(node.kwargs))  # a node's repr is its name
        other = first.setdefault(key, node)
        if other is not node:
            node.replace_all_uses_with(other)
            graph.erase_node(node)
            count += 1
    return count
