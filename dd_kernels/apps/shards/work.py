"""Draws the shards of a job that are missing, each by whichever process comes first."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from ..images import to_uint8
from . import formats
from .job import Shard
from .manifest import Manifest

_PAUSE = 0.2  # seconds between two looks at the shards that other processes draw

Draw = Callable[[Shard], Tensor]


def draw_all(manifest: Manifest, draw: Draw, progress: Callable[[int], None], names: tuple[str, str]) -> None:
    """Draws shards until none is missing, also of those that other processes have begun.

    A process holds the lock of the shard that it draws, which the system releases where it dies. So its shard is free
    again, and one of the others draws it.

    Args:
        manifest: of a job that has started.
        draw: returns the images [N, C, H, W] in [-1, 1] of a shard.
        progress: called with the number of images that are there, whoever drew them.
        names: of a .npz's arrays.
    """
    while missing := manifest.missing():
        progress(manifest.job.num_samples - sum(shard.count for shard in missing))
        for shard in missing:
            with _claim(manifest.folder, manifest.job.name(shard)) as mine:
                # Another process may have written it since the list was made.
                if mine and shard in manifest.missing():
                    _draw(manifest, shard, draw, names)
                    break
        else:
            time.sleep(_PAUSE)
    progress(manifest.job.num_samples)


def _draw(manifest: Manifest, shard: Shard, draw: Draw, names: tuple[str, str]) -> None:
    job = manifest.job
    images, path = to_uint8(draw(shard)), manifest.folder / job.name(shard)
    if path.is_dir():  # a folder's files would stay beside the new ones
        shutil.rmtree(path)
    manifest.add(shard, formats.write(path, job.format, shard.first, images, job.labels_of(shard), names))


@contextlib.contextmanager
def _claim(folder: Path, name: str) -> Iterator[bool]:
    """Yields whether this process alone holds a shard inside the block."""
    file = folder / f".{name}.lock"
    lock = FileLock(file, timeout=0, is_singleton=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()
