"""Whole models by one line, ``dd.accelerate(model)``, beside eager PyTorch.

    python -m benchmarks.compiled_models                   the table, at widths that a small machine runs
    python -m benchmarks.compiled_models --full cifar10    one model at its public width
    python -m benchmarks.compiled_models --bfloat16        also by dd.accelerate(model, dtype="bfloat16")
    python -m benchmarks.compiled_models --inductor        also torch.compile's default, whose compiling takes minutes
    python -m benchmarks.compiled_models "vae 512"         the decoder of Stable Diffusion to 512 x 512, as it is used

Of each model: its norms, how many are computed with their activation, which PyTorch computes and why, the graphs that
Dynamo captured and the seconds that it took, the largest difference to float64 beside eager's, and the speed as the
median of the ratios of paired calls, or why a model or a compiler fails. The models are diffusers' by their public
configurations, and blocks in the styles of other codebases (``tests/compile/models.py``), all with random weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dd_kernels as dd
from dd_kernels.compile import Report
from dd_kernels.ops.cuda_graph import first_line

from .models import randomized
from .public_models import LARGE, MODELS

ACTIVATIONS = {"silu", "mish", "gelu", "gelu_tanh"}
LONG = 60.0  # seconds of timing after which three rounds are enough, in place of five


def seconds(call: Callable[[], object]) -> float:
    """Returns the time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def speedups(calls: Sequence[Callable[[], object]], at_least: float) -> list[float]:
    """Returns how much faster each call is than the first: medians of the ratios of calls made one after another.

    All were called before: what the first call alone does takes no part.
    """
    rounds: list[list[float]] = []
    started, passed = time.perf_counter(), 0.0
    while passed < at_least or len(rounds) < (5 if passed < LONG else 3):
        rounds.append([seconds(call) for call in calls])
        passed = time.perf_counter() - started
    return [statistics.median(row[0] / row[i] for row in rounds) for i in range(1, len(calls))]


def to_float64(value: Any) -> Any:
    """Returns floating inputs in float64."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def why_not(report: Report) -> str:
    """Returns how many norms PyTorch computes, and what was left beside a norm, each with the reason."""
    reasons = Counter(norm.kept for norm in report.norms if norm.kept is not None)
    reasons.update(reason for norm in report.norms for reason in norm.left)
    return "; ".join(f"{count}: {reason}" for reason, count in reasons.items()) or "-"


def failed(error: Exception) -> str:
    """Returns an error as a cell of the table."""
    return f"fails: {type(error).__name__}: {first_line(error)}".replace("|", "/")


def failure(function: Callable[..., Any], inputs: Sequence[Any]) -> str | None:
    """Returns why a call fails, or None."""
    try:
        function(*inputs)
    except Exception as error:
        return failed(error)
    return None


def speeds(model: nn.Module, others: Sequence[Callable[..., Any]], inputs: Sequence[Any], at_least: float) -> str:
    """Returns how much faster than the model each other is, or why it fails."""
    model(*inputs)
    failures = [failure(other, inputs) for other in others]
    sound = [other for other, reason in zip(others, failures, strict=True) if reason is None]
    functions: list[Callable[..., Any]] = [model, *sound]
    ratios = iter(speedups([partial(f, *inputs) for f in functions], at_least))
    return " / ".join(reason or f"{next(ratios):.2f}" for reason in failures)


def row(
    name: str, batches: Iterable[int], full: bool, inductor: bool, at_least: float, bfloat16: bool = False
) -> list[str]:
    """Returns the table's cells of one model."""
    torch.manual_seed(0)
    model, inputs_of = LARGE[name]() if name in LARGE else MODELS[name](full)
    randomized(model).eval()
    fast, found = dd.accelerate(copy.deepcopy(model))
    report = found.networks[0]
    ours: list[nn.Module] = [fast]
    if bfloat16:
        ours.append(dd.accelerate(copy.deepcopy(model), dtype="bfloat16")[0])
    others: list[Callable[..., Any]] = list(ours)
    if inductor:
        torch._dynamo.reset()  # or torch.compile's models of earlier rows count towards its limit of recompilations
        others.append(torch.compile(model, dynamic=False))
    cells, errors, capture = [], "", 0.0
    with torch.no_grad():
        for batch in batches:
            inputs = inputs_of(batch)
            if not errors:
                capture = seconds(partial(fast, *inputs))
                exact = copy.deepcopy(model).double()(*map(to_float64, inputs))
                largest = [(f(*inputs) - exact).abs().max().item() for f in [*ours, model]]
                errors = " / ".join(f"{error:.1e}" for error in largest)
            cells.append(speeds(model, others, inputs, at_least))
    graphs = len(report.graphs) // len(cells)
    norms = report.norms
    active = sum(bool(ACTIVATIONS & set(norm.fused)) for norm in norms)
    return [name, f"{len(norms)} / {active}", why_not(report), str(graphs), f"{capture:.1f}", errors, *cells]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"of {', '.join([*MODELS, *LARGE])}; without any, all but {', '.join(LARGE)}",
    )
    parser.add_argument("--full", action="store_true", help="public widths")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--bfloat16", action="store_true", help="products of bfloat16, too")
    parser.add_argument("--inductor", action="store_true", help="torch.compile's default backend, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per model and batch")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.models if name not in MODELS and name not in LARGE]
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join([*MODELS, *LARGE])}")
    torch.set_num_threads(arguments.threads)
    also = " / in bfloat16" * arguments.bfloat16
    titles = [f"x eager at batch {n}{also}" + " / of torch.compile" * arguments.inductor for n in arguments.batch]
    head = [
        "model",
        "norms / with activation",
        "PyTorch's norms and what is left, and why",
        "graphs",
        "capture s",
        f"error ours{also} / eager",
        *titles,
    ]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name in arguments.models or MODELS:
        batches = [1] if name in LARGE else arguments.batch
        try:
            cells = row(name, batches, arguments.full, arguments.inductor, arguments.seconds, arguments.bfloat16)
        except Exception as error:
            cells = [name, failed(error), *["-"] * (len(head) - 2)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
