"""A Hugging Face dataset on disk: a folder of parquet files, or of the arrow files of ``save_to_disk``."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..files import PathLike, check_readable
from ..memory import check_memory
from .dataset import ImageData
from .folder import report_broken
from .pictures import GREY, Colour, decode_image, load_image

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
SUFFIXES = (".parquet", ".arrow")


def table_files(folder: PathLike) -> list[pathlib.Path]:
    """Returns the parquet and arrow files of a dataset's training split, sorted; [] where the folder holds none.

    They lie in the folder itself, or in its subfolder ``train`` or ``data``. Those of other splits are left out.
    """
    for place in (pathlib.Path(folder), pathlib.Path(folder, "train"), pathlib.Path(folder, "data")):
        if not place.is_dir():
            continue
        files = sorted(path for path in place.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))
        files = [path for path in files if not path.name.startswith(("cache-", "test", "valid"))]
        if files:
            return files
    return []


def huggingface_folder(
    folder: PathLike,
    size: int,
    channels: int = 3,
    progress: bool = False,
    background: Colour = GREY,
    strict: bool = False,
) -> ImageData:
    """Returns the images of a Hugging Face dataset on disk, cropped and resized, and its labels if it has any.

    Args: as those of :func:`image_folder`.

    Raises:
        ValueError: pyarrow is not installed; no column of images; a file that cannot be read; with ``strict`` an image
            that cannot be read.
    """
    rows, names = _rows(table_files(folder))
    check_memory(f"the data {str(folder)!r} at {size} x {size}", len(rows) * channels * size * size)
    images = torch.empty(len(rows), channels, size, size, dtype=torch.uint8)
    labels: list[int] = []
    broken: list[str] = []
    for i, (image, label) in enumerate(tqdm(rows, desc="reading images", unit="image", disable=not progress)):
        try:
            images[len(labels)] = _picture(image, f"row {i}", pathlib.Path(folder), size, channels, background)
            labels.append(-1 if label is None else int(label))
        except ValueError as error:
            broken.append(str(error))
    report_broken(broken, len(rows), str(folder), strict)
    return _labelled(images[: len(labels)], labels, names, folder)


def _labelled(images: torch.Tensor, labels: list[int], names: Sequence[str], folder: PathLike) -> ImageData:
    if -1 in labels:
        if any(label != -1 for label in labels):
            raise ValueError(f"labels in {str(folder)!r} must be given for all images or for none")
        return ImageData(images)
    found = torch.tensor(labels)
    # Where the classes have no names, labels count the classes, of which there are not more than images.
    limit = len(names) or max(len(labels), 2)
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= limit:
        raise ValueError(f"labels in {str(folder)!r} must be in [0, {limit}); got {low} to {high}")
    return ImageData(images, found, tuple(names) or tuple(str(i) for i in range(high + 1)))


def _picture(image: Any, name: str, folder: pathlib.Path, size: int, channels: int, background: Colour) -> torch.Tensor:
    """Returns an image of a row: bytes, or a struct of bytes and path, as the package datasets stores it."""
    if isinstance(image, dict):
        content, path = image.get("bytes"), image.get("path")
        if content is None and path:
            return load_image(folder / path, size, channels, background)
        image = content
    if not isinstance(image, bytes):
        raise ValueError(f"cannot read the image {name!r}: it holds no bytes")
    return decode_image(image, name, size, channels, background)


def _rows(files: Sequence[pathlib.Path]) -> tuple[list[tuple[Any, Any]], list[str]]:
    """Returns (image, label or None) of every row, and the names of the classes."""
    try:
        import pyarrow
    except ImportError as error:
        reason = "parquet and arrow files need pyarrow: pip install 'dd_kernels[huggingface]'"
        raise ValueError(f"cannot read {str(files[0])!r}: {reason}") from error
    rows: list[tuple[Any, Any]] = []
    names: list[str] = []
    for path in files:
        check_readable("data", path)
        try:
            for table in _tables(path):
                rows += _columns(table, path)
                names = names or _class_names(table.schema)
        except (pyarrow.ArrowException, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot read {str(path)!r} as a dataset: {reason}") from error
    if not rows:
        raise ValueError(f"the dataset {str(files[0].parent)!r} holds no rows")
    return rows, names


def _tables(path: pathlib.Path) -> Iterator[Any]:
    import pyarrow.ipc
    import pyarrow.parquet

    if path.suffix == ".parquet":
        yield pyarrow.parquet.read_table(path)
        return
    with open(path, "rb") as file:
        try:
            yield pyarrow.ipc.open_stream(file).read_all()  # as save_to_disk writes it
        except pyarrow.ArrowInvalid:
            file.seek(0)
            yield pyarrow.ipc.open_file(file).read_all()


def _columns(table: Any, path: pathlib.Path) -> list[tuple[Any, Any]]:
    image = next((name for name in IMAGE_COLUMNS if name in table.column_names), None)
    if image is None:
        wanted = " or ".join(map(repr, IMAGE_COLUMNS))
        raise ValueError(f"{str(path)!r} must have a column {wanted}; got {', '.join(table.column_names)}")
    images = table.column(image).to_pylist()
    label = next((name for name in LABEL_COLUMNS if name in table.column_names), None)
    labels = [None] * len(images) if label is None else table.column(label).to_pylist()
    if not all(value is None or type(value) is int for value in labels):
        raise ValueError(f"labels in {str(path)!r} must be integers; got {labels[0]!r}")
    return list(zip(images, labels, strict=True))


def _class_names(schema: Any) -> list[str]:
    """Returns the names of the classes that the package datasets keeps in a schema's metadata, or []."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return next([str(n) for n in features[name]["names"]] for name in LABEL_COLUMNS if name in features)
    except (TypeError, KeyError, ValueError, StopIteration):
        return []
