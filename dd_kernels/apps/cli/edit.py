"""Change images: noise is added up to a strength and taken away again (SDEdit, Meng et al., 2022).

Without arguments held-out images of the model's own data, at four strengths. --classes says what they become. A .png
shows the images above the results, a row for each strength; a .npz or a folder holds the results, row by row.
"""

from __future__ import annotations

import argparse

from ...sampling import image_to_image
from ..images import Output
from . import common, real_images, sampler
from .common import LoadedModel

STRENGTHS = (0.2, 0.4, 0.6, 0.8)
STEPS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    real_images.add_arguments(parser, 10)
    parser.add_argument(
        "--strength",
        type=common.number,
        nargs="+",
        default=STRENGTHS,
        help="in [0, 1], the share of the timesteps that are taken back: 0 changes nothing, 1 keeps nothing "
        f"(default: {' '.join(map(str, STRENGTHS))})",
    )
    sampler.add_arguments(parser, sampler.ONE_STEP, "ddpm", f"of the whole sampler: {STEPS}, or 50 for ddim")
    parser.add_argument("--seed", type=common.seed, default=0, help="of all noise (default: 0)")
    common.add_output_arguments(parser, "edited.png")
    common.add_model_arguments(parser, "the images' own, or none")


def run(args: argparse.Namespace) -> int:
    """Changes the images and writes them."""
    loaded = LoadedModel.from_arguments(args)
    with common.backend_of(args, loaded.device):
        table, output = sampler.table_of(loaded, args, STEPS), Output(args.out, args.overwrite, args.npz_names)
        images, labels = real_images.load(loaded, args)
        common.check_images(loaded, len(images) * len(args.strength))
        results = {
            f"strength {strength:g}": image_to_image(
                loaded.model,
                images,
                table,
                loaded.info.make_schedule(),
                strength=strength,
                seed=args.seed,
                batch_size=args.batch_size,
                progress=not args.no_progress,
                **loaded.conditions(labels),
            )
            for strength in args.strength
        }
        output.write_rows({"original": images}, results, labels)
        print(
            f"{args.out}: {len(images)} images at the strengths {', '.join(f'{s:g}' for s in args.strength)}, "
            f"{args.sampler} with {len(table)} steps at strength 1, on {loaded.device}"
        )
    return 0
