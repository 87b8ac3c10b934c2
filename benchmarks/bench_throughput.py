"""Whole sampling steps, model and update, against diffusers' U-Net and scheduler of the same shape.

A run of S steps is S such steps, so that images/s follow from the time of one; the report says so. The
bytes counted are the model's weights and the image in and out, each once: what no step can do without.
Weights are random. Ours runs in channels_last, as :class:`dd_kernels.nn.UNet` does everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dd_kernels as dd
from dd_kernels.nn import UNet

from .harness import THREADS, Case

SCHEDULE = dd.linear_schedule()
TABLES = {"ddim": dd.ddim(SCHEDULE, steps=50), "ddpm": dd.ddpm(SCHEDULE)}
Step = Callable[[Tensor], Tensor]


def _ours(model: UNet, sampler: str, backend: str = "auto") -> Step:
    table = TABLES[sampler]
    index = len(table) // 2
    t = table.timesteps[index]

    def step(x: Tensor) -> Tensor:
        with dd.use_backend(backend):
            return dd.reverse_step(x, model(x, t), table, index, seed=0)

    return step


def _diffusers(sampler: str, bytes_of_ours: int) -> Step | str:
    """One step of diffusers with the U-Net of google/ddpm-cifar10-32, of random weights."""
    try:
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    except ImportError:
        return "diffusers is not installed"
    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    ).eval()
    if _bytes(model) != bytes_of_ours:
        raise AssertionError(f"diffusers' U-Net must be as large as ours, {bytes_of_ours} bytes; got {_bytes(model)}")
    scheduler = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler]()
    scheduler.set_timesteps(len(TABLES[sampler]))
    t = scheduler.timesteps[len(scheduler.timesteps) // 2]
    return lambda x: scheduler.step(model(x, t).sample, t, x).prev_sample


def _bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _case(name: str, sampler: str, batch: int) -> Case:
    model = UNet.from_config(name).eval()
    peers: dict[str, Step | str] = {"reference": _ours(model, sampler, "reference")}
    if name == "cifar10":
        peers["diffusers"] = _diffusers(sampler, _bytes(model))
    config = model.config
    x = torch.randn(batch, config["in_channels"], config["image_size"], config["image_size"])
    moved = _bytes(model) + 2 * x.numel() * x.element_size()
    step = _ours(model, sampler)
    return Case("sample", f"{name} {sampler}", x.shape, step, [(x,)], moved, peers, layout="channels_last")


@pytest.mark.parametrize(
    ("name", "sampler", "batch"),
    [
        ("digits", "ddim", 64),
        ("digits", "ddpm", 64),
        ("cifar10", "ddim", 1),
        ("cifar10", "ddpm", 1),
        ("cifar10", "ddim", 8),
    ],
)
@pytest.mark.parametrize("threads", [THREADS[-1]], ids=lambda n: f"{n}T", indirect=True)
def test_step(compare: Callable[[Case], dict[str, Any]], name: str, sampler: str, batch: int) -> None:
    compare(_case(name, sampler, batch))
