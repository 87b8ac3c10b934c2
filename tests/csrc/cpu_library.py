"""Builds the CPU library in ways that only tests need, and a package around it.

``sanitize`` adds AddressSanitizer and UndefinedBehaviorSanitizer. ``emulate`` has the kernels of 16 lanes run without
AVX-512, by ``tests/csrc/emulated/avx512_intrinsics.h``; the processor needs AVX2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import compiled
import pytest
from compiled import HERE, ROOT


def build(sanitize: bool = False, emulate: bool = False) -> Path:
    """Returns the library; what an earlier run compiled from the same sources is used again."""
    flags = ["-O1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    if sanitize:
        flags += compiled.SANITIZE
    if emulate:
        flags += ["-DDD_EMULATE_AVX512", "-mavx2", "-mfma", "-mf16c"]
    folders = [HERE / "emulated"] if emulate else []
    return compiled.build("cpu", sorted(ROOT.glob("csrc/*/cpu*.cpp")), flags, folders)


def package(folder: Path, library: Path) -> Path:
    """Copies dd_kernels into ``folder``, which PYTHONPATH may then name, with ``library`` as its CPU library."""
    shutil.copytree(ROOT / "dd_kernels", folder / "dd_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(library, folder / "dd_kernels" / "_cpu.abi3.so")
    return folder


def skip_unless_here(isa: str) -> None:
    """Skips a test where the processor, or the build, has no instruction set of that name."""
    draw = [sys.executable, "-c", "import dd_kernels as dd; dd.randn((1, 2), seed=0, backend='cpu')"]
    done = subprocess.run(draw, env={**os.environ, "DD_KERNELS_CPU_ISA": isa}, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this processor lacks {isa}, or the CPU library was not built")
