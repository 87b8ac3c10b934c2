"""The parts that time nothing: the build; then the ops' tests, compute-sanitizer, and compiling ahead. None raises."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import itertools
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import processes
from .harness import reason
from .machine import DEVICE

Check = dict[str, Any]
# -v: else pip hides why the CUDA kernels do not compile, where the rest of the package does.
PIP_OPTIONS = ("-v", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
BUILDS = {
    "pip install": ("-m", "pip", "install", *PIP_OPTIONS, "-e", "."),
    "setup.py build_ext": ("setup.py", "build_ext", "--inplace"),
}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("cuda", "triton")
TAIL = 15
KERNEL = re.compile(r"[\[-](cpu-avx2|cpu-baseline|triton|cuda)(?=[\]-])")
STATUS = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
TEST = re.compile(r"(tests/\S+?::.*?)(?: (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*)?$")
NO_DEVICE = "Device not supported"  # as compute-sanitizer says where it cannot run at all
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def outcome(status: int | str) -> str:
    """The exit status in a word."""
    if isinstance(status, str):
        return status
    return "ok" if status == 0 else f"exit status {status}"


def build(seconds: float, folder: Path) -> list[Check]:
    """Installs the package as it lies there; builds the libraries in place where pip cannot."""
    found = []
    cuda = Path("/usr/local/cuda")
    on_path = shutil.which("nvcc") or not (cuda / "bin" / "nvcc").exists()
    environment = {} if on_path else {"CUDA_HOME": os.environ.get("CUDA_HOME", str(cuda))}
    end = time.monotonic() + seconds
    for name, arguments in BUILDS.items():
        running = processes.start([sys.executable, *arguments], folder / "build.log", environment)
        result = outcome(running.finish(end))
        libraries = sorted(path.name for path in (processes.ROOT / "dd_kernels").glob("_*.so"))
        found.append({"check": name, "outcome": result, "seconds": running.seconds, "libraries": libraries})
        if result != "ok" or (DEVICE == "cuda" and not any("_cuda" in name for name in libraries)):
            lines = running.lines()
            found[-1]["tail"] = [line for line in lines if "error" in line.lower()][:TAIL] + lines[-TAIL:]
        if result == "ok":
            break
    return found


def _half_the_cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) // 2)


def counts(lines: Sequence[str]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """From pytest's -v: by kernel how many tests passed, failed ..., and the names of those that failed."""
    by_kernel: dict[str, Counter[str]] = {}
    failed = []
    for line in lines:
        status, test = STATUS.search(line), TEST.search(line)
        if status is None or test is None or line.startswith(("FAILED", "ERROR")):  # the summary repeats them
            continue
        kernel = KERNEL.search(test[1])
        by_kernel.setdefault(kernel[1] if kernel else "no kernel", Counter())[status[1].lower()] += 1
        if status[1] in ("FAILED", "ERROR"):
            failed.append(test[1].strip())
    return {kernel: dict(counter) for kernel, counter in sorted(by_kernel.items())}, failed


def _tests() -> list[str]:
    """The suite of the ops, and what else nothing but a GPU shows: that the drop-in schedulers' loops are captured."""
    captures = "tests/integrations/diffusers/test_diffusers_capture.py::test_a_whole_loop_captures"
    return ["tests/ops", captures] if importlib.util.find_spec("diffusers") is not None else ["tests/ops"]


