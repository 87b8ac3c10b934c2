"""Walk between two images along their DDIM latents (Song et al., 2021, section 5.3).

The ends are the latents x_T of two seeds (a row for every class), or of two image files, whose latents
come from DDIM inversion. --out as for sample; in a grid each row is one walk.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from ...ops import randn
from ...samplers import ddim, ddim_inversion
from ...sampling import sample, slerp
from .. import data
from ..images import Output
from . import common
from .common import LoadedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--seeds", type=common.seed, nargs=2, default=(0, 1), metavar=("A", "B"), help="(default: 0 1)")
    ends.add_argument("--images", nargs=2, metavar=("A", "B"), help="two image files instead of two seeds")
    parser.add_argument("-n", "--frames", type=common.integer(2), default=11, help="images per walk (default: 11)")
    parser.add_argument("--rows", type=common.count, help="walks between seeds (default: one per class, or 8)")
    common.add_step_arguments(parser, "50, each way")
    common.add_output_arguments(parser, "interpolation.png")
    common.add_model_arguments(parser)


def _ends_of_seeds(loaded: LoadedModel, seeds: tuple[int, int], rows: int) -> tuple[Tensor, Tensor]:
    shape = (rows, *loaded.info.sample_shape)
    first, second = (randn(shape, seed=seed, device=loaded.device) for seed in seeds)
    return first, second


def _ends_of_images(
    loaded: LoadedModel, paths: list[str], labels: list[int] | None, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Returns x_T of both files, once for each label."""
    channels, size, _ = loaded.info.sample_shape
    pixels = data.ImageData(torch.stack([data.load_image(path, size, channels) for path in paths]))
    x_start = pixels.batch(torch.arange(2))[0].to(loaded.device)
    table = ddim_inversion(loaded.info.make_schedule(), **common.ddim_options(loaded, args))
    rows = 1 if labels is None else len(labels)
    both = x_start.repeat_interleave(rows, dim=0)  # [2 rows, C, H, W]
    conditions = loaded.conditions(None if labels is None else labels * 2)
    x_T = sample(loaded.model, both, table, batch_size=args.batch_size, progress=not args.no_progress, **conditions)
    first, second = x_T.chunk(2)
    return first, second


def run(args: argparse.Namespace) -> int:
    """Interpolates the latents, draws the images, writes them."""
    loaded = LoadedModel.from_arguments(args)
    with common.backend_of(args, loaded.device):
        labels = loaded.labels(args.classes, default="none" if args.images else "all")
        # Inversion does not clip, so the way back from its latent must not clip either.
        clip = None if args.images else 1.0
        table = ddim(loaded.info.make_schedule(), clip=clip, **common.ddim_options(loaded, args))
        output = Output(args.out, args.overwrite, args.npz_names)
        if args.images:
            if args.rows is not None:
                raise ValueError(f"--rows must be left out with --images (a walk per class); got {args.rows}")
            common.check_images(loaded, args.frames * (1 if labels is None else len(labels)))
            a, b = _ends_of_images(loaded, args.images, labels, args)
        else:
            rows = args.rows or (8 if labels is None else len(labels))
            common.check_images(loaded, rows * args.frames)
            labels = None if labels is None else [labels[i % len(labels)] for i in range(rows)]
            a, b = _ends_of_seeds(loaded, args.seeds, rows)
        x_T = slerp(a, b, torch.linspace(0, 1, args.frames)).flatten(0, 1)
        every_label = None if labels is None else [label for label in labels for _ in range(args.frames)]
        x = sample(
            loaded.model,
            x_T,
            table,
            batch_size=args.batch_size,
            progress=not args.no_progress,
            **loaded.conditions(every_label),
        )
        output.write(x, every_label, columns=args.frames)
        print(f"{args.out}: {len(a)} walks of {args.frames} images, ddim with {len(table)} steps, on {loaded.device}")
    return 0
