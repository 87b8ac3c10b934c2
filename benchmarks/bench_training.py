"""A training step (q_sample, forward, backward, AdamW) beside the same model in plain PyTorch.

Our U-Net runs as a user trains it, on a CPU accelerated; a GPU runs it under bfloat16 autocast. ``saved_bytes`` is what
the forward pass keeps for the backward pass; ``peak_bytes``, on a GPU, the peak of a step's memory less what was
allocated before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dd_kernels as dd
from dd_kernels.nn import CONFIGS, UNet

from . import machine, models
from .bench_reverse_step import SCHEDULE
from .harness import Case, Plan, Row, Target, dtype_name, reason


@dataclass(frozen=True)
class Run:
    """A model and a batch; ``compile``: measures torch.compile too, which takes minutes to prepare."""

    model: str
    batch: int
    compile: bool = False

    def __str__(self) -> str:
        return f"training {self.model} {self.batch}{' torch.compile' if self.compile else ''}"


RUNS = {
    "cuda": [Run("cifar10", 128), Run("cifar10", 512), Run("imagenet64", 32), Run("cifar10", 128, compile=True)],
    "cpu": [Run("digits", 64), Run("cifar10", 4), Run("digits", 64, compile=True)],
}


class Trained:
    """A model with its optimizer; a call with images takes one step."""

    def __init__(self, target: Target, module: nn.Module, forward: Callable[..., Tensor], drawn: bool, y: Any) -> None:
        self.forward, self.drawn, self.y = forward, drawn, y
        self.autocast = target.kind == "cuda"
        self.device = torch.device(target.device)
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

    def loss(self, images: Tensor, t: Tensor) -> Tensor:
        """Returns the simple loss, equation 14 of DDPM (Ho et al., 2020)."""
        if self.drawn:
            x_t, noise = dd.q_sample(images, t, SCHEDULE, seed=0, return_noise=True)
        else:
            rows, noise = SCHEDULE.on(images.device).rows[t], torch.randn_like(images)
            x_t = rows[:, 0].view(-1, 1, 1, 1) * images + rows[:, 1].view(-1, 1, 1, 1) * noise
        bf16 = torch.autocast(self.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with bf16:
            out = self.forward(x_t, t, self.y)
        return F.mse_loss(out.float(), noise)

    def __call__(self, images: Tensor, t: Tensor) -> None:
        with torch.enable_grad():
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(images, t).backward()
            self.optimizer.step()


def _implementations(target: Target, run: Run) -> dict[str, Trained]:
    """Returns ours and its peers, all with the same weights."""
    model: UNet = models.unet(run.model, target, torch.float32).train()
    plain = models.eager_copy(model)
    y = models.labels(model, run.batch, target.device)
    if run.compile:
        torch._dynamo.reset()
        return {
            "dd_kernels": Trained(target, model, model, True, y),
            "torch.compile": Trained(target, plain, torch.compile(plain, dynamic=False), False, y),
            "dd_kernels, torch.compile": Trained(target, model, torch.compile(model, dynamic=False), True, y),
        }
    fast = models.by_the_line(model, target)
    return {"dd_kernels": Trained(target, fast, fast, True, y), "eager": Trained(target, plain, plain, False, y)}


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


def _inspect(target: Target, found: dict[str, Trained], images: Tensor, t: Tensor) -> Row:
    """Returns the memory that each implementation keeps and needs."""
    parameters = {p.untyped_storage().data_ptr() for p in found["dd_kernels"].optimizer.param_groups[0]["params"]}
    memory: Row = {}
    for name, trained in found.items():
        if "torch.compile" in name and torch.device(target.device).type != "cuda":
            continue  # only the compiler knows which tensors it saves
        try:
            if "torch.compile" not in name:
                saved = saved_bytes(partial(trained.loss, images, t), parameters)
                memory[name] = {"saved_bytes": saved}
            if torch.device(target.device).type == "cuda":
                peak = machine.peak_bytes(partial(trained, images, t))
                memory[name] = {**memory.get(name, {}), "peak_bytes": peak}
        except Exception as error:
            memory[name] = {"not_measured": reason(error)}
    return {"memory": memory}


def _case(target: Target, run: Run) -> Case:
    """Returns the case of one training step."""
    found = _implementations(target, run)
    config = CONFIGS[run.model]
    shape = (run.batch, config["in_channels"], config["image_size"], config["image_size"])
    images = torch.rand(shape, device=target.device) * 2 - 1
    t = torch.randint(len(SCHEDULE), (run.batch,), device=target.device)
    weights = sum(p.nbytes for p in found["dd_kernels"].optimizer.param_groups[0]["params"])
    return Case(
        "training",
        run.model,
        shape,
        found["dd_kernels"],
        [(images, t)],
        # Weights are read twice, gradients written and read, weights and two moments updated.
        9 * weights + 2 * images.nbytes,
        {name: trained for name, trained in found.items() if name != "dd_kernels"},
        dtype_name(torch.bfloat16) if target.kind == "cuda" else "float32",
        "channels_last",
        target.device,
        graph=False,
        inspect=lambda: _inspect(target, found, images, t),
    )


def plans(target: Target) -> list[Plan]:
    """Returns a plan for every run, on a CPU with all its threads."""
    threads = machine.THREADS[-1] if target.kind == "cpu" else None
    return [
        Plan(str(run), partial(_case, target, run), threads, "compiled" if run.compile else "training")
        for run in RUNS[target.kind]
    ]


def test_training(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)
