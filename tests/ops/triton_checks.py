"""What a process where Triton compiles, and does not interpret, can tell with no GPU; run by test_triton.py."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from functools import partial

import torch
import torch.utils._triton
import triton
import triton.language as tl
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from unrun import unrun

import dd_kernels as dd
from dd_kernels import backend as backends
from dd_kernels.nn import UNet
from dd_kernels.ops import triton_common
from dd_kernels.ops.activation import Activation
from dd_kernels.ops.group_norm_silu import triton as gn
from dd_kernels.ops.group_norm_silu import triton_activations
from dd_kernels.ops.reverse_step import triton as step_op
from dd_kernels.ops.reverse_step.op import Arguments
from tools.cubin import usages
from tools.triton_aot import cases, cells, group_norm, listed, q_sample, randn
from tools.triton_compile import compile_only, specialisations


def _steps_and_seeds(batch: int, step: int, seed: int, scale: float) -> None:
    """A step of a loop: the row is a view anywhere in memory, guidance an int or a float."""
    x = torch.empty(batch, 3, 32, 32)
    key = torch.tensor([0, seed, batch, step])[1:]
    row = torch.arange(50)[step : step + 1]
    rows, timesteps = torch.zeros(50, 12), torch.arange(50)
    step_op.reverse_step(Arguments(x, x, None, x, scale, None, None, rows, timesteps, row, key, x, None))


def recompiles() -> dict[str, int]:
    """Returns how many kernels a family of calls compiles that differ in values, batch size or table length."""
    dtype = torch.bfloat16
    families = {
        "reverse_step": [lambda i=i: _steps_and_seeds(i, 7 * i % 50, 3**i, i) for i in range(1, 8)],
        "q_sample": [lambda n=n: q_sample(3, 32, n, dtype, False) for n in range(1, 9)],
        "randn": [lambda n=n: randn(3, 32, n, dtype, False) for n in range(1, 9)],
        "group_norm_silu": [lambda n=n: group_norm(128, 32, n, dtype, True, False) for n in range(1, 9)],
        "group_norm_silu split": [lambda n=n: group_norm(128, 256, n, dtype, True, False) for n in range(1, 9)],
        "group_norm_silu sides": [lambda s=s: group_norm(128, s, 2, dtype, True, False) for s in (132, 256, 300, 512)],
        "group_norm_silu_backward": [lambda n=n: group_norm(128, 32, n, dtype, False, True) for n in range(1, 9)],
        "group_norm_silu_backward split": [
            lambda n=n: group_norm(128, 256, n, dtype, False, True) for n in range(1, 9)
        ],
    }
    return {name: len(specialisations(calls)) for name, calls in families.items()}


def alignments() -> int:
    """Kernels compiled for parameters and statistics that lie anywhere, as in a flat parameter buffer."""
    buffer = torch.empty(4096)
    x = torch.empty(2, 128, 8, 8)

    def call(first: int) -> None:
        weight, bias = buffer[first : first + 128], buffer[first + 129 : first + 257]
        mean, rstd = buffer[first + 300 : first + 364].view(2, 32), buffer[first + 401 : first + 465].view(2, 32)
        gn.group_norm_silu(x, 32, weight, bias, 1e-5, None, None, None, True, x, mean, rstd)

    return len(specialisations([lambda i=i: call(i) for i in range(5)]))


def activations() -> dict[str, dict[str, int]]:
    """Bytes of stack and spills of each kernel, by activation; of groups that one program holds, and of larger ones."""
    taken: dict[str, dict[str, int]] = {}
    small = torch.empty(128, device="meta")
    for activation in Activation:
        with compile_only(90) as launches:
            for side in (32, 256):
                x, rows = torch.empty(2, 128, side, side, device="meta"), torch.empty(2, 128, device="meta")
                statistics = torch.empty(2, 32, device="meta")
                options = (32, small, small, 1e-5, rows, rows, rows, activation)
                gn.group_norm_silu(x, *options, x, statistics, statistics)
                gn.group_norm_silu_backward(x, x, statistics, statistics, *options, x, small, small, rows, rows, rows)
        found = usages([launch.kernel.asm["cubin"] for launch in launches], 90)
        taken[activation.name.lower()] = {
            launch.name: usage.stack + usage.spills for launch, usage in zip(launches, found, strict=True)
        }
    return taken


def clips() -> list[str]:
    """The instructions of a step that take the smaller or the larger of two numbers."""
    with compile_only(90) as launches:
        _steps_and_seeds(2, 3, 1, 2.0)
    return sorted(set(re.findall(r"(?:min|max)[.\w]*\.f32", launches[0].kernel.asm["ptx"])))


def graph() -> list[str]:
    """The calls in the one graph of a loop's body on fake CUDA tensors."""
    torch.utils._triton.has_triton = lambda: True  # dynamo asks for a GPU before it knows a Triton kernel
    found: list[str] = []

    def keep(module: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        found.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module

    schedule = dd.linear_schedule(1000)
    table = dd.ddpm(schedule)

    def body(x, out, step, weight, seed):
        h = dd.group_norm_silu(out, 2, weight, weight, backend="triton")
        x = dd.reverse_step(x, h, table, step, seed=seed, backend="triton")
        x = x + dd.q_sample(x, step, schedule, seed=seed, backend="triton")
        return x + dd.randn(tuple(x.shape), seed=seed, device=x.device, backend="triton")

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 4, 8, 8, device="cuda:0")
        for one in (schedule, table):  # fake copies, since real ones need a device
            one._copies[x.device] = one.copy_to(x.device)
        integers = torch.empty(3, dtype=torch.int64, device="cuda:0")
        step = torch.empty(1, dtype=torch.int64, device="cuda:0")
        arguments = (x, x.to(torch.bfloat16), step, torch.empty(4, device="cuda:0"), integers)
        assert torch.compile(body, fullgraph=True, backend=keep)(*arguments).shape == x.shape
    return found


