"""Rewrite: this package's own norm, which a model called and Dynamo traced into its operator, is one call again.

    y = empty_like(x); group_norm_silu(x, ..., y)            ->  y = checked_norm(x, ...)
    y = autograd_function_apply(forward, backward, x, ...)   ->  y = checked_norm(x, ...)

The operator writes to y, and a graph within the graph may do anything: past neither may anything be moved, and no other
rewrite knows them. Equal wherever y is fresh, since the operator writes all of it, and where the two inner graphs are
those of the norm and of its gradients. So ``dd_kernels.nn.UNet`` takes the same way as every other model, in training
too.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._functorch.autograd_function import autograd_function_apply

from ..ops.activation import name_of
from ..ops.group_norm_silu.op import BACKWARD, FORWARD, LAID_OUT_LIKE
from .fused_norm import checked_norm, may_skip_checks
from .graph import Calls, known, module_path, only_user, tensor
from .report import NormReport

_EMPTY = Calls(torch.empty_like)
# What the graphs within a recorded norm call.
_WITHIN = Calls(torch.empty_like, torch.empty, torch._C._set_grad_enabled, LAID_OUT_LIKE, FORWARD, BACKWARD)
# Of the operator's arguments: what has a gradient, and where the operator of the gradients takes what it writes.
_GRADIENTS = {0: 12, 2: 13, 3: 14, 5: 15, 6: 16, 7: 17}
_OPTION_COUNT = 9
_OPTIONS = ("pre_shift", "scale", "shift")
# Calls that trace to nothing: questions that were answered at capture.
_ANSWERED = Calls(torch._C._are_functorch_transforms_active, torch._C._log_api_usage_once)


class _Norm(NamedTuple):
    """A norm in the graph: the arguments of its operator up to the activation, y, and the call that computes y."""

    arguments: tuple[Any, ...]
    y: fx.Node
    call: fx.Node


def _plain(node: fx.Node) -> _Norm | None:
    """Returns the norm whose operator ``node`` is, if it writes y alone, which is fresh."""
    x, y = node.args[0], node.args[-1]
    if len(node.args) != _OPTION_COUNT + 1 or node.kwargs or not isinstance(y, fx.Node):
        return None
    if y not in _EMPTY or y.args != (x,) or next(iter(y.users)) is not node:
        return None
    return _Norm(node.args[:_OPTION_COUNT], y, node)


def _one_call(graph: fx.Graph, target: Any) -> fx.Node | None:
    """Returns the one call of ``target`` in an inner graph of a norm, None where the graph does anything else."""
    found = graph.find_nodes(op="call_function", target=target)
    is_known = all(node.op in ("placeholder", "output") or node in _WITHIN for node in graph.nodes)
    return found[0] if len(found) == 1 and is_known else None


def _recorded(module: fx.GraphModule, node: fx.Node) -> _Norm | None:
    """Returns the norm that ``node``, an autograd function that Dynamo has traced, computes with its gradients."""
    inner = [getattr(module, str(v.target)) for v in node.args[:2] if isinstance(v, fx.Node)]
    forward, backward = (_one_call(g.graph, t) for g, t in zip(inner, (FORWARD, BACKWARD), strict=True))
    if forward is None or backward is None:
        return None
    results, y = inner[0].graph.output_node().args[0][0], only_user(node)
    if results is forward.args[9]:  # torch 2.10: the call returns y itself, and the inner graphs take a context first
        y = node
    elif results != (forward.args[9],) or y is None or y.target is not operator.getitem:
        return None
    if any(v is not None for v in forward.args[12:]):
        return None
    given = node.args[2:]
    inputs = dict(zip(inner[0].graph.find_nodes(op="placeholder")[-len(given) :], given, strict=True))
    gradients = dict(zip(inputs, inner[1].graph.output_node().args[0], strict=True))
    for i, j in _GRADIENTS.items():
        v = forward.args[i]
        if v is not None and gradients.get(v) is not (backward.args[j] if known(inputs[v]).requires_grad else None):
            return None
    return _Norm(tuple(inputs.get(v, v) for v in forward.args[:_OPTION_COUNT]), y, node)


def _report(norm: _Norm) -> NormReport:
    """Returns what the norm computes in its pass."""
    pre_shift, scale, activation = norm.arguments[5], norm.arguments[6], norm.arguments[8]
    fused = ["embedding"] * (pre_shift is not None) + ["scale-shift"] * (scale is not None)
    name = name_of(activation)
    return NormReport(module_path(norm.call), (*fused, *[name] * (name != "none")), None)


def _restore(graph: fx.Graph, norm: _Norm) -> None:
    """Puts one call in the place of the norm."""
    options = {name: v for name, v in zip(_OPTIONS, norm.arguments[5:8], strict=True) if v is not None}
    with graph.inserting_before(norm.call):
        call = graph.call_function(checked_norm, (*norm.arguments[:5], norm.arguments[8]), options)
    call.meta = {**norm.call.meta, "example_value": known(norm.y)}
    norm.y.replace_all_uses_with(call, lambda user: user is not norm.call)
    both = (norm.call, norm.y) if norm.y in norm.call.all_input_nodes else (norm.y, norm.call)
    for node in dict.fromkeys(both):
        graph.erase_node(node)


def restore_norms(module: fx.GraphModule) -> list[NormReport]:
    """Makes calls of the norm again, on a CPU, of what they were traced to; returns the norms."""
    graph, found = module.graph, []
    for node in list(graph.nodes):
        norm = None
        if node in _ANSWERED and not node.users:
            graph.erase_node(node)
        elif node.op == "call_function" and node.target is FORWARD:
            norm = _plain(node)
        elif node.op == "call_function" and node.target is autograd_function_apply:
            norm = _recorded(module, node)
        if norm is None:
            continue
        small = [tensor(v) for v in norm.arguments[2:8] if isinstance(v, fx.Node)]
        if may_skip_checks(known(norm.y), *small):
            found.append(_report(norm))
            _restore(graph, norm)
    module.delete_all_unused_submodules()
    return found
