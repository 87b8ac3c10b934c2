"""Guidance by a classifier of noisy images: its options, and the model that they make of a U-Net."""

from __future__ import annotations

import argparse
import copy
import math
from functools import partial

import torch
from torch import Tensor, nn

from ...nn import NoisyClassifier, UNet
from ...sampling.guidance import classifier_guided
from ..checkpoint import ModelInfo
from ..classifier_file import load_classifier
from .argument_types import number

OPTIONS = ("classifier", "classifier_scale")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --classifier and --classifier-scale."""
    parser.add_argument("--classifier", metavar="FILE", help="guide by this classifier, which train-classifier wrote")
    parser.add_argument("--classifier-scale", type=number, metavar="S", help="how strongly (default: 1)")


class ClassifierGuided(nn.Module):
    """A U-Net guided by a classifier, algorithm 2 of Dhariwal & Nichol (2021).

    Attributes:
        num_classes, classes: how many classes the classifier tells apart, and their names.
    """

    def __init__(
        self, model: UNet, info: ModelInfo, classifier: NoisyClassifier, classes: tuple[str, ...], scale: float
    ) -> None:
        super().__init__()
        self.model, self.classifier, self.scale = model, classifier, scale
        self.schedule, self.prediction = info.make_schedule(), info.prediction
        self.num_classes: int = classifier.config["num_classes"]
        self.classes = classes

    def scaled(self, scale: float) -> ClassifierGuided:
        """Returns the same with another scale."""
        other = copy.copy(self)
        other.scale = scale
        return other

    @property
    def self_conditioning(self) -> bool:
        """Whether the U-Net reads an estimate of x_0."""
        return self.model.self_conditioning

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor, y: Tensor | None = None, x_self: Tensor | None = None
    ) -> Tensor:
        """Returns the prediction for x_t of the model's class y, guided towards the classifier's class label [N]."""
        model = partial(self.model, y=y, x_self=x_self)
        log_probability = partial(self.classifier.log_probability, label=label)
        return classifier_guided(model, log_probability, self.schedule, self.scale, self.prediction)(x, t)


def guided_model(
    args: argparse.Namespace, model: UNet, info: ModelInfo, device: torch.device
) -> UNet | ClassifierGuided:
    """Returns the model, with the classifier that a command's arguments name, if they name one.

    Raises:
        ValueError: the classifier does not fit the model, or a scale that is not finite or has no classifier.
    """
    path, scale = (getattr(args, name, None) for name in OPTIONS)
    if path is None:
        if scale is not None:
            raise ValueError(f"--classifier-scale needs --classifier; got {scale}")
        return model
    scale = 1.0 if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"--classifier-scale must be a finite number; got {scale}")
    classifier, its = load_classifier(path)
    for what, wanted, found in (
        ("images of", info.sample_shape, its.sample_shape),
        ("the schedule", (info.schedule, info.num_timesteps), (its.schedule, its.num_timesteps)),
        ("classes:", model.num_classes or its.config["num_classes"], its.config["num_classes"]),
    ):
        if wanted != found:
            raise ValueError(f"--classifier must be trained on {what} {wanted}, as the model is; got {found}")
    return ClassifierGuided(model, info, classifier.to(device), its.classes, scale)
