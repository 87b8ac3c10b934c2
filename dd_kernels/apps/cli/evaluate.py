"""Measure the quality and speed of a model's samples: table 1 of DDIM (Song et al., 2021).

Prints four tables, of samplers (rows) and numbers of steps (columns): the Fréchet distance of the samples to held-out
real images of --data, in the features of a classifier of the others; the shares of samples of the class asked for, and
of those that the classifier is sure of; images/s. The floor is that distance of training images. The classifier for
fashion-mnist is bundled, with the features of real images; another is trained first (for digits in seconds).
--out X.json keeps each cell once it is measured, and with --resume-if-there the same command goes on from there.
With --guidances, or --classifier-scales: accuracy and distance of one sampler against the strength of its guidance.
With --bits-per-dim: the variational bound of held-out images, with its standard error and its terms.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from ...samplers.named import FEW_STEP_SAMPLERS
from ...samplers.timesteps import SPACINGS
from .. import data, plots
from ..checkpoint import DEFAULT, model_path
from ..evaluate import (
    Evaluation,
    Judge,
    KeptCells,
    as_json,
    environment,
    evaluate,
    likelihood_json,
    likelihood_markdown,
    load_judge,
    markdown,
    packaged_judge,
    sampler_table,
    save_judge,
    strengths_markdown,
    strengths_png,
    terms_png,
)
from ..evaluate.results import LARGE, LEARNED
from ..evaluate.table import ROWS, SAMPLES, STEPS, samples_of_columns
from ..files import atomic_write, check_writable, only_writer
from ..shards.job import model_digest
from . import bits_per_dim, classifier, common, guidance, strengths
from .common import LoadedModel
from .report import Report


def row(text: str) -> float | str:
    """An argparse type: eta, a variance of DDPM, or a sampler for few steps."""
    if text in (LARGE, LEARNED) or text in FEW_STEP_SAMPLERS:
        return text
    try:
        eta = float(text)
    except ValueError:
        eta = math.nan
    if not 0 <= eta <= 1:
        names = ", ".join((LARGE, LEARNED, *FEW_STEP_SAMPLERS))
        raise argparse.ArgumentTypeError(f"must be numbers in [0, 1] or among {names}; got {text!r}")
    return eta


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--steps", type=common.count, nargs="+", help="the columns (default: 10 20 50 100 1000)")
    parser.add_argument(
        "--etas",
        "--rows",
        type=row,
        nargs="+",
        help="the rows: DDIM's eta, fixed_large for DDPM's larger variance, learned_range for the model's, or a "
        f"sampler for few steps: {', '.join(FEW_STEP_SAMPLERS)} (default: 0 0.2 0.5 1 fixed_large dpm++, and "
        "learned_range for a model that learns its variance)",
    )
    parser.add_argument(
        "-n",
        "--num-samples",
        type=common.integer(2),
        nargs="+",
        help="samples per cell, once or for each column; a distance of fewer is biased upwards more "
        f"(default: {SAMPLES})",
    )
    parser.add_argument("--spacing", choices=SPACINGS, help="of the timesteps (default: leading)")
    parser.add_argument("--seed", type=common.seed, default=0, help="of all noise (default: 0)")
    parser.add_argument(
        "--data",
        help="real images, of which the held-out ones are taken; as train takes it (default: those that the model was "
        "trained on, or digits)",
    )
    parser.add_argument(
        "--judge", help="a .safetensors to read the classifier and the real images' features from, or to keep them in"
    )
    bits_per_dim.add_arguments(parser)
    strengths.add_arguments(parser)
    parser.add_argument(
        "--plot",
        metavar="PICTURE.png",
        help="where to plot the bound's terms by timestep, or accuracy and distance against the guidance",
    )
    parser.add_argument("--out", help="to write too: a .md (the tables), a .json (everything) or a folder for both")
    parser.add_argument("--overwrite", action="store_true", help="replace --out, or write to a folder with files")
    parser.add_argument(
        "--resume-if-there",
        action="store_true",
        help="go on from the cells that --out X.json keeps of the same command, or begin",
    )
    common.add_model_arguments(parser, classes=None)
    classifier.add_arguments(parser)


def _rows(loaded: LoadedModel, args: argparse.Namespace) -> Sequence[float | str]:
    """Returns the rows asked for; by default those of every model, and the learned variance of one that has it."""
    if strengths.axis(args) is not None:
        return args.etas or strengths.ROWS
    return args.etas or (*ROWS, *([LEARNED] if loaded.learns_variance else []))


def _steps(args: argparse.Namespace) -> Sequence[int]:
    """Returns the columns asked for, or those by default."""
    return args.steps or (STEPS if strengths.axis(args) is None else strengths.STEPS)


def _check_resume(args: argparse.Namespace) -> None:
    """Raises ``ValueError`` where --resume-if-there has no file of cells to go on from."""
    if not args.resume_if_there:
        return
    if args.overwrite:
        raise ValueError("only one of --resume-if-there and --overwrite may be given; got both")
    if not _keeps_cells(args):
        raise ValueError(
            f"--resume-if-there needs --out X.json, without --bits-per-dim; got --out {args.out}"
            + (" with it" if args.bits_per_dim else "")
        )


def _keeps_cells(args: argparse.Namespace) -> bool:
    """Returns whether the measurement has cells that --out keeps as JSON."""
    return args.out is not None and args.out.lower().endswith(".json") and not args.bits_per_dim


def _check_samplers(loaded: LoadedModel, args: argparse.Namespace) -> None:
    """Raises ``ValueError`` for steps that the model's schedule does not have, before the classifier is trained."""
    schedule = loaded.info.make_schedule()
    kind: dict[str, Any] = {"prediction": loaded.info.prediction, "learned_variance": loaded.learns_variance}
    for row in _rows(loaded, args):
        for steps in _steps(args):
            sampler_table(schedule, row, steps, spacing=args.spacing or "leading", **kind)
    common.check_images(loaded, max(_samples(args)))


