"""Encode held-out images by DDIM into their latents and decode them: the error, which falls with the number of steps.

Prints table 2 of DDIM (Song et al., 2021, section 5.4): the squared error per value, of images scaled to [0, 1]. A .png
shows the images above what comes back, a row for each number of steps; a .npz or a folder holds that, row by row.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...samplers import ddim, ddim_inversion
from ...samplers.timesteps import SPACINGS
from ...sampling import sample
from .. import plots
from ..files import atomic_write
from ..images import Output
from . import common, real_images
from .common import LoadedModel

STEPS = (10, 20, 50, 100, 200)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    real_images.add_arguments(parser, 10)
    parser.add_argument(
        "--steps",
        type=common.count,
        nargs="+",
        help=f"the numbers of steps, each way (default: those of {' '.join(map(str, STEPS))} that the model has)",
    )
    parser.add_argument("--spacing", choices=SPACINGS, default="leading", help="of the timesteps (default: leading)")
    common.add_output_arguments(parser, "reconstructed.png")
    parser.add_argument("--plot", metavar="PICTURE.png", help="where to plot the error against the steps")
    common.add_model_arguments(parser, "the images' own, or none")


def _there_and_back(loaded: LoadedModel, images: Tensor, steps: int, args: argparse.Namespace, **run: Any) -> Tensor:
    """Returns what DDIM makes of the latents of ``images``; neither way clips x_0, so that one undoes the other."""
    schedule = loaded.info.make_schedule()
    kind: dict[str, Any] = {"steps": steps, "spacing": args.spacing, "prediction": loaded.info.prediction}
    kind["learned_variance"] = loaded.learns_variance
    for table in (ddim_inversion(schedule, **kind), ddim(schedule, clip=None, **kind)):
        images = sample(loaded.model, images, table, **run)
    return images


def _errors(images: Tensor, results: Mapping[int, Tensor]) -> dict[int, tuple[float, float]]:
    """Returns for each number of steps the mean squared error of values in [0, 1], and its standard error."""
    errors = {}
    for steps, x in results.items():
        each = ((x - images).double() / 2).square().flatten(1).mean(dim=1)
        errors[steps] = (float(each.mean()), float(each.std(correction=min(1, len(each) - 1)) / len(each) ** 0.5))
    return errors


def _plot(errors: Mapping[int, tuple[float, float]]) -> bytes:
    figure = plots.figure(6, 4)
    axes = figure.add_subplot()
    means, bars = zip(*errors.values(), strict=True)
    axes.errorbar(list(errors), means, yerr=bars, marker="o", capsize=3)
    axes.set(xscale="log", yscale="log", xlabel="steps, each way", ylabel="squared error per value")
    axes.set_title("DDIM: images encoded and decoded")
    axes.grid(alpha=0.3, which="both")
    return plots.png(figure)


def run(args: argparse.Namespace) -> int:
    """Reconstructs the images, prints the errors and writes the pictures."""
    loaded = LoadedModel.from_arguments(args)
    with common.backend_of(args, loaded.device):
        output = Output(args.out, args.overwrite, args.npz_names)
        if args.plot is not None:
            plots.check_plot("--plot", args.plot, args.overwrite)
        images, labels = real_images.load(loaded, args)
        numbers = args.steps or [steps for steps in STEPS if steps <= loaded.info.num_timesteps]
        common.check_images(loaded, len(images) * len(numbers))
        options = {"batch_size": args.batch_size, "progress": not args.no_progress, **loaded.conditions(labels)}
        results = {steps: _there_and_back(loaded, images, steps, args, **options) for steps in numbers}
        errors = _errors(images, results)
        plot = None if args.plot is None else _plot(errors)
        output.write_rows({"original": images}, {f"{steps} steps": x for steps, x in results.items()}, labels)
    if plot is not None:
        atomic_write(args.plot, plot)
    print("| steps | squared error | standard error |\n| ----: | ------------: | -------------: |")
    for steps, (mean, error) in errors.items():
        print(f"| {steps:5} | {mean:13.6f} | {error:14.6f} |")
    print(f"\n{args.out}: {len(images)} images, values in [0, 1], DDIM without noise, on {loaded.device}")
    return 0
