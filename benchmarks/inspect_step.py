"""Inspects a step: kernel launches, the shares of GroupNorm+SiLU and of the sampler, memory, FLOPs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .harness import Row
from .models import Denoiser

REPEATS = 3
# Matches the kernels and operators of GroupNorm and SiLU. On a GPU our CUDA kernels are found by the type of their
# argument, Triton's and PyTorch's kernels by their names; on a CPU all of them are operators.
NORM = re.compile(
    r"group_?norm|silu|rowwisemoments|computefusedparams|norm(forward|backward)"
    r"|^_(whole_groups|partial_moments|combine_moments|apply|partial_sums|combine_sums|parameter_gradients)",
    re.IGNORECASE,
)


def _events(run: Callable[[], object], device: str) -> list[tuple[str, float, int]]:
    """Returns (name, microseconds, calls) over REPEATS runs, of a GPU's kernels or a CPU's operators.

    The time of an operator leaves out the operators that it calls.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    run()
    with profile(activities=activities) as profiler:
        for _ in range(REPEATS):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
    found = []
    for event in profiler.key_averages():
        on_device = "CUDA" in str(getattr(event, "device_type", ""))
        if device == "cuda" and on_device and event.self_device_time_total > 0:
            found.append((event.key, event.self_device_time_total, event.count))
        elif device == "cpu" and event.self_cpu_time_total > 0 and "::" in event.key:
            found.append((event.key, event.self_cpu_time_total, event.count))
    return found


# The kinds of layers by the operators of a CPU; the first kind that matches has the operator.
KINDS = {
    "convolutions": re.compile(r"conv", re.IGNORECASE),
    "norms and activations": NORM,
    "attention": re.compile(r"attention|softmax|bmm", re.IGNORECASE),
    "linear": re.compile(r"addmm|::mm\b|linear|gemm", re.IGNORECASE),
    "copies and layouts": re.compile(r"copy_|contiguous|clone|::to\b|reorder|::cat\b", re.IGNORECASE),
}


def kinds(run: Callable[[], object]) -> Row:
    """Returns the shares of a call's time on a CPU by kind of layer."""
    with torch.no_grad():
        events = _events(run, "cpu")
    found: dict[str, float] = {}
    for name, us, _ in events:
        kind = next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "rest")
        found[kind] = found.get(kind, 0.0) + us
    total = sum(found.values())
    return {kind: us / total for kind, us in sorted(found.items(), key=lambda pair: -pair[1])}


def _copies(name: str) -> bool:
    """Returns whether a GPU's event is a copy or a fill, not a kernel."""
    return name.startswith(("Memcpy", "Memset"))


def breakdown(denoiser: Denoiser, x: Tensor, device: str) -> Row:
    """Returns the launches of a step (None on a CPU), and the shares of its time: group_norm_silu, sampler, rest."""
    with torch.no_grad():
        out = denoiser.model(x).clone()
        model = _events(lambda: denoiser.model(x), device)
        update = _events(lambda: denoiser.update(x, out), device)
    norm = sum(us for name, us, _ in model if NORM.search(name))
    sampler = sum(us for _, us, _ in update)
    total = sampler + sum(us for _, us, _ in model)
    if total == 0:
        raise RuntimeError("the profiler saw nothing")
    launches = sum(calls for name, _, calls in [*model, *update] if not _copies(name))
    return {
        "launches": round(launches / REPEATS) if device == "cuda" else None,
        "share": {
            "group_norm_silu": norm / total,
            "sampler": sampler / total,
            "rest": (total - norm - sampler) / total,
        },
    }


def peak_bytes(run: Callable[[], object], cuda: Any = torch.cuda) -> int:
    """Returns the peak of a GPU's memory during a call, less what was allocated before it."""
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    run()
    cuda.synchronize()
    return int(cuda.max_memory_allocated()) - before


def saved_bytes(run: Callable[[], object], parameters: set[int]) -> int:
    """Returns the bytes that a forward pass keeps for its backward pass.

    Each storage counts once; those at the addresses ``parameters`` do not count.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result  # kept until here, because memory that is freed could be counted twice
    return sum(kept.values())


def flops(run: Callable[[], object]) -> int:
    """Counts the floating-point operations of convolutions and matrix products; one multiply-add is two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