def _samples(args: argparse.Namespace) -> list[int]:
    """Returns the number of samples of each column."""
    return samples_of_columns(args.num_samples or SAMPLES, _steps(args))


def _check_fits(loaded: LoadedModel, shape: tuple[int, ...], num_classes: int) -> None:
    classes = loaded.num_classes
    common.check_shape(loaded, shape)
    if classes not in (None, num_classes):
        raise ValueError(f"--model must have the {num_classes} classes of the data, or none; got {classes}")


def _judge(loaded: LoadedModel, args: argparse.Namespace) -> Judge:
    """Returns the judge in the file --judge or bundled for the data, or trains one, and keeps it in --judge."""
    source = common.data_of(loaded, args)
    kept = packaged_judge(source) if args.judge is None else pathlib.Path(args.judge)
    if kept is not None and kept.exists():
        judge = load_judge(kept)
        _check_fits(loaded, judge.shape, judge.num_classes)
        return judge
    if kept is not None:
        check_writable("--judge", kept)
    train, held_out = data.splits(source)
    _check_fits(loaded, tuple(held_out.images.shape[1:]), len(held_out.classes))
    judge = Judge.trained(train, held_out)
    if kept is None:
        return judge
    save_judge(kept, judge)
    return load_judge(kept)  # whose features are rounded, so that this run's figures are those of later ones


def _measure(loaded: LoadedModel, judge: Judge, args: argparse.Namespace, kept: KeptCells | None) -> Evaluation:
    samples = _samples(args)
    classes = None if loaded.num_classes is None else judge.labels(max(samples)).tolist()
    rows = strengths.of_arguments(loaded, args, classes)
    return evaluate(
        loaded.network,
        loaded.info.make_schedule(),
        judge,
        n=samples,
        steps=_steps(args),
        rows=_rows(loaded, args),
        prediction=loaded.info.prediction,
        learned_variance=loaded.learns_variance,
        spacing=args.spacing or "leading",
        seed=args.seed,
        progress=not args.no_progress,
        kept=kept,
        strengths=rows,
        batch_size=args.batch_size,
        **({} if rows is not None else loaded.conditions(classes)),
    )


def run(args: argparse.Namespace) -> int:
    """Measures samples or the bound, prints the tables and writes them."""
    bits_per_dim.check(args)
    strengths.check(args)
    _check_resume(args)
    if args.plot is not None:
        if not args.bits_per_dim and strengths.axis(args) is None:
            wanted = "--bits-per-dim, --guidances or --classifier-scales"
            raise ValueError(f"--plot must be left out without {wanted}; got {args.plot}")
        plots.check_plot("--plot", args.plot, args.overwrite)
    loaded = LoadedModel.from_arguments(args)
    alone = only_writer("--out", args.out) if _keeps_cells(args) else contextlib.nullcontext()
    with common.backend_of(args, loaded.device), alone:
        report = None if args.out is None else Report(args.out, args.overwrite or args.resume_if_there)
        start = time.perf_counter()
        contents, plot = _measured(loaded, args, start)
    print(contents[".md"], end="")
    if report is not None:
        report.write(contents)
    if plot is not None:
        atomic_write(args.plot, plot)
    return 0


def _measured(loaded: LoadedModel, args: argparse.Namespace, start: float) -> tuple[dict[str, str], bytes | None]:
    """Returns the measurement's text for each suffix, and its plot, if it has one."""
    if args.bits_per_dim:
        bound = bits_per_dim.measure(loaded, args)
        facts = _timed_facts(loaded, args, start)
        plot = None if args.plot is None else terms_png(bound)
        return {".md": likelihood_markdown(bound, facts), ".json": likelihood_json(bound, facts)}, plot
    _check_samplers(loaded, args)
    judge = _judge(loaded, args)
    kept = KeptCells(args.out, _facts(loaded, args), args.resume_if_there) if _keeps_cells(args) else None
    evaluation = _measure(loaded, judge, args, kept)
    facts = _timed_facts(loaded, args, start, 0.0 if kept is None else kept.seconds_before)
    if strengths.axis(args) is None:
        return {".md": markdown(evaluation, facts), ".json": as_json(evaluation, facts)}, None
    plot = None if args.plot is None else strengths_png(evaluation)
    return {".md": strengths_markdown(evaluation, facts), ".json": as_json(evaluation, facts)}, plot


def _facts(loaded: LoadedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Returns what a measurement runs on, and with what options."""
    return {
        **environment(loaded.device, loaded.backend_that_runs()),
        "model": args.model or DEFAULT,
        "model_sha256": model_digest(model_path(args.model)),
        "ema": args.ema,
        "classes": list(loaded.classes) or list(map(str, range(loaded.num_classes or 0))),
        "dtype": args.dtype,
        "accelerate": args.accelerate,
        **{name: getattr(args, name) for name in guidance.OPTIONS},
        "classifier": args.classifier,
        "classifier_sha256": None if args.classifier is None else model_digest(args.classifier),
        "classifier_scale": loaded.classifier_scale,
        **strengths.of_each_row(args),
        "batch_size": args.batch_size,
    }


def _timed_facts(loaded: LoadedModel, args: argparse.Namespace, start: float, before: float = 0.0) -> dict[str, Any]:
    """Returns the same of a measurement that has run, with the seconds since ``start`` and those ``before``."""
    return {**_facts(loaded, args), "seconds": round(before + time.perf_counter() - start, 1)}
