"""Builds whole models and sampling steps in every implementation that is compared, and profiles them.

All weights are random.

``dd_kernels`` is the model with our ops and our step. ``eager`` is the same model in plain PyTorch and shares its
weights. ``reference`` runs our reference. ``diffusers`` is its U-Net with the same weights, and its scheduler.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dd_kernels as dd
from dd_kernels.nn import GroupNormSiLU, UNet

from . import machine
from .bench_reverse_step import SEEDS, TABLES, eager_step
from .harness import Row, Target, reason
from .timing import GpuClock, UnusableError, captured

SD_UNET: dict[str, Any] = {  # Stable Diffusion 1.5's U-Net
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD_TOKENS = (77, 768)
ONLY_EPSILON = {"learn_variance": False}  # for imagenet64, since diffusers' DDIM takes no learned variance


M = TypeVar("M", bound=nn.Module)


@dataclass
class Denoiser:
    """A sampling step in two halves, model(x) and update(x, out), with all other arguments bound."""

    model: Callable[[Tensor], Tensor]
    update: Callable[[Tensor, Tensor], Tensor]
    module: nn.Module
    backend: str = "auto"

    def __call__(self, x: Tensor) -> Tensor:
        with dd.use_backend(self.backend):
            return self.update(x, self.model(x))


class EagerGroupNormSiLU(GroupNormSiLU):
    """The norm of our U-Net in plain PyTorch, computed in the dtype of its input."""

    def forward(
        self, x: Tensor, *, pre_shift: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Computes what GroupNormSiLU does."""
        if pre_shift is not None:
            x = x + pre_shift[:, :, None, None]
        y = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if scale is not None and shift is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(y) if self.activation == "silu" else y


def sharing(model: M) -> M:
    """Returns a copy of the model that shares its parameters."""
    return copy.deepcopy(model, {id(p): p for p in [*model.parameters(), *model.buffers()]})


def eager_copy(model: UNet) -> UNet:
    """Returns the model in plain PyTorch, sharing its weights."""
    copied = sharing(model)
    for module in copied.modules():
        if type(module) is GroupNormSiLU:
            module.__class__ = EagerGroupNormSiLU
    return copied


def accelerated(model: M) -> M:
    """Returns an accelerated copy of the model that shares its parameters."""
    copied = sharing(model)
    dd.accelerate(copied)
    return copied


def by_the_line(model: UNet, target: Target) -> UNet:
    """Returns the model as a user on a CPU runs it, accelerated; on a GPU the model itself.

    There a CUDA graph of the whole step is a row of its own.
    """
    return accelerated(model) if target.kind == "cpu" else model


def randomized(model: M) -> M:
    """Makes weights that start at 0 random, because products with zeros can run faster; returns the model."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def channels_last(model: M) -> M:
    """Stores the model's weights in channels_last; returns the model."""
    untyped: Any = model  # the types of nn.Module.to lack memory_format
    untyped.to(memory_format=torch.channels_last)
    return model


def unet(name: str, target: Target, dtype: torch.dtype, **options: Any) -> UNet:
    """Returns the named U-Net on the target, for inference."""
    if name == "imagenet64":
        options = {**ONLY_EPSILON, **options}
    with torch.device(target.device):
        model = UNet.from_config(name, **options)
    return channels_last(randomized(model).to(dtype)).eval()


def labels(model: UNet, batch: int, device: torch.device | str) -> Tensor | None:
    """Returns a class for each image where the model has classes, else None."""
    classes = model.config["num_classes"]
    return None if classes is None else torch.arange(batch, device=device) % classes


def ours(model: UNet, sampler: str, batch: int, device: torch.device | str, backend: str = "auto") -> Denoiser:
    """Returns a step as :func:`dd_kernels.sample` runs it, but into a new tensor."""
    table = TABLES[sampler]
    index = len(table) // 2
    t = table.on(torch.device(device)).timesteps[index].expand(batch)
    y = labels(model, batch, device)
    seed = SEEDS[sampler]
    return Denoiser(
        lambda x: model(x, t, y),
        lambda x, out: dd.reverse_step(x, out, table, index, seed=seed),
        model,
        backend,
    )


def eager(model: UNet, sampler: str, batch: int, device: torch.device | str) -> Denoiser:
    """Returns the same step in plain PyTorch."""
    plain, step = eager_copy(model), eager_step(TABLES[sampler], len(TABLES[sampler]) // 2)
    return Denoiser(ours(plain, sampler, batch, device).model, step, plain)


def compiled(denoiser: Denoiser, mode: str) -> Denoiser:
    """Returns the whole step under torch.compile."""
    step = torch.compile(lambda x: denoiser.update(x, denoiser.model(x)), mode=mode, dynamic=False)
    return Denoiser(step, lambda x, out: out, denoiser.module, denoiser.backend)


def compiled_beside(found: dict[str, Denoiser | str], modes: tuple[str, ...]) -> dict[str, Denoiser | str]:
    """Returns ours, and ours and a peer under torch.compile; the peer is diffusers, or eager where that is missing."""
    torch._dynamo.reset()
    peer = "diffusers" if isinstance(found.get("diffusers"), Denoiser) else "eager"
    result: dict[str, Denoiser | str] = {"dd_kernels": found["dd_kernels"]}
    for mode in modes:
        for name in (peer, "dd_kernels"):
            suffix = "torch.compile" if mode == "default" else f"torch.compile {mode}"
            step = found[name]
            assert isinstance(step, Denoiser)
            result[f"{name}, {suffix}"] = compiled(step, mode)
    return result


def scheduler_of(sampler: str, device: torch.device | str) -> Any:
    """Returns diffusers' scheduler with its timesteps on the device, as pipelines place them."""
    from diffusers import DDIMScheduler, DDPMScheduler

    scheduler: Any = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler]()
    scheduler.set_timesteps(len(TABLES[sampler]), device=device)
    return scheduler


