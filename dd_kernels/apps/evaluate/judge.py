"""The classifier whose features and confidence real and sampled digits are compared by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageData
from .frechet import frechet_distance, moments

FEATURES = 16
"""Dimension of the features: low, because the distance's bias at n samples grows with it."""
SURE = 0.95
"""The classifier is sure of an image where it gives one class at least this probability."""
# Few epochs and dropout: features of images learnt by heart lie far from those of held-out ones.
EPOCHS, BATCH, LEARNING_RATE, DROPOUT = 15, 64, 4e-3, 0.3


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
        """x [N, C, H, W] -> logits [N, num_classes]."""
        return self.head(self.body(x))


@contextlib.contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """One thread, whose sums have one order, and a seed of its own that leaves torch's generator alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def train_classifier(images: Tensor, labels: Tensor, seed: int = 0) -> Classifier:
    """A classifier trained on the CPU in seconds; the same arguments give the same weights.

    Args:
        images: [N, C, H, W] in [-1, 1], on the CPU.
        labels: [N] int64, 0 .. classes - 1.
        seed: of the initial weights and of the order of the images.
    """
    with _deterministic(seed):
        model = Classifier(tuple(images.shape[1:]), int(labels.max()) + 1)
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
        for name, data in (("train", train), ("test", test)):
            if data.labels is None:
                raise ValueError(f"{name} must have labels, for the classifier; got none")
        self.shape = tuple(test.images.shape[1:])
        if tuple(train.images.shape[1:]) != self.shape:
            raise ValueError(
                f"train must have images of {self.shape}, as test has; got {tuple(train.images.shape[1:])}"
            )
        self.seed, self._train, self._test_labels = seed, train, test.labels
        self.test_images, labels = test.batch(torch.arange(len(test)))
        self.classifier = train_classifier(*train.batch(torch.arange(len(train))), seed)
        features = self._features(self.test_images)
        self.accuracy = float((self._probabilities(features).argmax(1) == labels).float().mean())
        self._moments = moments(features)

    def labels(self, n: int) -> Tensor:
        """[n] int64: classes as the held-out images have them, one after the other, again from the first at the end."""
        return self._test_labels.repeat(-(-n // len(self._test_labels)))[:n]

    def real(self, labels: Tensor) -> Tensor:
        """Training images [N, C, H, W] in [-1, 1] of these classes, each once (so N is less where they run out)."""
        of_class = [(self._train.labels == c).nonzero()[:, 0][: int((labels == c).sum())] for c in labels.unique()]
        return self._train.batch(torch.cat(of_class))[0]

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        # As an image file would hold them: nothing outside the range.
        return self.classifier.body(images.to("cpu", torch.float32).clamp(-1, 1))

    @torch.no_grad()
    def _probabilities(self, features: Tensor) -> Tensor:
        return self.classifier.head(features).softmax(1)

    def distance(self, images: Tensor) -> float:
        """Fréchet distance of images [N, C, H, W] in [-1, 1] (beyond is clipped), N >= 2, to the held-out ones."""
        return frechet_distance(*moments(self._features(images)), *self._moments)

    def sure(self, images: Tensor) -> float:
        """Share of the images to whose likeliest class the classifier gives a probability of at least ``SURE``."""
        return float((self._probabilities(self._features(images)).amax(1) >= SURE).float().mean())
