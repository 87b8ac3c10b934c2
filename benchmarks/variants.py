"""What varies between the rows of one op, and the command that measures one row by hand.

``python -m benchmarks.bench_randn --shape 16,3,32,32 --dtype bfloat16 --layout channels_last --threads 2``
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from . import machine, results
from .harness import Case, Plan, Target, dtype_name, measure
from .timing import clock_of

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """Declares a field that is also an option of the command line."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Variant:
    """What every op's rows vary; an op adds fields of its own.

    ``every_peer``: also measures the peers that take seconds to prepare (torch.compile) or are slow (our reference).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    every_peer: bool = False

    def __str__(self) -> str:
        return f"{self.shape} {dtype_name(self.dtype)} {self.layout}"


V = TypeVar("V", bound=Variant)
Build = Callable[[Target, V], Case]


def plans_of(target: Target, variants: Iterable[V], build: Build[V], part: str = "ops") -> list[Plan]:
    """Returns a plan for every variant and number of threads; on a GPU one for every variant."""
    threads: Sequence[int | None] = machine.THREADS if target.kind == "cpu" else (None,)
    return [Plan(str(v), partial(build, target, v), n, part) for v in variants for n in threads]


def _shape(text: str) -> tuple[int, ...]:
    """Parses "16,3,32,32"."""
    shape = tuple(int(size) for size in text.split(","))
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError
    return shape


def _number(text: str) -> int:
    """Parses a number of threads."""
    if int(text) < 1:
        raise ValueError
    return int(text)


_shape.__name__, _number.__name__ = "N,C,H,W", "number above 0"  # argparse names the types in its errors


def _parser(variant: type[Variant], description: str) -> argparse.ArgumentParser:
    """Returns the parser of one op's command line."""
    parser = argparse.ArgumentParser(description=f"Measures one row beside its peers. {description.splitlines()[0]}")
    parser.add_argument("--shape", type=_shape, required=True, metavar="N,C,H,W")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous")
    for field in dataclasses.fields(variant):
        if "help" not in field.metadata:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if field.default is False:
            parser.add_argument(flag, action="store_true", help=field.metadata["help"])
        else:
            parser.add_argument(flag, default=field.default, **field.metadata)
    parser.add_argument(
        "--threads", type=_number, default=torch.get_num_threads(), help="of torch, on a CPU (%(default)s)"
    )
    return parser


def main(variant: type[V], build: Build[V], description: str | None) -> None:
    """Runs the command line of one op: measures one row and prints it."""
    options = vars(_parser(variant, description or "").parse_args())
    threads = options.pop("threads") if machine.DEVICE == "cpu" else None
    chosen = variant(**{**options, "dtype": DTYPES[options["dtype"]], "every_peer": True})
    target = Target(machine.DEVICE, machine.DEVICE, clock_of(machine.DEVICE))
    row = measure(Plan(str(chosen), lambda: build(target, chosen), threads), target)
    print(results.title([row]))
    print("\n".join(results.aligned(results.cells([row]))))
