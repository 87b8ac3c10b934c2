"""Tests what describes and profiles the machine: its peak rate, memory, FLOPs, and the names of the norm's kernels."""

import re
from pathlib import Path

import pytest
import torch

import dd_kernels as dd
from benchmarks import machine

pytestmark = pytest.mark.slow


def test_the_peak_needs_a_compiler_or_takes_a_matrix_product(monkeypatch, few_rounds):
    monkeypatch.setattr(machine, "PEAK_ROUNDS", 1000)
    assert machine.peak()["how"] == "multiply-adds on registers"
    machine._peak_library.cache_clear()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    without = machine.peak()
    machine._peak_library.cache_clear()
    assert without["gflop_per_s"] > 0
    assert "no C++ compiler" in without["how"]


def test_the_norms_kernels_are_known_by_name():
    root = Path(dd.__file__).parent
    cuda = "".join(path.read_text() for path in (root.parent / "csrc" / "group_norm_silu").glob("*.cu*"))
    found = re.findall(r"__global__[^{;]*?\w+_kernel\(const (\w+)", cuda)
    triton = "".join(path.read_text() for path in (root / "ops" / "group_norm_silu").glob("triton*.py"))
    found += re.findall(r"\b(_\w+)\[(?:grid|\()", triton)
    assert len(set(found)) >= 10, found
    theirs = ["void at::native::(anonymous)::RowwiseMomentsCUDAKernel<float>", "silu_kernel"]
    assert not [name for name in found + theirs if not machine.NORM.search(name)]
    for other in (
        "implicit_convolve_sgemm",
        "reverse_step_kernel(ReverseStepArguments)",
        "vectorized_elementwise_kernel",
    ):
        assert not machine.NORM.search(other)


def test_peak_memory_is_what_a_call_adds(cuda):
    cuda.reset_peak_memory_stats = lambda: None
    cuda.memory_allocated, cuda.max_memory_allocated = (lambda: 100), (lambda: 175)
    assert machine.peak_bytes(lambda: None, cuda) == 75


def test_flops_of_a_convolution():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    x = torch.randn(2, 3, 4, 4)
    assert machine.flops(lambda: conv(x)) == 2 * 2 * 8 * 16 * 27
