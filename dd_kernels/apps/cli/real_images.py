"""The real images that a command starts from: files, or held-out images of the data that the model was trained on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import data
from ..data import ImageData
from ..shards.job import labels_in_turn
from . import common
from .common import LoadedModel


def add_arguments(parser: argparse.ArgumentParser, number: int) -> None:
    """Adds --images, --data and -n, by default ``number``."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--images", nargs="+", metavar="FILE", help="image files, whose central squares are resized to the model's size"
    )
    source.add_argument("--data", help="where held-out images come from; as train takes it (default: the model's own)")
    parser.add_argument("-n", "--num-images", type=common.count, help=f"how many held-out ones (default: {number})")
    parser.set_defaults(default_images=number)


def read_files(loaded: LoadedModel, paths: Sequence[str]) -> ImageData:
    """Returns image files as squares of the model's size."""
    channels, size, _ = loaded.info.sample_shape
    return ImageData(torch.stack([data.load_image(path, size, channels) for path in paths]))


def own_labels(loaded: LoadedModel, images: ImageData) -> Tensor | None:
    """Returns the images' own labels; those of "no class" where they have none and the model knows it."""
    classes, null_label = loaded.model.config["num_classes"], loaded.model.null_label
    if classes is None:
        return None
    if images.labels is not None and len(images.classes) == classes:
        return images.labels
    if null_label is None:
        raise ValueError(f"the held-out images must have labels of the model's {classes} classes; got other images")
    return torch.full((len(images),), null_label)


def load(loaded: LoadedModel, args: argparse.Namespace) -> tuple[Tensor, list[int] | None]:
    """Returns images [N, C, H, W] in [-1, 1] on the model's device, and their labels: their own, or --classes in turn.

    Raises:
        ValueError: images that are not there, or do not fit the model; more of them than there are.
    """
    if args.images:
        if args.num_images is not None:
            raise ValueError(f"-n must be left out with --images; got {args.num_images}")
        images = read_files(loaded, args.images)
    else:
        images = data.held_out(common.data_of(loaded, args), progress=not args.no_progress)
        common.check_shape(loaded, tuple(images.images.shape[1:]))
    n = len(images) if args.images else min(args.default_images, len(images))
    n = n if args.num_images is None else args.num_images
    if n > len(images):
        raise ValueError(f"-n must be at most {len(images)}, the held-out images there are; got {n}")
    x_start = images.batch(torch.arange(n))[0].to(loaded.device)
    if args.classes is not None:
        return x_start, labels_in_turn(loaded.labels(args.classes), 0, n)
    labels = own_labels(loaded, images)
    return x_start, None if labels is None else labels[:n].tolist()
