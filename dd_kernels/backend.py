"""Which implementation of an op runs, and why.

Four implementations stand behind every op of :mod:`dd_kernels.ops`:

=============  ==========================================================  =================
name           what it is                                                  runs on
=============  ==========================================================  =================
``cpu``        C++ built by ``pip install``, one build for every torch     CPU tensors
``cuda``       CUDA C++ built where ``nvcc`` is found                      CUDA tensors [1]_
``triton``     Triton, compiled when first called                          CUDA, ROCm tensors
``reference``  plain PyTorch: the equations as they stand in the papers    any tensor
=============  ==========================================================  =================

.. [1] On devices of compute capability 8.0 (Ampere) or later.

``auto`` takes the fastest that serves the call. A backend asked for by name, per call, with
:func:`use_backend` or with the environment variable ``DD_KERNELS_BACKEND``, runs or raises.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch.compiler import is_compiling

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run this call; the message says why."""


def _check_name(argument: str, name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


def _load_library(stem: str) -> str | None:
    """Loads ``dd_kernels/_<stem>*.so``, whose loading registers its ops; returns why not, or None."""
    found = sorted(pathlib.Path(__file__).parent.glob(f"_{stem}.*so"))
    if not found:
        return f"the extension dd_kernels/_{stem}.so was not built (no compiler at install time?)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        warnings.warn(f"dd_kernels: {found[0].name} is there but cannot be loaded: {error}", stacklevel=2)
        return f"{found[0].name} cannot be loaded: {error}"
    return None


def _cuda_unavailable_reason() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _load_library("cuda")


def _triton_unavailable_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


_unavailable_reason: dict[str, str | None] = {
    "cpu": _load_library("cpu"),
    "cuda": _cuda_unavailable_reason(),
    "triton": _triton_unavailable_reason(),
    "reference": None,
}
# Checked where it is used, so that a bad value is an error of the call and not of the import.
_process_default = os.environ.get("DD_KERNELS_BACKEND", "auto")
_default: ContextVar[str | None] = ContextVar("_default", default=None)
_blocks: list[str] = []  # the backends of all use_backend blocks that are entered now, in any thread

_LEAST_CAPABILITY = (8, 0)
_too_old: dict[int, str | None] = {}  # by the index of a CUDA device, whose capability is asked for once


def _too_old_reason(device: torch.device) -> str | None:
    """Returns why the kernels of the CUDA library cannot run on this CUDA device; None if they can."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _too_old:
        capability = torch.cuda.get_device_capability(index)
        _too_old[index] = None
        if capability < _LEAST_CAPABILITY:
            least, found = (".".join(map(str, numbers)) for numbers in (_LEAST_CAPABILITY, capability))
            _too_old[index] = f"its kernels need compute capability {least} or later, and cuda:{index} has {found}"
    return _too_old[index]


def interpreting_triton() -> bool:
    """Returns whether Triton kernels run in its interpreter, which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _devices(name: str) -> tuple[str, ...]:
    if name == "triton" and interpreting_triton():
        return ("cpu", "cuda")
    return {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}[name]


def unavailable(name: str, device: torch.device | str = "cpu") -> str | None:
    """Returns why backend ``name`` cannot run on ``device``; None if it can."""
    _check_name("name", name)
    if name in ("auto", "reference"):
        return None
    device_type = torch.device(device).type
    if _unavailable_reason[name] is not None:
        return _unavailable_reason[name]
    if device_type not in _devices(name):
        return f"it takes {' or '.join(_devices(name))} tensors, and these are on {device_type}"
    if name == "cuda" and device_type == "cuda":
        return _too_old_reason(torch.device(device))
    return None


# Pre-filled, because a dict that grows while torch.compile traces causes a recompilation.
_device_types = {torch.device("cpu"): "cpu", **{torch.device("cuda", i): "cuda" for i in range(16)}}


def _device_type(device: torch.device) -> str:
    """Returns ``device.type``, kept since torch makes it a new string at every call: the most expensive check."""
    found = _device_types.get(device)
    if found is None:
        found = _device_types[device] = device.type
    return found


def _fastest(device: torch.device) -> str:
    device_type = _device_types.get(device) or _device_type(device)
    if device_type == "cpu":
        return "cpu" if _unavailable_reason["cpu"] is None else "reference"
    if device_type == "cuda":
        if _unavailable_reason["cuda"] is None and _too_old_reason(device) is None:
            return "cuda"
        return "triton" if _unavailable_reason["triton"] is None else "reference"
    return "reference"


def choose(op: str, backend: str, device: torch.device, unsupported_reason: str | None = None) -> str:
    """Returns the name of the implementation that runs ``op`` on ``device``.

    ``unsupported_reason`` says why only the reference serves this call (a float64 input, a gradient asked
    for), or is None. ``auto`` then takes the reference; a kernel asked for by name raises
    :class:`BackendUnavailableError`.
    """
    argument = "backend"
    if backend == "auto":
        backend = _block_default() if _blocks else _process_default
        argument = "DD_KERNELS_BACKEND"
    if backend == "auto":
        return "reference" if unsupported_reason else _fastest(device)
    _check_name(argument, backend)
    if backend == "reference":
        return backend
    reason = unavailable(backend, device) or unsupported_reason
    if reason is not None:
        raise BackendUnavailableError(f"{op}: backend={backend!r} was asked for but cannot run: {reason}")
    return backend


def is_free() -> bool:
    """Returns whether the fastest backend is taken: neither a block nor the process's default names another one."""
    return {*_blocks, _process_default} == {"auto"}


def _block_default() -> str:
    """Returns the backend of the innermost ``use_backend`` block around this call.

    torch.compile cannot read a context variable. It reads, and guards on, the block that was entered last.
    """
    return _blocks[-1] if is_compiling() else _default.get() or _process_default


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops called inside the block on backend ``name``, in this thread or asynchronous task alone.

    >>> with dd_kernels.use_backend("reference"):
    ...     x = dd_kernels.randn((1, 3, 8, 8), seed=0)
    """
    _blocks.append(_check_name("name", name))
    token = None if is_compiling() else _default.set(name)
    try:
        yield
    finally:
        _blocks.remove(name)
        if token is not None:
            _default.reset(token)
