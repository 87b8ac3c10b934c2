"""Takes down the operators that a graph calls on a CPU, with where each tensor lies that they read and write.

Views, sizes and allocations compute nothing and are left out. The results are put in memory of the recording's own, in
which a tensor that nothing refers to any more makes room for later ones: the operators may run again, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..ops.tracing import untraced
from .memory import Memory
from .places import WRITES

CPU = torch.device("cpu")

_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    {
        *(_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default),
        *(_aten.new_empty.default, _aten.new_empty_strided.default),
    }
)
Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Refused(Exception):
    """A graph cannot be recorded; the message says why."""


class Where(NamedTuple):
    """Where a tensor lies; unlike the tensor itself it does not make its memory count as in use."""

    storage: torch.UntypedStorage
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor) -> Where:
        """Returns where a tensor lies, which must be of a CPU and strided."""
        if not is_plain(value):
            raise Refused(f"a tensor is {type(value).__name__} of {value.layout} on {value.device}")
        return cls(value.untyped_storage(), int(value.storage_offset()), value.shape, value.stride(), value.dtype)

    def tensor(self) -> Tensor:
        """Returns a tensor that lies there."""
        return torch.empty(0, dtype=self.dtype).set_(self.storage, self.offset, self.size, self.stride)


def is_plain(value: Tensor) -> bool:
    """Returns whether a tensor is its memory and strides, and nothing else."""
    plain = type(value) in (Tensor, nn.Parameter) and value.device == CPU and value.layout == torch.strided
    return plain and not value.is_conj() and not value.is_neg()


def _is_dense(value: Tensor) -> bool:
    """Returns whether a tensor's elements fill its memory, each in a place of its own."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.numel() == 0 or last + 1 == value.numel() == value.untyped_storage().nbytes() // value.itemsize


def _storages(values: Any) -> set[int]:
    return {value.untyped_storage()._cdata for value in tree_leaves(values) if isinstance(value, Tensor)}


def _is_view(func: OpOverload) -> bool:
    """Returns whether an operator returns its input's memory and computes nothing."""
    infos = [value.alias_info for value in func._schema.returns]
    return func is _aten._unsafe_view.default or any(info is not None and not info.is_write for info in infos)


def _looks(func: OpOverload, args: Sequence[Any]) -> bool:
    """Returns whether a call returns a number of a tensor, or a tensor whose size its values tell."""
    if func is _aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags


def _written(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Returns the arguments that a call writes to."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return written


def _writing(func: OpOverload) -> tuple[OpOverload, list[str]] | None:
    """Returns the variant of an operator that writes to tensors given by these names; None where there is none."""
    names = [(a.name, str(a.type)) for a in func._schema.arguments]
    for overload in ("out", f"{func._overloadname}_out"):
        other = getattr(func.overloadpacket, overload, None)
        if other is None:
            continue
        arguments = other._schema.arguments
        if [(a.name, str(a.type)) for a in arguments if not a.is_out] == names:
            return other, [a.name for a in arguments if a.is_out]
    return None


def _copy(places: Sequence[Tensor | None], values: Sequence[Any]) -> None:
    """Copies results to their places; an operator may return None in place of a tensor."""
    for place, value in zip(places, values, strict=True):
        if place is not None:
            place.copy_(value)


def _then_copied(func: OpOverload) -> Callable[..., None]:
    """Returns what calls an operator and copies its results to tensors given first."""

    def call(to: Sequence[Tensor | None], *args: Any, **kwargs: Any) -> None:
        results = func(*args, **kwargs)
        _copy(to, (results,) if isinstance(results, Tensor) else results)

    return call


class Recorder(TorchDispatchMode):
    """Takes down the calls that compute, and puts all results in memory of its own."""

    def __init__(self, memory: Memory, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._memory, self._inputs = memory, _storages(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls an operator and takes it down."""
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload) or torch.Tag.inplace_view in func.tags:
            raise Refused(f"{func} is called")
        if _looks(func, args):
            raise Refused(f"{func} looks at a value")
        if _storages(_written(func, args, kwargs)) & self._inputs:
            raise Refused(WRITES)
        result = func(*args, **kwargs)
        if func in _ALLOCATIONS:
            return self._placed(result)
        if _is_view(func):
            return result
        if func._schema.is_mutable:
            self._record(untraced(func), args, kwargs)
            return result
        return self._record_with_results(func, args, kwargs, result)

    def _placed(self, value: Any) -> Any:
        """Returns a tensor of the form of a result, in this recording's memory."""
        if value is None:
            return None
        if not isinstance(value, Tensor) or not is_plain(value) or not _is_dense(value):
            raise Refused(f"an operator returns {type(value).__name__} in another form than dense tensors")
        with torch.inference_mode(False):
            place = self._memory.empty(value.shape, value.stride(), value.dtype)
        if place is None:
            raise Refused("there is no room for its results")
        return place

    def _record(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.calls.append((call, *tree_map_only(Tensor, Where.of, (tuple(args), kwargs))))

    def _record_with_results(self, func: OpOverload, args: Any, kwargs: Any, result: Any) -> Any:
        """Takes a call down so that it writes to where its results are put now; returns these."""
        several = isinstance(result, tuple | list)
        results = list(result) if several else [result]
        if _storages(results) & _storages([args, kwargs]):
            raise Refused(f"{func} may return its input")
        places = [self._placed(value) for value in results]
        _copy(places, results)
        writing = _writing(func)
        if writing is not None and None not in places and len(places) == len(writing[1]):
            self._record(untraced(writing[0]), args, {**kwargs, **dict(zip(writing[1], places, strict=True))})
        else:
            self._record(_then_copied(func), (places, *args), kwargs)
        return type(result)(places) if several else places[0]
