"""Builds the extension libraries; everything else about the package is in pyproject.toml.

Each library is every file csrc/*/<name>*.<suffix>, on LibTorch's stable ABI and without a line of
Python's own, so that one build serves every torch from 2.10 on and every Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

ROOT = Path(__file__).parent.resolve()
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020A000000000000"]  # torch 2.10


def sources(pattern: str) -> list[str]:
    """Returns paths below csrc/, relative to this file, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/*/{pattern}"))


def cpu_library() -> list[Extension]:
    """Returns the extension dd_kernels/_cpu.abi3.so, or nothing where there is no C++ compiler."""
    if not os.environ.get("CXX", "").strip():
        os.environ.pop("CXX", None)  # torch would take an empty CXX for the name of a compiler
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None or sys.platform == "win32":
        warnings.warn(
            f"no C++ compiler ({compiler}) that can build the CPU kernels was found: dd_kernels is installed "
            "without them, and runs its plain PyTorch reference on CPU tensors",
            stacklevel=2,
        )
        return []
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    flags += ["-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-g0"]
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


def nvcc() -> str | None:
    """The CUDA compiler, or None to build without: ``DD_KERNELS_CUDA`` says 0 or 1, else what is found decides."""
    wanted = os.environ.get("DD_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"DD_KERNELS_CUDA must be 0 or 1; got {wanted!r}")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    compiler = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    compiler = compiler or shutil.which("nvcc")
    if compiler is None and wanted == "1":
        raise SystemExit("DD_KERNELS_CUDA=1 asks for the CUDA kernels, but nvcc was not found (PATH, CUDA_HOME)")
    return None if wanted == "0" or sys.platform == "win32" else compiler


def architectures() -> list[str]:
    """Compute capabilities to build for: ``TORCH_CUDA_ARCH_LIST``, else of the GPUs here, else of all we serve."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed and torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        listed = sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in devices})
    return listed or ["8.0", "9.0", "10.0+PTX"]


def architecture_flags() -> list[str]:
    """Returns nvcc's flags for :func:`architectures`."""
    flags = []
    for name in architectures():
        number = name.removesuffix("+PTX").replace(".", "")
        targets = f"sm_{number},compute_{number}" if name.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code=[{targets}]")
    return flags


CUDA_RULES = """
rule compile
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $nvcc -shared -cudart static $in $libraries -o $out
"""


def cuda_sources() -> list[str]:
    """Returns the kernels (.cu) and bindings (.cpp) of the CUDA library."""
    return sources("cuda*.cu") + sources("cuda*.cpp")


def write_cuda_build(compiler: str, folder: Path, library: Path) -> None:
    """Writes ``folder/build.ninja``: each file of kernels and bindings becomes an object, linked to ``library``."""
    # Two threads: one file for three architectures, as after a change to it, takes both of a small machine's cores.
    flags = ["-std=c++17", "-O3", "--fmad=false", "--threads=2", "-diag-suppress=1675"]
    flags += [*STABLE_ABI, *architecture_flags()]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"]
    flags += [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    objects = {f"{Path(source).parent.name}_{Path(source).name}.o": source for source in cuda_sources()}
    lines = [f"nvcc = {compiler}", f"flags = {' '.join(flags)}", f"libraries = {' '.join(libraries)}", CUDA_RULES]
    lines += [f"build {target}: compile {ROOT / source}" for target, source in objects.items()]
    lines += [f"build {library}: link {' '.join(objects)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))


class BuildLibraries(BuildExtension):
    """Builds the CUDA library with nvcc itself, so that it needs no torch with CUDA; the rest as torch does."""

    def build_extension(self, extension: Extension) -> None:
        if extension.name != "dd_kernels._cuda":
            super().build_extension(extension)
            return
        folder = Path(self.build_temp).resolve() / "cuda"
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        write_cuda_build(nvcc(), folder, library)
        jobs = os.environ.get("MAX_JOBS")
        try:
            subprocess.run(["ninja", "-C", str(folder), *(["-j", jobs] if jobs else [])], check=True)
        except subprocess.CalledProcessError as error:
            if os.environ.get("DD_KERNELS_CUDA") == "1":
                raise SystemExit("DD_KERNELS_CUDA=1 asks for the CUDA kernels, and they do not compile") from error
            warnings.warn("the CUDA kernels do not compile (see above): dd_kernels is installed without", stacklevel=2)


def cuda_library() -> list[Extension]:
    """Returns the extension dd_kernels/_cuda.abi3.so, or nothing where there is no nvcc."""
    # Optional: an nvcc that is too old must not cost anyone the rest of the package.
    return [Extension("dd_kernels._cuda", [], py_limited_api=True, optional=True)] if nvcc() else []


setup(
    ext_modules=cpu_library() + cuda_library(),
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
