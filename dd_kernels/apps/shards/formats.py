"""What a shard is: a .npz file, a .tar file as WebDataset reads it, or a folder of PNG files."""

from __future__ import annotations

import hashlib
import io
import pathlib
import tarfile
from collections.abc import Iterator, Sequence

from torch import Tensor

from ..files import atomic_write
from ..folders import atomic_folder, write_new
from ..images import npz_bytes, png_bytes

# The suffix of each kind's name; a folder has none.
FORMATS = {"npz": ".npz", "tar": ".tar", "png": ""}
_CHUNK = 1 << 20


def write(
    path: pathlib.Path,
    kind: str,
    first: int,
    images: Tensor,
    labels: Sequence[int] | None,
    names: tuple[str, str] = ("images", "labels"),
) -> str:
    """Writes a shard, whole or not at all, and returns its checksum; equal images give equal bytes.

    Args:
        path: of the file or folder, which is replaced where it is there.
        kind: one of ``FORMATS``.
        first: index of the first image; members of a .tar and files of a folder are named by their image's index.
        images: [N, H, W, C] uint8.
        labels: of the images; a .tar holds ``<index>.cls`` files of them, and a folder holds none.
        names: of a .npz's arrays.
    """
    if kind == "npz":
        atomic_write(path, npz_bytes(images, labels, names))
    elif kind == "tar":
        atomic_write(path, _tar(first, images, labels))
    else:
        with atomic_folder(path) as folder:
            for name, content in _pngs(first, images):
                write_new(folder / name, content)
    return digest(path)


def digest(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a shard as it is on disk: of a file's bytes, or of a folder's names and bytes."""
    content = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.iterdir()):
            content.update(f"{file.name} {file.stat().st_size}\n".encode())
            _update(content, file)
    else:
        _update(content, path)
    return content.hexdigest()


def _update(content: hashlib._Hash, path: pathlib.Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            content.update(chunk)


def _pngs(first: int, images: Tensor) -> Iterator[tuple[str, bytes]]:
    """Yields the name and content of each image's file."""
    for i, image in enumerate(images.numpy()):
        yield f"{first + i:010d}.png", png_bytes(image)


def _tar(first: int, images: Tensor, labels: Sequence[int] | None) -> bytes:
    """Returns an archive whose members lie in the order of the images, without times or owners."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for i, (name, png) in enumerate(_pngs(first, images)):
            members = [(name, png)]
            if labels is not None:
                members.append((f"{first + i:010d}.cls", str(labels[i]).encode()))
            for member, value in members:
                info = tarfile.TarInfo(member)
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))
    return content.getvalue()
