"""Training of a classifier of noisy images, for guidance (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

import math
import pathlib
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ...nn import NoisyClassifier
from ...ops import q_sample
from ..checkpoint import ModelInfo
from ..data import ImageData
from .model import build_classifier
from .options import PRECISIONS, TrainOptions
from .trainer import TrainingDivergedError, make_batch, seed_torch

# AdamW's weight decay is that of guided-diffusion's classifiers.
DEFAULTS: dict[str, Any] = {
    "steps": 10_000,
    "batch_size": 64,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "warmup": 100,
    "lr_schedule": "cosine",
}
# Digits take half a minute of one core, Fashion-MNIST five minutes: 0.16 s a step on an AMD EPYC that was busy.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"config": "digits", "steps": 500},
    "fashion-mnist": {"config": "fashion", "steps": 2000, "precision": "bf16"},
}
_UNUSED = (
    "prediction",
    "label_drop",
    "unconditional",
    "loss_weight",
    "snr_gamma",
    "timesteps",
    "input_perturbation",
    "ema",
)
LEVELS = 8
"""At how many timesteps the accuracy is measured."""
_AT_ONCE = 1000  # images that are classified together, which bounds memory


def train_noisy_classifier(
    options: TrainOptions, dataset: ImageData, device: torch.device | str = "cpu", progress: bool = False
) -> tuple[NoisyClassifier, ModelInfo]:
    """Returns a classifier trained on x_t at every timestep of the schedule, in eval mode, and its description.

    A step minimises the cross entropy of the labels. As in the training of a model, images, timesteps, noise and
    dropout are functions of (seed, step), so that the same options give the same bits on one machine with one number
    of threads.

    Args:
        options: those of data, network, schedule, optimizer, precision and seed are used.
        dataset: images with labels.
        device: where to train.
        progress: show a tqdm bar.

    Raises:
        ValueError: data without labels, or options that do not fit them.
        TrainingDivergedError: the loss is not a number.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model, info = build_classifier(options, dataset)
        model = model.to(device).train()
        loss = _train(model, info, options, dataset, progress)
    used = {name: value for name, value in asdict(options).items() if name not in _UNUSED}
    described = {**used, "data": pathlib.Path(options.data).name, "step": options.steps, "loss": loss}
    return model.eval().requires_grad_(False), replace(info, training=described)


def _train(model: NoisyClassifier, info: ModelInfo, options: TrainOptions, dataset: ImageData, progress: bool) -> float:
    """Takes all steps; returns the running mean of the loss."""
    device, schedule = model.head.weight.device, info.make_schedule()
    betas, dtype = (options.beta1, options.beta2), PRECISIONS[options.precision]
    optimizer = torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=options.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    mean = None
    for step in tqdm(range(options.steps), desc="training", unit="step", disable=not progress):
        seed_torch(options.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate(step)
        batch = make_batch(dataset, options, None, step)
        assert batch.labels is not None
        x_start, t, labels = batch.x_start.to(device), batch.t.to(device), batch.labels.to(device)
        x_t = q_sample(x_start, t, schedule, seed=options.seed, draw=step)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(x_t, t)
        loss = F.cross_entropy(logits.float(), labels)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingDivergedError(f"the loss of step {step + 1} is not a number: try a smaller lr")
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        mean = value if mean is None else 0.99 * mean + 0.01 * value
    assert mean is not None
    return mean


@torch.no_grad()
def accuracy_by_timestep(model: NoisyClassifier, info: ModelInfo, images: ImageData, seed: int = 0) -> dict[int, float]:
    """Returns the share of labelled images that are classified right, by timestep, at ``LEVELS`` of them from 0 on."""
    device, schedule = model.head.weight.device, info.make_schedule()
    timesteps = sorted({len(schedule) * level // LEVELS for level in range(LEVELS)})
    right = dict.fromkeys(timesteps, 0)
    for index in torch.arange(len(images)).split(_AT_ONCE):
        x_start, labels = images.batch(index)
        assert labels is not None
        for timestep in timesteps:
            t = torch.full((len(index),), timestep, device=device)
            x_t = q_sample(x_start.to(device), t, schedule, seed=seed, first_sample=int(index[0]), draw=timestep)
            right[timestep] += int(model(x_t, t).argmax(1).cpu().eq(labels).sum())
    return {timestep: count / len(images) for timestep, count in right.items()}
