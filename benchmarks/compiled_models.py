"""Whole models by one line, ``torch.compile(model, backend="dd_kernels")``, beside eager PyTorch.

    python -m benchmarks.compiled_models                   the table, at widths that a small machine runs
    python -m benchmarks.compiled_models --full cifar10    one model at its public width
    python -m benchmarks.compiled_models --inductor --batch 1 8

Of each model: its norms and how many the fused kernel computes, the graphs that Dynamo captured and the seconds that it
took, the largest difference to float64 beside eager's, and the speed as the median of the ratios of paired calls. The
models are diffusers' by their public configurations, and blocks in the styles of other codebases
(``tests/compile/models.py``), all with random weights.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dd_kernels.compile import Report, dd_kernels
from tests.compile.models import STYLES, make

from .models import randomized

Inputs = tuple[Any, ...]
Built = tuple[nn.Module, Callable[[int], Inputs]]


class First(nn.Module):
    """A model of diffusers as a function that returns its first tensor."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, *inputs: Any) -> Tensor:
        """Returns the first tensor of the model's result."""
        result = self.model(*inputs, **self.options)
        while not isinstance(result, Tensor):
            result = result[0]
        return result


def _diffusers() -> Any:
    """Returns the module, whose types do not say that its models are modules of torch."""
    return importlib.import_module("diffusers")


def _cifar10(full: bool) -> Built:
    diffusers = _diffusers()

    width = 128 if full else 64
    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return First(model), lambda n: (torch.randn(n, 3, 32, 32), torch.tensor([3] * n))


def _conditional(full: bool, **options: Any) -> nn.Module:
    diffusers = _diffusers()

    width = 320 if full else 64
    widths = (width, 2 * width, 4 * width, 4 * width)
    sizes = {"block_out_channels": widths, "cross_attention_dim": 768 if full else 64, "attention_head_dim": 8}
    model: nn.Module = diffusers.UNet2DConditionModel(**{**sizes, **options})
    return model


def _sd(full: bool) -> Built:
    side, tokens = (64, 768) if full else (32, 64)
    return First(_conditional(full)), lambda n: (
        torch.randn(n, 4, side, side), torch.tensor([3] * n), torch.randn(n, 77, tokens)
    )  # fmt: skip


def _controlnet(full: bool) -> Built:
    diffusers = _diffusers()

    unet: Any = _conditional(full)
    model = diffusers.ControlNetModel.from_unet(unet)
    side, tokens = (64, 768) if full else (32, 64)
    return First(model), lambda n: (
        torch.randn(n, 4, side, side),
        torch.tensor([3] * n),
        torch.randn(n, 77, tokens),
        torch.randn(n, 3, 8 * side, 8 * side),
    )


def _motion(full: bool) -> Built:
    diffusers = _diffusers()

    unet: Any = _conditional(full)
    model = diffusers.UNetMotionModel.from_unet2d(unet)
    side, tokens = (64, 768) if full else (16, 64)
    return First(model), lambda n: (
        torch.randn(n, 4, 4, side, side), torch.tensor([3] * n), torch.randn(n, 77, tokens).repeat_interleave(4, 0)
    )  # fmt: skip


def _decoder(full: bool) -> Built:
    diffusers = _diffusers()

    width = 128 if full else 32
    names = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    model = diffusers.AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width), layers_per_block=2, **names
    )
    side = 64 if full else 32
    return First(model.decoder), lambda n: (torch.randn(n, 4, side, side),)


def _temporal(full: bool) -> Built:
    diffusers = _diffusers()

    width = 128 if full else 32
    names = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    model = diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(width, 2 * width, 4 * width, 4 * width), **names)
    return First(model.decoder, num_frames=2), lambda n: (torch.randn(2 * n, 4, 16, 16), torch.zeros(n, 2))


