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

import torch

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


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _load_library("cuda")


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


_why_not: dict[str, str | None] = {
    "cpu": _load_library("cpu"),
    "cuda": _why_no_cuda(),
    "triton": _why_no_triton(),
    "reference": None,
}
# Checked where it is used, so that a bad value is an error of the call and not of the import.
_default = os.environ.get("DD_KERNELS_BACKEND", "auto")


_LEAST_CAPABILITY = (8, 0)
_too_old: dict[int, str | None] = {}  # by the index of a CUDA device, which is asked once


def _why_not_on(device: torch.device) -> str | None:
    """Why the CUDA library cannot run on this CUDA device, whatever else it can; None if it can."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _too_old:
        capability = torch.cuda.get_device_capability(index)
        _too_old[index] = None
        if capability < _LEAST_CAPABILITY:
            least, found = (".".join(map(str, numbers)) for numbers in (_LEAST_CAPABILITY, capability))
            _too_old[index] = f"its kernels need compute capability {least} or later, and cuda:{index} has {found}"
    return _too_old[index]


def interpreting_triton() -> bool:
    """Whether Triton kernels run in its interpreter, which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _devices(name: str) -> tuple[str, ...]:
    if name == "triton" and interpreting_triton():
        return ("cpu", "cuda")
    return {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}[name]


def unavailable(name: str, device: torch.device | str = "cpu") -> str | None:
    """Why backend ``name`` cannot run on ``device``; None if it can."""
    _check_name("name", name)
    if name in ("auto", "reference"):
        return None
    device_type = torch.device(device).type
    if _why_not[name] is not None:
        return _why_not[name]
    if device_type not in _devices(name):
        return f"it takes {' or '.join(_devices(name))} tensors, and these are on {device_type}"
    if name == "cuda" and device_type == "cuda":
        return _why_not_on(torch.device(device))
    return None


# Filled with the usual ones: what grows under torch.compile is compiled twice.
_device_types = {torch.device("cpu"): "cpu", **{torch.device("cuda", i): "cuda" for i in range(16)}}


def _device_type(device: torch.device) -> str:
    """``device.type``, which torch spells anew at every call: the dearest of all checks."""
    found = _device_types.get(device)
    if found is None:
        found = _device_types[device] = device.type
    return found


def _fastest(device: torch.device) -> str:
    device_type = _device_type(device)
    if device_type == "cpu":
        return "cpu" if _why_not["cpu"] is None else "reference"
    if device_type == "cuda":
        if _why_not["cuda"] is None and _why_not_on(device) is None:
            return "cuda"
        return "triton" if _why_not["triton"] is None else "reference"
    return "reference"


def choose(op: str, backend: str, device: torch.device, obstacle: str | None = None) -> str:
    """The name of the implementation that runs ``op`` on ``device``.

    ``obstacle`` says why only the reference serves this call (a float64 input, a gradient asked
    for), or is None. ``auto`` then takes the reference; a kernel asked for by name raises
    :class:`BackendUnavailableError`.
    """
    argument = "backend"
    if backend == "auto":
        backend, argument = _default, "DD_KERNELS_BACKEND"
    if backend == "auto":
        return "reference" if obstacle else _fastest(device)
    _check_name(argument, backend)
    if backend == "reference":
        return backend
    reason = unavailable(backend, device) or obstacle
    if reason is not None:
        raise BackendUnavailableError(f"{op}: backend={backend!r} was asked for but cannot run: {reason}")
    return backend


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops called inside the block, in every thread, on backend ``name``.

    >>> with dd_kernels.use_backend("reference"):
    ...     x = dd_kernels.randn((1, 3, 8, 8), seed=0)
    """
    global _default
    before, _default = _default, _check_name("name", name)
    try:
        yield
    finally:
        _default = before
