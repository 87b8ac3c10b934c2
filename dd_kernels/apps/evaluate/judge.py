"""A classifier of real images, and the comparison of samples with real images by its features and confidence."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageData
from .frechet import frechet_distance, moments

FEATURES = 16
"""Dimension of the features. It is low because the bias of the distance at n samples grows with it."""
SURE = 0.95
"""The classifier is sure of an image where it gives one class at least this probability."""
# Few epochs and dropout prevent overfitting, which would move the features of training images away from held-out ones.
EPOCHS, BATCH, LEARNING_RATE, DROPOUT = 15, 64, 4e-3, 0.3
BOOTSTRAPS = 100
"""Sets of images drawn again for the standard error of a distance."""
_AT_ONCE = 1000  # images whose features are computed together, which bounds memory


def image_shape(images: Tensor) -> tuple[int, int, int]:
    """Returns (C, H, W) of images [N, C, H, W]."""
    _, channels, height, width = images.shape
    return channels, height, width


class Classifier(nn.Module):
    """A convolutional classifier of images [N, C, H, W] in [-1, 1], H and W divisible by 2."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(DROPOUT),
            nn.Linear(32 * (height // 2) * (width // 2), FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [N, num_classes] for x [N, C, H, W]."""
        return self.head(self.body(x))


@contextlib.contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Runs the block on one thread, which fixes the order of sums, with a seed; restores torch's generator after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def train_classifier(images: Tensor, labels: Tensor, seed: int = 0, epochs: int = EPOCHS) -> Classifier:
    """Returns a classifier trained on the CPU; the same arguments give the same weights.

    Args:
        images: [N, C, H, W] in [-1, 1], on the CPU.
        labels: [N] int64, 0 .. classes - 1.
        seed: of the initial weights and of the order of the images.
        epochs: how often each image is seen.
    """
    with _deterministic(seed):
        model = Classifier(image_shape(images), int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        total = epochs * -(-len(images) // BATCH)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                rate.step()
    return model.eval()


def _labelled(name: str, data: ImageData) -> tuple[Tensor, Tensor]:
    """Returns all images [N, C, H, W] in [-1, 1] and their labels [N]."""
    images, labels = data.batch(torch.arange(len(data)))
    if labels is None:
        raise ValueError(f"{name} must have labels, for the classifier; got none")
    return images, labels


class RealImages(NamedTuple):
    """What a judge keeps of real images: features [N, FEATURES] and labels [N] int64."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Measures:
    """How samples, or real images, compare with held-out real ones.

    Attributes:
        images: how many were measured.
        distance: Fréchet distance to the held-out images, in the classifier's features.
        distance_error: its standard error, by ``BOOTSTRAPS`` bootstraps over the images measured.
        sure: share of the images that the classifier gives to one class with at least the probability ``SURE``.
        right: share of the images that the classifier gives to the class they are meant to have; None where they have
            none.
        right_by_class: that share of the images of each class, None of a class that no image is meant to have.
    """

    images: int
    distance: float
    distance_error: float
    sure: float
    right: float | None
    right_by_class: list[float | None] | None = None


class Judge:
    """Compares images with held-out real ones, in the features of a classifier trained on other real ones.

    Args:
        classifier: it, in evaluation.
        shape: (C, H, W) of the images.
        seed: of the classifier's training. Distances in the features of two seeds do not compare.
        train, held_out: features of real images that the classifier was trained on, and of others.
    """

    def __init__(
        self,
        classifier: Classifier,
        shape: tuple[int, int, int],
        seed: int,
        train: RealImages,
        held_out: RealImages,
    ) -> None:
        self.classifier, self.shape, self.train, self.held_out, self.seed = classifier, shape, train, held_out, seed
        self._moments = moments(held_out.features)
        self._floors: dict[int, Measures] = {}

    @classmethod
    def trained(cls, train: ImageData, held_out: ImageData, seed: int = 0, epochs: int = EPOCHS) -> Judge:
        """Trains a classifier on ``train`` and returns a judge of images of the same shape.

        Raises:
            ValueError: data without labels, or of two shapes.
        """
        (images, labels), (others, their_labels) = _labelled("train", train), _labelled("held_out", held_out)
        shape = image_shape(others)
        if image_shape(images) != shape:
            raise ValueError(f"train must have images of {shape}, as held_out has; got {image_shape(images)}")
        classifier = train_classifier(images, labels, seed, epochs)
        known = RealImages(_features(classifier, images), labels)
        return cls(classifier, shape, seed, known, RealImages(_features(classifier, others), their_labels))

    @property
    def num_classes(self) -> int:
        """Number of classes that the classifier knows."""
        return self.classifier.head.out_features

    def labels(self, n: int) -> Tensor:
        """Returns n labels [n] int64: those of the held-out images in order, repeated where n is more."""
        return self.held_out.labels.repeat(-(-n // len(self.held_out.labels)))[:n]

    def measure(self, images: Tensor, labels: Tensor | None = None) -> Measures:
        """Compares images [N, C, H, W], N >= 2, clipped to [-1, 1], with the held-out ones; labels [N] are meant."""
        return self._measure(_features(self.classifier, images), labels)

    def real(self, labels: Tensor) -> Measures:
        """Returns what as many training images of each class as ``labels`` names measure; fewer, where it has fewer."""
        own = self.train.labels
        picked = torch.cat([own.eq(c).nonzero()[:, 0][: int(labels.eq(c).sum())] for c in labels.unique()])
        return self._measure(self.train.features[picked], own[picked])

    def floor(self, n: int) -> Measures:
        """Returns what real images measure of the classes that n samples have, see :meth:`real`; measured once."""
        if n not in self._floors:
            self._floors[n] = self.real(self.labels(n))
        return self._floors[n]

    @cached_property
    def all_held_out(self) -> Measures:
        """What the held-out images themselves measure: a distance of 0, and the classifier's accuracy."""
        return self._measure(*self.held_out)

    def digest(self) -> str:
        """Returns the SHA-256 of the classifier's weights and of the real images' features and labels."""
        content = hashlib.sha256()
        for value in (*self.classifier.state_dict().values(), *self.train, *self.held_out):
            content.update(value.contiguous().numpy())
        return content.hexdigest()

    @torch.no_grad()
    def _measure(self, features: Tensor, labels: Tensor | None) -> Measures:
        best, classes = self.classifier.head(features).softmax(1).max(1)
        right, by_class = None, None
        if labels is not None:
            labels = labels.cpu()
            hits = classes.eq(labels)
            of_class = [hits[labels == c] for c in range(self.num_classes)]
            right, by_class = _share(hits), [_share(own) if len(own) else None for own in of_class]
        sure = _share(best >= SURE)
        return Measures(len(features), self._distance(features), self._error(features), sure, right, by_class)

    def _distance(self, features: Tensor) -> float:
        return frechet_distance(*moments(features), *self._moments)

    def _error(self, features: Tensor) -> float:
        """Returns the standard deviation of the distance of images drawn again from these, as many."""
        n = len(features)
        drawn = np.random.default_rng(0).integers(n, size=(BOOTSTRAPS, n))
        return float(np.std([self._distance(features[torch.from_numpy(rows)]) for rows in drawn], ddof=1))


def _share(chosen: Tensor) -> float:
    return float(chosen.float().mean())


@torch.no_grad()
def _features(classifier: Classifier, images: Tensor) -> Tensor:
    """Returns the features [N, FEATURES] of images, clipped as an image file would clip them."""
    parts = images.to("cpu", torch.float32).clamp(-1, 1).split(_AT_ONCE)
    return torch.cat([classifier.body(part) for part in parts])
