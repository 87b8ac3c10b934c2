"""Describes the machine, measures its limits in the same run as the ops, and profiles what a call consists of."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import dd_kernels
from dd_kernels import backend as backends

from .timing import Arguments, Call, Clock, CpuClock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS = tuple(n for n in (1, 2) if n <= len(os.sched_getaffinity(0)))
COPY_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}  # size of the tensor that is copied
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
PEAK_SOURCE = Path(__file__).with_name("fma_peak.cpp")
PEAK_OPTIONS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", "-std=c++17")
PEAK_ROUNDS = 4_000_000  # takes about 10 ms
PEAK_REPEATS = 5
PROFILED_RUNS = 3
# Matches the kernels and operators of GroupNorm and SiLU. On a GPU our CUDA kernels are found by the type of their
# argument, Triton's and PyTorch's kernels by their names; on a CPU all of them are operators.
NORM = re.compile(
    r"group_?norm|silu|rowwisemoments|computefusedparams|norm(forward|backward)"
    r"|^_(whole_groups|partial_moments|combine_moments|apply|partial_sums|combine_sums|parameter_gradients)",
    re.IGNORECASE,
)


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


@cache
def _peak_library() -> ctypes.CDLL | None:
    """Compiles the measurement of the peak rate for this processor; returns None where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "fma_peak.so")
        subprocess.run([compiler, *PEAK_OPTIONS, str(PEAK_SOURCE), "-o", str(library)], check=True, capture_output=True)
        found = ctypes.CDLL(str(library))
    found.fma_peak.argtypes, found.fma_peak.restype = [ctypes.c_int, ctypes.c_long], ctypes.c_double
    return found


def peak() -> dict[str, float | str]:
    """Measures the peak rate of a CPU's fused multiply-adds on torch's present number of threads.

    Returns:
        gflop_per_s, a multiply-add counted as two operations, and in "how" what was measured: register-resident
        multiply-adds, or a large matrix product where no compiler was found.
    """
    library = _peak_library()
    if library is None:
        rate = limits(CpuClock(), "cpu", torch.float32)["matmul_gflop_per_s"]
        return {"gflop_per_s": rate, "how": "a matrix product of torch (no C++ compiler was found)"}
    best = max(library.fma_peak(torch.get_num_threads(), PEAK_ROUNDS) for _ in range(PEAK_REPEATS))
    return {"gflop_per_s": best / 1e9, "how": "multiply-adds on registers"}


def events(run: Callable[[], object], device: str) -> list[tuple[str, float, int]]:
    """Returns (name, microseconds, calls) over PROFILED_RUNS runs, of a GPU's kernels or a CPU's operators.

    The time of an operator leaves out the operators that it calls.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    run()
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_RUNS):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
    found = []
    for event in profiler.key_averages():
        on_device = "CUDA" in str(getattr(event, "device_type", ""))
        if device == "cuda" and on_device and event.self_device_time_total > 0:
            found.append((event.key, event.self_device_time_total, event.count))
        elif device == "cpu" and event.self_cpu_time_total > 0 and "::" in event.key:
            found.append((event.key, event.self_cpu_time_total, event.count))
    return found


# The kinds of layers by the operators of a CPU; the first kind that matches has the operator.
KINDS = {
    "convolutions": re.compile(r"conv", re.IGNORECASE),
    "norms and activations": NORM,
    "attention": re.compile(r"attention|softmax|bmm", re.IGNORECASE),
    "linear": re.compile(r"addmm|::mm\b|linear|gemm", re.IGNORECASE),
    "copies and layouts": re.compile(r"copy_|contiguous|clone|::to\b|reorder|::cat\b", re.IGNORECASE),
}


def kinds(run: Callable[[], object]) -> dict[str, float]:
    """Returns the shares of a call's time on a CPU by kind of layer."""
    with torch.no_grad():
        operators = events(run, "cpu")
    found: dict[str, float] = {}
    for name, us, _ in operators:
        kind = next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "rest")
        found[kind] = found.get(kind, 0.0) + us
    total = sum(found.values())
    return {kind: us / total for kind, us in sorted(found.items(), key=lambda pair: -pair[1])}


def peak_bytes(run: Callable[[], object], cuda: Any = torch.cuda) -> int:
    """Returns the peak of a GPU's memory during a call, less what was allocated before it."""
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    run()
    cuda.synchronize()
    return int(cuda.max_memory_allocated()) - before


def flops(run: Callable[[], object]) -> int:
    """Counts the floating-point operations of convolutions and matrix products; one multiply-add is two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
