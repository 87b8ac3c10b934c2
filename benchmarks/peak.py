"""Measures the peak rate of a CPU's fused multiply-adds, which bounds every convolution and matrix product."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from . import machine
from .timing import CpuClock

SOURCE = Path(__file__).with_name("fma_peak.cpp")
OPTIONS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", "-std=c++17")
ROUNDS = 4_000_000  # takes about 10 ms
REPEATS = 5


@cache
def _library() -> ctypes.CDLL | None:
    """Compiles the measurement for this processor; returns None where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "fma_peak.so")
        subprocess.run([compiler, *OPTIONS, str(SOURCE), "-o", str(library)], check=True, capture_output=True)
        found = ctypes.CDLL(str(library))
    found.fma_peak.argtypes, found.fma_peak.restype = [ctypes.c_int, ctypes.c_long], ctypes.c_double
    return found


def measured() -> dict[str, float | str]:
    """Measures the peak on torch's present number of threads.

    Returns:
        gflop_per_s, a multiply-add counted as two operations, and in "how" what was measured: register-resident
        multiply-adds, or a large matrix product where no compiler was found.
    """
    library = _library()
    if library is None:
        rate = machine.limits(CpuClock(), "cpu", torch.float32)["matmul_gflop_per_s"]
        return {"gflop_per_s": rate, "how": "a matrix product of torch (no C++ compiler was found)"}
    best = max(library.fma_peak(torch.get_num_threads(), ROUNDS) for _ in range(REPEATS))
    return {"gflop_per_s": best / 1e9, "how": "multiply-adds on registers"}
