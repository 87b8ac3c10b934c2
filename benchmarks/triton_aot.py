"""What the Triton kernels compile to, with no GPU: registers, stack, spills and access width per shape.

    python -m benchmarks.triton_aot                  the table, into benchmarks/results/triton_aot.md and .json
    python -m benchmarks.triton_aot --quick --arch 90 --output -

The ops' own launch code runs on meta tensors of the shapes of the cifar10 and Stable Diffusion networks,
before a driver that compiles for the GPU it is told and launches nothing: what is compiled is what a user runs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver, jit

_BINARIES = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_RESULTS = pathlib.Path(__file__).parent / "results" / "triton_aot"

# (network, C, side, batch); every GroupNorm has 32 groups.
SHAPES = (
    ("cifar10", 128, 32, 256),
    ("cifar10", 384, 32, 256),
    ("cifar10", 512, 16, 256),
    ("cifar10", 256, 8, 256),
    ("cifar10", 512, 4, 256),
    ("sd unet", 320, 64, 2),
    ("sd unet", 640, 32, 2),
    ("sd unet", 1920, 32, 2),
    ("sd unet", 1280, 16, 2),
    ("sd unet", 2560, 8, 2),
    ("sd vae", 512, 64, 1),
    ("sd vae", 256, 256, 1),
    ("sd vae", 128, 512, 1),
)
QUICK = (SHAPES[0], SHAPES[5])
STATES = (("cifar10", 3, 32, 256), ("sd unet", 4, 64, 2))  # what is denoised


class CompileOnly(DriverBase):
    """Stands for a CUDA GPU of compute capability ``arch`` (90 is 9.0) that cannot run anything."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # triton keeps the kernels of each device apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError("nothing is launched")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch that was compiled and not run."""

    name: str
    kernel: object  # triton's CompiledKernel
    options: dict


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[Launch]]:
    """Inside, Triton launches compile for ``arch`` and are listed instead of run."""
    launches: list[Launch] = []
    run, before = jit.JITFunction.run, driver._active

    def compile_and_list(self: jit.JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(self.fn.__name__, kernel, options))
        return kernel

    driver.set_active(CompileOnly(arch))
    jit.JITFunction.run = compile_and_list
    try:
        yield launches
    finally:
        jit.JITFunction.run, driver._active = run, before


def specialisations(calls: Sequence[Callable[[], None]], arch: int = 90) -> set[str]:
    """The kernels that the calls would have compiled for ``arch``, without compiling them."""
    found: set[str] = set()

    def note(*, key: str, fn: jit.JitFunctionInfo, **_: object) -> bool:
        found.add(f"{fn.name} {key}")
        return True  # as if it were done

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        with compile_only(arch):
            for call in calls:
                call()
    finally:
        knobs.runtime.jit_cache_hook = before
    return found


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one kernel takes: registers, local memory (stack bytes, spill instructions), access widths in bits."""

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    loads: dict[int, int]  # width: instructions
    stores: dict[int, int]


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(_BINARIES / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _widths(opcodes: list[str], stem: str) -> dict[int, int]:
    widths = collections.Counter()
    for opcode in opcodes:
        if opcode.startswith(stem):
            bits = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", opcode)
            widths[int(bits.group(1)) if bits else 32] += 1
    return dict(sorted(widths.items()))


def usage(kernel: object) -> Usage:
    """Reads the cubin of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", resources).groups())
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    spills = sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
    return Usage(
        registers,
        stack,
        spills,
        kernel.metadata.shared,
        len(opcodes),
        _widths(opcodes, "LDG"),
        _widths(opcodes, "STG"),
    )


