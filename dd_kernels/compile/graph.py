"""Reads a graph that Dynamo captured: what a node calls, what is known of its result, and what may be moved past it."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


class Calls:
    """A set of functions and method names; a node is in it if the node calls one of them."""

    def __init__(self, *targets: Callable[..., Any] | str) -> None:
        self._functions = frozenset(t for t in targets if not isinstance(t, str))
        self._methods = frozenset(t for t in targets if isinstance(t, str))

    def __contains__(self, node: object) -> bool:
        if not isinstance(node, fx.Node):
            return False
        return (node.op == "call_function" and node.target in self._functions) or (
            node.op == "call_method" and node.target in self._methods
        )


ADD = Calls(operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__radd__")
MUL = Calls(operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "__mul__", "__rmul__")
CASTS = Calls("to", "type", "float", "half", "bfloat16", "type_as")
VIEWS = Calls(
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze", "contiguous"),
    *(torch.reshape, torch.flatten, torch.unflatten, torch.transpose, torch.permute, torch.unsqueeze, torch.squeeze),
)
_IN_PLACE_OPERATORS = Calls(
    *(getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")),
    *(getattr(operator, name) for name in ("iand", "ior", "ixor", "ilshift", "irshift", "setitem", "delitem")),
    *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"),
)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Returns an argument of a call by its position or its keyword."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def operands(node: fx.Node) -> tuple[Any, Any] | None:
    """Returns both operands of an addition or a product; None where it has further arguments (``alpha``, ``out``)."""
    return (node.args[0], node.args[1]) if len(node.args) == 2 and not node.kwargs else None


def other_operand(node: fx.Node, known: fx.Node) -> fx.Node | None:
    """Returns the tensor that a sum or product has beside ``known``; None where there is none, or another argument."""
    pair = operands(node)
    if pair is None:
        return None
    other = pair[1] if pair[0] is known else pair[0]
    return other if isinstance(other, fx.Node) and other is not known and tensor(other) is not None else None


def tensor(node: object) -> Tensor | None:
    """Returns the fake tensor that stands for the node's result; None where the result is no tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def known(node: fx.Node) -> Tensor:
    """Returns the fake tensor of a node of which it was checked that there is one."""
    value = tensor(node)
    assert value is not None, node
    return value


def only_user(node: fx.Node) -> fx.Node | None:
    """Returns the one node that reads this one's result, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def equal(a: Any, b: Any) -> bool:
    """Returns whether two sizes are equal for every input that the graph serves; adds no guard."""
    return bool(statically_known_true(a == b))


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Returns whether two fake tensors have one shape for every input that the graph serves."""
    return a.ndim == b.ndim and all(equal(m, n) for m, n in zip(a.shape, b.shape, strict=True))


def hint(size: Any) -> int:
    """Returns a size, of a dynamic one the value that the graph was captured with; adds no guard."""
    if isinstance(size, torch.SymInt):
        known = size.node.hint
        return 1 if known is None else int(known)
    return int(size)


def elements(value: Tensor) -> int:
    """Returns the number of elements of a fake tensor, dynamic sizes as they were at capture."""
    count = 1
    for size in value.shape:
        count *= hint(size)
    return count


def per_channel(node: object, like: Tensor) -> bool:
    """Returns whether a node is [N, C, 1, ...] or [1, C, 1, ...] beside ``like`` [N, C, ...]."""
    value = tensor(node)
    if value is None or value.ndim != like.ndim or value.ndim < 3 or value.device != like.device:
        return False
    one_batch = equal(value.shape[0], 1) or equal(value.shape[0], like.shape[0])
    return one_batch and equal(value.shape[1], like.shape[1]) and all(equal(size, 1) for size in value.shape[2:])


def is_custom(node: fx.Node) -> bool:
    """Returns whether a node calls an operator of a library, or a graph within the graph."""
    kinds = torch._ops.OpOverload | torch._ops.OpOverloadPacket | torch._ops.HigherOrderOperator
    return node.op == "call_function" and isinstance(node.target, kinds)


@lru_cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of a function's parameters; none where it is not Python's."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _is_asked_to_write(node: fx.Node) -> bool:
    """Returns whether a call of a function has ``inplace=True``, by name or by position."""
    assert callable(node.target)
    given = {**dict(zip(_parameters(node.target), node.args, strict=False)), **node.kwargs}
    return bool(given.get("inplace"))


def mutates(node: fx.Node) -> bool:
    """Returns whether a call may write to a tensor that it was given."""
    if node.op == "call_method":
        name = str(node.target)
        return node in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.startswith("__"))
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.OpOverloadPacket | torch._ops.HigherOrderOperator):
        return True  # custom ops and control flow: unknown
    name = getattr(node.target, "__name__", "")
    named = _is_asked_to_write(node) or node.kwargs.get("out") is not None
    return bool(node in _IN_PLACE_OPERATORS or named or re.fullmatch(r"\w*[a-z0-9]_", name))


def is_barrier(node: fx.Node) -> bool:
    """Returns whether nothing may be moved past a node: it writes to a tensor, or changes grad mode or autocast."""
    if mutates(node) or node.op in ("call_module", "output"):
        return True
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name.startswith(("_enter", "_exit", "_set_grad", "set_", "_set_", "inference", "_saved_tensors"))


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """Yields the nodes of the graph after ``first`` and before ``last``."""
    node = last if first is last else first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def module_path(node: fx.Node) -> str:
    """Returns the name of the module that made a call, as ``named_modules()`` has it; the node's own where none did."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [entry[0] for entry in stack.values()]
    if not entries:
        return node.name
    name = re.sub(r"\.__dict__\['_modules'\]|\._modules\b", "", entries[-1])
    name = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", name)
    return re.sub(r"^L\.(self\.|self$|fn\.|fn$)?", "", name).strip(".") or node.name
