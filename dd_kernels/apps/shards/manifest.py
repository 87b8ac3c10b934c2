"""The manifest of a folder of shards: its job, and the checksum of every shard that is there."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from filelock import FileLock

from ..files import atomic_write, check_readable
from .formats import digest
from .job import Job, Shard

MANIFEST = "manifest.json"
_LARGEST = 64 << 20  # bytes of a manifest: half a million shards
_CHECKSUM = re.compile("[0-9a-f]{64}")


class Manifest:
    """The manifest in a folder. Every change of it is one rename, made by one process at a time.

    Args:
        folder: which holds the shards.
        job: what they hold.
    """

    def __init__(self, folder: pathlib.Path, job: Job) -> None:
        self.folder, self.job = folder, job
        self.file = folder / MANIFEST

    @classmethod
    def read(cls, folder: pathlib.Path) -> Manifest:
        """Returns the manifest of a folder.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        job, _ = _parsed(folder / MANIFEST)
        return cls(folder, job)

    def start(self) -> None:
        """Writes the manifest of a new job, or finds the one of an equal job, which goes on.

        Raises:
            ValueError: the folder's manifest is damaged or that of another job; the difference is named.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if not self.file.exists():
                self._write({})
                return
            job, _ = _parsed(self.file)
        if job != self.job:
            raise ValueError(f"out: {str(self.folder)!r} holds another job; {job.differences(self.job)}")

    def checksums(self) -> dict[str, str]:
        """Returns the checksum of every shard that counts, by name."""
        return _parsed(self.file)[1]

    def add(self, shard: Shard, checksum: str) -> None:
        """Makes a shard count, which was written before."""
        with self._locked():
            self._write({**self.checksums(), self.job.name(shard): checksum})

    def damaged(self) -> list[str]:
        """Returns the names of the shards that are listed and missing, truncated or altered."""
        return [name for name, checksum in self.checksums().items() if not self._holds(name, checksum)]

    def forget(self, names: list[str]) -> None:
        """Makes these shards not count, so that they are drawn again."""
        with self._locked():
            self._write({name: value for name, value in self.checksums().items() if name not in names})

    def missing(self) -> list[Shard]:
        """Returns the shards that do not count yet, in the order of their images."""
        there = self.checksums()
        return [shard for shard in self.job.shards if self.job.name(shard) not in there]

    def _holds(self, name: str, checksum: str) -> bool:
        try:
            return digest(self.folder / name) == checksum
        except OSError:
            return False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.folder / f".{MANIFEST}.lock", is_singleton=False):
            yield

    def _write(self, checksums: Mapping[str, str]) -> None:
        content = {"job": asdict(self.job), "shards": dict(sorted(checksums.items()))}
        atomic_write(self.file, json.dumps(content, indent=1).encode() + b"\n")


def _parsed(file: pathlib.Path) -> tuple[Job, dict[str, str]]:
    """Returns the job and the checksums that a manifest holds."""
    check_readable("manifest", file)
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST} bytes")
        content: Any = json.loads(file.read_bytes())
        if not isinstance(content, dict) or content.keys() != {"job", "shards"}:
            raise ValueError("it must hold job and shards")
        job, shards = Job.from_json(content["job"]), content["shards"]
        names = {job.name(shard) for shard in job.shards}
        if not isinstance(shards, dict) or not shards.keys() <= names:
            raise ValueError("shards must be those of the job")
        if not all(isinstance(value, str) and _CHECKSUM.fullmatch(value) for value in shards.values()):
            raise ValueError("each shard must have a SHA-256")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the manifest {str(file)!r} is damaged: {error}") from error
    return job, shards
