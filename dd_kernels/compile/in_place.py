"""Compiles the calls of one network in place, apart from every other's, and notes where Dynamo gives up on one.

Dynamo keeps what it compiled by code object, at most ``torch._dynamo.config.recompile_limit`` graphs of each (8). The
models of a class share the code of ``forward``, so that after eight a further one would run eagerly. Each network is
called through a code object of its own, with a limit of its own where PyTorch takes one.

Dynamo does not look for hooks that come or go after a call was captured: that is done here.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from .capture import dd_kernels
from .report import Report

_log = logging.getLogger(__name__)
GRAPHS = 16  # of one network, by sizes, modes and adapters: enough to put some in and take them out
_GAVE_UP = (
    f"PyTorch ran a call eagerly: the graphs of other calls have reached their limit ({GRAPHS}, before torch 2.13"
    " torch._dynamo.config.recompile_limit), or compiling is turned off"
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_numbers = itertools.count()
_reports: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()


def report_of(module: nn.Module) -> Report | None:
    """Returns the report of a network that is compiled in place; None of another."""
    return _reports.get(module)


def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module with its hooks, past what it was compiled to."""
    return self._call_impl(*args, **kwargs)


def _own_call(module: nn.Module) -> Callable[..., Any]:
    """Returns :func:`_call` of ``module`` under a code object and a name that no other module shares.

    By the name Dynamo remembers which numbers have changed between calls, and makes them inputs of the graph. The
    groups of a model's norms must be none because another model has other groups.
    """
    code = _call.__code__.replace(co_name=f"_call_{next(_numbers)}")
    return types.MethodType(types.FunctionType(code, globals()), module)


class _Hooks:
    """Looks for hooks that were put into a network or taken out of it.

    PyTorch numbers the hooks of a process in one sequence: where none was there and none was made since, there is
    nothing to look for.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._next = module, RemovableHandle.next_id
        self._found = self._find()

    def _find(self) -> frozenset[int]:
        return frozenset(key for m in self._module.modules() for name in _HOOKS for key in getattr(m, name))

    def have_changed(self) -> bool:
        """Returns whether there are others than at the last call."""
        if not self._found and RemovableHandle.next_id == self._next:
            return False
        before, self._found, self._next = self._found, self._find(), RemovableHandle.next_id
        return self._found != before


def _arguments(module: nn.Module) -> frozenset[str]:
    """Returns the names of what a module's forward takes; none where it is not Python's, as a traced module's."""
    try:
        return frozenset(inspect.signature(module.forward).parameters)
    except ValueError:
        return frozenset()


def _divides_its_batch(module: nn.Module) -> bool:
    """Returns whether the batch of a network is the frames of all samples, as in the decoder of Stable Video Diffusion.

    In every block the batch is divided by the number of frames. Where both are symbols, PyTorch 2.13 does not simplify
    the quotients: each block doubles them, and the second size of a batch takes more than half an hour to capture.
    """
    of_frames = {"num_frames", "image_only_indicator"}
    return any(of_frames <= _arguments(m) for m in module.modules())


def compile_in_place(module: nn.Module, report: Report, options: dict[str, Any]) -> Callable[[], None]:
    """Compiles the calls of ``module``, whose graphs ``report`` takes; returns what undoes it.

    Where a graph breaks within a function, models share that function's code: torch 2.13 keeps them apart there too.
    """
    before, weakly = module._compiled_call_impl, weakref.ref(module)
    settings: dict[str, Any] = {"backend": dd_kernels, "options": {"report": report, **options}}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        settings |= {"isolate_recompiles": True, "recompile_limit": GRAPHS}
    if _divides_its_batch(module):
        settings["dynamic"] = False
    compiled: Any = torch.compile(_own_call(module), **settings)
    hooks = _Hooks(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if is_compiling():  # within another model that is compiled
            return compiled(*args, **kwargs)
        if hooks.have_changed():
            compiled = torch.compile(_own_call(module), **settings)
        runs = report.runs
        report.calls += 1
        result = compiled(*args, **kwargs)
        if report.runs == runs and _GAVE_UP not in report.notes:
            report.notes.append(_GAVE_UP)
            _log.warning("%s: %s", report.name, _GAVE_UP)
        return result

    def undo() -> None:
        if (owner := weakly()) is not None:
            owner._compiled_call_impl = before
            _reports.pop(owner, None)

    module._compiled_call_impl = call
    _reports[module] = report
    return undo
