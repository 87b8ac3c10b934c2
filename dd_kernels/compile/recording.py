"""Runs a rewritten graph on a CPU as the list of operators that it called, recorded once per form of its inputs.

Between two kernels of a U-Net lie views, sizes, allocations and what a convolution asks before it runs: some thousand
steps of Python, a fifth of a forward pass at batch 1. For inputs of one form they come out the same each time. So in
inference the second call of a form is recorded: the operators that compute, with the tensors they were given, in memory
that this recording keeps. From the third call on they alone run, on what is copied to the inputs' places. What is
computed is the same in every bit.

A recording is bound to its parameters: where one was changed in place or has moved, the graph runs as it is and is
recorded again. A graph that writes to an input, returns a view of one, or looks at a value to
decide, is never recorded.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..ops.cuda_graph import first_line
from ..ops.tracing import untraced
from .fused_convolution import records
from .memory import Memory
from .places import WRITES, copied_out, form, place_for, reason_against_results, write, writes_to_an_input
from .workspace import Workspace

_log = logging.getLogger(__name__)
FORMS = 4  # of one graph's inputs whose recordings are kept, those used last

_aten = torch.ops.aten
_CPU = torch.device("cpu")
_ALLOCATIONS = frozenset(
    {
        *(_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default),
        *(_aten.new_empty.default, _aten.new_empty_strided.default),
    }
)
_Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class _Refused(Exception):
    """A graph cannot be recorded; the message says why."""


class _Where(NamedTuple):
    """Where a tensor lies; unlike the tensor itself it does not make its memory count as in use."""

    storage: torch.UntypedStorage
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor) -> _Where:
        """Returns where a tensor lies, which must be of a CPU and strided."""
        if not _is_plain(value):
            raise _Refused(f"a tensor is {type(value).__name__} of {value.layout} on {value.device}")
        return cls(value.untyped_storage(), int(value.storage_offset()), value.shape, value.stride(), value.dtype)

    def tensor(self) -> Tensor:
        """Returns a tensor that lies there."""
        return torch.empty(0, dtype=self.dtype).set_(self.storage, self.offset, self.size, self.stride)


def _is_plain(value: Tensor) -> bool:
    """Returns whether a tensor is its memory and strides, and nothing else."""
    plain = type(value) in (Tensor, nn.Parameter) and value.device == _CPU and value.layout == torch.strided
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


def _then_copied(func: OpOverload) -> Callable[..., None]:
    """Returns what calls an operator and copies its results to tensors given first."""

    def call(to: Sequence[Tensor | None], *args: Any, **kwargs: Any) -> None:
        results = func(*args, **kwargs)
        for place, value in zip(to, (results,) if isinstance(results, Tensor) else results, strict=True):
            if place is not None:
                place.copy_(value)

    return call


class _Recorder(TorchDispatchMode):
    """Takes down the calls that compute, and puts all results in memory of its own."""

    def __init__(self, memory: Memory, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._memory, self._inputs = memory, _storages(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls an operator and takes it down."""
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload) or torch.Tag.inplace_view in func.tags:
            raise _Refused(f"{func} is called")
        if _looks(func, args):
            raise _Refused(f"{func} looks at a value")
        if _storages(_written(func, args, kwargs)) & self._inputs:
            raise _Refused(WRITES)
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
        if not isinstance(value, Tensor) or not _is_plain(value) or not _is_dense(value):
            raise _Refused(f"an operator returns {type(value).__name__} in another form than dense tensors")
        with torch.inference_mode(False):
            place = self._memory.empty(value.shape, value.stride(), value.dtype)
        if place is None:
            raise _Refused("there is no room for its results")
        return place

    def _record(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.calls.append((call, *tree_map_only(Tensor, _Where.of, (tuple(args), kwargs))))

    def _record_with_results(self, func: OpOverload, args: Any, kwargs: Any, result: Any) -> Any:
        """Takes a call down so that it writes to where its results are put now; returns these."""
        several = isinstance(result, tuple | list)
        results = list(result) if several else [result]
        if _storages(results) & _storages([args, kwargs]):
            raise _Refused(f"{func} may return its input")
        places = [self._placed(value) for value in results]
        for place, value in zip(places, results, strict=True):
            if place is not None:
                place.copy_(value)
        writing = _writing(func)
        if writing is not None and None not in places and len(places) == len(writing[1]):
            self._record(untraced(writing[0]), args, {**kwargs, **dict(zip(writing[1], places, strict=True))})
        else:
            self._record(_then_copied(func), (places, *args), kwargs)
        return type(result)(places) if several else places[0]


class _Recording:
    """The calls of a graph for inputs of one form."""

    def __init__(self, calls: Sequence[_Call], memory: Memory, places: Sequence[Any], results: Sequence[Any]) -> None:
        # A parameter is held by its memory alone, since what is kept of it goes when the parameter itself does.
        self._places = [place if isinstance(place, Tensor) and not _is_parameter(place) else None for place in places]
        self._memory = memory
        made: dict[Hashable, Tensor] = {}

        def tensor(where: _Where) -> Tensor:
            key = (where.storage._cdata, *where[1:])
            return made.setdefault(key, where.tensor()) if key not in made else made[key]

        def tensors(values: Any) -> Any:
            return tree_map_only(_Where, tensor, values, is_leaf=lambda value: isinstance(value, _Where))

        with torch.inference_mode(False), torch.no_grad():
            self._calls = [(call, tensors(args), tensors(kwargs)) for call, args, kwargs in calls]
            self._results = tensors(list(results))

    def run(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Runs the calls for these inputs; returns results that are the caller's."""
        for place, value in zip(self._places, args, strict=True):
            if place is not None:
                write(place, value)
        for call, positional, named in self._calls:
            call(*positional, **named)
        return copied_out(self._results)


def _is_parameter(value: Any) -> bool:
    return isinstance(value, nn.Parameter)


def _state(parameter: nn.Parameter) -> tuple[int, int]:
    """Returns what tells whether a parameter has changed or moved; those of inference mode count no versions."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _record(call: Callable[..., Any], args: Sequence[Any]) -> tuple[_Recording, tuple[Any, ...]]:
    """Calls a graph; returns the recording of that and results that are the caller's.

    Raises:
        _Refused: it cannot be recorded.
    """
    memory, places = Memory(), [place_for(value, _CPU) for value in args]
    if not all(_is_plain(value) for value in places if isinstance(value, Tensor)):
        raise _Refused("an input is no plain tensor on the CPU")
    recorder = _Recorder(memory, places)
    with recorder:
        results = call(*places)
    if (reason := reason_against_results(places, results)) is not None:
        raise _Refused(reason)
    found = tree_map_only(Tensor, _Where.of, list(results))
    copies = copied_out(results)
    del results
    if memory.in_use():
        raise _Refused("something keeps a tensor of the graph")
    return _Recording(recorder.calls, memory, places, found), copies


@dataclass
class _Form:
    """Inputs of one form: the parameters' state when they came last, and their recording if there is one."""

    parameters: tuple[tuple[int, int], ...]
    recording: _Recording | None = None
    is_refused: bool = False


class Recordings:
    """Calls a graph; by a recording where that is right, and otherwise as it is, with a note that says why."""

    def __init__(self, module: fx.GraphModule, notes: list[str]) -> None:
        self._call: Callable[..., Any] = module.forward
        self._notes, self._workspace, self._lock = notes, Workspace(), threading.Lock()
        self._forms: OrderedDict[Hashable, _Form] = OrderedDict()
        self._owner: weakref.ref[Tensor] | None = None
        self._writes = writes_to_an_input(module.graph)
        if self._writes:
            self._note(WRITES)

    def _note(self, reason: str) -> None:
        note = f"not recorded: {reason}"
        if note not in self._notes:
            self._notes.append(note)
            _log.info(note)

    def _is_free(self) -> bool:
        """Returns whether nothing but the operators themselves sees this call."""
        seen = records() or torch.is_autocast_enabled("cpu") or _get_current_dispatch_mode() is not None
        return not self._writes and not seen

    def run(self, *args: Any) -> Any:
        """Calls the graph; what another thread runs at this time is not recorded."""
        if not self._is_free() or not self._lock.acquire(blocking=False):
            return self._workspace.run(self._call, args)
        try:
            return self._run(args)
        finally:
            self._lock.release()

    def _run(self, args: Sequence[Any]) -> Any:
        parameters = tuple(_state(value) for value in args if _is_parameter(value))
        others = [form(v) if isinstance(v, Tensor) else v for v in args if not _is_parameter(v)]
        key = (torch.get_num_threads(), *others)
        known = self._forms.get(key)
        if known is None or known.parameters != parameters:
            self._forms[key] = _Form(parameters)
            self._own(args)
        self._forms.move_to_end(key)
        while len(self._forms) > FORMS:
            self._forms.popitem(last=False)
        if known is None or known.parameters != parameters or known.is_refused:
            return self._workspace.run(self._call, args)
        if known.recording is not None:
            return known.recording.run(args)
        return self._record(known, args)

    def _record(self, known: _Form, args: Sequence[Any]) -> Any:
        """Records a call, or makes it as it is where that is refused."""
        self._workspace.clear()
        random = torch.get_rng_state()
        try:
            known.recording, results = _record(self._call, args)
        except Exception as error:
            known.is_refused = True
            self._note(first_line(error))
        if not known.is_refused:
            return results
        torch.set_rng_state(random)
        return self._workspace.run(self._call, args)

    def _own(self, args: Sequence[Any]) -> None:
        """Lets the recordings go with a parameter of this call, so with the model."""
        if self._owner is None or self._owner() is None:
            self._owner = next((weakref.ref(v, self._clear) for v in args if _is_parameter(v)), None)

    def _clear(self, _: Any) -> None:
        self._forms.clear()
