"""Train a U-Net on digits, Fashion-MNIST, a folder of images or IDX files, a Hugging Face dataset or a .npz file.

Writes --out MODEL.safetensors, with the averaged weights (which sample loads) and the training state (which --resume
continues from), and MODEL.samples.png, with 64 samples. Ctrl-C, SIGTERM and SIGHUP save first. Processes that torchrun
starts share the images of each step; another number of them may resume the run. Options left out have
DDPM's values for CIFAR-10; with --data digits, those that the bundled digits model was trained with, and with --data
fashion-mnist those of a model that trains in an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace

import torch

from ...samplers.rows import PREDICTIONS
from .. import data, images, training
from ..processes import Processes
from ..training import LOSS_WEIGHTS, RECIPES, TIMESTEPS, Parallel, TrainOptions
from . import common, train_options
from .train_options import Add


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments; those of ``TrainOptions`` are absent unless given."""
    parser.add_argument("--out", required=True, help="the model file to write, a .safetensors")
    parser.add_argument("--resume", action="store_true", help="continue the run that wrote --out")
    parser.add_argument(
        "--resume-if-there",
        action="store_true",
        help="continue the run that wrote --out, by the same command, or begin it (for torchrun --max-restarts)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model and a grid that are there")
    parser.add_argument(
        "--save-every", type=common.integer(0), default=1000, help="steps (default: 1000; 0: at the end)"
    )
    parser.add_argument(
        "--sample-every", type=common.integer(0), default=1000, help="steps (default: 1000; 0: at the end)"
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="values of options left out (default: those for --data, where it is a name)",
    )
    parser.add_argument(
        "--preview", metavar="PICTURE.png", help="write a picture of the first images as training sees them, and stop"
    )
    parser.add_argument(
        "--no-state", action="store_true", help="leave the training state out of the finished file (no --resume)"
    )
    parser.add_argument("--half", action="store_true", help="with --no-state: weights of the finished file in float16")
    parser.add_argument("--plot", metavar="PICTURE.png", help="draw the loss by step when the run ends")
    parser.add_argument(
        "--evolution", metavar="PICTURE.png", help="add a row of samples to a picture every --sample-every steps"
    )
    parser.add_argument(
        "--accumulate",
        type=common.count,
        default=1,
        metavar="K",
        help="go through a process's images of a step in K micro-batches, for less memory (default: 1)",
    )
    parser.add_argument(
        "--shard-model",
        action="store_true",
        help="keep a share of weights, averages and moments in each of torchrun's processes (FSDP2), in place of all",
    )
    common.add_run_arguments(parser)
    add = train_options.adder(parser, "options of the run (with --resume as before, but for --steps)")
    train_options.add_data(add)
    train_options.add_network(add)
    _add_objective(add)
    train_options.add_optimizer(add)
    add("--accelerate", action="store_true", help="rewrite the model by dd_kernels.accelerate; pays in fp32 on a CPU")


def _add_objective(add: Add) -> None:
    add("--prediction", choices=PREDICTIONS, help="what the model predicts")
    add("--label-drop", type=common.number, help="share of labels dropped, for guidance")
    add("--unconditional", action="store_true", help="ignore the labels")
    add("--loss-weight", choices=LOSS_WEIGHTS, help="of L_simple: by timestep, so that --snr-gamma bounds it (min-snr)")
    add("--snr-gamma", type=common.number, help="gamma of --loss-weight min-snr (default: 5)")
    add("--timesteps", choices=TIMESTEPS, help="how a batch's are drawn: alike, or more often where losses are large")
    add("--input-perturbation", type=common.number, help="gamma of DDPM-IP; 0.1 in the paper (default: 0)")
    add(
        "--ema",
        type=common.number,
        nargs="+",
        metavar="DECAY",
        help="of the averaged weights; of several the first is the file's own, and sample --ema takes the others",
    )


def _options(args: argparse.Namespace) -> TrainOptions:
    """Returns the options given, over those of the resumed run or over the defaults for the data."""
    given = train_options.given(args)
    if args.resume:
        if args.recipe is not None:
            raise ValueError(f"--recipe must be left out with --resume; got {args.recipe}")
        before = training.resumed_options(args.out)
        return replace(before, **given)
    train_options.check_data(given)
    return TrainOptions(**{**RECIPES.get(args.recipe or given["data"], {}), **given})


def _preview(options: TrainOptions, args: argparse.Namespace) -> int:
    """Writes a grid of the first images that training would see: cropped, resized, normalised and flipped."""
    images.check_png("--preview", args.preview, args.overwrite)
    dataset = data.load(
        options.data, options.image_size, options.grey, not args.no_progress, options.background, options.strict
    )
    shown = replace(options, batch_size=min(len(dataset), training.GRID))
    batch = training.make_batch(dataset, shown, None, 0)
    images.save_png(images.grid(images.to_uint8(batch.x_start)), args.preview)
    low, high = batch.x_start.aminmax()
    channels, height, width = batch.x_start.shape[1:]
    classes = ", ".join(dataset.classes[:10]) + (" ..." if len(dataset.classes) > 10 else "")
    print(
        f"{args.preview}: {len(batch.x_start)} of {len(dataset)} images, {height} x {width} x {channels}, "
        f"values from {low:.2f} to {high:.2f}, {len(dataset.classes)} classes{': ' if classes else ''}{classes}"
    )
    return 0


def run(args: argparse.Namespace) -> int:
    """Trains, and prints the step and the loss."""
    if args.resume_if_there and (args.resume or args.overwrite):
        raise ValueError("only one of --resume-if-there, --resume and --overwrite may be given; got two")
    if args.preview is not None:
        return _preview(_options(args), args)
    device = common.device(args.device)
    with Processes.joined(device) as processes, common.backend_of(args, device):
        return _train(args, device, processes)


def _train(args: argparse.Namespace, device: torch.device, processes: Processes) -> int:
    """Trains, among all processes; the first one prints."""
    resume = args.resume or (args.resume_if_there and processes.largest(os.path.exists(args.out)) > 0)
    processes.first_alone(lambda: training.check_out(args.out, resume, args.overwrite))
    options, parallel = processes.together(lambda: (_options(args), _parallel(args, processes)))
    start = time.perf_counter()
    trainer = training.train(
        options,
        args.out,
        resume=resume,
        overwrite=args.overwrite,
        save_every=args.save_every,
        sample_every=args.sample_every,
        device=device,
        progress=not args.no_progress,
        keep_state=not args.no_state,
        half=args.half,
        plot=args.plot,
        evolution=args.evolution,
        parallel=parallel,
    )
    seconds = time.perf_counter() - start
    where = f"{device}" if processes.count == 1 else f"{processes.count} processes, the first on {device}"
    loss, stopped = f"loss {trainer.loss:.4f}, {seconds:.0f} s on {where}", trainer.stopped_by
    if stopped is not None:
        told = f"stopped by {stopped.name} and saved at step {trainer.step}: {loss}; --resume goes on"
    else:
        told = f"{args.out}: step {trainer.step}, {loss}; samples in {training.grid_path(args.out)}"
    if parallel.is_first:
        print(told)
    return 0 if stopped is None else 128 + stopped


def _parallel(args: argparse.Namespace, processes: Processes) -> Parallel:
    """Returns how the processes share a step."""
    if args.shard_model:
        from ..training.sharded import Sharded  # a second of imports

        return Sharded(processes, args.accumulate)
    return Parallel(processes, args.accumulate)
