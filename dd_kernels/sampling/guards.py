"""The guards of an accelerated model: evaluated in the first two steps of a loop, and not in every one.

Before each call Dynamo compares what the model's Python code looked at when it was captured. Of a U-Net that takes
0.6 ms, and 1.7 ms where a step has driven it out of the cache. Within ``sample`` nothing changes the model between two
steps but the model itself, a callback, or another thread. From the third step on only those guards are evaluated that
tell the model's graphs apart, if

- nobody sees the steps, the model is called alike in each, and no other thread runs, for which PyTorch's switch would
  hold too,
- in the second step each call ran one graph and none was captured,
- no graph of the model changes a Python object that outlives its call, and x keeps its form.

A change between two loops is seen by the next one's first step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

if TYPE_CHECKING:
    from ..compile.report import Report

Result = TypeVar("Result")
_FEWEST_STEPS = 3


def _form(x: Tensor) -> Hashable:
    return (x.dtype, x.shape, x.stride(), torch.is_inference(x))


def _is_alone() -> bool:
    """Returns whether this is the only thread; that of a progress bar runs no model."""
    return all(v is threading.current_thread() or type(v).__name__ == "TMonitor" for v in threading.enumerate())


def _report_of(model: Callable[..., Any]) -> Report | None:
    """Returns the report of an accelerated model, or None."""
    if not isinstance(model, torch.nn.Module) or model._compiled_call_impl is None:
        return None
    from ..compile.in_place import report_of  # it imports Dynamo, which whoever accelerated the model has done

    return report_of(model)


class Guards:
    """The guards of one model in one loop of so many steps, which someone may see, or that ``differs`` otherwise."""

    def __init__(self, model: Callable[..., Any], steps: int, differs: bool) -> None:
        serves = not differs and steps >= _FEWEST_STEPS and not is_compiling()
        self._report = _report_of(model) if serves else None
        self._step = 0
        self._trusted: Hashable = None  # the form of x for which they are left out

    def _checked(self, report: Report, x: Tensor, call: Callable[[], Result]) -> Result:
        """Makes the second call, and looks at whether further ones can be trusted."""
        graphs, calls, runs = len(report.graphs), report.calls, report.runs
        result = call()
        if 0 < report.calls - calls == report.runs - runs and len(report.graphs) == graphs and report.is_pure:
            self._trusted = _form(x)
        return result

    def call(self, x: Tensor, call: Callable[[], Result]) -> Result:
        """Returns what ``call``, a step's calls of the model for ``x``, returns."""
        if self._report is None:
            return call()
        self._step += 1
        if self._step == 2:
            return self._checked(self._report, x, call)
        if self._trusted is None or self._trusted != _form(x) or not _is_alone():
            return call()
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            return call()