def _empty(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if last else x


def group_norm(channels: int, side: int, batch: int, dtype: torch.dtype, last: bool, backward: bool) -> None:
    """GroupNorm+SiLU as the U-Nets call it: 32 groups, weight, bias and the time embedding's shift."""
    from dd_kernels.ops.group_norm_silu import triton as op

    x = _empty(batch, channels, side, side, dtype=dtype, last=last)
    per_channel, per_sample, statistics = _empty(channels), _empty(batch, channels), _empty(batch, 32)
    options = (32, per_channel, per_channel, 1e-5, per_sample, None, None, True)
    if backward:
        gradients = (x, per_channel, per_channel, per_sample, None, None)
        op.group_norm_silu_backward(x, x, statistics, statistics, *options, *gradients)
    else:
        op.group_norm_silu(x, *options, x, statistics, statistics)


def reverse_step(channels: int, side: int, batch: int, dtype: torch.dtype, last: bool, guided: bool) -> None:
    """A DDPM step with its noise, or a guided DDIM step: float32 state, model output of ``dtype``."""
    from dd_kernels.ops.reverse_step import triton as op

    x = _empty(batch, channels, side, side, last=last)
    out = _empty(batch, channels, side, side, dtype=dtype, last=last)
    integers = _empty(50, dtype=torch.int64)
    key = None if guided else integers[:3]
    arguments = (_empty(50, 10), integers, integers[:1], key, x, None)
    op.reverse_step(x, out, None, out if guided else None, 7.5, None, None, *arguments)


def q_sample(channels: int, side: int, batch: int, dtype: torch.dtype, last: bool) -> None:
    """A training input and its noise."""
    from dd_kernels.ops.q_sample import triton as op

    x = _empty(batch, channels, side, side, dtype=dtype, last=last)
    integers = _empty(batch, dtype=torch.int64)
    op.q_sample(x, None, _empty(1000, 2), integers, _empty(3, dtype=torch.int64), x, x)


def randn(channels: int, side: int, batch: int, dtype: torch.dtype, last: bool) -> None:
    """x_T."""
    from dd_kernels.ops.randn import triton as op

    z = _empty(batch, channels, side, side, dtype=dtype, last=last)
    op.randn(z, _empty(3, dtype=torch.int64), 0)


OPS = {
    "group_norm_silu": (lambda *shape: group_norm(*shape, backward=False), SHAPES),
    "group_norm_silu_backward": (lambda *shape: group_norm(*shape, backward=True), SHAPES),
    "reverse_step": (lambda *shape: reverse_step(*shape, guided=False), STATES),
    "reverse_step guided": (lambda *shape: reverse_step(*shape, guided=True), STATES),
    "q_sample": (q_sample, STATES),
    "randn": (randn, STATES),
}


def vector_bits(channels: int, side: int, itemsize: int, last: bool, options: dict) -> int:
    """The widest access that the layout of a tile allows, at most 128 bits."""
    run = options.get("BLOCK_CHANNELS", channels) if last else side * side
    return 8 * math.gcd(16, run * itemsize, channels * itemsize if last else 0)


def rows(arch: int, dtypes: list[str], quick: bool) -> Iterator[dict]:
    """A row per kernel of every op, shape, dtype and layout."""
    for op, (call, shapes) in OPS.items():
        for network, channels, side, batch in (s for s in shapes if not quick or s in QUICK + STATES[1:]):
            for dtype_name in dtypes:
                for last in (False, True):
                    dtype = getattr(torch, dtype_name)
                    with compile_only(arch) as launches:
                        call(channels, side, batch, dtype, last)
                    for launch in launches:
                        yield {
                            "op": op,
                            "kernel": launch.name,
                            "network": network,
                            "shape": [batch, channels, side, side],
                            "dtype": dtype_name,
                            "layout": "NHWC" if last else "NCHW",
                            "arch": arch,
                            "warps": launch.options["num_warps"],
                            "allowed_bits": vector_bits(channels, side, dtype.itemsize, last, launch.options),
                            **dataclasses.asdict(usage(launch.kernel)),
                        }


def _markdown(table: list[dict]) -> str:
    head = "op, kernel, network, shape, dtype, layout, sm, warps, registers, stack, spills, load bits, store bits"
    lines = [f"Triton {triton.__version__}, compiled without a GPU by `python -m benchmarks.triton_aot`.", ""]
    lines += ["| " + " | ".join(head.split(", ")) + " |", "|" + "---|" * len(head.split(", "))]
    for row in table:
        shape = "x".join(map(str, row["shape"]))
        cells = [row["op"], row["kernel"], row["network"], shape, row["dtype"], row["layout"], row["arch"]]
        cells += [row["warps"], row["registers"], row["stack"], row["spills"]]
        cells += [max(row["loads"], default=""), max(row["stores"], default="")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, 90 for 9.0")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--quick", action="store_true", help="a few shapes that reach every kernel")
    parser.add_argument("--output", default=str(_RESULTS), help="where .md and .json go; - prints the JSON")
    arguments = parser.parse_args()

    table = [row for arch in arguments.arch for row in rows(arch, arguments.dtypes, arguments.quick)]
    if arguments.output == "-":
        json.dump(table, sys.stdout)
        return
    output = pathlib.Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(
        json.dumps({"triton": triton.__version__, "kernels": table}, indent=1) + "\n"
    )
    output.with_suffix(".md").write_text(_markdown(table))
    print(f"{len(table)} kernels, {sum(row['spills'] > 0 for row in table)} with spills: {output}.md")


if __name__ == "__main__":
    main()
