"""Describes the machine, and measures its bandwidth and its rate of matrix products in the same run."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dd_kernels
from dd_kernels import backend as backends

from .timing import Arguments, Call, Clock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS = tuple(n for n in (1, 2) if n <= len(os.sched_getaffinity(0)))
COPY_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}  # size of the tensor that is copied
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}


@cache
def cpu_isa() -> str | None:
    """Returns the instruction set that the CPU library chose; None where the library was not built."""
    found = sorted(Path(dd_kernels.__file__).parent.glob("_cpu.*so"))
    if not found:
        return None
    function = ctypes.CDLL(str(found[0])).dd_kernels_cpu_isa
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
    return str(function(None).decode())


@cache
def _processor() -> str:
    """Returns the name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def described(device: str) -> dict[str, Any]:
    """Returns the device, torch's version and the CPU's instruction set, as the results name them."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {"device": name, "torch": torch.__version__, "isa": cpu_isa() if device == "cpu" else None}


def kernels(device: str) -> list[str]:
    """Lists the backends with kernels of their own that run on ``device``, in the order of "auto"."""
    names = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[device]
    return [name for name in names if backends.unavailable(name, device) is None]


def backend(device: str) -> str:
    """Returns the backend that "auto" takes on ``device``."""
    return next(iter(kernels(device)), "reference")


_limits: dict[tuple[object, ...], dict[str, float]] = {}


def limits(clock: Clock, device: torch.device | str, dtype: torch.dtype) -> dict[str, float]:
    """Returns the copy bandwidth and the rate of matrix products, measured once per process.

    Returns:
        copy_gb_per_s (bytes read and written) and matmul_gflop_per_s (two operations per product), measured on
        random data in ``dtype``, on torch's present number of threads.
    """
    key = (clock.device, str(device), dtype, torch.get_num_threads())
    if key not in _limits:
        source = torch.randn(COPY_BYTES[clock.device] // 4, device=device)
        target = torch.empty_like(source)
        seconds = _median_seconds(clock, target.copy_, (source,), 8 * source.numel())
        del target, source
        size = MATMUL_SIZE[clock.device]
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = _median_seconds(clock, torch.mm, (a, b), 3 * a.nbytes)
        _limits[key] = {
            "copy_gb_per_s": 8 * (COPY_BYTES[clock.device] // 4) / seconds / 1e9,
            "matmul_gflop_per_s": 2 * size**3 / product / 1e9,
        }
    return _limits[key]


def _median_seconds(clock: Clock, call: Call, arguments: Arguments, bytes_moved: int) -> float:
    timer = clock.timer(call, [arguments], bytes_moved)
    return statistics.median(timer.measure() for _ in range(5))
