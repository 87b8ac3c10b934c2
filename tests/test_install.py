"""What pip builds: a library for every torch and every x86-64, and an installation that does without it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dd_kernels

ROOT = Path(__file__).parents[1]
LIBRARY = next(Path(dd_kernels.__file__).parent.glob("_cpu.*so"), None)
needs_library = pytest.mark.skipif(LIBRARY is None, reason="installed without a C++ compiler")


def symbols(*options):
    return subprocess.run(["nm", "-DC", *options, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils is not installed")
def test_imports_nothing_but_the_stable_abi():
    imported = symbols("--undefined-only")
    assert "torch_parallel_for" in imported
    assert not re.findall(r".*\b(?:at|c10|caffe2|torch::(?!stable|headeronly))::.*", imported)
    assert not re.findall(r".*\bPy\w+.*", imported)


@needs_library
@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils is not installed")
def test_wide_vectors_only_in_functions_chosen_at_run_time():
    """A function of another namespace compiled with AVX2 or AVX-512 would fault on an older processor."""
    code = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    if "x86-64" not in code:
        return
    function, with_avx2, with_avx512 = "", set(), set()
    for line in code.splitlines():
        if line.endswith(">:"):
            function = line
        elif "%zmm" in line or "%k" in line:
            with_avx512.add(function)
        elif "%ymm" in line:
            with_avx2.add(function)
    assert with_avx2
    assert with_avx512
    assert all("avx512" in name or "@" in name for name in with_avx512), with_avx512
    assert all("avx2" in name or "avx512" in name or "@" in name for name in with_avx2), with_avx2


@pytest.mark.parametrize("compiler", ["/nonexistent/c++"])
def test_setup_without_a_compiler_warns_and_builds_nothing(tmp_path, compiler):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CXX": compiler, "DD_KERNELS_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (/nonexistent/c++)" in done.stderr
    assert not list(tmp_path.rglob("_cpu*"))
