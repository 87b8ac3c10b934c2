"""A classifier of real digits, and the comparison of samples with real digits by its features and confidence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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


def train_classifier(images: Tensor, labels: Tensor, seed: int = 0) -> Classifier:
    """Returns a classifier trained on the CPU, in seconds; the same arguments give the same weights.

    Args:
        images: [N, C, H, W] in [-1, 1], on the CPU.
        labels: [N] int64, 0 .. classes - 1.
        seed: of the initial weights and of the order of the images.
    """
    with _deterministic(seed):
        model = Classifier(image_shape(images), int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        total = EPOCHS * -(-len(images) // BATCH)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total)
        for _ in range(EPOCHS):
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


class Judge:
    """Compares images with held-out real ones, in the features of a classifier trained on other real ones.

    Args:
        train: images and labels to train the classifier on.
        test: held-out images and labels, with which images are compared.
        seed: of the classifier's training. Distances in the features of two seeds do not compare.

    Attributes:
        shape: (C, H, W) of the images.
        test_images: the held-out ones, [N, C, H, W] in [-1, 1].
        accuracy: of the classifier on the held-out images, in [0, 1].

    Raises:
        ValueError: data without labels, or of two shapes.
    """

    def __init__(self, train: ImageData, test: ImageData, seed: int = 0) -> None:
        self._train_images, self._train_labels = _labelled("train", train)
        self.test_images, self._test_labels = _labelled("test", test)
        self.seed, self.shape = seed, image_shape(test.images)
        if image_shape(train.images) != self.shape:
            raise ValueError(f"train must have images of {self.shape}, as test has; got {image_shape(train.images)}")
        self.classifier = train_classifier(self._train_images, self._train_labels, seed)
        features = self._features(self.test_images)
        self.accuracy = float(self._probabilities(features).argmax(1).eq(self._test_labels).float().mean())
        self._moments = moments(features)

    def labels(self, n: int) -> Tensor:
        """Returns n labels [n] int64: those of the held-out images in order, repeated where n is more."""
        return self._test_labels.repeat(-(-n // len(self._test_labels)))[:n]

    def real(self, labels: Tensor) -> Tensor:
        """Returns as many training images of each class as ``labels`` names, [N, C, H, W] in [-1, 1]; N is less where a
        class has fewer."""
        of_class = [self._train_labels.eq(c).nonzero()[:, 0][: int(labels.eq(c).sum())] for c in labels.unique()]
        return self._train_images[torch.cat(of_class)]

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        # Clips, as an image file would.
        return self.classifier.body(images.to("cpu", torch.float32).clamp(-1, 1))

    @torch.no_grad()
    def _probabilities(self, features: Tensor) -> Tensor:
        return self.classifier.head(features).softmax(1)

    def distance(self, images: Tensor) -> float:
        """Returns the Fréchet distance of images [N, C, H, W], N >= 2, clipped to [-1, 1], to the held-out ones."""
        return frechet_distance(*moments(self._features(images)), *self._moments)

    def sure(self, images: Tensor) -> float:
        """Returns the share of images that the classifier gives to one class with at least the probability ``SURE``."""
        return float((self._probabilities(self._features(images)).amax(1) >= SURE).float().mean())
