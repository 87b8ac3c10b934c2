"""The parts of a report: what each runs, its share of the time, and the processes that measure it."""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools import checks, processes

from .harness import Plan, Target, reason

OVER = "the part's time was over"
UNUSABLE = 3  # exit status of a worker: what is left needs another process
GRACE = 5.0  # seconds that a plan may run after the end of its part
WORKER = (sys.executable, "-m", "benchmarks.worker")
MODULES = (
    *("bench_reverse_step", "bench_randn", "bench_q_sample", "bench_group_norm_silu", "bench_conv2d"),
    *("bench_throughput", "bench_training", "bench_growth", "bench_model"),
)
Measured = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Part:
    """A part's name and its seconds by device (None: it runs only where asked for by name).

    ``patience``: how many times its share it may take; the parts after it have that much less.
    ``checks``: it checks and measures nothing.
    """

    name: str
    seconds: dict[str, int | None]
    patience: float = 1.0
    checks: bool = False


PARTS = {
    part.name: part
    for part in (
        Part("build", {"cuda": 75, "cpu": None}, patience=2.5, checks=True),
        Part("checks", {"cuda": 115, "cpu": None}, checks=True),
        Part("ops", {"cuda": 85, "cpu": 240}),
        Part("end_to_end", {"cuda": 60, "cpu": 260}),
        Part("training", {"cuda": 25, "cpu": 40}),
        Part("growth", {"cuda": 30, "cpu": 60}),
        Part("shapes", {"cuda": 45, "cpu": 160}),
        Part("compiled", {"cuda": 45, "cpu": None}),
    )
}
TOTAL = {device: sum(part.seconds[device] or 0 for part in PARTS.values()) for device in ("cpu", "cuda")}


def plans(target: Target, *names: str) -> list[Plan]:
    """Returns the plans that the parts named measure on the target."""
    modules = [importlib.import_module(f"benchmarks.{name}") for name in MODULES]
    every = [plan for module in modules for plan in module.plans(target)]
    return [plan for name in names for plan in every if plan.part == name]


@dataclass
class Share:
    """Divides the time among the parts: those that come later share what a part leaves or overdraws."""

    remaining: float
    weights: dict[str, int] = field(default_factory=dict)

    def take(self, name: str) -> float:
        """Returns the seconds for the part ``name``."""
        share = PARTS[name].patience * self.weights[name] / sum(self.weights.values())
        return max(self.remaining, 0.0) * min(share, 1.0)

    def used(self, name: str, seconds: float) -> None:
        """Notes that the part is over and took ``seconds``."""
        self.remaining -= seconds
        del self.weights[name]


def _lines(out: Path) -> list[dict[str, Any]]:
    """Returns the lines that a worker wrote, without one that it was killed in."""
    found = []
    for line in out.read_text().splitlines() if out.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _last_words(running: processes.Running, status: int | str) -> str:
    """Returns a worker's status and the last line that it printed."""
    lines = [line for line in running.lines() if line.strip() and not line.startswith("USDT:")]
    words = f": {lines[-1].strip()[:200]}" if lines else ""
    return f"{status}{words}" if isinstance(status, str) else f"its process ended with status {status}{words}"


