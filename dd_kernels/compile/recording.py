"""Runs a rewritten graph on a CPU as the list of operators that it called, recorded once per form of its inputs.

Between two kernels of a U-Net lie views, sizes, allocations and what a convolution asks before it runs: some thousand
steps of Python, a fifth of a forward pass at batch 1. For inputs of one form they come out the same each time. So in
inference the second call of a form is recorded: the operators that compute, with the tensors they were given, in memory
that this recording keeps. From the third call on they alone run, on what is copied to the inputs' places. What is
computed is the same in every bit.

A recording is bound to its parameters: where one was changed in place or has moved, the graph runs as it is and is
recorded again. A graph that writes to an input, returns a view of one or something with a gradient, or looks at a value
of a tensor, is not recorded.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only

from ..ops.cuda_graph import first_line
from .fused_convolution import records
from .memory import Memory, Owner, owner_of, state_of
from .places import WRITES, copied_out, form, place_for, reason_against_results, write, writes_to_an_input
from .recorder import CPU, Call, Recorder, Refused, Where, is_plain
from .workspace import Workspace

_log = logging.getLogger(__name__)
FORMS = 4  # of one graph's inputs whose recordings are kept, those used last
MOST_COPIED = 64 << 20
"""Bytes of inputs beside parameters above which a graph runs as it is: all of them are copied in every call."""


class _Recording:
    """The calls of a graph for inputs of one form."""

    def __init__(self, calls: Sequence[Call], memory: Memory, places: Sequence[Any], results: Sequence[Any]) -> None:
        # A parameter is held by its memory alone, since what is kept of it goes when the parameter itself does.
        self._places = [place if isinstance(place, Tensor) and not _is_parameter(place) else None for place in places]
        self._memory = memory
        made: dict[Hashable, Tensor] = {}

        def tensor(where: Where) -> Tensor:
            key = (where.storage._cdata, *where[1:])
            if key not in made:
                made[key] = where.tensor()
            return made[key]

        def tensors(values: Any) -> Any:
            return tree_map_only(Where, tensor, values, is_leaf=lambda value: isinstance(value, Where))

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


def _record(call: Callable[..., Any], args: Sequence[Any]) -> tuple[_Recording, tuple[Any, ...]]:
    """Calls a graph; returns the recording of that and results that are the caller's.

    Raises:
        Refused: it cannot be recorded.
    """
    if sum(value.nbytes for value in args if isinstance(value, Tensor) and not _is_parameter(value)) > MOST_COPIED:
        raise Refused("its inputs beside parameters take too long to copy")
    memory, places = Memory(), [place_for(value, CPU) for value in args]
    if not all(is_plain(value) for value in places if isinstance(value, Tensor)):
        raise Refused("an input is no plain tensor on the CPU")
    recorder = Recorder(memory, places)
    with recorder:
        results = call(*places)
    if (reason := reason_against_results(places, results)) is not None:
        raise Refused(reason)
    if any(isinstance(value, Tensor) and value.requires_grad for value in results):
        raise Refused("a result carries a gradient")
    found = tree_map_only(Tensor, Where.of, list(results))
    copies = copied_out(results)
    del results
    if memory.in_use():
        raise Refused("something keeps a tensor of the graph")
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
        self._owner: Owner = None
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
        parameters = tuple(state_of(value) for value in args if _is_parameter(value))
        others = [form(v) if isinstance(v, Tensor) else v for v in args if not _is_parameter(v)]
        key = (torch.get_num_threads(), *others)
        known = self._forms.get(key)
        if known is None or known.parameters != parameters:
            self._forms[key] = _Form(parameters)
            self._owner = owner_of(args, self._clear, self._owner)
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

    def _clear(self, _: Any) -> None:
        self._forms.clear()
