"""Train a classifier of noisy images, by which sample --classifier guides a model (Dhariwal & Nichol 2021).

Writes --out CLASSIFIER.safetensors when it is done, and prints the accuracy by timestep, on images held out where the
data have some. It must be trained on the schedule of the model that it guides. Options left out have values for
--data; digits take half a minute of one core.
"""

from __future__ import annotations

import argparse
import time

from .. import data, training
from ..classifier_file import save_classifier
from ..data import ImageData
from ..files import check_writable
from ..training import TrainOptions
from . import common, train_options

RECIPES = training.CLASSIFIER_RECIPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments; those of ``TrainOptions`` are absent unless given."""
    parser.add_argument("--out", required=True, help="the classifier's file to write, a .safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="values of options left out (default: those for --data, where it is a name)",
    )
    common.add_run_arguments(parser)
    add = train_options.adder(parser, "options of the run")
    train_options.add_data(add)
    train_options.add_network(add)
    train_options.add_optimizer(add)


def _options(args: argparse.Namespace) -> TrainOptions:
    """Returns the options given, over those of the recipe and the defaults of classifiers."""
    given = train_options.given(args)
    train_options.check_data(given)
    recipe = RECIPES.get(args.recipe or given["data"], {})
    return TrainOptions(**{**training.CLASSIFIER_DEFAULTS, **recipe, **given})


def _images(options: TrainOptions, progress: bool) -> tuple[ImageData, ImageData, str]:
    """Returns the training images, those to measure the accuracy on, and what these are."""
    read = (options.image_size, options.grey, progress, options.background, options.strict)
    images = data.load(options.data, *read)
    if data.has_held_out(options.data):
        return images, data.held_out(options.data, progress), "held-out"
    return images, images, "training"


def run(args: argparse.Namespace) -> int:
    """Trains, writes the file, and prints the accuracy by timestep."""
    if not args.out.endswith(".safetensors"):
        raise ValueError(f"--out must end in .safetensors; got {args.out!r}")
    check_writable("--out", args.out, args.overwrite)
    options, device, progress = _options(args), common.device(args.device), not args.no_progress
    images, measured, which = _images(options, progress)
    with common.backend_of(args, device):
        start = time.perf_counter()
        classifier, info = training.train_noisy_classifier(options, images, device, progress)
        seconds = time.perf_counter() - start
        shares = training.accuracy_by_timestep(classifier, info, measured, options.seed)
    save_classifier(args.out, classifier.state_dict(), info)
    by_timestep = ", ".join(f"{share:.1%} at {timestep}" for timestep, share in shares.items())
    print(
        f"{args.out}: step {options.steps}, loss {info.training['loss']:.4f}, {seconds:.0f} s on {device}\n"
        f"accuracy by timestep on {len(measured)} {which} images: {by_timestep}"
    )
    return 0
