"""Compiles what is to be timed, ahead of time: ``python -m benchmarks.prepare ops 0 8`` is the first of 8 processes.

Each builds its share of the plans and calls every implementation once, so that the process that measures finds the
kernels of Triton and of torch.compile in their caches on disk. There are hundreds, and each takes half a second of a
core; the plans that compile whole models take minutes, and are ``models 0 4``.
"""

from __future__ import annotations

import contextlib
import os
import sys

import torch
import torch._inductor.config

from . import machine, timing
from .harness import Plan, Target, reason
from .parts import PARTS

MEMORY = 0.4  # of the device's, for all processes of a kind


def plans(target: Target, models: bool) -> list[Plan]:
    """What the device's parts measure, compiled models or the others; not what must be compiled undisturbed."""
    parts = [part for part in PARTS.values() if part.seconds[target.kind] is not None and part.slow == models]
    return [plan for part in parts for plan in part.plans(target) if not plan.tunes]


def prepare(plan: Plan, target: Target) -> None:
    """Calls every implementation of a plan."""
    with target.clock.running(), torch.no_grad():
        try:
            case = plan.build()
            for call in filter(callable, (case.ours, *case.peers.values())):
                with contextlib.suppress(torch.OutOfMemoryError):  # what it was to run is compiled by then
                    call(*case.inputs[0])
        finally:
            target.clock.release()


def run(mine: list[Plan], target: Target) -> None:
    """Prepares the plans, and says so: the report counts the lines."""
    for plan in mine:
        try:
            prepare(plan, target)
            print(f"prepared {plan}", flush=True)
        except Exception as error:
            print(f"{plan}: {reason(error)}", flush=True)
            if not target.clock.usable():
                return


def main() -> None:
    """The command line."""
    kind, first, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    # The tests and the sanitizer beside it come first, and must find memory.
    os.nice(10)
    if machine.DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY / every)
    # Which of several kernels is fastest shows only where nothing else runs: the code is kept, the choice is not.
    torch._inductor.config.autotune_local_cache = False
    clock = timing.clock_of(machine.DEVICE, graphs=False)
    clock.copies = lambda bytes_moved: 1
    target = Target(machine.DEVICE, machine.DEVICE, clock)
    run(plans(target, kind == "models")[first::every], target)


if __name__ == "__main__":
    main()
