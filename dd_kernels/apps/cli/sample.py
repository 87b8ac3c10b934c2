"""Draw images with a trained model; without arguments, 64 handwritten digits into samples.png.

--out NAME.png is one grid, NAME.npz holds the arrays images [N, H, W, C] and labels, a name without a suffix
is a folder of single PNGs, or of shards with --shard-size or torchrun: then the same command goes on where it was
stopped, and every process takes the next shard that is free. An image depends on its number and --seed, not on -n
or --batch-size: image 37 is --first-sample 37 -n 1.
"""

from __future__ import annotations

import argparse
import time

import torch

from ...ops.reverse_step.table import StepTable
from ...samplers.named import FEW_STEP_SAMPLERS
from ..images import Output
from ..processes import Processes
from ..shards.job import labels_in_turn
from . import classifier, common, sampler, shards
from .common import LoadedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("-n", "--num-samples", type=common.count, default=64, help="how many (default: 64)")
    common.add_output_arguments(parser, "samples.png")
    parser.add_argument("--columns", type=common.count, help="images per row of the grid (default: a square)")
    steps = "50 for ddim, all of the model's for ddpm, 10 for dpm++ and unipc, 25 for euler"
    sampler.add_arguments(parser, (*sampler.ONE_STEP, *FEW_STEP_SAMPLERS), "ddim", steps)
    parser.add_argument("--seed", type=common.seed, default=0, help="of all noise (default: 0)")
    parser.add_argument("--first-sample", type=common.integer(0, 2**32 - 1), default=0, help="(default: 0)")
    shards.add_arguments(parser)
    common.add_model_arguments(parser)
    classifier.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Draws the images, writes them, and prints the speed."""
    with Processes.joined() as processes:
        loaded = LoadedModel.from_arguments(args)
        with common.backend_of(args, loaded.device):
            table, classes = sampler.table_of(loaded, args), loaded.labels(args.classes)
            if args.first_sample + args.num_samples > 2**32:
                both = f"{args.first_sample} + {args.num_samples}"
                raise ValueError(f"--first-sample and -n must stay below 2^32 together; got {both}")
            if args.shard_size is not None or processes.count > 1:
                shards.run(loaded, table, shards.job_of(loaded, table, classes, args), args, processes)
            elif args.shard_format is not None:
                raise ValueError(f"--shard-format needs --shard-size; got {args.shard_format}")
            else:
                _run(loaded, table, classes, args)
    return 0


def _run(loaded: LoadedModel, table: StepTable, classes: list[int] | None, args: argparse.Namespace) -> None:
    """Draws all images in one piece."""
    first, n = args.first_sample, args.num_samples
    common.check_images(loaded, n)
    labels = labels_in_turn(classes, first, n)
    output, batches = Output(args.out, args.overwrite, args.npz_names), common.Batches(args.batch_size)
    start = time.perf_counter()
    x = batches.draw(loaded, table, n, labels, seed=args.seed, first_sample=first, progress=not args.no_progress)
    seconds = time.perf_counter() - start
    steps = len(table) * -(-n // batches.size)
    output.write(x, labels, columns=args.columns, first_sample=first)
    print(
        f"{args.out}: {n} images, {args.sampler} with {len(table)} steps, in {seconds:.2f} s: "
        f"{n / seconds:.1f} images/s, {steps / seconds:.1f} steps/s on {_device_name(loaded.device)}, "
        f"backend {loaded.backend_that_runs()}"
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