def diffusers_unet(model: UNet, sampler: str, batch: int, device: torch.device | str) -> Denoiser | str:
    """Returns diffusers' U-Net with the same weights and its scheduler, called as its pipelines call them."""
    try:
        from dd_kernels.integrations.diffusers.unet import to_diffusers
    except ImportError:
        return "diffusers is not installed"
    with torch.device(device):  # on the host, drawing the first weights would take seconds
        theirs = to_diffusers(model)
    theirs = channels_last(theirs).eval()
    scheduler = scheduler_of(sampler, device)
    t = scheduler.timesteps[len(scheduler.timesteps) // 2]
    y, dtype = labels(model, batch, device), next(theirs.parameters()).dtype
    return Denoiser(
        lambda x: theirs(x.to(dtype), t, class_labels=y).sample,
        lambda x, out: scheduler.step(out, t, x).prev_sample,
        theirs,
    )


def stable_diffusion(sampler: str, batch: int, target: Target, dtype: torch.dtype) -> dict[str, Denoiser] | str:
    """Returns diffusers' U-Net of Stable Diffusion 1.5's size, as it is and accelerated."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        return "diffusers is not installed"
    device = target.device
    with torch.device(device):
        theirs: Any = UNet2DConditionModel(**SD_UNET)
    theirs = channels_last(theirs.to(dtype)).eval()
    fast = accelerated(theirs)
    tokens = torch.randn(batch, *SD_TOKENS, device=device).to(dtype)
    scheduler, table = scheduler_of(sampler, device), TABLES[sampler]
    t, index = scheduler.timesteps[len(scheduler.timesteps) // 2], len(table) // 2
    return {
        "dd_kernels": Denoiser(
            lambda x: fast(x.to(dtype), t, tokens).sample,
            lambda x, out: dd.reverse_step(x, out, table, index, seed=SEEDS[sampler]),
            fast,
        ),
        "diffusers": Denoiser(
            lambda x: theirs(x.to(dtype), t, tokens).sample,
            lambda x, out: scheduler.step(out, t, x).prev_sample,
            theirs,
        ),
    }


def parameter_bytes(module: nn.Module) -> int:
    """Returns the size of the weights in bytes."""
    return sum(p.nbytes for p in module.parameters())


def replayed(target: Target, step: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], object] | str:
    """Returns a step captured as a CUDA graph, which always reads the tensor it was captured with; or why not."""
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


def pipeline(
    theirs: Denoiser | str, sampler: str, steps: int, batch: int, device: torch.device | str
) -> Callable[[Tensor], Tensor] | str:
    """Returns the loop of diffusers' DDPMPipeline and DDIMPipeline, or why it is missing."""
    if isinstance(theirs, str):
        return theirs
    scheduler = scheduler_of(sampler, device)
    scheduler.set_timesteps(steps, device=device)
    module: Any = theirs.module
    classes = module.config.num_class_embeds
    y = {} if classes is None else {"class_labels": torch.arange(batch, device=device) % classes}

    def sample(x: Tensor) -> Tensor:
        for t in scheduler.timesteps:
            x = scheduler.step(module(x.to(module.dtype), t, **y).sample, t, x).prev_sample
        return x

    return sample


def _copies(name: str) -> bool:
    """Returns whether a GPU's event is a copy or a fill, not a kernel."""
    return name.startswith(("Memcpy", "Memset"))


def breakdown(denoiser: Denoiser, x: Tensor, device: str) -> Row:
    """Returns the launches of a step (None on a CPU), and the shares of its time: group_norm_silu, sampler, rest."""
    with torch.no_grad():
        out = denoiser.model(x).clone()
        model = machine.events(lambda: denoiser.model(x), device)
        update = machine.events(lambda: denoiser.update(x, out), device)
    norm = sum(us for name, us, _ in model if machine.NORM.search(name))
    sampler = sum(us for _, us, _ in update)
    total = sampler + sum(us for _, us, _ in model)
    if total == 0:
        raise RuntimeError("the profiler saw nothing")
    launches = sum(calls for name, _, calls in [*model, *update] if not _copies(name))
    return {
        "launches": round(launches / machine.PROFILED_RUNS) if device == "cuda" else None,
        "share": {
            "group_norm_silu": norm / total,
            "sampler": sampler / total,
            "rest": (total - norm - sampler) / total,
        },
    }
