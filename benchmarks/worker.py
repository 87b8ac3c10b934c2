"""Measures the plans of one part in a process of its own and writes a line for each: ``python -m benchmarks.worker``.

:mod:`benchmarks.report` starts it, and starts another where a kernel has taken the device away from it. The
first line names all plans; then each has one, {"plan", "name"} and "row" or "not_measured".
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from . import machine, timing
from .harness import Target, measure, reason
from .parts import PARTS
from .timing import UnusableError

OVER = "the part's time was over"
UNUSABLE = 3  # exit status: what is left needs another process


def run(part: str, target: Target, start: int, end: float, out: Path) -> int:
    """Measures the plans from number ``start`` until the monotonic clock shows ``end``; the exit status."""
    plans = PARTS[part].plans(target)
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
            except UnusableError as error:
                write({**line, "not_measured": str(error), "unusable": True})
                return UNUSABLE
            except Exception as error:
                write({**line, "not_measured": reason(error)})
                if not target.clock.usable():
                    return UNUSABLE
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[name for name, part in PARTS.items() if part.files])
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
