"""Samples as images: PNG grids that a person can look at, single PNGs, .npz."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .files import PathLike, atomic_write, check_writable

# A grid's images are enlarged until they are at least this many pixels wide.
READABLE_SIDE = 64


def to_uint8(x: Tensor) -> Tensor:
    """[N, C, H, W] in [-1, 1] (beyond is clipped) -> [N, H, W, C] uint8 on the CPU.

    Raises:
        ValueError: not [N, 1 or 3, H, W], or NaN in it.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x must be [N, C, H, W] with C 1 or 3; got {list(x.shape)}")
    x = x.detach().to("cpu", torch.float32)
    if torch.isnan(x).any():
        raise ValueError(f"x must hold numbers; got NaN in {int(torch.isnan(x).flatten(1).any(1).sum())} of {len(x)}")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _pillow(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def grid(images: Tensor, columns: int | None = None, zoom: int | None = None, gap: int = 1) -> Image.Image:
    """One picture of all images, row by row, enlarged by whole pixels (nearest neighbour).

    Args:
        images: [N, H, W, C] uint8, N >= 1.
        columns: images per row; the least square by default.
        zoom: factor of enlargement; by default at least ``READABLE_SIDE`` pixels per image.
        gap: pixels between images, before enlargement.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(f"images must be uint8 [N, H, W, C], N >= 1; got {images.dtype} {list(images.shape)}")
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 96, np.uint8)
    for i, image in enumerate(images.numpy()):
        top, left = (v * (side + gap) + gap for v, side in zip(divmod(i, columns), (height, width), strict=True))
        sheet[top : top + height, left : left + width] = image
    zoom = zoom or -(-READABLE_SIDE // width)
    picture = _pillow(sheet)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def save_png(picture: Image.Image, path: PathLike) -> None:
    """Writes a PNG, whole or not at all."""
    atomic_write(path, lambda temporary: picture.save(temporary, format="PNG"))


def _save_npz(path: PathLike, images: Tensor, labels: Sequence[int] | None) -> None:
    arrays: dict[str, Any] = {"images": images.numpy()}
    if labels is not None:
        arrays["labels"] = np.asarray(labels, dtype=np.int64)

    def write(temporary: pathlib.Path) -> None:
        with open(temporary, "wb") as file:  # given a name, numpy would append .npz to it
            np.savez_compressed(file, **arrays)

    atomic_write(path, write)


class Output:
    """Where samples go: ``x.png`` is a grid, ``x.npz`` arrays, anything else a folder of single PNGs.

    Made before the work is done, so that a path that cannot be written is found first.

    Args:
        path: a .png or .npz, replaced as a whole; or a folder, made if it is not there.
        overwrite: a folder that holds files already may be written to.

    Raises:
        ValueError: ``path`` cannot be written, or is a folder with files in it.
    """

    def __init__(self, path: PathLike, overwrite: bool = False) -> None:
        self.path = pathlib.Path(path)
        self.kind = self.path.suffix.lower() if self.path.suffix.lower() in (".png", ".npz") else "folder"
        if self.kind != "folder":
            check_writable("out", self.path)
            return
        if self.path.is_file():
            raise ValueError(f"out must be a .png, a .npz or a folder; got the file {str(path)!r}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out: cannot make the folder {str(path)!r}: {error.strerror}") from error
        check_writable("out", self.path / "image.png")
        if not overwrite and any(self.path.iterdir()):
            raise ValueError(f"out: the folder {str(path)!r} holds files already (--overwrite to write into it)")

    def write(
        self, x: Tensor, labels: Sequence[int] | None = None, *, columns: int | None = None, first_sample: int = 0
    ) -> None:
        """Writes samples [N, C, H, W] in [-1, 1]; a folder's files are numbered from ``first_sample``."""
        images = to_uint8(x)
        if self.kind == ".png":
            save_png(grid(images, columns), self.path)
        elif self.kind == ".npz":
            _save_npz(self.path, images, labels)
        else:
            for i, image in enumerate(images.numpy()):
                save_png(_pillow(image), self.path / f"{first_sample + i:06d}.png")
