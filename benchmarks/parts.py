"""The parts of a report: what each measures, its share of the time, and the processes that do it.

Each part is measured by ``python -m benchmarks.parts``, a worker, in a process of its own; another worker is started
where a kernel has made the device unusable. A worker writes a first line that names all plans, then a line for each:
{"plan", "name"} and "row" or "not_measured".

``--compile ops 0 8`` is the first of 8 processes that call every implementation once, so that the workers that
measure find the kernels of Triton and of torch.compile in their caches on disk. There are hundreds of kernels, and
each takes half a second of a core. ``--compile models 0 4`` does so for the plans that compile whole models.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from tools import processes

from . import machine, timing
from .harness import Plan, Target, measure, reason

OVER = "the part's time was over"
UNUSABLE = 3  # exit status of a worker: what is left needs another process
MEMORY = 0.4  # fraction of the device's memory for all compiling processes of a kind
GRACE = 5.0  # seconds that a plan may run after the end of its part
WORKER = (sys.executable, "-m", "benchmarks.parts")
MODULES = (
    *("bench_reverse_step", "bench_randn", "bench_q_sample", "bench_group_norm_silu", "bench_conv2d"),
    *("bench_attention", "bench_throughput", "bench_training", "bench_model"),
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


def _ending(running: processes.Running, status: int | str) -> str:
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


def measure_part(
    part: str, seconds: float, folder: Path, stream: bool = False, worker: Sequence[str] = WORKER
) -> Measured:
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
            return {"rows": [], "not_measured": [{"name": part, "reason": _ending(running, status)}]}
        retry = not stream and progress.drop_failed_captures()
        stream = stream or retry
        at = progress.first_missing()
        # Where a worker died without a line for the plan that it was measuring, that plan is the first missing one.
        if at < len(progress.names) and not retry and (status != UNUSABLE or at == progress.start):
            words = _ending(running, status)
            progress.done[at] = {"plan": at, "name": progress.names[at], "not_measured": words}
            at += 1
        progress.start = at
        if at >= len(progress.names) or time.monotonic() > end:
            return progress.result()


def work(part: str, target: Target, start: int, end: float, out: Path) -> int:
    """Measures the plans from number ``start`` until the monotonic clock shows ``end``; returns the exit status."""
    every = plans(target, part)
    with out.open("a") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        if start == 0:
            write({"plans": [str(plan) for plan in every]})
        for number, plan in list(enumerate(every))[start:]:
            line: dict[str, Any] = {"plan": number, "name": str(plan)}
            if time.monotonic() > end:
                write({**line, "not_measured": OVER})
                continue
            try:
                write({**line, "row": measure(plan, target)})
            except timing.UnusableError as error:
                write({**line, "not_measured": str(error), "unusable": True})
                return UNUSABLE
            except Exception as error:
                write({**line, "not_measured": reason(error)})
                if not target.clock.usable():
                    return UNUSABLE
    return 0


def to_compile(target: Target, kind: str) -> list[Plan]:
    """Returns the plans of the device's parts that are compiled ahead, without those that choose by timing."""
    names = [name for name, part in PARTS.items() if part.seconds[target.kind] is not None and not part.checks]
    names = [name for name in names if (name == "compiled") == (kind == "models")]
    return [plan for plan in plans(target, *names) if not plan.tunes]


def _call_once(plan: Plan, target: Target) -> None:
    """Calls every implementation of a plan once."""
    with target.clock.running(), torch.no_grad():
        try:
            case = plan.build()
            for call in filter(callable, (case.ours, *case.peers.values())):
                with contextlib.suppress(torch.OutOfMemoryError):  # the call has compiled by then
                    call(*case.inputs[0])
        finally:
            target.clock.release()


def compile_all(plans: list[Plan], target: Target) -> None:
    """Compiles what the plans call and prints a line for each; the report counts the lines."""
    for plan in plans:
        try:
            _call_once(plan, target)
            print(f"compiled {plan}", flush=True)
        except Exception as error:
            print(f"{plan}: {reason(error)}", flush=True)
            if not target.clock.usable():
                return


def compile_ahead(kind: str, first: int, every: int) -> None:
    """Compiles this process's share of the plans, with less priority and memory than the tests beside it."""
    os.nice(10)
    if machine.DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY / every)
    # Autotuning must not store its choices, because other processes disturb its timings.
    torch._inductor.config.autotune_local_cache = False
    clock = timing.clock_of(machine.DEVICE, graphs=False)
    clock.copies = lambda bytes_moved: 1  # type: ignore[method-assign]
    target = Target(machine.DEVICE, machine.DEVICE, clock)
    compile_all(to_compile(target, kind)[first::every], target)


def main() -> int:
    """Runs the command line."""
    if sys.argv[1:2] == ["--compile"]:
        kind, first, every = sys.argv[2:]
        compile_ahead(kind, int(first), int(every))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description="Measures a part's plans.")
    parser.add_argument("part", choices=[name for name, part in PARTS.items() if not part.checks])
    parser.add_argument("--start", type=int, default=0, help="number of the first plan")
    parser.add_argument("--seconds", type=float, required=True, help="no plan starts later than this")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stream", action="store_true", help="capture no CUDA graphs")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    clock = timing.clock_of(machine.DEVICE, graphs=not args.stream)
    return work(args.part, Target(machine.DEVICE, machine.DEVICE, clock), args.start, end, args.out)


if __name__ == "__main__":
    sys.exit(main())
