"""The CUDA library as nvcc builds it: no spills, 16-byte accesses, planned registers, only the stable ABI."""

import functools
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
ARCHITECTURES = "8.0 9.0 10.0+PTX"
REGISTERS_OF_A_MULTIPROCESSOR = 65536
# Threads of a block, and blocks to a multiprocessor that the registers are planned for.
PLANNED = {
    r"(randn|q_sample)_kernel.*OrderE[045]E": (128, 8),
    r"reverse_step_kernel.*OrderE[05]ELb0E": (128, 6),
    r"reverse_step_kernel.*OrderE[05]ELb1E": (128, 4),
    r"reverse_step_kernel.*OrderE4E": (128, 8),
    r"(randn|q_sample)_kernel.*OrderE[123]E": (128, 3),
    r"reverse_step_kernel.*OrderE[123]ELb0E": (128, 3),
    r"reverse_step_kernel.*OrderE[123]ELb1E": (128, 2),
    r"resident_kernel.*AccessE0ELi2E": (256, 4),
    r"resident_kernel.*AccessE0ELi4E": (256, 3),
    r"resident_kernel.*(AccessE1|ELi(8|12)E)": (256, 2),
    r"warp_kernel": (128, 8),
    r"statistics_kernel": (256, 3),
    r"(apply|resident_backward|apply_backward|column_sums)_kernel": (256, 2),
    r"channel_sums_kernel": (256, 4),
    r"parameter_kernel": (256, 1),
}
ELEMENT_BY_ELEMENT = re.compile(r"OrderE4E|AccessE2E|parameter_kernel")
READS_LAST = re.compile(r"apply(_backward)?_kernel")
WRITES_ONLY_SUMS = re.compile(r"(column|channel)_sums_kernel")


def cuda_tool(name: str) -> str | None:
    """A CUDA tool from the path, or from Triton's package."""
    triton = importlib.util.find_spec("triton")
    packaged = Path(triton.origin).parent / "backends/nvidia/bin" if triton else None
    return shutil.which(name) or (shutil.which(name, path=str(packaged)) if packaged else None)


needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc on the path, which builds the CUDA library"
)
needs_cuobjdump = pytest.mark.skipif(cuda_tool("cuobjdump") is None, reason="no cuobjdump, neither CUDA's nor Triton's")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library alone, for every architecture: without a C++ compiler named, setup.py leaves out the CPU's."""
    folder = tmp_path_factory.mktemp("cuda")
    environment = {**os.environ, "DD_KERNELS_CUDA": "1", "CXX": "none", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return next(folder.rglob("_cuda*.so"))


def inspect(library: Path, option: str) -> str:
    """What cuobjdump says of the library."""
    command = [cuda_tool("cuobjdump"), option, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def planned_registers(kernel: str) -> int:
    """The most registers a thread may have."""
    matching = [plan for pattern, plan in PLANNED.items() if re.search(rf"\d{pattern}", kernel)]
    assert len(matching) == 1, kernel
    threads, blocks = matching[0]
    return REGISTERS_OF_A_MULTIPROCESSOR // (threads * blocks)


@functools.cache
def disassembly(library: Path) -> dict[str, list[str]]:
    """The instructions of every kernel, all its architectures together."""
    kernels, current = defaultdict(list), None
    for line in inspect(library, "-sass").splitlines():
        if found := re.search(r"Function : (\S+)", line):
            current = kernels[found[1]]
        elif (found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)) and current is not None:
            current.append(found[1])
    return kernels


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
def test_no_spills_and_planned_registers(library):
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", inspect(library, "-res-usage")
    )
    assert len(usage) > 3 * 80
    for kernel, registers, stack, local in usage:
        assert int(stack) == 0, kernel
        assert int(local) == 0, kernel
        assert int(registers) <= planned_registers(kernel), kernel


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
def test_accesses_of_16_bytes_and_none_of_local_memory(library):
    kernels = disassembly(library)
    assert len(kernels) > 80
    for kernel, instructions in kernels.items():
        text = "\n".join(instructions)
        assert not re.search(r"\b(LDL|STL)\b", text), kernel
        if ELEMENT_BY_ELEMENT.search(kernel):
            continue
        assert "randn_kernel" in kernel or re.search(r"\bLDG\.E(\.\w+)*\.128\b", text), kernel
        assert WRITES_ONLY_SUMS.search(kernel) or re.search(r"\bSTG\.E(\.\w+)*\.128\b", text), kernel
        if "Order" in kernel:  # the norm's kernels write statistics and sums, too
            assert set(re.findall(r"\bSTG\.[\w.]+", text)) == {"STG.E.128"}, kernel
            numbers = len(re.findall(r"\bLDG\.E\.64\b", text)) / len(ARCHITECTURES.split())
            assert numbers <= 2, kernel  # a timestep's index and the number of the draw


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
def test_clips_let_nan_through(library):
    """The host build clips by comparisons; the instruction that does so on a GPU drops NaN unless it is told not to."""
    kernels = {name: "\n".join(text) for name, text in disassembly(library).items() if "reverse_step" in name}
    assert len(kernels) == 12
    for kernel, text in kernels.items():
        assert set(re.findall(r"\bFMNMX[\w.]*", text)) == {"FMNMX.NAN"}, kernel


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
def test_what_is_read_and_written_last_leaves_the_cache_first(library):
    kernels = {name: "\n".join(text) for name, text in disassembly(library).items() if READS_LAST.search(name)}
    kernels = {name: text for name, text in kernels.items() if not ELEMENT_BY_ELEMENT.search(name)}
    assert len(kernels) == 24
    for kernel, text in kernels.items():
        for access in ("LDG", "STG"):
            assert re.search(rf"\b{access}\.E\.EF(\.\w+)*\.128\b", text), (kernel, access)
            assert not re.search(rf"\b{access}\.E\.128\b", text), (kernel, access)


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
def test_architectures(library):
    assert set(re.findall(r"sm_\d+", inspect(library, "-lelf"))) >= {"sm_80", "sm_90", "sm_100"}
    assert set(re.findall(r"(?:sm|compute)_\d+", inspect(library, "-lptx"))) <= {"sm_100", "compute_100"}
    assert inspect(library, "-lptx")


@pytest.mark.slow
@needs_nvcc
def test_imports_nothing_but_the_stable_abi(library):
    names = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", str(library)], check=True, capture_output=True, text=True
    ).stdout
    assert "aoti_torch_" in names
    assert not re.search(r"\b(at|c10|torch)::|cuda[A-Z]", names)


# None of them waits for the device, allocates or copies: a capture allows them all.
RUNTIME = {
    *("cudaDeviceGetAttribute", "cudaFuncGetAttributes", "cudaGetDevice", "cudaGetErrorString", "cudaGetLastError"),
    *("cudaLaunchKernelExC", "cudaOccupancyMaxActiveClusters"),
}


@pytest.mark.slow
@needs_nvcc
def test_calls_nothing_of_the_runtime_that_a_capture_forbids(library):
    objects = sorted(map(str, library.parents[1].rglob("*.o")))
    assert len(objects) > 10
    command = ["nm", "--undefined-only", *objects]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"\bU (cuda[A-Z]\w+)", names)) == RUNTIME


@pytest.fixture
def setup_functions(monkeypatch):
    """What setup.py defines; nothing is built."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setenv("DD_KERNELS_CUDA", "0")
    return runpy.run_path(str(ROOT / "setup.py"))


def test_architecture_list(setup_functions, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0+PTX")
    assert setup_functions["architecture_flags"]() == [
        "-gencode=arch=compute_86,code=[sm_86]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]


def test_built_only_as_asked(setup_functions, monkeypatch):
    assert setup_functions["nvcc"]() is None
    monkeypatch.setenv("DD_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="DD_KERNELS_CUDA must be 0 or 1; got 'yes'"):
        setup_functions["nvcc"]()
    monkeypatch.setenv("DD_KERNELS_CUDA", "1")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(SystemExit, match="nvcc was not found"):
        setup_functions["nvcc"]()
