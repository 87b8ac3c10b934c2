"""The options of a training run, their checks, and recipes for named data."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...samplers.rows import PREDICTIONS
from ...schedules import SCHEDULES
from ..checkpoint import check_timesteps
from ..data import parse_colour
from .timesteps import TIMESTEPS

LOSS_WEIGHTS = ("uniform", "min-snr")
LR_SCHEDULES = ("constant", "cosine")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INTEGERS = ("steps", "batch_size", "num_timesteps", "warmup", "seed")
_FLOATS = ("lr", "weight_decay", "beta1", "beta2", "clip_grad", "label_drop", "snr_gamma", "input_perturbation")
_SWITCHES = ("accelerate", "grey", "flip", "strict", "unconditional")
_CHOICES: dict[str, Collection[str]] = {
    "prediction": PREDICTIONS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "loss_weight": LOSS_WEIGHTS,
    "timesteps": TIMESTEPS,
    "lr_schedule": LR_SCHEDULES,
}


def _decays(value: Any) -> tuple[float, ...]:
    return tuple(float(decay) for decay in np.atleast_1d(value))


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training run. The defaults are DDPM's for CIFAR-10 (Ho et al., 2020, appendix B).

    Args:
        data: "digits", "fashion-mnist", a .npz file, or a folder of images, of IDX files or of a Hugging Face dataset.
        image_size, grey: side that a folder's images are resized to; grey instead of RGB.
        background: colour behind transparent pixels, as CSS spells it ("grey", "#ff0000").
        strict: refuse a folder with images that cannot be read, instead of skipping them.
        flip: mirror half of the images (not for digits, whose mirror images mean nothing).
        config: a name in ``dd_kernels.nn.CONFIGS``; None: a U-Net that fits the images' size, CIFAR-10's at 32.
        model: U-Net options that replace the configuration's; a model with ``learn_variance`` is trained by L_hybrid,
            one with ``self_conditioning`` reads its own x_0 of half of the images.
        schedule, num_timesteps, prediction: the forward process, and what the model predicts.
        label_drop: share of the labels replaced by "no class", for classifier-free guidance.
        unconditional: ignore the labels altogether.
        loss_weight: of L_simple: "uniform", or "min-snr" with ``snr_gamma`` (Hang et al., 2023).
        timesteps: how they are drawn: "uniform", or "loss-second-moment" (Nichol & Dhariwal, 2021, eq. 18).
        input_perturbation: gamma of DDPM-IP (Ning et al., 2023): x_t is made with z + gamma z', z' another normal, and
            the target stays z; 0.1 in the paper.
        steps, batch_size: optimizer steps in all, images in each.
        lr, weight_decay, beta1, beta2, warmup: AdamW; the learning rate grows linearly over ``warmup`` steps.
        lr_schedule: of the learning rate after that: "constant", or "cosine", which falls to 0 at the last step.
        clip_grad: greatest norm of the gradient.
        ema: decay of the averaged weights, which are those that a model file holds; or several decays, the first of
            them the file's own average.
        precision: "fp32", or "bf16" / "fp16" for the forward pass (autocast; fp16 with a loss scale).
        accelerate: rewrite the model by :func:`dd_kernels.accelerate`, whose rounding differs from that without.
        seed: of everything random.

    Raises:
        ValueError: an option is of a wrong type or out of range.
    """

    data: str = "digits"
    image_size: int | None = None
    grey: bool = False
    background: str = "grey"
    strict: bool = False
    flip: bool = False
    config: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    schedule: str = "linear"
    num_timesteps: int = 1000
    prediction: str = "epsilon"
    label_drop: float = 0.1
    unconditional: bool = False
    loss_weight: str = "uniform"
    snr_gamma: float = 5.0
    timesteps: str = "uniform"
    input_perturbation: float = 0.0
    steps: int = 800_000
    batch_size: int = 128
    lr: float = 2e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    warmup: int = 5000
    lr_schedule: str = "constant"
    clip_grad: float = 1.0
    ema: tuple[float, ...] = (0.9999,)
    precision: str = "fp32"
    accelerate: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._make_plain()
        self._check("steps", self.steps >= 1, "at least 1")
        self._check("batch_size", self.batch_size >= 1, "at least 1")
        check_timesteps(self.num_timesteps)
        self._check("warmup", self.warmup >= 0, "at least 0")
        self._check("seed", 0 <= self.seed < 1 << 64, "in [0, 2^64)")
        self._check("image_size", self.image_size is None or self.image_size >= 1, "at least 1")
        self._check("lr", 0 < self.lr < math.inf, "a positive number")
        self._check("clip_grad", self.clip_grad > 0, "a positive number (inf: no clipping)")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0")
        self._check("snr_gamma", 0 < self.snr_gamma < math.inf, "a positive number")
        self._check("input_perturbation", 0 <= self.input_perturbation < math.inf, "at least 0")
        for name in ("beta1", "beta2", "label_drop"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        differ = len(set(self.ema)) == len(self.ema) > 0
        self._check("ema", differ and all(0 <= decay < 1 for decay in self.ema), "different numbers in [0, 1)")
        for name, choices in _CHOICES.items():
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        parse_colour(self.background)

    def _make_plain(self) -> None:
        """Turns numpy numbers and paths into values that JSON takes."""
        kinds: dict[str, tuple[Callable[[Any], Any], str]] = {
            **dict.fromkeys(_INTEGERS, (operator.index, "an integer")),
            **dict.fromkeys(_FLOATS, (float, "a number")),
            **dict.fromkeys(_SWITCHES, (bool, "true or false")),
            "data": (os.fspath, "a string or a path"),
            "model": (dict, "a mapping"),
            "ema": (_decays, "a number, or several"),
        }
        if self.image_size is not None:
            kinds["image_size"] = (operator.index, "an integer")
        for name, (convert, wanted) in kinds.items():
            try:
                value = convert(getattr(self, name))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} must be {wanted}; got {getattr(self, name)!r}") from error
            object.__setattr__(self, name, value)

    def learning_rate(self, step: int) -> float:
        r"""Returns the learning rate of step ``step``: linear in the warm-up, then constant or a half cosine.

        The cosine, eq. 5 of SGDR (Loshchilov & Hutter, 2017), goes from ``lr`` at the warm-up's end to 0 at ``steps``.
        """
        rate = self.lr * min(1.0, (step + 1) / max(self.warmup, 1))
        if self.lr_schedule == "constant":
            return rate
        done = max(step - self.warmup, 0) / max(self.steps - self.warmup, 1)
        return rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {wanted}; got {getattr(self, name)!r}")


# 8 x 8 images of ten classes need a small model, which trains in minutes. models/README.md has the result.
DIGITS: dict[str, Any] = {
    "config": "digits",
    "steps": 4000,
    "batch_size": 64,
    "lr": 1e-3,
    "warmup": 200,
    "ema": 0.999,
}
# 11 epochs of Fashion-MNIST. A step takes 0.54 s of one core of an AMD EPYC with AVX-512 BF16 and 0.30 s of two (fp32:
# 0.90 and 0.49 s): the run 50 minutes on two quiet cores.
FASHION: dict[str, Any] = {
    "config": "fashion",
    "steps": 10_000,
    "batch_size": 64,
    "lr": 1e-3,
    "warmup": 500,
    "lr_schedule": "cosine",
    "ema": 0.999,
    "precision": "bf16",
}
RECIPES = {"digits": DIGITS, "fashion-mnist": FASHION}
