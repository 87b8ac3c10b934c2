"""Builds the package, runs the tests of the ops and runs compute-sanitizer, each within a time limit.

Every function returns the outcomes as records and raises nothing of what the programs do.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import processes

Check = dict[str, Any]
# With -v pip shows why the CUDA kernels did not compile; else it hides the output of a build that succeeds.
PIP_OPTIONS = ("-v", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
BUILDS = {
    "pip install": ("-m", "pip", "install", *PIP_OPTIONS, "-e", "."),
    "setup.py build_ext": ("setup.py", "build_ext", "--inplace"),
}
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("cuda", "triton")
TAIL = 15  # lines of a failed program's output that a record keeps
KERNEL = re.compile(r"[\[-](cpu-avx512|cpu-avx2|cpu-baseline|triton|cuda)(?=[\]-])")
STATUS = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
TEST = re.compile(r"(tests/\S+?::.*?)(?: (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*)?$")
UNSUPPORTED_DEVICE = "Device not supported"  # printed by compute-sanitizer where it cannot run at all
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def outcome(status: int | str) -> str:
    """Returns the exit status in words."""
    if isinstance(status, str):
        return status
    return "ok" if status == 0 else f"exit status {status}"


def is_bad(check: Check) -> bool:
    """Returns whether the check failed; one that passed or could not be made is not bad."""
    failed = check.get("failures") or check.get("errors")
    return bool(failed) or check["outcome"].startswith("exit status")


def described(check: Check) -> str:
    """Returns a check in one line."""
    words = [f"{check['check']}: {check['outcome']}"]
    if "seconds" in check:
        words.append(f"{check['seconds']:.0f} s")
    if check.get("libraries"):
        words.append(", ".join(check["libraries"]))
    for kernel, by_status in check.get("kernels", {}).items():
        words.append(f"{kernel} {', '.join(f'{n} {status}' for status, n in by_status.items())}")
    if "errors" in check:
        found = "no summary" if check["errors"] is None else f"{check['errors']} errors"
        words.append(f"{found}, {check['ops']} groups of ops")
    if "plans" in check:
        words.append(f"{check['plans']} plans")
    words += [f"failed: {name}" for name in check.get("failed", [])]
    return "; ".join(words)


def build(seconds: float, folder: Path) -> list[Check]:
    """Installs the package in place with pip, or builds the libraries with setup.py where pip fails."""
    found = []
    cuda = Path("/usr/local/cuda")
    on_path = shutil.which("nvcc") or not (cuda / "bin" / "nvcc").exists()
    environment = {} if on_path else {"CUDA_HOME": os.environ.get("CUDA_HOME", str(cuda))}
    end = time.monotonic() + seconds
    for name, arguments in BUILDS.items():
        running = processes.start([sys.executable, *arguments], folder / "build.log", environment)
        result = outcome(running.finish(end))
        libraries = sorted(path.name for path in (processes.ROOT / "dd_kernels").glob("_*.so"))
        check: Check = {"check": name, "outcome": result, "seconds": running.seconds, "libraries": libraries}
        if result != "ok" or (torch.cuda.is_available() and not any("_cuda" in name for name in libraries)):
            lines = running.lines()
            check["tail"] = [line for line in lines if "error" in line.lower()][:TAIL] + lines[-TAIL:]
        found.append(check)
        if result == "ok":
            break
    return found


def half_the_cores() -> int:
    """Returns how many processes may run beside others."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def counts(lines: Sequence[str]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Reads the output of ``pytest -v``.

    Returns:
        The number of tests by kernel and status, and the names of the tests that failed.
    """
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
    """Names the suite of the ops, and the test that captures whole loops of the drop-in schedulers on a GPU."""
    captures = "tests/integrations/diffusers/test_diffusers_capture.py::test_a_whole_loop_captures"
    return ["tests/ops", captures] if importlib.util.find_spec("diffusers") is not None else ["tests/ops"]


def op_tests(seconds: float, folder: Path, paths: Sequence[str] | None = None) -> list[Check]:
    """Runs the tests of the ops on every kernel that runs here, and stops them when their time is over."""
    command = [sys.executable, "-m", "pytest", *(paths or _tests()), "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "-m", "not slow"]  # the options in pyproject.toml need pytest-benchmark
    if importlib.util.find_spec("xdist") is not None and half_the_cores() > 1:
        command += ["-n", str(half_the_cores())]
    running = processes.start(command, folder / "tests.log")
    result = outcome(running.finish(time.monotonic() + seconds))
    by_kernel, failed = counts(running.lines())
    check = {"check": "tests of the ops", "outcome": result, "seconds": running.seconds, "kernels": by_kernel}
    check |= {"failed": failed[:50], "failures": len(failed)}
    if result != "ok":
        check["tail"] = running.lines()[-TAIL:]
    return [check]


def compute_sanitizer() -> str | None:
    """Returns the path of compute-sanitizer, or None."""
    folders = [Path("/usr/local/cuda/bin"), Path("/usr/local/cuda/compute-sanitizer")]
    folders += [*Path("/usr/local").glob("cuda-*/bin"), *Path("/opt").glob("*/*/bin")]
    programs = (folder / "compute-sanitizer" for folder in folders)
    return shutil.which("compute-sanitizer") or next((str(p) for p in programs if p.exists()), None)


def sanitizer(seconds: float, folder: Path, program: str | None = None) -> list[Check]:
    """Runs the four tools of compute-sanitizer over every op on each backend, all at the same time."""
    program = program or compute_sanitizer()
    if program is None:
        return [{"check": "compute-sanitizer", "outcome": "not measured: compute-sanitizer was not found"}]
    end = time.monotonic() + seconds
    # Every tensor gets an allocation of its own, so that an access behind its end is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {}
    for tool, backend in itertools.product(SANITIZERS, BACKENDS):
        # "application-only" leaves out the compilers that Triton starts.
        command = [program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "9"]
        command += [sys.executable, "-m", "tools.sanitize", backend]
        running[f"{tool} {backend}"] = processes.start(command, folder / f"{tool}.{backend}.log", environment)
    return [_sanitized(name, started, end) for name, started in running.items()]


def _sanitized(name: str, running: processes.Running, end: float) -> Check:
    """Waits for one tool and reads its summary."""
    result = outcome(running.finish(end))
    lines = running.lines()
    absent = next((line for line in lines if line.startswith("not available") or UNSUPPORTED_DEVICE in line), None)
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
