"""The options of guidance: how strongly samples are pushed towards their class, and at which timesteps."""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

from ...nn import UNet
from ...sampling.guidance import Interval, check_guidance
from .argument_types import number

OPTIONS = ("guidance", "guidance_rescale", "guidance_interval")


def _scale_of_weight(text: str) -> float:
    """An argparse type: the scale 1 + w of a weight w."""
    return 1 + number(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --guidance in both conventions, --guidance-rescale and --guidance-interval."""
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument(
        "--guidance",
        type=number,
        default=1.0,
        metavar="SCALE",
        help="classifier-free guidance, uncond + SCALE (cond - uncond); 1 is without (default: 1)",
    )
    scale.add_argument(
        "--guidance-weight",
        dest="guidance",
        type=_scale_of_weight,
        metavar="W",
        help="the same as Ho & Salimans write it, (1 + W) cond - W uncond: --guidance 1 + W",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=number,
        default=0.0,
        help="in [0, 1], how far the guided output's deviation goes back to the conditional one's (default: 0)",
    )
    parser.add_argument(
        "--guidance-interval",
        type=number,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide at these timesteps only, both included (default: at all)",
    )


class Guidance(NamedTuple):
    """What :func:`dd_kernels.sample` is told of guidance, without the labels."""

    scale: float
    rescale: float
    interval: Interval | None

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, model: UNet) -> Guidance:
        """Returns what the arguments say.

        Raises:
            ValueError: they do not fit the model or one another.
        """
        interval = None if args.guidance_interval is None else tuple(args.guidance_interval)
        scales = getattr(args, "guidances", None) or [args.guidance]
        for scale in scales:
            if scale != 1 and model.null_label is None:
                raise ValueError(f"--guidance needs a model trained with dropped labels; got {scale} for one without")
            if not math.isfinite(scale):
                raise ValueError(f"--guidance must be a finite number; got {scale}")
        check_guidance(args.guidance_rescale, interval)
        for name in OPTIONS[1:]:
            if set(scales) == {1} and getattr(args, name):
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be left out with --guidance 1; got {getattr(args, name)}")
        return cls(args.guidance, args.guidance_rescale, interval)

    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments of ``sample``."""
        names = ("guidance_scale", "guidance_rescale", "guidance_interval")
        return dict(zip(names, self, strict=True))
