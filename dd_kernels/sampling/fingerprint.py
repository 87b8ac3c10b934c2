"""What a model's Python code may look at, as one value that changes when it does."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

_PLAIN = frozenset((int, float, bool, str, bytes, complex, type(None)))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook")
# What every module has: visited for itself, or of no effect on a call without gradients.
_KEPT_BY_ALL = frozenset(vars(nn.Module())) - {"training"}


def _of_value(value: Any, depth: int = 2) -> Hashable:
    """Returns a number or a string itself, a container by its items, a tensor by its place, else the object's name."""
    kind = value.__class__
    if kind in _PLAIN:
        return (kind, value)
    if isinstance(value, Tensor):
        return (value.data_ptr(), value.stride())
    if depth and isinstance(value, dict):
        return tuple((_of_value(k, 0), _of_value(v, depth - 1)) for k, v in value.items())
    if depth and isinstance(value, list | tuple):
        return tuple([_of_value(v, depth - 1) for v in value])
    return (kind, id(value))


def _of_module(module: nn.Module) -> Hashable:
    own = vars(module)
    attributes = [(name, _of_value(own[name])) for name in own.keys() - _KEPT_BY_ALL]
    tensors = [None if v is None else _of_value(v) for d in (module._parameters, module._buffers) for v in d.values()]
    return (id(module), tuple(tensors), frozenset(attributes))


def fingerprint(model: Callable[..., Any]) -> Hashable:
    """Returns a value that differs where modules, parameters' places or attributes do; None of a model with hooks."""
    if not isinstance(model, nn.Module):
        return (id(model),)
    modules = list(model.modules())
    for module in modules:
        own = vars(module)
        if any(own.get(hooks) for hooks in _HOOKS):
            return None
    return tuple(map(_of_module, modules))
