"""Describes what is drawn into a folder, and cuts it into shards by image index."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ...ops.reverse_step.table import StepTable
from ..differences import differences
from ..files import PathLike
from .formats import FORMATS


def labels_in_turn(classes: Sequence[int] | None, first: int, count: int) -> list[int] | None:
    """Returns the label of each image from index ``first`` on; images take the classes in turn, by their index."""
    return None if classes is None else [classes[(first + i) % len(classes)] for i in range(count)]


@dataclass(frozen=True)
class Shard:
    """The images from ``first`` on, ``count`` of them."""

    first: int
    count: int

    def name(self, suffix: str) -> str:
        """Returns the name of its file or folder."""
        return f"{self.first:010d}-{self.first + self.count - 1:010d}{suffix}"


@dataclass(frozen=True)
class Job:
    """What decides every byte of the shards; two runs with equal jobs draw the same images.

    Args:
        version: of dd_kernels.
        model: SHA-256 of the model's file.
        options: the options of the command that change images, as sampler, steps, dtype and guidance.
        table: SHA-256 of the sampler's rows and timesteps.
        labels: the classes that images take in turn, by index; None without classes.
        seed, first_sample, num_samples: of the noise; the images' indices.
        image: [C, H, W].
        shard_size, format: images per shard, and what a shard is: one of ``FORMATS``.
    """

    version: str
    model: str
    options: dict[str, Any]
    table: str
    labels: list[int] | None
    seed: int
    first_sample: int
    num_samples: int
    image: list[int]
    shard_size: int
    format: str

    @property
    def shards(self) -> list[Shard]:
        """Returns all shards, in the order of their images."""
        end = self.first_sample + self.num_samples
        starts = range(self.first_sample, end, self.shard_size)
        return [Shard(start, min(self.shard_size, end - start)) for start in starts]

    def name(self, shard: Shard) -> str:
        """Returns the name of a shard's file or folder."""
        return shard.name(FORMATS[self.format])

    def labels_of(self, shard: Shard) -> list[int] | None:
        """Returns the label of each image of a shard."""
        return labels_in_turn(self.labels, shard.first, shard.count)

    def differences(self, other: Job) -> str:
        """Returns in words how this job, of a folder, differs from the other one, that is asked for."""
        return differences(*({**asdict(job), **job.options, "options": None} for job in (self, other)))

    @staticmethod
    def from_json(values: Any) -> Job:
        """Returns the job that a manifest holds.

        Raises:
            ValueError: it holds none.
        """
        names = {field.name for field in fields(Job)}
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"job must hold {', '.join(sorted(names))}")
        numbers = [values[name] for name in ("seed", "first_sample", "num_samples", "shard_size")]
        if not all(type(number) is int and number >= 0 for number in numbers) or values["shard_size"] < 1:
            raise ValueError(f"seed, first_sample, num_samples and shard_size must be integers; got {numbers}")
        if values["format"] not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {values['format']!r}")
        return Job(**values)


def table_digest(table: StepTable) -> str:
    """Returns the SHA-256 of a sampler: its rows as the kernels read them, and what the model is called with."""
    content = hashlib.sha256(repr((table.threshold, table.learned_variance)).encode())
    for values in (table.rows.float(), table.model_times):
        content.update(np.ascontiguousarray(values.numpy()).tobytes())
    return content.hexdigest()


def model_digest(path: PathLike) -> str:
    """Returns the SHA-256 of a model's file."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            content.update(chunk)
    return content.hexdigest()
