"""Rewrite: an activation that alone reads a norm is computed in the norm's pass.

    act(norm(x))  ->  group_norm_silu(x, activation=act)

Found as a module or a function, and written out: x * sigmoid(x), x * tanh(softplus(x)). Casts between floating dtypes,
dropout in evaluation and views may stand between the two: an activation is elementwise, so views are made of its
result, and rounding to a smaller dtype happens once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from .graph import MUL, Calls, argument, only_user, operands

_FUNCTIONS = {"silu": Calls(F.silu), "mish": Calls(F.mish), "gelu": Calls(F.gelu, torch._C._nn.gelu)}
_OTHERS = Calls(F.relu, F.leaky_relu, F.elu, F.hardswish, F.softplus, F.relu6, torch.relu, torch.tanh, torch.sigmoid)
_SIGMOID = Calls(torch.sigmoid, F.sigmoid, torch.special.expit, "sigmoid")
_TANH, _SOFTPLUS = Calls(torch.tanh, F.tanh, "tanh"), Calls(F.softplus, torch._C._nn.softplus)

# An activation found: its name for the op, and its nodes, of which the last has the result.
Found = tuple[str, list[fx.Node]]


def _name(node: fx.Node) -> str | None:
    name = next((name for name, calls in _FUNCTIONS.items() if node in calls), None)
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(argument(node, 1, "approximate", "none"))
    return name


def _gate_of(node: fx.Node) -> Found | None:
    """Returns the activation where ``node`` is multiplied by its own sigmoid (SiLU) or tanh of softplus (Mish)."""
    users = list(node.users)
    product = next((user for user in users if user in MUL), None)
    gate = next((user for user in users if user is not product), None)
    if product is None or gate is None or len(users) != 2:
        return None
    if gate in _SIGMOID and not gate.kwargs:
        name, nodes = "silu", [gate]
    elif gate in _SOFTPLUS and len(gate.args) == 1 and not gate.kwargs and only_user(gate) in _TANH:
        name, nodes = "mish", [gate, *gate.users]
    else:
        return None
    pair = operands(product)
    if pair is None or set(pair) != {node, nodes[-1]} or only_user(nodes[-1]) is not product:
        return None
    return name, [*nodes, product]


def activation_of(node: fx.Node) -> Found | None:
    """Returns the activation that alone reads ``node``, or None."""
    user = only_user(node)
    if user is None:
        return _gate_of(node)
    name = _name(user)
    return None if name is None else (name, [user])


def reason_against(node: fx.Node) -> str | None:
    """Returns why :func:`activation_of` did not find an activation that reads ``node``; None where none reads it."""
    activations = [user for user in node.users if user in _OTHERS or any(user in c for c in _FUNCTIONS.values())]
    if not activations:
        return None
    if len(node.users) > 1:
        return "the norm's result is read by more than its activation"
    return f"no kernel for {getattr(activations[0].target, '__name__', activations[0].target)}"
