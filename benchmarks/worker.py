"""Measures the plans of one part in a process of its own, or compiles what they call: ``python -m benchmarks.worker``.

:mod:`benchmarks.parts` starts workers, and starts another where a kernel has made the device unusable. A measuring
worker writes a first line that names all plans, then a line for each: {"plan", "name"} and "row" or "not_measured".

``--compile ops 0 8`` is the first of 8 processes that call every implementation once, so that the workers that
measure find the kernels of Triton and of torch.compile in their caches on disk. There are hundreds of kernels, and
each takes half a second of a core. ``--compile models 0 4`` does so for the plans that compile whole models.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from . import machine, parts, timing
from .harness import Plan, Target, measure, reason
from .parts import OVER, PARTS, UNUSABLE

MEMORY = 0.4  # fraction of the device's memory for all compiling processes of a kind


def run(part: str, target: Target, start: int, end: float, out: Path) -> int:
    """Measures the plans from number ``start`` until the monotonic clock shows ``end``; returns the exit status."""
    plans = parts.plans(target, part)
    with out.open("a") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        if start == 0:
            write({"plans": [str(plan) for plan in plans]})
        for number, plan in list(enumerate(plans))[start:]:
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
    return [plan for plan in parts.plans(target, *names) if not plan.tunes]


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=[name for name, part in PARTS.items() if not part.checks])
    parser.add_argument("--start", type=int, default=0, help="number of the first plan")
    parser.add_argument("--seconds", type=float, required=True, help="no plan starts later than this")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stream", action="store_true", help="capture no CUDA graphs")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    clock = timing.clock_of(machine.DEVICE, graphs=not args.stream)
    return run(args.part, Target(machine.DEVICE, machine.DEVICE, clock), args.start, end, args.out)


if __name__ == "__main__":
    sys.exit(main())
