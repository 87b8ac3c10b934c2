"""Which implementation runs, and what is said when the one asked for cannot."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import dd_kernels as dd
from dd_kernels import backend as backends


def run_python(code, **environment):
    """A new Python with these environment variables: (exit status, output)."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(dd.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_auto_takes_the_kernel_and_the_reference_where_only_that_serves():
    assert backends.choose("op", "auto", torch.device("cpu")) == "cpu"
    assert backends.choose("op", "auto", torch.device("cpu"), "no kernel does it") == "reference"
    assert backends.choose("op", "auto", torch.device("meta")) == "reference"
    assert backends.choose("op", "reference", torch.device("cpu"), "no kernel does it") == "reference"


def test_a_backend_asked_for_by_name_runs_or_says_why_not():
    assert backends.choose("op", "cpu", torch.device("cpu")) == "cpu"
    with pytest.raises(dd.BackendUnavailableError, match=r"op: backend='cpu' .* no kernel does it"):
        backends.choose("op", "cpu", torch.device("cpu"), "no kernel does it")
    with pytest.raises(dd.BackendUnavailableError, match=r"op: backend='cpu' .* takes cpu tensors, .* on meta"):
        backends.choose("op", "cpu", torch.device("meta"))
    with pytest.raises(ValueError, match="backend must be one of auto, cpu, cuda, triton, reference; got 'mps'"):
        backends.choose("op", "mps", torch.device("cpu"))


def test_unavailable():
    assert backends.unavailable("auto") is None
    assert backends.unavailable("reference", "meta") is None
    assert "no CUDA device" in backends.unavailable("cuda") or torch.cuda.is_available()
    with pytest.raises(ValueError, match="name must be one of"):
        backends.unavailable("opencl")


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_cuda_kernels_need_a_recent_device(monkeypatch, capability, runs):
    device = torch.device("cuda", 1)
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or capability)
    monkeypatch.setattr(backends, "_too_old", {})
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends._unavailable_reason, name, None)
    reason = "its kernels need compute capability 8.0 or later, and cuda:1 has 7.5"
    assert backends.choose("op", "auto", device) == ("cuda" if runs else "triton")
    assert backends.unavailable("cuda", device) == (None if runs else reason)
    if runs:
        assert backends.choose("op", "cuda", device) == "cuda"
    else:
        with pytest.raises(dd.BackendUnavailableError, match=f"op: backend='cuda' .* cannot run: {reason}"):
            backends.choose("op", "cuda", device)
        monkeypatch.setitem(backends._unavailable_reason, "triton", "the package triton is not installed")
        assert backends.choose("op", "auto", device) == "reference"
    assert asked == [1]


def test_triton_takes_cpu_tensors_only_in_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.unavailable("triton", "cpu") is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "takes cuda tensors" in backends.unavailable("triton", "cpu")


def test_use_backend_is_for_the_block_and_this_thread_alone():
    cpu = torch.device("cpu")
    with dd.use_backend("reference"):
        assert backends.choose("op", "auto", cpu) == "reference"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(backends.choose, "op", "auto", cpu).result() == "cpu"
        assert backends.choose("op", "cpu", cpu) == "cpu"
        with dd.use_backend("cpu"):
            assert backends.choose("op", "auto", cpu) == "cpu"
        assert backends.choose("op", "auto", cpu) == "reference"
    assert backends.choose("op", "auto", cpu) == "cpu"
    with pytest.raises(ValueError, match="name must be one of"), dd.use_backend("gpu"):
        pass


def test_threads_have_blocks_of_their_own():
    """Each stays in its block while the other enters and leaves one."""
    cpu, both = torch.device("cpu"), threading.Barrier(2)

    def chosen(name):
        seen = []
        with dd.use_backend(name):
            both.wait()
            seen.append(backends.choose("op", "auto", cpu))
            both.wait()
        both.wait()
        return [*seen, backends.choose("op", "auto", cpu)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(chosen, ["reference", "cpu"])) == [["reference", "cpu"], ["cpu", "cpu"]]


def test_a_compiled_function_follows_the_block_that_it_is_called_in():
    compiled = torch.compile(lambda: dd.randn((2, 3), seed=1), fullgraph=True, backend="aot_eager")
    for name in ("reference", "cpu", "auto", "reference"):
        with dd.use_backend(name):
            assert compiled().equal(dd.randn((2, 3), seed=1))
    assert compiled().equal(dd.randn((2, 3), seed=1))


def test_a_block_of_auto_leaves_the_choice_free(monkeypatch):
    assert backends.is_free()
    with dd.use_backend("auto"):
        assert backends.is_free()
        with dd.use_backend("reference"):
            assert not backends.is_free()
        assert backends.is_free()
    monkeypatch.setattr(backends, "_process_default", "reference")
    assert not backends.is_free()
    with dd.use_backend("auto"):
        assert not backends.is_free()


def test_use_backend_ends_with_an_exception():
    with pytest.raises(RuntimeError, match="inside"), dd.use_backend("reference"):
        raise RuntimeError("inside")
    assert backends.choose("op", "auto", torch.device("cpu")) == "cpu"


def test_environment_variable(monkeypatch):
    show = "import torch, dd_kernels.backend as b; print(b.choose('op', 'auto', torch.device('cpu')))"
    assert run_python(show, DD_KERNELS_BACKEND="reference") == (0, "reference\n")
    monkeypatch.setattr(backends, "_process_default", "fast")
    with pytest.raises(ValueError, match="DD_KERNELS_BACKEND must be one of"):
        backends.choose("op", "auto", torch.device("cpu"))


@pytest.mark.parametrize(
    "isa", [*(pytest.param(isa, marks=pytest.mark.slow) for isa in ("baseline", "avx2")), "avx512", "foo"]
)
def test_instruction_set_from_the_environment(isa):
    status, text = run_python(
        "import ctypes, pathlib, dd_kernels as dd; dd.randn((1, 2), seed=0);"
        "library = next(pathlib.Path(dd.__file__).parent.glob('_cpu.*so'));"
        "isa = ctypes.CDLL(str(library)).dd_kernels_cpu_isa; isa.restype = ctypes.c_char_p; print(isa(None).decode())",
        DD_KERNELS_CPU_ISA=isa,
        DD_KERNELS_BACKEND="cpu",
    )
    if isa == "foo":
        assert status != 0
        assert "DD_KERNELS_CPU_ISA must be baseline, avx2 or avx512; got 'foo'" in text
    elif status != 0:
        assert f"DD_KERNELS_CPU_ISA is {isa}, but this processor lacks AVX" in text
    else:
        assert text == f"{isa}\n"


def test_a_library_that_is_absent_or_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backend.py"))
    assert "was not built" in backends._load_library("cpu")
    (tmp_path / "_cpu.abi3.so").write_bytes(b"not a library")
    with pytest.warns(UserWarning, match=r"_cpu\.abi3\.so is there but cannot be loaded"):
        assert "cannot be loaded" in backends._load_library("cpu")


def test_without_the_library_the_reference_serves(monkeypatch):
    monkeypatch.setitem(backends._unavailable_reason, "cpu", "it was not built")
    z = dd.randn((2, 8), seed=3)
    assert z.equal(dd.randn((2, 8), seed=3, backend="reference"))
    with pytest.raises(dd.BackendUnavailableError, match="it was not built"):
        dd.randn((2, 8), seed=3, backend="cpu")
