"""Rewrite: this package's own norm, which a model called and Dynamo traced into its operator, is one call again.

    y = empty_like(x); group_norm_silu(x, ..., y)  ->  y = checked_norm(x, ...)

The operator writes to y, past which nothing may be moved, and no other rewrite knows it. Equal wherever y is fresh: the
operator writes all of it. So ``dd_kernels.nn.UNet`` takes the same way as every other model.
"""

from __future__ import annotations

import torch
from torch import fx

from ..ops.activation import name_of
from ..ops.group_norm_silu.op import FORWARD
from .fused_norm import checked_norm, may_skip_checks
from .graph import Calls, known, module_path, tensor
from .report import NormReport

_EMPTY = Calls(torch.empty_like)
_OPTIONS = ("pre_shift", "scale", "shift")
# Calls that trace to nothing: questions that were answered at capture.
_ANSWERED = Calls(torch._C._are_functorch_transforms_active, torch._C._log_api_usage_once)


def _is_whole(node: fx.Node) -> bool:
    """Returns whether a call of the operator writes y alone, which is fresh, on a CPU."""
    x, y = node.args[0], node.args[-1]
    if len(node.args) != 10 or node.kwargs or not isinstance(y, fx.Node) or y not in _EMPTY or y.args != (x,):
        return False
    small = [tensor(v) for v in node.args[2:8] if isinstance(v, fx.Node)]
    return next(iter(y.users)) is node and may_skip_checks(known(y), *small)


def _report(node: fx.Node) -> NormReport:
    """Returns what the norm computes in its pass."""
    pre_shift, scale, activation = node.args[5], node.args[6], node.args[8]
    assert isinstance(activation, int)
    fused = ["embedding"] * (pre_shift is not None) + ["scale-shift"] * (scale is not None)
    name = name_of(activation)
    return NormReport(module_path(node), (*fused, *[name] * (name != "none")), None)


def restore_norms(graph: fx.Graph) -> list[NormReport]:
    """Makes calls of the norm again of what they were traced to; returns the norms."""
    found = []
    for node in list(graph.nodes):
        if node in _ANSWERED and not node.users:
            graph.erase_node(node)
        elif node.op == "call_function" and node.target is FORWARD and _is_whole(node):
            y = node.args[-1]
            options = {name: v for name, v in zip(_OPTIONS, node.args[5:8], strict=True) if v is not None}
            with graph.inserting_before(node):
                norm = graph.call_function(checked_norm, (*node.args[:5], node.args[8]), options)
            norm.meta = {**node.meta, "example_value": known(y)}
            y.replace_all_uses_with(norm, lambda user, node=node: user is not node)
            found.append(_report(node))
            graph.erase_node(node)
            graph.erase_node(y)
    return found
