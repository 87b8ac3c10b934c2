"""Images in a .npz file."""

from __future__ import annotations

import pathlib
import zipfile

import numpy as np
import torch
from torch import Tensor

from ..files import PathLike, check_readable
from ..memory import check_memory
from .dataset import ImageData

# Our names and those of guided-diffusion's scripts, for images and labels.
NAMES = (("images", "labels"), ("arr_0", "arr_1"))


def npz_file(path: PathLike) -> ImageData:
    """Returns ``images`` [N, H, W, C] uint8 (C 1 or 3, or [N, H, W]) and ``labels`` [N], if it has any, of a .npz.

    ``arr_0`` and ``arr_1``, as guided-diffusion writes them, mean the same.

    Raises:
        ValueError: not a regular file, unreadable, pickled, or arrays of another name, shape or dtype.
    """
    path = check_readable("data", path)
    try:
        arrays = _arrays(path)
    except Exception as error:  # numpy raises OSError, ValueError, EOFError, BadZipFile, zlib.error ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {str(path)!r} as .npz: {reason}") from error
    images_name, labels_name = NAMES[1] if "arr_0" in arrays else NAMES[0]
    images = arrays.get(images_name)
    if images is None:
        raise ValueError(f"{str(path)!r} must hold an array 'images' (or 'arr_0') [N, H, W, C]")
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{images_name} in {str(path)!r} must be uint8 [N, H, W, C] with C 1 or 3; "
            f"got {images.dtype} {list(images.shape)}"
        )
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"{images_name} in {str(path)!r} must be square; got {images.shape[1]} x {images.shape[2]}")
    labels = arrays.get(labels_name)
    checked = None if labels is None else _checked_labels(labels_name, labels, len(images), path)
    classes = () if checked is None else tuple(str(i) for i in range(int(checked.max()) + 1))
    return ImageData(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), checked, classes)


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays that have one of our names, each only if it is as long as its header says."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in (name for names in NAMES for name in names):
            if f"{name}.npy" not in archive.namelist():
                continue
            with archive.open(f"{name}.npy") as member:
                version = np.lib.format.read_magic(member)
                read_header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read_header(member)
                promised = int(np.prod([int(side) for side in shape], dtype=object)) * dtype.itemsize
                held = archive.getinfo(f"{name}.npy").file_size - member.tell()
            if promised != held:
                raise ValueError(f"the header of {name!r} tells of {promised} bytes, the file of {held}")
            check_memory(f"the array {name!r}", 2 * promised)
            with archive.open(f"{name}.npy") as member:
                found[name] = np.lib.format.read_array(member, allow_pickle=False)
    return found


def _checked_labels(name: str, labels: np.ndarray, count: int, path: pathlib.Path) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(f"{name} in {str(path)!r} must be {count} integers; got {labels.dtype} {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= max(count, 2):
        raise ValueError(f"{name} in {str(path)!r} must count from 0; got {labels.min()} to {labels.max()}")
    return torch.from_numpy(labels.astype(np.int64))
