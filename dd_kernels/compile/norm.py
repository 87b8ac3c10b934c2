"""Finds every GroupNorm of a graph, lets the rewrites fold in what stands around it, and replaces it by one op."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..ops import group_norm_silu
from ..ops.activation import activation_of
from . import activation, pays, pre_shift, residual, scale_shift, skip
from .fused_norm import checked_norm, may_skip_checks, per_sample
from .graph import CASTS, VIEWS, Calls, argument, between, is_barrier, known, module_path, only_user, tensor
from .identity import is_eval_dropout
from .pre_shift import PreShift
from .report import NormReport

_GROUP_NORM = Calls(F.group_norm, torch.group_norm)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Norm:
    """A GroupNorm node, and what is folded into it so far."""

    node: fx.Node
    x: fx.Node
    last: fx.Node  # whose result the op's takes the place of
    channels_last: bool = False  # what the convolutions before it give
    views: list[fx.Node] = field(default_factory=list)  # between the norm and ``last``, made of the op's result
    covered: list[fx.Node] = field(default_factory=list)  # nodes that the op does the work of, in the graph's order
    options: dict[str, Any] = field(default_factory=dict)
    pre_shift: PreShift | None = None
    total: fx.Node | None = None  # the sum of x and the residual
    fused: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def _source(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Follows casts to a wider dtype back: the kernel computes in float32 whatever it reads. Returns what they read."""
    passed: list[fx.Node] = []
    while node in CASTS and only_user(node) is not None and isinstance(node.args[0], fx.Node):
        before, after = tensor(node.args[0]), tensor(node)
        if before is None or after is None or before.device != after.device or not before.dtype.is_floating_point:
            break
        if torch.promote_types(before.dtype, after.dtype) != after.dtype:
            break
        passed.append(node)
        node = node.args[0]
    return node, passed


def _beyond(node: fx.Node) -> tuple[fx.Node, list[fx.Node], list[fx.Node]]:
    """Follows casts, dropout in evaluation and views: returns the last node, the views, and all nodes passed."""
    views: list[fx.Node] = []
    passed: list[fx.Node] = []
    while (user := only_user(node)) is not None and user.args and user.args[0] is node:
        before, after = tensor(node), tensor(user)
        if before is None or after is None or before.device != after.device or not after.dtype.is_floating_point:
            break
        if user in VIEWS:
            views.append(user)
        elif not (user in CASTS or is_eval_dropout(user)):
            break
        passed.append(user)
        node = user
    return node, views, passed


def _fold_after(norm: Norm) -> None:
    """Folds scale-shift and the activation in."""
    like = known(norm.node)
    end, views, passed = _beyond(norm.last)
    if not views:
        found = scale_shift.scale_shift_of(end, like)
        if isinstance(found, scale_shift.ScaleShift):
            norm.options |= {"scale": found.scale, "shift": found.shift}
            norm.covered += [*passed, *found.nodes]
            norm.last = found.nodes[-1]
            norm.fused.append("scale-shift")
            end, views, passed = _beyond(norm.last)
        elif found is not None:
            norm.left.append(found)
    act = activation.activation_of(end)
    reason = activation.reason_against(end) if act is None else pays.activation(act[0], like, norm.channels_last)
    if act is not None and reason is None:
        norm.options["activation"], nodes = act
        norm.covered += [*passed, *nodes]
        norm.views, norm.last = views, nodes[-1]
        norm.fused.append(act[0])
    elif reason is not None:
        norm.left.append(reason)


def _fold_before(norm: Norm) -> None:
    """Folds in what is added before the norm, or stands beside its input."""
    x, casts = _source(norm.x)
    value, read = known(x), known(norm.last)
    if read.dtype != value.dtype:  # the result has more digits than x, so that x is cast before
        x, casts = norm.x, []
    norm.covered += casts
    reader = casts[-1] if casts else norm.node
    found = pre_shift.pre_shift_of(reader, x, pays.convolution_bias(value.device))
    if found is not None:
        norm.pre_shift = found
        norm.covered += found.nodes
        norm.fused += ["embedding"] * (found.embedding is not None) + ["bias"] * (found.convolution is not None)
        x = found.x
    elif pays.two_inputs(value.device):
        if (parts := skip.skip_of(x, reader)) is not None:
            norm.covered.append(x)
            x, norm.options["skip"] = parts
            norm.fused.append("skip")
        elif not casts and (terms := residual.residual_of(x, norm.last)) is not None:
            norm.covered.append(x)
            norm.total = x
            x, norm.options["residual"] = terms
            norm.fused.append("residual")
    norm.x = x