def training_graphs() -> dict[str, int]:
    """The Triton kernels in the one forward and the one backward graph of a residual block's training step."""
    torch.utils._triton.has_triton = lambda: True
    found: dict[str, int] = {}

    def count(name: str, nodes: Sequence[torch.fx.Node]) -> None:
        found[name] = sum("triton_kernel_wrapper" in str(node.target) for node in nodes)

    backends.choose = lambda *arguments: "triton"  # which would run on CPU tensors, were anything run
    block = UNet.from_config("digits").middle.resnets[0]
    x = torch.randn(2, block.conv1.in_channels, 4, 4, requires_grad=True)
    embedding = torch.randn(2, block.embedding.in_features)
    forward, backward = (unrun(partial(count, name)) for name in ("forward", "backward"))
    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    with compile_only(90):
        torch.compile(block, fullgraph=True, backend=backend)(x, embedding).sum().backward()
    return found


def huge() -> list[str]:
    """Samples of more than 2^31 elements compile with 64-bit offsets."""
    with compile_only(90) as launches:
        randn(2, 1 << 16, 1, torch.bfloat16, False)
        randn(2, 1 << 16, 1, torch.bfloat16, True)
        group_norm(32, 1 << 14, 1, torch.bfloat16, True, False)
    return [launch.name for launch in launches]


def table() -> list[list[str]]:
    """The table's lines as far as they are known without compiling."""
    return [cells(row) for case in cases(archs=[90]) for row in listed(case)]


def cubins() -> list[str]:
    """Digests of a few compiled kernels."""
    with compile_only(90) as launches:
        randn(3, 32, 4, torch.float32, False)
        q_sample(3, 32, 4, torch.float32, False)
    return [hashlib.sha256(launch.kernel.asm["cubin"]).hexdigest() for launch in launches]


def amd() -> dict[str, int]:
    """Returns how many vector registers each kernel spills on an AMD GPU; compiled without NVIDIA's instructions."""
    triton_common.ASSEMBLY = triton_activations.ASSEMBLY = tl.constexpr(False)
    spilled: dict[str, int] = {}
    for case in cases(archs=[90], dtypes=["bfloat16"], quick=True):
        with compile_only("gfx942") as launches:
            case.launch()
        for launch in launches:
            (count,) = re.findall(r"vgpr_spill_count: *(\d+)", launch.kernel.asm["amdgcn"])
            spilled[launch.name] = spilled.get(launch.name, 0) + int(count)
    return spilled


FUNCTIONS = (recompiles, alignments, activations, clips, graph, huge, table, cubins, amd, training_graphs)
CHECKS = {f.__name__: f for f in FUNCTIONS}

if __name__ == "__main__":
    print(triton.__version__, file=sys.stderr)
    json.dump({name: CHECKS[name]() for name in sys.argv[1:]}, sys.stdout)
