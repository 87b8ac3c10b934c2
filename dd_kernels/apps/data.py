"""Training images: scikit-learn's digits, a folder, or a .npz file; and words of Philox to pick from them."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ..ops.randn import noise_key
from ..ops.randn.reference import words

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = ("train", "test", "all")
# Streams of the noise contract that the ops leave free.
STREAM_SHUFFLE, STREAM_LABEL_DROP, STREAM_FLIP, STREAM_SPLIT = range(4, 8)


@dataclass(frozen=True)
class ImageData:
    """Images held in memory as bytes, N C H W of them.

    Attributes:
        images: [N, C, H, W] uint8.
        labels: [N] int64 in [0, len(classes)), or None.
        classes: the classes' names, () without labels.
        maximum: the byte that means 1; 0 means -1.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    maximum: int = 255

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every byte and label: tells whether a resumed run has the data that it began with."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes, self.maximum)).encode())
        digest.update(self.images.contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """x_0 [len(index), C, H, W] float32 in [-1, 1], and the labels or None."""
        x_start = self.images[index].to(torch.float32) * (2.0 / self.maximum) - 1.0
        return x_start, None if self.labels is None else self.labels[index]


def uniform_words(count: int, *, seed: int, draw: int, stream: int, first: int = 0) -> Tensor:
    """int64 [count], uniform in [0, 2^32): the first Philox word of (seed; 0, first + n, draw, stream).

    Bit-equal on every machine, so a choice made with them needs no state to be repeated.
    """
    key = noise_key(seed, first, draw, torch.device("cpu"))
    return words(key, count, 4, key[2:3], stream)[:, 0, 0]


@lru_cache(maxsize=4)
def shuffled(count: int, *, seed: int, draw: int, stream: int = STREAM_SHUFFLE) -> Tensor:
    """A permutation of ``count`` indices that depends on (seed, draw, stream) alone; not to be written to."""
    return torch.argsort(uniform_words(count, seed=seed, draw=draw, stream=stream), stable=True)


def digits(split: str = "train") -> ImageData:
    """The 1,797 handwritten digits of UCI (8 x 8, 17 grey levels) as scikit-learn ships them.

    Args:
        split: "train" (1,437 of them), "test" (the other 360, drawn once and for all), or "all".

    Raises:
        ValueError: an unknown split, or scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("data 'digits' needs scikit-learn: pip install 'dd_kernels[digits]'") from error
    source = load_digits()
    images = torch.from_numpy(source.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(source.target.astype(np.int64))
    order = shuffled(len(images), seed=0, draw=0, stream=STREAM_SPLIT)
    held_out = len(images) // 5 + 1
    index = {"train": order[held_out:], "test": order[:held_out], "all": torch.arange(len(images))}[split]
    return ImageData(images[index], labels[index], tuple("0123456789"), maximum=16)


def load_image(path: str | pathlib.Path, size: int, channels: int = 3) -> Tensor:
    """[C, size, size] uint8: the file's largest central square, resized.

    Raises:
        ValueError: the file, which is named, cannot be read as an image.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = file.convert("RGB" if channels == 3 else "L")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise ValueError(f"cannot read the image {str(path)!r}: {_first_line(error)}") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side != size or image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC, box)
    return torch.from_numpy(np.array(image).reshape(size, size, channels)).permute(2, 0, 1).contiguous()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def image_folder(folder: str | pathlib.Path, size: int, channels: int = 3, progress: bool = False) -> ImageData:
    """Every image under ``folder``; its subfolders, if it has any with images, are the classes.

    Args:
        folder: read in sorted order, subfolders of subfolders too.
        size: side in pixels; each image is cropped to its central square and resized.
        channels: 3 (RGB) or 1 (grey).
        progress: show a tqdm bar.

    Raises:
        ValueError: no images; images both beside and inside the class folders; a broken file, which is named.
    """
    folder = pathlib.Path(folder)
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB); got {channels}")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"the folder {str(folder)!r} holds no images ({', '.join(SUFFIXES)})")
    names = [p.relative_to(folder).parts for p in files]
    classes = tuple(sorted({parts[0] for parts in names if len(parts) > 1}))
    if classes and any(len(parts) == 1 for parts in names):
        beside = next(p for p, parts in zip(files, names, strict=True) if len(parts) == 1)
        raise ValueError(f"subfolders of {str(folder)!r} are classes, but {beside.name!r} lies beside them")
    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
    for i, path in enumerate(tqdm(files, desc="reading images", unit="image", disable=not progress)):
        images[i] = load_image(path, size, channels)
    labels = torch.tensor([classes.index(parts[0]) for parts in names]) if classes else None
    return ImageData(images, labels, classes)


