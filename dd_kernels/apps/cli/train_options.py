"""The options of a training run that the commands for models and for classifiers share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from ...nn import CONFIGS
from ...schedules import SCHEDULES
from .. import data
from ..checkpoint import MOST_TIMESTEPS
from ..training import LR_SCHEDULES, PRECISIONS, TrainOptions
from . import common

Add = Callable[..., None]


def _assignment(text: str) -> tuple[str, Any]:
    """An argparse type: NAME=VALUE, the value as JSON or else a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE; got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
    except RecursionError as error:
        raise argparse.ArgumentTypeError(f"{name} is nested too deeply") from error


def adder(parser: argparse.ArgumentParser, title: str) -> Add:
    """Returns what adds arguments to a new group; those that are not given are absent from the namespace."""
    group = parser.add_argument_group(title)

    def add(flag: str, **keywords: Any) -> None:
        group.add_argument(flag, default=argparse.SUPPRESS, **keywords)

    return add


def add_data(add: Add) -> None:
    """Adds where images come from, and how they are read."""
    add(
        "--data",
        help="digits, fashion-mnist, a .npz (images, labels), or a folder: of images (subfolders are classes), of IDX "
        "files by MNIST's names, or of a Hugging Face dataset",
    )
    add("--image-size", type=common.count, help="side in pixels that a folder's images are cropped and resized to")
    add("--grey", action="store_true", help="read a folder's images as grey")
    add("--background", metavar="COLOUR", help="behind transparent pixels (default: grey)")
    add("--strict", action="store_true", help="refuse a folder with broken images instead of skipping them")
    add("--flip", action="store_true", help="mirror half of the images")


def add_network(add: Add) -> None:
    """Adds the network and the forward process that it is trained on."""
    add("--config", choices=CONFIGS, help="U-Net to start from (default: one that fits the images' size)")
    add(
        "--set",
        dest="model",
        type=_assignment,
        nargs="+",
        metavar="NAME=VALUE",
        help="U-Net options, channels=[64,128]",
    )
    add("--schedule", choices=SCHEDULES, help="noise schedule")
    add("--num-timesteps", type=common.integer(1, MOST_TIMESTEPS), help="T")


def add_optimizer(add: Add) -> None:
    """Adds how the network is trained."""
    add("--steps", type=common.count, help="optimizer steps in all")
    add("--batch-size", type=common.count, help="images per step")
    add("--lr", type=common.number, help="learning rate")
    add("--weight-decay", type=common.number, help="AdamW's")
    add("--beta1", type=common.number, help="AdamW's")
    add("--beta2", type=common.number, help="AdamW's")
    add("--warmup", type=common.integer(0), help="steps over which the learning rate grows")
    add("--lr-schedule", choices=LR_SCHEDULES, help="after the warm-up: constant, or a cosine to 0 at the last step")
    add("--clip-grad", type=common.number, help="greatest norm of the gradient; inf: any")
    add("--precision", choices=PRECISIONS, help="of the forward pass")
    add("--seed", type=common.seed, help="of everything random")


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of :class:`TrainOptions` that the arguments give."""
    found = {name: value for name, value in vars(args).items() if name in TrainOptions.__dataclass_fields__}
    if "model" in found:
        found["model"] = dict(found["model"])
    return found


def check_data(options: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` where --data is missing."""
    if "data" not in options:
        raise ValueError(f"--data must be given: {', '.join(data.NAMED)}, a folder or a .npz file")
