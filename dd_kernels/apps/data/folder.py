"""A folder of images, whose subfolders are classes."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..files import PathLike
from ..memory import check_memory
from .dataset import ImageData
from .pictures import GREY, Colour, load_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Left by macOS and Windows; names that begin with a dot (._x.png, .ipynb_checkpoints) are ignored as well.
IGNORED = ("__MACOSX", "Thumbs.db", "desktop.ini")
# A message names at most this many broken images.
NAMED = 5


def image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files under ``folder`` whose names end like an image's, sorted; symbolic links are followed.

    Raises:
        ValueError: a symbolic link leads back to a folder that it lies in.
    """
    return sorted(_walk(folder, (os.path.realpath(folder),)))


def _walk(folder: pathlib.Path, above: tuple[str, ...]) -> Iterator[pathlib.Path]:
    with os.scandir(folder) as entries:
        listed = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in IGNORED]
    for entry in listed:
        path = folder / entry.name
        if not entry.is_dir():
            if path.suffix.lower() in SUFFIXES:
                yield path
            continue
        real = os.path.realpath(path)
        if real in above:
            raise ValueError(f"the symbolic link {str(path)!r} leads back to {real!r}, which it lies in")
        yield from _walk(path, (*above, real))


def image_folder(
    folder: PathLike,
    size: int,
    channels: int = 3,
    progress: bool = False,
    background: Colour = GREY,
    strict: bool = False,
) -> ImageData:
    """Returns every image under ``folder``; its subfolders, if one of them has images, are the classes.

    Hidden files and what macOS and Windows leave behind are ignored. Images that cannot be read are skipped, with one
    warning that counts them and names the first.

    Args:
        folder: read in sorted order, subfolders of subfolders too; symbolic links are followed.
        size: side in pixels; each image is cropped to its central square and resized.
        channels: 3 (RGB) or 1 (grey).
        progress: show a tqdm bar.
        background: colour behind transparent pixels.
        strict: refuse a folder with images that cannot be read.

    Raises:
        ValueError: no images; images both beside and inside the class folders; a loop of symbolic links; with
            ``strict`` an image that cannot be read.
    """
    folder = pathlib.Path(folder)
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB); got {channels}")
    try:
        files = image_files(folder)
    except OSError as error:
        raise ValueError(f"cannot read the folder {str(error.filename or folder)!r}: {error.strerror}") from error
    if not files:
        raise ValueError(f"the folder {str(folder)!r} holds no images ({', '.join(SUFFIXES)})")
    check_memory(f"the data {str(folder)!r} at {size} x {size}", len(files) * channels * size * size)
    images, files = _read(files, folder, size, channels, progress, background, strict)
    names = [path.relative_to(folder).parts for path in files]
    classes = tuple(sorted({parts[0] for parts in names if len(parts) > 1}))
    if classes and any(len(parts) == 1 for parts in names):
        beside = next(path for path, parts in zip(files, names, strict=True) if len(parts) == 1)
        raise ValueError(f"subfolders of {str(folder)!r} are classes, but {beside.name!r} lies beside them")
    labels = torch.tensor([classes.index(parts[0]) for parts in names]) if classes else None
    return ImageData(images, labels, classes)


def _read(
    files: Sequence[pathlib.Path],
    folder: pathlib.Path,
    size: int,
    channels: int,
    progress: bool,
    background: Colour,
    strict: bool,
) -> tuple[Tensor, list[pathlib.Path]]:
    """Returns the images that can be read, and their files."""
    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
    good: list[pathlib.Path] = []
    broken: list[str] = []
    for path in tqdm(files, desc="reading images", unit="image", disable=not progress):
        try:
            images[len(good)] = load_image(path, size, channels, background)
            good.append(path)
        except ValueError as error:
            broken.append(str(error))
    report_broken(broken, len(files), str(folder), strict)
    return images[: len(good)], good


def report_broken(broken: Sequence[str], count: int, source: str, strict: bool) -> None:
    """Warns of images that were skipped.

    Raises:
        ValueError: there are some and ``strict`` is set, or all are broken.
    """
    if not broken:
        return
    listed = "; ".join(broken[:NAMED]) + (f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else "")
    if strict or len(broken) == count:
        raise ValueError(f"{len(broken)} of {count} images in {source!r} are broken: {listed}")
    warnings.warn(f"skipped {len(broken)} of {count} images in {source!r}: {listed}", stacklevel=4)
