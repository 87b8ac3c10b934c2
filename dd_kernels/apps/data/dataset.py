"""Images in memory, and the order in which training visits them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ...ops.randn import Stream, noise_key
from ...ops.randn.reference import words


@dataclass(frozen=True)
class ImageData:
    """Images in memory, as bytes.

    Attributes:
        images: [N, C, H, W] uint8.
        labels: [N] int64 in [0, len(classes)), or None.
        classes: the classes' names, () without labels.
        maximum: the byte that stands for 1; 0 stands for -1.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    maximum: int = 255

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every byte and label, by which a resumed run knows that its data are those that it began with."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes, self.maximum)).encode())
        digest.update(self.images.contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns x_0 [len(index), C, H, W] float32 in [-1, 1], and the labels or None."""
        x_start = self.images[index].to(torch.float32) * (2.0 / self.maximum) - 1.0
        return x_start, None if self.labels is None else self.labels[index]


def uniform_words(count: int, *, seed: int, draw: int, stream: int, first: int = 0) -> Tensor:
    """Returns int64 [count], uniform in [0, 2^32): the first Philox word of (seed; 0, first + n, draw, stream).

    They are bit-equal on every machine, so a choice made with them is repeated without a stored state.
    """
    key = noise_key(seed, first, draw, torch.device("cpu"))
    return words(key, count, 4, key[2:3], stream)[:, 0, 0]


@lru_cache(maxsize=4)
def shuffled(count: int, *, seed: int, draw: int, stream: int = Stream.SHUFFLE) -> Tensor:
    """Returns a permutation of ``count`` indices that depends on (seed, draw, stream) alone; do not write to it."""
    return torch.argsort(uniform_words(count, seed=seed, draw=draw, stream=stream), stable=True)


def positions(data: ImageData, first: int, count: int, *, seed: int) -> Tensor:
    """Returns the indices of ``count`` images from position ``first`` on in an endless run of shuffled epochs."""
    size, parts = len(data), []
    while count > 0:
        epoch, offset = divmod(first, size)
        part = shuffled(size, seed=seed, draw=epoch)[offset : offset + count]
        parts.append(part)
        first, count = first + len(part), count - len(part)
    return torch.cat(parts)


def class_indices(names: Sequence[str], classes: Sequence[str], num_classes: int) -> list[int]:
    """Returns the labels of classes given by name or number."""
    labels = []
    for name in names:
        if name in classes:
            labels.append(classes.index(name))
        elif name.isdecimal() and int(name) < num_classes:
            labels.append(int(name))
        else:
            known = ", ".join(classes) if classes else f"0 to {num_classes - 1}"
            raise ValueError(f"classes must be among {known}; got {name!r}")
    return labels
