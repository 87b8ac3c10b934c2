"""Builds the extension libraries; everything else about the package is in pyproject.toml.

Each library is every file csrc/*/<name>*.<suffix>, on LibTorch's stable ABI and without a line of
Python's own, so that one build serves every torch from 2.10 on and every Python.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020A000000000000"]  # torch 2.10


def sources(pattern: str) -> list[str]:
    """Paths below csrc/, relative to this file, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/*/{pattern}"))


def cpu_library() -> list[Extension]:
    """dd_kernels/_cpu.abi3.so, or nothing where there is no C++ compiler."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None or sys.platform == "win32":
        warnings.warn(
            f"no C++ compiler ({compiler}) that can build the CPU kernels was found: dd_kernels is installed "
            "without them, and runs its plain PyTorch reference on CPU tensors",
            stacklevel=2,
        )
        return []
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    flags += ["-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall"]
    return [
        CppExtension(
            "dd_kernels._cpu",
            sources("cpu*.cpp"),
            depends=sources("*.h"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": STABLE_ABI + flags},
            py_limited_api=True,
        )
    ]


setup(
    ext_modules=cpu_library(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
