"""``evaluate --guidances`` and ``--classifier-scales``: one sampler at several strengths of guidance."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..evaluate import Strengths
from .argument_types import number
from .classifier import ClassifierGuided
from .common import LoadedModel

STEPS, ROWS = (50,), (0.0,)  # what --steps and --rows are where they are left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --guidances and --classifier-scales."""
    strengths = parser.add_mutually_exclusive_group()
    strengths.add_argument(
        "--guidances",
        type=number,
        nargs="+",
        metavar="SCALE",
        help="measure one sampler (default: eta 0, 50 steps) at each of these scales of --guidance",
    )
    strengths.add_argument(
        "--classifier-scales", type=number, nargs="+", metavar="S", help="the same at each scale of --classifier"
    )


def axis(args: argparse.Namespace) -> str | None:
    """Returns which strengths are measured, "guidance" or "classifier scale", or None."""
    if args.guidances is not None:
        return "guidance"
    return None if args.classifier_scales is None else "classifier scale"


def check(args: argparse.Namespace) -> None:
    """Raises ``ValueError`` for options that do not go with several strengths."""
    if axis(args) is None:
        return
    flag = f"--{axis(args)}s".replace(" ", "-")
    for name in ("steps", "etas"):
        if len(getattr(args, name) or [0]) != 1:
            raise ValueError(f"--{name} must be one with {flag}; got {getattr(args, name)}")
    if args.guidances is not None and args.guidance != 1:
        raise ValueError(f"--guidance must be left out with {flag}; got {args.guidance}")
    if args.classifier_scales is not None:
        if args.classifier is None or args.classifier_scale is not None:
            raise ValueError(f"{flag} needs --classifier, without --classifier-scale; got {args.classifier_scales}")
        if not all(map(math.isfinite, args.classifier_scales)):
            raise ValueError(f"{flag} must be finite numbers; got {args.classifier_scales}")


def of_each_row(args: argparse.Namespace) -> dict[str, None]:
    """Returns the option that each row of the table has for its own, as one that is None for all."""
    return {} if axis(args) is None else {"guidance" if args.guidances is not None else "classifier_scale": None}


def of_arguments(loaded: LoadedModel, args: argparse.Namespace, classes: Sequence[int] | None) -> Strengths | None:
    """Returns the strengths asked for, with the model and its conditions at each; None without any."""
    name = axis(args)
    if name is None:
        return None
    return Strengths(name, {s: {"model": m.network, **m.conditions(classes)} for s, m in _guided(loaded, args)})


def _guided(loaded: LoadedModel, args: argparse.Namespace) -> Iterator[tuple[float, LoadedModel]]:
    """Yields each strength and the model guided so."""
    for scale in args.guidances or ():
        yield scale, replace(loaded, guidance=loaded.guidance._replace(scale=scale))
    for scale in args.classifier_scales or ():
        assert isinstance(loaded.network, ClassifierGuided)
        yield scale, replace(loaded, network=loaded.network.scaled(scale))
