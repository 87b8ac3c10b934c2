"""Training images by the name of their source."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

from ..files import PathLike, check_readable
from .arrays import npz_file
from .dataset import ImageData
from .digits import digits
from .folder import image_folder
from .idx import fashion_mnist, idx_folder, is_idx_folder
from .pictures import parse_colour
from .tables import huggingface_folder, table_files

NAMED: dict[str, Callable[[str], ImageData]] = {"digits": digits, "fashion-mnist": fashion_mnist}


def has_held_out(source: PathLike) -> bool:
    """Returns whether a source keeps images for tests: a named one, or IDX files."""
    return os.fspath(source) in NAMED or is_idx_folder(source)


def held_out(source: PathLike, progress: bool = False) -> ImageData:
    """Returns images that training does not see: those of a named source or of IDX files that are kept for tests.

    Of any other source they are all that it has. Raises as :func:`load`.
    """
    source = os.fspath(source)
    if is_idx_folder(source):
        return idx_folder(source, "test")
    return NAMED[source]("test") if source in NAMED else load(source, progress=progress)


def splits(source: PathLike) -> tuple[ImageData, ImageData]:
    """Returns the images for training and the held-out ones of a source that keeps some: a named one, or IDX files.

    Raises:
        ValueError: another source.
    """
    if not has_held_out(source):
        names = ", ".join(map(repr, NAMED))
        raise ValueError(f"data must be {names} or a folder of IDX files, which keep images for tests; got {source!r}")
    return load(source), held_out(source)


def load(
    source: PathLike,
    image_size: int | None = None,
    grey: bool = False,
    progress: bool = False,
    background: str = "grey",
    strict: bool = False,
) -> ImageData:
    """Returns the images of ``source``: a name of ``NAMED``, a .npz file, or a folder: of IDX files, of images, or of a
    Hugging Face dataset.

    Args:
        source: the name or the path.
        image_size, grey, background, strict: how a folder's images are read, see :func:`image_folder`.
        progress: show a tqdm bar.

    Raises:
        ValueError: none of these, or not readable; a folder without ``image_size``; ``grey`` without a folder.
    """
    source = os.fspath(source)
    path = pathlib.Path(source)
    if path.is_dir() and not is_idx_folder(path):
        if image_size is None:
            raise ValueError(f"image_size must be given for the folder of images {source!r}")
        read = huggingface_folder if table_files(path) else image_folder
        return read(path, int(image_size), 1 if grey else 3, progress, parse_colour(background), strict)
    if path.is_dir():
        data = idx_folder(path)
    elif source in NAMED:
        data = NAMED[source]("train")
    elif path.exists():
        data = npz_file(check_readable("data", path))
    else:
        names = ", ".join(map(repr, NAMED))
        raise ValueError(f"data must be {names}, a folder or a .npz file; got {source!r}, which is not there")
    if grey:
        raise ValueError(f"grey may be given only for a folder of images; got it for {source!r}")
    side = data.images.shape[-1]
    if image_size not in (None, side):
        raise ValueError(f"image_size must be that of the data, {side}; got {image_size}")
    return data
