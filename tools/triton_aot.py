"""Compiles the Triton kernels with no GPU and tabulates registers, stack, spills and access widths by shape.

    python -m tools.triton_aot                  the table, into benchmarks/results/triton_aot.md
    python -m tools.triton_aot --quick --arch 90 --json

The ops' own launch code runs on meta tensors of the shapes of the cifar10 and Stable Diffusion networks, with a
driver that compiles for a chosen GPU and launches nothing. So the kernels compiled here are those that a user runs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from .cubin import usages
from .triton_compile import Launch, compile_only, without_compiling

Row = dict[str, Any]
TABLE = pathlib.Path(__file__).parent.parent / "benchmarks" / "results" / "triton_aot.md"
ARCHS = (80, 90, 100)
DTYPES = ("bfloat16", "float32")

# By network: the batch, and by the side of the map the channels of the GroupNorms, which have 32 groups each.
NETWORKS = {
    "cifar10": (256, {32: (128, 256, 384), 16: (128, 256, 384, 512), 8: (256, 512), 4: (256, 512)}),
    "sd unet": (
        2,
        {
            64: (320, 640, 960),
            32: (320, 640, 960, 1280, 1920),
            16: (640, 1280, 1920, 2560),
            8: (1280, 2560),
        },
    ),
    "sd vae": (1, {64: (512,), 128: (512,), 256: (512, 256), 512: (256, 128)}),
}
# (network, channels, side, batch)
SHAPES = tuple(
    (network, channels, side, batch)
    for network, (batch, sides) in NETWORKS.items()
    for side, widths in sides.items()
    for channels in widths
)
QUICK = (("cifar10", 128, 32, 256), ("sd unet", 320, 64, 2))
STATES = (("cifar10", 3, 32, 256), ("sd unet", 4, 64, 2))  # the denoised images and latents


def _empty(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    """Returns a meta tensor."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if last else x


def group_norm(channels: int, side: int, batch: int, dtype: torch.dtype, last: bool, backward: bool) -> None:
    """Launches GroupNorm+SiLU as the U-Nets call it, with weight, bias and the time embedding added before the norm."""
    from dd_kernels.ops.group_norm_silu import triton as op

    x = _empty(batch, channels, side, side, dtype=dtype, last=last)
    per_channel, per_sample, statistics = _empty(channels), _empty(batch, channels), _empty(batch, 32)
    options = (32, per_channel, per_channel, 1e-5, per_sample, None, None, True)
    if backward:
        gradients = (x, per_channel, per_channel, per_sample, None, None)
        op.group_norm_silu_backward(x, x, statistics, statistics, *options, *gradients)
    else:
        op.group_norm_silu(x, *options, x, statistics, statistics)


def reverse_step(channels: int, side: int, batch: int, dtype: torch.dtype, last: bool, kind: str) -> None:
    """Launches a DDPM step that draws noise, a guided DDIM step or one of a third-order solver, with its history.

    The state is float32, the model's output has ``dtype``.
    """
    from dd_kernels.ops.reverse_step import triton as op
    from dd_kernels.ops.reverse_step.op import Arguments

    x = _empty(batch, channels, side, side, last=last)
    out = _empty(batch, channels, side, side, dtype=dtype, last=last)
    integers = _empty(50, dtype=torch.int64)
    key = integers[:3] if kind == "ddpm" else None
    uncond = out if kind == "guided" else None
    history = (x, x) if kind == "multistep" else (None, None)
    arguments = (_empty(50, 12), integers, integers[:1], key, x, None, *history)
    op.reverse_step(Arguments(x, out, None, uncond, 7.5, None, None, *arguments))


def q_sample(channels: int, side: int, batch: int, dtype: torch.dtype, last: bool) -> None:
    """Launches q_sample, drawing the noise and returning it."""
    from dd_kernels.ops.q_sample import triton as op
    from dd_kernels.ops.q_sample.op import Arguments

    x = _empty(batch, channels, side, side, dtype=dtype, last=last)
    integers = _empty(batch, dtype=torch.int64)
    op.q_sample(Arguments(x, None, _empty(1000, 2), integers, _empty(3, dtype=torch.int64), x, x))


def randn(channels: int, side: int, batch: int, dtype: torch.dtype, last: bool) -> None:
    """Launches the normals of x_T."""
    from dd_kernels.ops.randn import triton as op
    from dd_kernels.ops.randn.op import Arguments

    z = _empty(batch, channels, side, side, dtype=dtype, last=last)
    op.randn(Arguments(z, _empty(3, dtype=torch.int64), 0))


OPS: dict[str, tuple[Callable[..., None], tuple[tuple[str, int, int, int], ...]]] = {
    "group_norm_silu": (partial(group_norm, backward=False), SHAPES),
    "group_norm_silu_backward": (partial(group_norm, backward=True), SHAPES),
    "reverse_step": (partial(reverse_step, kind="ddpm"), STATES),
    "reverse_step guided": (partial(reverse_step, kind="guided"), STATES),
    "reverse_step multistep": (partial(reverse_step, kind="multistep"), STATES),
    "q_sample": (q_sample, STATES),
    "randn": (randn, STATES),
}