def _hunyuan(full: bool) -> Built:
    diffusers = _diffusers()

    width = 128 if full else 32
    model = diffusers.AutoencoderKLHunyuanVideo(block_out_channels=(width, 2 * width, 4 * width, 4 * width))
    return First(model.decoder), lambda n: (torch.randn(n, 16, 2, 8, 8),)


def _ltx(full: bool) -> Built:
    diffusers = _diffusers()

    model = diffusers.AutoencoderKLLTXVideo() if full else diffusers.AutoencoderKLLTXVideo(
        block_out_channels=(32, 64, 64, 64), decoder_block_out_channels=(32, 64, 64, 64)
    )  # fmt: skip
    return First(model.decoder), lambda n: (torch.randn(n, 128, 2, 8, 8),)


def _style(name: str) -> Callable[[bool], Built]:
    def build(full: bool) -> Built:
        channels = 128 if full else 64
        model, _, _ = make(name, blocks=4, channels=channels)
        return model, lambda n: make(name, blocks=0, batch=n, channels=channels, side=32)[1:]

    return build


MODELS: dict[str, Callable[[bool], Built]] = {
    "cifar10": _cifar10,
    "sd 1.5": _sd,
    "controlnet": _controlnet,
    "motion": _motion,
    "vae decoder": _decoder,
    "temporal decoder": _temporal,
    "hunyuan decoder": _hunyuan,
    "ltx decoder": _ltx,
    **{name: _style(name) for name in STYLES},
}


def seconds(call: Callable[[], object]) -> float:
    """Returns the time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def speedups(calls: Sequence[Callable[[], object]], at_least: float) -> list[float]:
    """Returns how much faster each call is than the first: medians of the ratios of calls made one after another."""
    for call in calls:
        call()
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < 5 or time.perf_counter() - started < at_least:
        rounds.append([seconds(call) for call in calls])
    return [statistics.median(row[0] / row[i] for row in rounds) for i in range(1, len(calls))]


def to_float64(value: Any) -> Any:
    """Returns floating inputs in float64."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def row(name: str, batches: Iterable[int], full: bool, inductor: bool, at_least: float) -> list[str]:
    """Returns the table's cells of one model."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, inputs_of = MODELS[name](full)
    randomized(model).eval()
    report = Report()
    options: dict[str, Any] = {"report": report}
    fast = torch.compile(model, backend=dd_kernels, options=options, dynamic=False)
    compiled = [torch.compile(model, dynamic=False)] if inductor else []
    cells, errors, capture = [], "", 0.0
    with torch.no_grad():
        for batch in batches:
            inputs = inputs_of(batch)
            first = seconds(partial(fast, *inputs))
            if not errors:
                capture = first
                exact = copy.deepcopy(model).double()(*map(to_float64, inputs))
                largest = [(f(*inputs) - exact).abs().max().item() for f in (fast, model)]
                errors = " / ".join(f"{error:.1e}" for error in largest)
            functions: list[Callable[..., Any]] = [model, fast, *compiled]
            calls = [partial(f, *inputs) for f in functions]
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in speedups(calls, at_least)))
    graphs = len(report.graphs) // len(cells)
    norms = report.norms
    activations = sum(bool(norm.fused) for norm in norms)
    kept = sum(norm.kept is not None for norm in norms)
    return [name, f"{len(norms)} / {activations} / {kept}", str(graphs), f"{capture:.1f}", errors, *cells]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all without any")
    parser.add_argument("--full", action="store_true", help="public widths")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--inductor", action="store_true", help="torch.compile's default backend, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per model and batch")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.models if name not in MODELS]
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    torch.set_num_threads(arguments.threads)
    speeds = [f"x eager at batch {n}" + " / of torch.compile" * arguments.inductor for n in arguments.batch]
    head = ["model", "norms / fused / PyTorch's", "graphs", "capture s", "error ours / eager", *speeds]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name in arguments.models or MODELS:
        cells = row(name, arguments.batch, arguments.full, arguments.inductor, arguments.seconds)
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