@dataclass
class Progress:
    """The plans of a part that are done, by number, and the plan at which the next worker starts."""

    names: list[str] = field(default_factory=list)
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    start: int = 0

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Takes the lines of a worker."""
        self.names = next((line["plans"] for line in lines if "plans" in line), self.names)
        self.done |= {line["plan"]: line for line in lines if "plan" in line}

    def drop_failed_captures(self) -> bool:
        """Forgets the plans whose capture of a graph made the device unusable; returns whether there were any."""
        failed = [n for n, line in self.done.items() if line.get("unusable") and "captured" in line["not_measured"]]
        for number in failed:
            del self.done[number]
        return bool(failed)

    def first_missing(self) -> int:
        """Returns the number of the first plan that is not done."""
        return next((number for number in range(len(self.names)) if number not in self.done), len(self.names))

    def result(self) -> Measured:
        """Returns the rows, and what was not measured and why, in the order of the plans."""
        lines = [self.done.get(i, {"name": name, "not_measured": OVER}) for i, name in enumerate(self.names)]
        return {
            "rows": [line["row"] for line in lines if "row" in line],
            "not_measured": [
                {"name": line["name"], "reason": line["not_measured"]} for line in lines if "not_measured" in line
            ],
        }


def measure(part: str, seconds: float, folder: Path, stream: bool = False, worker: Sequence[str] = WORKER) -> Measured:
    """Measures all plans of a part in processes of their own, so that a kernel that fails takes no others with it.

    A worker that dies or hangs loses the plan that it was measuring; another one continues after it. Where the
    capture of a graph made the device unusable, the next workers capture none and start with that plan.
    """
    end = time.monotonic() + seconds
    progress = Progress()
    tries = 0
    while True:
        tries += 1
        out = folder / f"{part}.{tries}.jsonl"
        command = [*worker, part, "--start", str(progress.start)]
        command += ["--seconds", f"{max(0.0, end - time.monotonic()):.1f}", "--out", str(out)]
        command += ["--stream"] if stream else []
        running = processes.start(command, folder / f"{part}.{tries}.log")
        status = running.finish(end + GRACE)
        progress.add(_lines(out))
        if not progress.names:
            return {"rows": [], "not_measured": [{"name": part, "reason": _last_words(running, status)}]}
        retry = not stream and progress.drop_failed_captures()
        stream = stream or retry
        at = progress.first_missing()
        # Where a worker died without a line for the plan that it was measuring, that plan is the first missing one.
        if at < len(progress.names) and not retry and (status != UNUSABLE or at == progress.start):
            words = _last_words(running, status)
            progress.done[at] = {"plan": at, "name": progress.names[at], "not_measured": words}
            at += 1
        progress.start = at
        if at >= len(progress.names) or time.monotonic() > end:
            return progress.result()


def compiled_ahead(seconds: float, folder: Path) -> list[checks.Check]:
    """Fills the caches of Triton and torch.compile with what the other parts call, in several processes."""
    end = time.monotonic() + seconds
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    half = checks.half_the_cores()
    running = []
    for kind, every in (("ops", half), ("models", max(1, half // 2))):
        for first in range(every):
            command = [*WORKER, "--compile", kind, str(first), str(every)]
            running.append(processes.start(command, folder / f"compile.{kind}.{first}.log", environment))
    outcomes = {checks.outcome(one.finish(end)) for one in running}
    lines = [line for one in running for line in one.lines()]
    check: checks.Check = {
        "check": "compiled ahead",
        "outcome": "ok" if outcomes == {"ok"} else f"in part: {', '.join(sorted(outcomes))}",
        "seconds": max(one.seconds for one in running),
        "plans": sum(line.startswith("compiled") for line in lines),
    }
    if outcomes - {"ok"}:
        check["tail"] = [line for line in lines if not line.startswith("compiled")][-checks.TAIL :]
    return [check]


def side_by_side(seconds: float, folder: Path) -> list[checks.Check]:
    """Runs the ops' tests, compute-sanitizer and the compiling ahead at the same time, since none of them is timed."""

    def checked(run: Callable[[float, Path], list[checks.Check]]) -> list[checks.Check]:
        try:
            return run(seconds, folder)
        except Exception as error:
            return [{"check": run.__name__, "outcome": f"not measured: {reason(error)}"}]

    runs = (checks.op_tests, checks.sanitizer, compiled_ahead)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [check for found in pool.map(checked, runs) for check in found]


def run(name: str, seconds: float, folder: Path, stream: bool) -> dict[str, Any]:
    """Runs one part: its checks, or the measurement of its plans."""
    if name == "build":
        return {"rows": [], "not_measured": [], "checks": checks.build(seconds, folder)}
    if name == "checks":
        return {"rows": [], "not_measured": [], "checks": side_by_side(seconds, folder)}
    return dict(measure(name, seconds, folder, stream))
