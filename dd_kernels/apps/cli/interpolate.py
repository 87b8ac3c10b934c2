"""Walk between two images: along their DDIM latents (Song et al., 2021, section 5.3), or as DDPM does.

--method ddim: the ends are the latents x_T of two seeds (a row for every class), or of two image files, whose latents
come from DDIM inversion. --method ddpm: two image files, or what two seeds draw, are diffused to --depth, mixed and
denoised (Ho et al., 2020, section 4.3). --out as for sample; in a grid each row is one walk.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from ...ops import randn
from ...samplers import ddim, ddim_inversion
from ...sampling import interpolate as between_images
from ...sampling import sample, slerp
from ..images import Output
from ..shards.job import labels_in_turn
from . import common, real_images, sampler
from .common import LoadedModel

Labels = list[int] | None


METHODS = ("ddim", "ddpm")
DDPM_STEPS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--seeds", type=common.seed, nargs=2, default=(0, 1), metavar=("A", "B"), help="(default: 0 1)")
    ends.add_argument("--images", nargs=2, metavar=("A", "B"), help="two image files instead of two seeds")
    parser.add_argument("--method", choices=METHODS, default="ddim", help="(default: ddim)")
    parser.add_argument(
        "--depth",
        type=common.count,
        help="ddpm: how many of the model's timesteps to diffuse; 500 of 1000 in the paper, whose images of 256 x 256 "
        "stay recognisable there (default: a quarter of them)",
    )
    parser.add_argument("--seed", type=common.seed, help="ddpm: of the noise, which a row's images share (default: 0)")
    parser.add_argument("-n", "--frames", type=common.integer(2), default=11, help="images per walk (default: 11)")
    parser.add_argument("--rows", type=common.count, help="walks between seeds (default: one per class, or 8)")
    common.add_step_arguments(parser, f"50, each way; ddpm: {DDPM_STEPS} of the whole sampler")
    common.add_output_arguments(parser, "interpolation.png")
    common.add_model_arguments(parser, "all; none with --images, and for ddpm")


def _latents_of_seeds(loaded: LoadedModel, seeds: tuple[int, int], rows: int) -> Tensor:
    """Returns x_T of all rows of the first seed, then of the second."""
    shape = (rows, *loaded.info.sample_shape)
    return torch.cat([randn(shape, seed=seed, device=loaded.device) for seed in seeds])


def _images(loaded: LoadedModel, paths: list[str], rows: int) -> Tensor:
    """Returns the first image for all rows, then the second."""
    x_start = real_images.read_files(loaded, paths).batch(torch.arange(2))[0]
    return x_start.to(loaded.device).repeat_interleave(rows, dim=0)


def _ddim_walks(loaded: LoadedModel, rows: int, labels: Labels, args: argparse.Namespace) -> Tensor:
    """Returns walks along the arc between DDIM's latents, [rows frames, C, H, W]."""
    schedule, options = loaded.info.make_schedule(), common.ddim_options(loaded, args)
    run = {"batch_size": args.batch_size, "progress": not args.no_progress}
    # Inversion does not clip, so the way back from its latent must not clip either.
    table = ddim(schedule, clip=None if args.images else 1.0, **options)
    if args.images:
        both, inversion = _images(loaded, args.images, rows), ddim_inversion(schedule, **options)
        x_T = sample(loaded.model, both, inversion, **run, **loaded.conditions(labels and labels * 2))
    else:
        x_T = _latents_of_seeds(loaded, args.seeds, rows)
    first, second = x_T.chunk(2)
    mixed = slerp(first, second, torch.linspace(0, 1, args.frames)).flatten(0, 1)
    return sample(loaded.model, mixed, table, **run, **loaded.conditions(_of_frames(labels, args.frames)))


def _ddpm_walks(loaded: LoadedModel, rows: int, labels: Labels, args: argparse.Namespace) -> Tensor:
    """Returns walks between images that are diffused, mixed and denoised, [rows frames, C, H, W]."""
    schedule = loaded.info.make_schedule()
    depth = max(1, len(schedule) // 4) if args.depth is None else args.depth
    if depth > len(schedule):
        raise ValueError(f"--depth must be at most the model's {len(schedule)} timesteps; got {depth}")
    run = {"batch_size": args.batch_size, "progress": not args.no_progress}
    table = sampler.ancestral(loaded, args.steps or min(DDPM_STEPS, len(schedule)), args.spacing)
    if args.images:
        both = _images(loaded, args.images, rows)
    else:
        x_T, drawn_by = _latents_of_seeds(loaded, args.seeds, rows), ddim(schedule, **common.ddim_options(loaded, args))
        both = sample(loaded.model, x_T, drawn_by, **run, **loaded.conditions(labels and labels * 2))
    first, second = both.chunk(2)
    walks = between_images(
        loaded.model,
        first,
        second,
        torch.linspace(0, 1, args.frames),
        table,
        schedule,
        strength=depth / len(schedule),
        seed=args.seed or 0,
        **run,
        **loaded.conditions(_of_frames(labels, args.frames)),
    )
    return walks.flatten(0, 1)


def _of_frames(labels: Labels, frames: int) -> Labels:
    """Returns the label of each image of each walk."""
    return labels and [label for label in labels for _ in range(frames)]


def run(args: argparse.Namespace) -> int:
    """Draws the walks and writes them."""
    loaded = LoadedModel.from_arguments(args)
    with common.backend_of(args, loaded.device):
        for name in ("depth", "seed"):
            if args.method == "ddim" and getattr(args, name) is not None:
                raise ValueError(f"--{name} must be left out with --method ddim; got {getattr(args, name)}")
        if args.images and args.rows is not None:
            raise ValueError(f"--rows must be left out with --images (a walk per class); got {args.rows}")
        labels = loaded.labels(args.classes, default="none" if args.images or args.method == "ddpm" else "all")
        output = Output(args.out, args.overwrite, args.npz_names)
        per_class = len(labels or [0])
        rows = args.rows or (per_class if args.images or per_class > 1 else 8)
        common.check_images(loaded, rows * args.frames)
        walks = _ddim_walks if args.method == "ddim" else _ddpm_walks
        labels = labels_in_turn(labels, 0, rows)
        x = walks(loaded, rows, labels, args)
        output.write(x, _of_frames(labels, args.frames), columns=args.frames)
        print(f"{args.out}: {rows} walks of {args.frames} images, {args.method}, on {loaded.device}")
    return 0
