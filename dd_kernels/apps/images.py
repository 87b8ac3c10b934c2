"""Samples as images: PNG grids, folders of single PNGs, .npz files."""

from __future__ import annotations

import io
import operator
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .data.arrays import NAMES
from .files import PathLike, atomic_write, check_writable
from .folders import atomic_folder, check_folder, write_new
from .memory import check_memory

# A grid's images are enlarged until they are at least this many pixels wide.
READABLE_SIDE = 64
FORMATS = (".png", ".npz")
# Names of the arrays in a .npz: ours, and those of guided-diffusion's scripts and evaluator.
NPZ_NAMES = {"images": NAMES[0], "arr": NAMES[1]}


def to_uint8(x: Tensor) -> Tensor:
    """Converts [N, C, H, W] in [-1, 1] (clipped) to [N, H, W, C] uint8 on the CPU.

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
    """Returns one picture of all images, row by row, enlarged by whole pixels (nearest neighbour).

    Args:
        images: [N, H, W, C] uint8, N >= 1.
        columns: images per row, at most N; the least square by default.
        zoom: factor of enlargement; by default at least ``READABLE_SIDE`` pixels per image.
        gap: pixels between images, before enlargement.

    Raises:
        ValueError: not such images, or a picture that does not fit this machine's memory.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(f"images must be uint8 [N, H, W, C], N >= 1; got {images.dtype} {list(images.shape)}")
    n, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(n))) if columns is None else min(operator.index(columns), n)
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    rows = -(-n // columns)
    zoom = -(-READABLE_SIDE // width) if zoom is None else zoom
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    check_memory(f"a grid of {n} images", 2 * shape[0] * shape[1] * channels * zoom**2)
    sheet = np.full(shape, 96, np.uint8)
    for i, image in enumerate(images.numpy()):
        top, left = (v * (side + gap) + gap for v, side in zip(divmod(i, columns), (height, width), strict=True))
        sheet[top : top + height, left : left + width] = image
    picture = _pillow(sheet)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def captioned(picture: Image.Image, rows: Sequence[str], columns: Sequence[str] = ()) -> Image.Image:
    """Returns a picture of rows of one height with their names at the left, and those of its columns above."""
    height = picture.height / len(rows)
    font = ImageFont.load_default(max(10, min(20, int(height / 4))))
    margin = 8
    left = max(int(font.getlength(name)) for name in rows) + 2 * margin
    above = int(font.getbbox("|")[3]) + 2 * margin if columns else 0
    sheet = Image.new(picture.mode, (left + picture.width, above + picture.height), "white")
    sheet.paste(picture, (left, above))
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(rows):
        draw.text((left - margin, above + (i + 0.5) * height), name, fill="black", font=font, anchor="rm")
    for i, name in enumerate(columns):
        centre = left + (i + 0.5) * picture.width / len(columns)
        draw.text((centre, above / 2), name, fill="black", font=font, anchor="mm")
    return sheet


def rows_of(rows: Mapping[str, Tensor], columns: Sequence[str] = ()) -> Image.Image:
    """Returns one picture of named rows, each of N samples [N, C, H, W] in [-1, 1], under N names or none."""
    images = to_uint8(torch.cat([x.cpu() for x in rows.values()]))
    return captioned(grid(images, len(images) // len(rows)), list(rows), columns)


def png_bytes(pixels: np.ndarray) -> bytes:
    """Returns one image [H, W, C] uint8 as a PNG file's content."""
    return picture_bytes(_pillow(pixels))


def picture_bytes(picture: Image.Image) -> bytes:
    """Returns a picture as a PNG file's content."""
    # Encoded in memory: Pillow takes no notice of a file that takes fewer bytes than it was given.
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def check_png(argument: str, path: PathLike, overwrite: bool = False) -> None:
    """Raises ``ValueError`` unless a .png can be written to ``path``, see :func:`check_writable`."""
    if pathlib.Path(path).suffix.lower() != ".png":
        raise ValueError(f"{argument} must name a .png; got {str(path)!r}")
    check_writable(argument, path, overwrite)


def save_png(picture: Image.Image, path: PathLike) -> None:
    """Writes a PNG, whole or not at all."""
    atomic_write(path, picture_bytes(picture))


def npz_bytes(images: Tensor, labels: Sequence[int] | None, names: tuple[str, str]) -> bytes:
    """Returns images [N, H, W, C] uint8, and their labels, as a .npz file's content."""
    arrays: dict[str, Any] = {names[0]: images.numpy()}
    if labels is not None:
        arrays[names[1]] = np.asarray(labels, dtype=np.int64)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


class Output:
    """The place that samples are written to: ``x.png`` is a grid, ``x.npz`` arrays, a name without a suffix a folder.

    Made before the work is done, so that a path that cannot be written is an error at once.

    Args:
        path: a .png or .npz, replaced as a whole; or a folder of single PNGs, which appear in it all at once.
        overwrite: a file that is there may be replaced, and a folder with files in it may be written to.
        npz_names: "images" (images, labels) or "arr" (arr_0, arr_1, as guided-diffusion's evaluator reads).

    Raises:
        ValueError: ``path`` cannot be written, has another suffix, or is there already and ``overwrite`` is not set.
    """

    def __init__(self, path: PathLike, overwrite: bool = False, npz_names: str = "images") -> None:
        self.path = pathlib.Path(path)
        if npz_names not in NPZ_NAMES:
            raise ValueError(f"npz_names must be one of {', '.join(NPZ_NAMES)}; got {npz_names!r}")
        self.names = NPZ_NAMES[npz_names]
        suffix = self.path.suffix.lower()
        self.kind = suffix if suffix in FORMATS else "folder"
        if self.kind != "folder":
            check_writable("out", self.path, overwrite)
        else:
            check_folder("out", str(path), overwrite, FORMATS)

    def write(
        self, x: Tensor, labels: Sequence[int] | None = None, *, columns: int | None = None, first_sample: int = 0
    ) -> None:
        """Writes samples [N, C, H, W] in [-1, 1]; a folder's files are numbered from ``first_sample``."""
        images = to_uint8(x)
        if self.kind == ".png":
            save_png(grid(images, columns), self.path)
        elif self.kind == ".npz":
            atomic_write(self.path, npz_bytes(images, labels, self.names))
        else:
            numbered = [(f"{first_sample + i:06d}.png", image) for i, image in enumerate(images.numpy())]
            with atomic_folder(self.path) as folder:
                for name, image in numbered:
                    write_new(folder / name, png_bytes(image))

    def write_rows(
        self, given: Mapping[str, Tensor], results: Mapping[str, Tensor], labels: Sequence[int] | None = None
    ) -> None:
        """Writes rows of N samples each: a .png shows all with their names, other kinds hold the results alone."""
        if self.kind == ".png":
            save_png(rows_of({**given, **results}), self.path)
        else:
            repeated = None if labels is None else [*labels] * len(results)
            self.write(torch.cat([x.cpu() for x in results.values()]), repeated)