def vector_bits(channels: int, side: int, itemsize: int, last: bool, options: dict[str, Any]) -> int:
    """Returns the widest access in bits, at most 128, that the layout of a tile allows."""
    run = options.get("BLOCK_CHANNELS", channels) if last else side * side
    return 8 * math.gcd(16, run * itemsize, channels * itemsize if last else 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op, compiled for one architecture. ``last``: channels_last; ``shape``: (channels, side, batch)."""

    op: str
    network: str
    shape: tuple[int, int, int]
    dtype: str
    last: bool
    arch: int

    def launch(self) -> None:
        """Calls the op's launch code."""
        OPS[self.op][0](*self.shape, getattr(torch, self.dtype), self.last)

    def row(self, launch: Launch) -> Row:
        """Returns the entries of a row that are known before the launch is compiled."""
        (channels, side, batch), options = self.shape, launch.options
        itemsize = getattr(torch, self.dtype).itemsize
        return {
            "op": self.op,
            "kernel": launch.name,
            "network": self.network,
            "shape": [batch, channels, side, side],
            "dtype": self.dtype,
            "layout": "NHWC" if self.last else "NCHW",
            "tile": [size for name, size in sorted(options.items()) if name in ("BLOCK_C", "BLOCK_P", "BLOCK_S")],
            "warps": options["num_warps"],
            "arch": self.arch,
            "allowed_bits": vector_bits(channels, side, itemsize, self.last, options),
        }


def cases(archs: Iterable[int] = ARCHS, dtypes: Iterable[str] = DTYPES, quick: bool = False) -> list[Case]:
    """Lists every op at the networks' shapes, in both layouts; ``quick``: a few shapes that reach every kernel."""
    return [
        Case(op, network, (channels, side, batch), dtype, last, arch)
        for arch in archs
        for op, (_, shapes) in OPS.items()
        for network, channels, side, batch in (s for s in shapes if not quick or s in QUICK + STATES[1:])
        for dtype in dtypes
        for last in (False, True)
    ]


def listed(case: Case) -> list[Row]:
    """Returns the rows of a case, without compiling and so without what the kernels use."""
    with without_compiling(case.arch) as (launches, _):
        case.launch()
    return [case.row(launch) for launch in launches]


def _compiled(case: Case) -> list[tuple[Row, bytes]]:
    """Compiles a case and returns its rows, each with its cubin."""
    with compile_only(case.arch) as launches:
        case.launch()
    return [(case.row(launch), launch.kernel.asm["cubin"]) for launch in launches]


def rows(wanted: list[Case], jobs: int) -> list[Row]:
    """Compiles every case in ``jobs`` processes and returns a row per launch."""
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        found = [pair for case in pool.map(_compiled, wanted) for pair in case]
    for arch in {row["arch"] for row, _ in found}:
        distinct = list({cubin for row, cubin in found if row["arch"] == arch})
        used = dict(zip(distinct, usages(distinct, arch), strict=True))
        for row, cubin in found:
            if row["arch"] == arch:
                row |= dataclasses.asdict(used[cubin])
    return [row for row, _ in found]


HEAD = "op, kernel, network, shape, dtype, layout, tile, warps, sm, registers, stack, spills, load bits, store bits"


def cells(row: Row) -> list[str]:
    """Returns the cells of a row that do not depend on the architecture."""
    names = ("op", "kernel", "network", "shape", "dtype", "layout", "tile", "warps")
    return ["x".join(map(str, row[name])) if isinstance(row[name], list) else str(row[name]) for name in names]


def _used(of_archs: Sequence[Row]) -> list[str]:
    """Returns what a launch uses on each architecture; a value that all share is written once."""
    columns = [[row[name] for row in of_archs] for name in ("arch", "registers", "stack", "spills")]
    columns += [[max(row[name], default="") for row in of_archs] for name in ("loads", "stores")]
    return [" ".join(map(str, column if len(set(column)) > 1 else column[:1])) for column in columns]


def _markdown(table: Sequence[Row]) -> str:
    """Returns the table, a line per launch, the architectures side by side."""
    names = HEAD.split(", ")
    lines = [f"Triton {triton.__version__}, compiled without a GPU by `python -m tools.triton_aot`.", ""]
    lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    launches: dict[tuple[str, ...], list[Row]] = {}
    for row in table:
        launches.setdefault(tuple(cells(row)), []).append(row)
    lines += ["| " + " | ".join([*known, *_used(of_archs)]) + " |" for known, of_archs in launches.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.triton_aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities, 90 for 9.0")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--quick", action="store_true", help="a few shapes that reach every kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--json", action="store_true", help="print the rows instead of writing the table")
    arguments = parser.parse_args()

    table = rows(cases(arguments.arch, arguments.dtypes, arguments.quick), arguments.jobs)
    if arguments.json:
        json.dump(table, sys.stdout)
        return
    TABLE.write_text(_markdown(table))
    print(f"{len(table)} launches, {sum(row['spills'] > 0 for row in table)} with spills: {TABLE}")


if __name__ == "__main__":
    main()