def _unsupported(node: fx.Node) -> str | None:
    """Returns why the op cannot compute a norm."""
    value, x = tensor(node), tensor(argument(node, 0, "input"))
    if value is None or x is None:
        return "its input is unknown"
    if x.dtype not in _DTYPES:
        return f"no kernel for {str(x.dtype).removeprefix('torch.')}"
    eps = argument(node, 4, "eps", 1e-5)
    # A number that differs between models of a class is an input of the graph, which gives a float when it runs.
    if isinstance(argument(node, 1, "num_groups"), fx.Node):
        return "its groups are computed"
    if isinstance(eps, fx.Node) and not isinstance(eps.meta.get("example_value"), torch.SymFloat):
        return "its eps is computed"
    return None


def _has_barrier(norm: Norm) -> bool:
    """Returns whether the work of the covered nodes must not move to the place of the last one."""
    covered = {norm.node, *norm.covered}
    first = next(node for node in norm.node.graph.nodes if node in covered)
    return any(is_barrier(node) for node in between(first, norm.last) if node not in covered)


def _match(node: fx.Node, channels_last: bool) -> Norm:
    norm = Norm(node, argument(node, 0, "input"), last=node, channels_last=channels_last)
    _fold_after(norm)
    _fold_before(norm)
    if _has_barrier(norm):
        reason = "an operation in place, or a change of grad mode or autocast, stands within it"
        norm = Norm(node, argument(node, 0, "input"), last=node, left=[reason])
    return norm


def _without_bias(convolution: fx.Node) -> fx.Node:
    """Takes the bias from a convolution and returns it."""
    bias: fx.Node = argument(convolution, 2, "bias")
    convolution.args = (*convolution.args[:2], *((None, *convolution.args[3:]) if len(convolution.args) > 2 else ()))
    convolution.kwargs = {name: v for name, v in convolution.kwargs.items() if name != "bias"}
    return bias


def _call(norm: Norm, read: Tensor) -> fx.Node:
    """Makes the node of the op, its options as [N, C], before ``norm.last``."""
    graph, node, options = norm.node.graph, norm.node, dict(norm.options)
    x, value = norm.x, known(norm.x)
    for name in ("scale", "shift"):
        if name in options:
            options[name] = graph.call_function(per_sample, (x, options[name]))
    if norm.pre_shift is not None:
        convolution = norm.pre_shift.convolution
        bias = None if convolution is None else _without_bias(convolution)
        options["pre_shift"] = graph.call_function(per_sample, (x, bias, norm.pre_shift.embedding))
    if value.dtype != read.dtype and torch.promote_types(value.dtype, read.dtype) == read.dtype:
        x = graph.call_method("to", (x, read.dtype))
    affine = (argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5))
    arguments = (x, argument(node, 1, "num_groups"), *affine)
    name = options.pop("activation", "none")
    if not options.keys() & {"skip", "residual"} and may_skip_checks(value, *map(tensor, affine[:2])):
        return graph.call_function(checked_norm, (*arguments, int(activation_of(name))), options)
    return graph.call_function(group_norm_silu, arguments, {"activation": name, **options})


def _replace(norm: Norm) -> None:
    """Puts the op in the place of ``norm.last``, the views after it, and erases the nodes that it covers."""
    graph, read, x = norm.node.graph, known(norm.last), known(norm.x)
    with graph.inserting_before(norm.last):
        result = _call(norm, read)
        if norm.total is not None:
            total, carried = norm.total, graph.call_function(operator.getitem, (result, 1))
            carried.meta = dict(total.meta)
            total.replace_all_uses_with(carried, lambda user: user not in norm.covered and user is not norm.node)
            result = graph.call_function(operator.getitem, (result, 0))
        if torch.promote_types(x.dtype, read.dtype) != read.dtype:
            result = graph.call_method("to", (result, read.dtype))
        result.meta = {**norm.node.meta, "example_value": read}
        for view in norm.views:
            copy = graph.node_copy(view)
            copy.args = (result, *view.args[1:])
            result = copy
    norm.last.replace_all_uses_with(result)
    erase_unread(graph, [norm.node, *norm.covered])


def erase_unread(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erases those of ``nodes`` that nothing reads any more, readers first."""
    wanted = set(nodes)
    for node in reversed(list(graph.nodes)):
        if node in wanted and not node.users:
            graph.erase_node(node)


def fuse_norms(graph: fx.Graph, channels_last: bool = False) -> list[NormReport]:
    """Replaces every GroupNorm for which it pays; returns what was found, in the graph's order."""
    found = []
    for node in [node for node in graph.nodes if node in _GROUP_NORM]:
        name, kept = module_path(node), _unsupported(node)
        if kept is not None:
            found.append(NormReport(name, (), kept))
            continue
        norm, x = _match(node, channels_last), known(argument(node, 0, "input"))
        kept = None if norm.fused else pays.norm_alone(x, channels_last)
        found.append(NormReport(name, tuple(norm.fused), kept, tuple(norm.left)))
        if kept is None:
            _replace(norm)
    return found
