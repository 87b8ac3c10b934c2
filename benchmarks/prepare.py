"""Compiles what is to be timed, ahead of time: ``python -m benchmarks.prepare ops 0 8`` is the first of 8 processes.

Each builds its share of the plans and calls every implementation once, so that the process that measures finds the
kernels of Triton and of torch.compile in their caches on disk. There are hundreds, and each takes half a second of a
core; the plans that compile whole models take minutes, and are ``models 0 4``.
"""

from __future__ import annotations

import os
import sys

import torch
import torch._inductor.config

from . import machine, timing
from .harness import Plan, Target, reason
from .parts import PARTS


def plans(target: Target, models: bool) -> list[Plan]:
    """What the device's parts measure, compiled models or the others; not what must be compiled undisturbed."""
    parts = [part for part in PARTS.values() if part.seconds[target.kind] is not None and part.slow == models]
    return [plan for part in parts for plan in part.plans(target) if not plan.tunes]


def prepare(plan: Plan, target: Target) -> None:
    """Calls every implementation of a plan."""
    with target.clock.running(), torch.no_grad():
        try:
            case = plan.build()
            for call in (case.ours, *case.peers.values()):
                if callable(call):
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
    os.nice(10)  # the tests and the sanitizer beside it come first
    kind, first, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    # Which of several kernels is fastest shows only where nothing else runs: the code is kept, the choice is not.
    torch._inductor.config.autotune_local_cache = False
    clock = timing.clock_of(machine.DEVICE, graphs=False)
    clock.copies = lambda bytes_moved: 1
    target = Target(machine.DEVICE, machine.DEVICE, clock)
    run(plans(target, kind == "models")[first::every], target)


if __name__ == "__main__":
    main()
