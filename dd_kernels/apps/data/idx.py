"""Images and labels in IDX files, the format of MNIST and of the data sets that took its place."""

from __future__ import annotations

import gzip
import io
import math
import pathlib
import struct
from dataclasses import replace

import numpy as np
import torch

from ..files import PathLike, bundled, check_readable
from ..memory import check_memory
from .arrays import npz_file
from .dataset import ImageData

# What the names of a split's files begin with.
SPLITS = {"train": "train", "test": "t10k"}
BYTE = 0x08  # the type of a file of bytes
# The most bytes that a byte of a .gz can stand for, since deflate makes 258 of two bits.
BYTES_PER_BYTE = 1032
# Where Debian's package dataset-fashion-mnist puts its files, and the names of their classes (Xiao et al., 2017).
FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def _file(folder: PathLike, split: str, kind: str) -> pathlib.Path | None:
    """Returns the file of images (kind "images-idx3") or of labels, compressed or not; None where there is none."""
    stem = f"{SPLITS[split]}-{kind}-ubyte"
    return next((path for name in (stem, f"{stem}.gz") if (path := pathlib.Path(folder, name)).exists()), None)


def is_idx_folder(folder: PathLike) -> bool:
    """Whether a folder holds a file of training images by MNIST's name."""
    return _file(folder, "train", "images-idx3") is not None


def idx_folder(folder: PathLike, split: str = "train") -> ImageData:
    """Returns the grey images and the labels of a folder's IDX files.

    They are train-images-idx3-ubyte and train-labels-idx1-ubyte, or t10k-... for the held-out ones, each also as .gz.

    Args:
        folder: where the files are.
        split: "train" or "test".

    Raises:
        ValueError: a file is missing or unreadable, or its header is none, or lies; images and labels do not fit.
    """
    images, labels = (_read(folder, split, kind) for kind in ("images-idx3", "labels-idx1"))
    if images.shape[1] != images.shape[2] or 0 in images.shape:
        raise ValueError(f"the images in {str(folder)!r} must be square; got {list(images.shape)}")
    if len(labels) != len(images):
        raise ValueError(f"the labels in {str(folder)!r} must be {len(images)}, one per image; got {len(labels)}")
    found = torch.from_numpy(labels.astype(np.int64))
    return ImageData(torch.from_numpy(images)[:, None], found, tuple(str(i) for i in range(int(found.max()) + 1)))


def fashion_mnist(split: str = "train") -> ImageData:
    """Returns Fashion-MNIST as Debian's package installs it: 60,000 training images of 28 x 28, or 10,000 others.

    Without the package the first 200 of the others are there, which are bundled.

    Raises:
        ValueError: the package is not installed, and the training images are asked for.
    """
    if not is_idx_folder(FASHION):
        if split == "test":
            return replace(npz_file(bundled("fashion.held_out.npz")), classes=FASHION_CLASSES)
        reason = "apt-get install dataset-fashion-mnist, or name the folder of its IDX files instead"
        raise ValueError(f"data 'fashion-mnist' needs the files in {str(FASHION)!r}: {reason}")
    return replace(idx_folder(FASHION, split), classes=FASHION_CLASSES)


def _read(folder: PathLike, split: str, kind: str) -> np.ndarray:
    """Returns the bytes of a file, shaped as its header says; ``kind`` ends in the number of its dimensions."""
    path = _file(folder, split, kind)
    if path is None:
        raise ValueError(f"{str(folder)!r} must hold the file {SPLITS[split]}-{kind}-ubyte or its .gz; got neither")
    check_readable("data", path)
    compressed = path.suffix == ".gz"
    try:
        with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
            limit = path.stat().st_size * (BYTES_PER_BYTE if compressed else 1)
            return _content(file, int(kind[-1]), limit)
    except Exception as error:  # gzip raises OSError, EOFError, zlib.error ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {str(path)!r} as IDX: {reason}") from error


def _content(file: io.BufferedIOBase, dimensions: int, limit: int) -> np.ndarray:
    """Returns what an IDX file holds, of at most ``limit`` bytes; memory is asked for once the header is believed."""
    head = file.read(4 + 4 * dimensions)
    if head[:4] != bytes((0, 0, BYTE, dimensions)):
        raise ValueError(f"it must begin with 0000{BYTE:02x}{dimensions:02x} (hexadecimal); got {head[:4].hex()!r}")
    if len(head) < 4 + 4 * dimensions:
        raise ValueError("its header ends early")
    shape = struct.unpack(f">{dimensions}I", head[4:])
    promised = math.prod(shape)
    if len(head) + promised > limit:
        raise ValueError(f"its header tells of {promised} bytes, more than the file can hold")
    check_memory("its content", promised)
    values = np.empty(promised, np.uint8)
    left = values.data
    while len(left) and (count := file.readinto(left)):
        left = left[count:]
    if len(left) or file.read(1):
        held = f"{promised - len(left)}" if len(left) else "more"
        raise ValueError(f"its header tells of {promised} bytes, the file holds {held}")
    return values.reshape(shape)