def op_tests(seconds: float, folder: Path, paths: Sequence[str] | None = None) -> list[Check]:
    """The tests on every kernel that runs here; cut off when their time is over."""
    paths = _tests() if paths is None else paths
    command = [sys.executable, "-m", "pytest", *paths, "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "-m", "not slow"]  # those of pyproject.toml want pytest-benchmark
    if importlib.util.find_spec("xdist") is not None and _half_the_cores() > 1:
        command += ["-n", str(_half_the_cores())]
    running = processes.start(command, folder / "tests.log")
    result = outcome(running.finish(time.monotonic() + seconds))
    by_kernel, failed = counts(running.lines())
    check = {"check": "tests of the ops", "outcome": result, "seconds": running.seconds, "kernels": by_kernel}
    check |= {"failed": failed[:50], "failures": len(failed)}
    if result != "ok":
        check["tail"] = running.lines()[-TAIL:]
    return [check]


def compute_sanitizer() -> str | None:
    """Where the tool is, or None."""
    found = shutil.which("compute-sanitizer")
    places = [Path("/usr/local/cuda/bin"), Path("/usr/local/cuda/compute-sanitizer")]
    places += [*Path("/usr/local").glob("cuda-*/bin"), *Path("/opt").glob("*/*/bin")]
    return found or next((str(p / "compute-sanitizer") for p in places if (p / "compute-sanitizer").exists()), None)


def sanitizer(seconds: float, folder: Path, program: str | None = None) -> list[Check]:
    """Its four tools over a short run of every op on each backend, all side by side."""
    program = program or compute_sanitizer()
    if program is None:
        return [{"check": "compute-sanitizer", "outcome": "not measured: compute-sanitizer was not found"}]
    end = time.monotonic() + seconds
    # Each tensor an allocation of its own, so that running over its end is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {}
    for tool, backend in itertools.product(TOOLS, BACKENDS):
        # Not the compilers that Triton starts.
        command = [program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "9"]
        command += [sys.executable, "-m", "benchmarks.sanitize", backend]
        running[f"{tool} {backend}"] = processes.start(command, folder / f"{tool}.{backend}.log", environment)
    return [_sanitized(name, started, end) for name, started in running.items()]


def _sanitized(name: str, running: processes.Running, end: float) -> Check:
    result = outcome(running.finish(end))
    lines = running.lines()
    absent = next((line for line in lines if line.startswith("not available") or NO_DEVICE in line), None)
    if absent is not None:
        return {"check": f"compute-sanitizer {name}", "outcome": f"not measured: {absent.lstrip('= ')}"}
    summaries = [int(found[1]) for line in lines if (found := SUMMARY.search(line))]
    check: Check = {
        "check": f"compute-sanitizer {name}",
        "outcome": result,
        "seconds": running.seconds,
        "errors": max(summaries) if summaries else None,
        "ops": sum(line.startswith("sanitized") for line in lines),
    }
    if result != "ok" or any(summaries):
        first = next((i for i, line in enumerate(lines) if line.startswith("=========") and "COMPUTE" not in line), 0)
        check["tail"] = lines[first : first + 2 * TAIL]
    return check


def compiled_ahead(seconds: float, folder: Path) -> list[Check]:
    """Fills the caches of Triton and torch.compile with what the other parts call."""
    end = time.monotonic() + seconds
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    running = []
    for kind, every in (("ops", _half_the_cores()), ("models", max(1, _half_the_cores() // 2))):
        for first in range(every):
            command = [sys.executable, "-m", "benchmarks.prepare", kind, str(first), str(every)]
            running.append(processes.start(command, folder / f"prepare.{kind}.{first}.log", environment))
    outcomes = {outcome(one.finish(end)) for one in running}
    lines = [line for one in running for line in one.lines()]
    check: Check = {
        "check": "compiled ahead",
        "outcome": "ok" if outcomes == {"ok"} else f"in part: {', '.join(sorted(outcomes))}",
        "seconds": max(one.seconds for one in running),
        "plans": sum(line.startswith("prepared") for line in lines),
    }
    if outcomes - {"ok"}:
        check["tail"] = [line for line in lines if not line.startswith("prepared")][-TAIL:]
    return [check]


def side_by_side(seconds: float, folder: Path) -> list[Check]:
    """The ops' tests, compute-sanitizer and the compiling ahead at once: what is not timed may share the device."""

    def checked(run: Callable[[float, Path], list[Check]]) -> list[Check]:
        try:
            return run(seconds, folder)
        except Exception as error:
            return [{"check": run.__name__, "outcome": f"not measured: {reason(error)}"}]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [check for found in pool.map(checked, (op_tests, sanitizer, compiled_ahead)) for check in found]
