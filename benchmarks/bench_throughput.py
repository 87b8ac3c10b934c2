"""Whole sampling steps (model and update) and whole runs of :func:`dd_kernels.sample`.

Images/s of a run of S steps follow from the time of one step ("extrapolated" in the tables); a row with ``steps`` is
a whole run. The bytes counted are those of the weights, and of the image in and out: no step moves fewer. Steps are
timed as a program calls them; "CUDA graph" is our step captured and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dd_kernels as dd
from dd_kernels.nn import CONFIGS

from . import inspect_step, machine, models
from .bench_reverse_step import SCHEDULE
from .harness import Case, Plan, Row, Target, dtype_name, reason
from .models import Denoiser
from .timing import GpuClock, UnusableError, captured

Step = Callable[[Tensor], object]
Peers = dict[str, Step | str]


@dataclass(frozen=True)
class Run:
    """A model, a sampler and a batch.

    Attributes:
        compile: modes of torch.compile to measure, which takes minutes.
        whole: number of steps of a whole run, which is timed instead of one step.
        size: side of the images or latents, where it is not the configuration's.
        reference: measures our reference too.
        profile: counts launches and shares too.
    """

    model: str
    sampler: str
    batch: int
    dtype: torch.dtype = torch.float32
    compile: tuple[str, ...] = ()
    whole: int | None = None
    size: int | None = None
    reference: bool = False
    profile: bool = False

    def __str__(self) -> str:
        steps = f" whole run of {self.whole}" if self.whole else ""
        modes = f" {' '.join(self.compile)}" if self.compile else ""
        return f"{self.model} {self.sampler}{steps}{modes} {self.batch} {dtype_name(self.dtype)}"


BF16 = torch.bfloat16
RUNS = {
    "cuda": [
        *(Run("cifar10", "ddim", n, BF16, reference=n == 256, profile=n in (1, 256)) for n in (256, 1, 64, 16, 512)),
        Run("cifar10", "ddpm", 256, BF16),
        Run("cifar10", "ddpm", 512, BF16),
        Run("cifar10", "ddim", 512, BF16, whole=10),
        *(Run("imagenet64", "ddim", n, BF16, profile=n == 64) for n in (64, 1, 16, 256)),
        *(Run("stable diffusion", "ddim", n, BF16, profile=n == 16) for n in (16, 1, 64)),
        *(Run("digits", sampler, 512) for sampler in ("ddim", "ddpm")),
        *(Run("digits", "ddim", n) for n in (1, 64)),
        Run("imagenet64", "ddpm", 64, BF16),
        Run("stable diffusion", "ddpm", 16, BF16),
        Run("cifar10", "ddim", 256, reference=True),
        Run("imagenet64", "ddim", 512, BF16),
        *(Run("stable diffusion", "ddim", n, BF16) for n in (256, 512)),
        Run("cifar10", "ddim", 256, BF16, compile=("default",)),
        Run("cifar10", "ddim", 1, BF16, compile=("reduce-overhead",)),
        Run("imagenet64", "ddim", 16, BF16, compile=("reduce-overhead",)),
        Run("cifar10", "ddim", 256, BF16, compile=("max-autotune",)),
    ],
    "cpu": [
        *(Run("digits", sampler, 64, reference=True, profile=True) for sampler in ("ddim", "ddpm")),
        *(Run("cifar10", sampler, 1, reference=True, profile=True) for sampler in ("ddim", "ddpm")),
        Run("digits", "ddim", 256),
        Run("digits", "ddim", 64, whole=10),
        Run("cifar10", "ddim", 16),
        Run("stable diffusion", "ddim", 1, size=32),
        Run("imagenet64", "ddim", 1),
        Run("cifar10", "ddim", 1, compile=("default",)),
    ],
}


def _implementations(target: Target, run: Run) -> dict[str, Denoiser | str]:
    """Returns the step of every implementation, or why one is missing."""
    if run.model == "stable diffusion":
        stable = models.stable_diffusion(run.sampler, run.batch, target, run.dtype)
        if isinstance(stable, str):
            raise RuntimeError(stable)
        return dict(stable)
    model = models.unet(run.model, target, run.dtype)
    of = (model, run.sampler, run.batch, target.device)
    found: dict[str, Denoiser | str] = {"dd_kernels": models.ours(*of), "eager": models.eager(*of)}
    found["diffusers"] = models.diffusers_unet(*of)
    if run.reference:
        found["reference"] = models.ours(*of, backend="reference")
    if len(machine.kernels(target.kind)) > 1 and not run.compile:
        found |= {name: models.ours(*of, backend=name) for name in machine.kernels(target.kind)[1:]}
    return found


def _compiled(found: dict[str, Denoiser | str], modes: tuple[str, ...]) -> dict[str, Denoiser | str]:
    """Returns ours, and ours and a peer under torch.compile; the peer is diffusers, or eager where that is missing."""
    torch._dynamo.reset()
    peer = "diffusers" if isinstance(found.get("diffusers"), Denoiser) else "eager"
    result: dict[str, Denoiser | str] = {"dd_kernels": found["dd_kernels"]}
    for mode in modes:
        for name in (peer, "dd_kernels"):
            suffix = "torch.compile" if mode == "default" else f"torch.compile {mode}"
            step = found[name]
            assert isinstance(step, Denoiser)
            result[f"{name}, {suffix}"] = models.compiled(step, mode)
    return result


def _graph(target: Target, step: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], object] | str:
    """Returns our step captured as a CUDA graph, which always reads the tensor it was captured with; or why not."""
    clock = target.clock
    if not isinstance(clock, GpuClock) or not clock.graphs:
        return "no CUDA graphs in this run"
    try:
        for _ in range(2):
            step(x)
        replay = captured(lambda: step(x), clock.cuda)
    except Exception as error:
        if not clock.usable():
            raise UnusableError(f"not captured: {reason(error)}") from error
        return f"not captured: {reason(error)}"
    return lambda _: replay()


def _inspect(target: Target, run: Run, found: dict[str, Denoiser | str], x: Tensor) -> Row:
    """Returns launches, shares and peak memory of every implementation that is not compiled."""
    device = torch.device(target.device).type
    result: dict[str, Row] = {}
    for name, denoiser in found.items():
        if isinstance(denoiser, str) or denoiser.backend != "auto":
            continue
        try:
            one = inspect_step.breakdown(denoiser, x, device) if run.profile else {}
            if device == "cuda":
                one["peak_bytes"] = inspect_step.peak_bytes(partial(denoiser, x))
        except Exception as error:
            one = {"not_measured": reason(error)}
        result[name] = one
    return {"breakdown": {name: one for name, one in result.items() if one}}


def _images(target: Target, run: Run) -> Tensor:
    """Returns random images or latents."""
    if run.model == "stable diffusion":
        channels, side = 4, run.size or models.SD_UNET["sample_size"]
    else:
        config: dict[str, Any] = CONFIGS[run.model]
        channels, side = config["in_channels"], config["image_size"]
    return torch.randn(run.batch, channels, side, side, device=target.device)


def _case(target: Target, run: Run, x: Tensor, module: nn.Module, ours: Step, peers: Peers, **options: Any) -> Case:
    """Returns the case of ``ours`` called with images ``x``: one step with ``module``, or a whole run of ``steps``."""
    steps = options.get("extra", {}).get("steps", 1)
    moved = steps * (models.parameter_bytes(module) + 2 * x.nbytes)
    return Case(
        "sample",
        f"{run.model} {run.sampler}",
        x.shape,
        ours,
        [(x,)],
        moved,
        peers,
        dtype_name(run.dtype),
        "channels_last",
        target.device,
        graph=False,
        **options,
    )


def _step_case(target: Target, run: Run) -> Case:
    """Returns the case of one step."""
    found = _implementations(target, run)
    if run.compile:
        found = _compiled(found, run.compile)
    x = _images(target, run)
    ours = found["dd_kernels"]
    assert isinstance(ours, Denoiser)
    peers: Peers = dict(list(found.items())[1:])
    if target.kind == "cuda" and not run.compile:
        peers["dd_kernels, CUDA graph"] = _graph(target, ours, x)
    inspect = None if run.compile else lambda: _inspect(target, run, found, x)
    return _case(target, run, x, ours.module, ours, peers, inspect=inspect)


def _whole_case(target: Target, run: Run) -> Case:
    """Returns the case of ``dd.sample`` from x_T to x_0, beside the loop of diffusers' pipelines."""
    model = models.unet(run.model, target, run.dtype)
    schedule, steps = SCHEDULE, run.whole or 1
    table = dd.ddim(schedule, steps=steps) if run.sampler == "ddim" else dd.ddpm(schedule, steps=steps)
    y = models.labels(model, run.batch, target.device)
    x_T = _images(target, run)
    kwargs = {} if y is None else {"y": y}

    def ours(x: Tensor) -> Tensor:
        return dd.sample(model, x, table, seed=0, model_kwargs=kwargs)

    peers: Peers = {
        "diffusers": _pipeline(models.diffusers_unet(model, run.sampler, run.batch, target.device), run, target)
    }
    return _case(target, run, x_T, model, ours, peers, extra={"steps": steps})


def _pipeline(theirs: Denoiser | str, run: Run, target: Target) -> Callable[[Tensor], Tensor] | str:
    """Returns the loop of diffusers' DDPMPipeline and DDIMPipeline, or why it is missing."""
    if isinstance(theirs, str):
        return theirs
    scheduler = models.scheduler_of(run.sampler, target.device)
    scheduler.set_timesteps(run.whole, device=target.device)
    module: Any = theirs.module
    classes = module.config.num_class_embeds
    y = {} if classes is None else {"class_labels": torch.arange(run.batch, device=target.device) % classes}

    def sample(x: Tensor) -> Tensor:
        for t in scheduler.timesteps:
            x = scheduler.step(module(x.to(module.dtype), t, **y).sample, t, x).prev_sample
        return x

    return sample


def plans(target: Target) -> list[Plan]:
    """Returns a plan for every run of the device, on a CPU with all its threads."""
    threads = machine.THREADS[-1] if target.kind == "cpu" else None
    return [
        Plan(
            f"sample {run}",
            partial(_whole_case if run.whole else _step_case, target, run),
            threads,
            "compiled" if run.compile else "end_to_end",
            tunes="max-autotune" in run.compile,
        )
        for run in RUNS[target.kind]
    ]


def test_throughput(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)
