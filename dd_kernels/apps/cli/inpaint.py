"""Paint a part of images anew, to fit the rest (RePaint, Lugmayr et al., 2022).

--mask is a picture whose white pixels are painted, or half (the lower one) or centre. Without arguments the lower
halves of held-out images of the model's own data. A .png shows the images, what is known of them, and the results; a
.npz or a folder holds the results, row by row. --resample 1 is plain replacement.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from ...sampling import inpaint
from .. import data
from ..images import Output
from ..shards.job import labels_in_turn
from . import common, real_images, sampler
from .common import LoadedModel

MASKS = ("half", "centre")
STEPS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    real_images.add_arguments(parser, 10)
    parser.add_argument(
        "--mask", default="half", help="a picture, white where to paint; or half, centre (default: half)"
    )
    parser.add_argument("--draws", type=common.count, default=3, help="paintings of each image (default: 3)")
    parser.add_argument(
        "--resample", type=common.count, default=5, help="how often each step is taken; more fits better (default: 5)"
    )
    parser.add_argument(
        "--jump", type=common.count, default=5, help="steps that are taken again at a time (default: 5)"
    )
    sampler.add_arguments(parser, sampler.ONE_STEP, "ddpm", str(STEPS))
    parser.add_argument("--seed", type=common.seed, default=0, help="of all noise (default: 0)")
    common.add_output_arguments(parser, "inpainted.png")
    common.add_model_arguments(parser, "the images' own, or none")


def _mask(name: str, size: int) -> Tensor:
    """Returns the mask, bool [size, size]."""
    if name in MASKS:
        middle, centre = torch.arange(size) >= size // 2, torch.zeros(size, dtype=torch.bool)
        centre[size // 4 : size - size // 4] = True
        return middle[:, None].expand(size, size) if name == "half" else centre[:, None] & centre
    mask = data.load_image(name, size, 1)[0] >= 128
    if not mask.any():
        raise ValueError(f"--mask must have white pixels, which are painted; got none in {name!r}")
    return mask


def run(args: argparse.Namespace) -> int:
    """Paints the images and writes them."""
    loaded = LoadedModel.from_arguments(args)
    with common.backend_of(args, loaded.device):
        table, output = sampler.table_of(loaded, args, STEPS), Output(args.out, args.overwrite, args.npz_names)
        mask = _mask(args.mask, loaded.info.sample_shape[1])
        images, labels = real_images.load(loaded, args)
        n = len(images)
        common.check_images(loaded, n * args.draws)
        x = inpaint(
            loaded.model,
            images.repeat(args.draws, 1, 1, 1),
            mask,
            table,
            loaded.info.make_schedule(),
            resample=args.resample,
            jump=args.jump,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=not args.no_progress,
            **loaded.conditions(labels_in_turn(labels, 0, n * args.draws)),
        )
        known = torch.where(mask.to(images.device), 0.0, images)
        results = {f"painted {i + 1}": part for i, part in enumerate(x.chunk(args.draws))}
        output.write_rows({"original": images, "known": known}, results, labels)
        print(
            f"{args.out}: {n} images, {int(mask.sum())} of {mask.numel()} pixels painted, {args.sampler} with "
            f"{len(table)} steps, taken {args.resample} times, on {loaded.device}"
        )
    return 0