def npz_file(path: str | pathlib.Path) -> ImageData:
    """A .npz with ``images`` [N, H, W, C] uint8 (C 1 or 3, or [N, H, W]) and, optionally, ``labels`` [N] integers.

    Raises:
        ValueError: unreadable, pickled, or arrays of another name, shape or dtype.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels") if name in file.files}
    except Exception as error:  # numpy raises OSError, ValueError, EOFError, BadZipFile, zlib.error ...
        raise ValueError(f"cannot read {str(path)!r} as .npz: {_first_line(error)}") from error
    images = arrays.get("images")
    if images is None:
        raise ValueError(f"{str(path)!r} must hold an array 'images' [N, H, W, C]")
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"images in {str(path)!r} must be uint8 [N, H, W, C] with C 1 or 3; got {images.dtype} {list(images.shape)}"
        )
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"images in {str(path)!r} must be square; got {images.shape[1]} x {images.shape[2]}")
    labels = None if "labels" not in arrays else _checked_labels(arrays["labels"], len(images), path)
    classes = () if labels is None else tuple(str(i) for i in range(int(labels.max()) + 1))
    return ImageData(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels, classes)


def _checked_labels(labels: np.ndarray, count: int, path: str | pathlib.Path) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(f"labels in {str(path)!r} must be {count} integers; got {labels.dtype} {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= max(count, 2):
        raise ValueError(f"labels in {str(path)!r} must count from 0; got {labels.min()} to {labels.max()}")
    return torch.from_numpy(labels.astype(np.int64))


def load(source: str, image_size: int | None = None, grey: bool = False, progress: bool = False) -> ImageData:
    """The training images that ``source`` names: "digits", a .npz file or a folder of images.

    Raises:
        ValueError: none of these, or not readable; a folder without ``image_size``; ``grey`` without a folder.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        if image_size is None:
            raise ValueError(f"image_size must be given for the folder of images {source!r}")
        return image_folder(path, image_size, 1 if grey else 3, progress)
    if source == "digits":
        data = digits("train")
    elif path.is_file():
        data = npz_file(path)
    else:
        raise ValueError(
            f"data must be 'digits', a folder of images or a .npz file; got {source!r}, which is not there"
        )
    if grey:
        raise ValueError(f"grey may be given only for a folder of images; got it for {source!r}")
    side = data.images.shape[-1]
    if image_size not in (None, side):
        raise ValueError(f"image_size must be that of the data, {side}; got {image_size}")
    return data


def positions(data: ImageData, first: int, count: int, *, seed: int) -> Tensor:
    """Indices of the ``count`` images at position ``first`` of an endless run of shuffled epochs."""
    size, parts = len(data), []
    while count > 0:
        epoch, offset = divmod(first, size)
        part = shuffled(size, seed=seed, draw=epoch)[offset : offset + count]
        parts.append(part)
        first, count = first + len(part), count - len(part)
    return torch.cat(parts)


def class_indices(names: Sequence[str], classes: Sequence[str], num_classes: int) -> list[int]:
    """The labels of classes given by name or number."""
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
