"""``evaluate --bits-per-dim``: the bound of held-out images, and its terms."""

from __future__ import annotations

import argparse
from typing import Any

from ...likelihood import Process
from .. import data
from ..evaluate import BitsPerDim, bits_per_dim
from ..evaluate.results import LEARNED
from ..evaluate.table import SAMPLES
from . import common, real_images
from .common import LoadedModel

VARIANCES = ("fixed_small", "fixed_large", LEARNED)
# Options of the other measurements, and of this one.
OF_SAMPLES = ("steps", "etas", "spacing", "classifier", "guidances", "classifier_scales")
OF_BOUND = ("variance",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this measurement."""
    parser.add_argument(
        "--bits-per-dim",
        action="store_true",
        help="measure the variational bound of held-out images instead of samples; -n says of how many",
    )
    parser.add_argument(
        "--variance", choices=VARIANCES, help="of the bound (default: fixed_small; the learned one of a model with it)"
    )


def check(args: argparse.Namespace) -> None:
    """Raises ``ValueError`` for options that belong to another measurement."""
    wrong = OF_SAMPLES if args.bits_per_dim else OF_BOUND
    for name in wrong:
        if getattr(args, name) is not None:
            where = "with" if args.bits_per_dim else "without"
            raise ValueError(f"--{name} must be left out {where} --bits-per-dim; got {getattr(args, name)}")
    if args.bits_per_dim and args.guidance != 1:
        raise ValueError(f"--guidance must be 1 with --bits-per-dim; got {args.guidance}")
    if args.bits_per_dim and len(args.num_samples or [0]) != 1:
        raise ValueError(f"--num-samples must be one number with --bits-per-dim; got {args.num_samples}")


def measure(loaded: LoadedModel, args: argparse.Namespace) -> BitsPerDim:
    """Returns the bound of the first images that are held out.

    Raises:
        ValueError: the model is not of these images, or has no such variance.
    """
    held_out = data.held_out(common.data_of(loaded, args), progress=not args.no_progress)
    common.check_shape(loaded, tuple(held_out.images.shape[1:]))
    learned = loaded.learns_variance
    if (args.variance not in (None, LEARNED) and learned) or (args.variance == LEARNED and not learned):
        kind = "learns its variance" if learned else "does not learn its variance"
        raise ValueError(f"--variance {args.variance} does not fit a model that {kind}")
    process = Process(
        model=loaded.model,
        schedule=loaded.info.make_schedule(),
        prediction=loaded.info.prediction,
        variance=args.variance or (LEARNED if learned else "fixed_small"),
    )
    labels = real_images.own_labels(loaded, held_out)
    options: dict[str, Any] = {"labels": labels, "seed": args.seed, "batch_size": args.batch_size}
    n = min(SAMPLES, len(held_out)) if args.num_samples is None else args.num_samples[0]
    return bits_per_dim(process, held_out, n=n, device=loaded.device, progress=not args.no_progress, **options)
