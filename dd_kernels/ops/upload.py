"""Tensors that are made once and kept: tables on a device, keys of the noise.

What is kept must be a real tensor of its own, whatever holds around the first call: a ``FakeTensorMode``,
``torch.export``, ``torch.jit.trace``, functionalisation, a ``torch.func`` transform, ``torch.device("meta")`` or
inference mode would otherwise leave their tensors to later eager calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch.compiler import is_compiling

T = TypeVar("T")


def _in_a_mode() -> bool:
    """Returns whether a mode, a transform or a device context changes what torch's functions do in this thread."""
    c = torch._C
    return (
        c._len_torch_dispatch_stack() > 0
        or c._len_torch_function_stack() > 0
        or c._are_functorch_transforms_active()
        or torch.is_inference_mode_enabled()
        or torch.jit.is_tracing()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
    )


def real(make: Callable[[], T], device: torch.device | None = None) -> T:
    """Returns what ``make`` makes outside of every mode, transform and device context of the caller.

    Where there is no such ``device``, as when CUDA tensors are faked on a machine without CUDA, it is made in them.

    All of these belong to a thread, so that a new thread is free of them. ``make`` must create its tensors on the
    CPU and move them by a blocking copy, since a new thread is not on the caller's CUDA stream either.
    """
    absent = device is not None and device.type == "cuda" and not torch.cuda.is_available()
    if absent or not _in_a_mode():
        return make()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(make())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def constant_for_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes torch.compile call ``function`` while it traces, and take the result as a constant.

    This is ``torch.compiler.assume_constant_result`` without its import of Dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class PerDevice(Generic[T]):
    """Base class of a table: makes its copy on a device at the first call there, and keeps it.

    Copies are not pickled or deep-copied: a subclass says in ``__reduce__`` what it is made of.
    """

    _copies: dict[torch.device, T]

    def copy_to(self, device: torch.device) -> T:
        """Makes the copy on ``device``, of tensors that are created on the CPU."""
        raise NotImplementedError

    def on(self, device: torch.device) -> T:
        """Returns the copy on ``device``, made at the first call, or while torch.compile traces it."""
        found = None if is_compiling() else self._copies.get(device)
        if found is None:
            self._keep_copy(device)
            found = self._copies[device]
        return found

    @constant_for_compile
    def _keep_copy(self, device: torch.device) -> None:
        if device not in self._copies:
            self._copies[device] = real(lambda: self.copy_to(device), device)
