"""Draw one page of pictures that explains diffusion, with any model: a HTML file that a browser opens as it is.

An image turns into noise, noise into an image with what the model predicts on the way, the schedules with their
signal-to-noise ratio, the same noise under every sampler and number of steps: each with its equation.
"""

from __future__ import annotations

import argparse
import pathlib

from tqdm import tqdm

from .. import plots
from ..checkpoint import DEFAULT
from ..explain import COLUMNS, Drawing, page, sections
from ..files import atomic_write, check_writable
from ..shards.job import labels_in_turn
from . import common, real_images
from .common import LoadedModel

IMAGES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    real_images.add_arguments(parser, IMAGES)
    parser.add_argument("--seed", type=common.seed, default=0, help="of all noise (default: 0)")
    parser.add_argument("--out", default="explain.html", help="a .html (default: explain.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    common.add_model_arguments(parser, "all, in turn")


def run(args: argparse.Namespace) -> int:
    """Draws the page and writes it."""
    if pathlib.Path(args.out).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out must name a .html; got {args.out!r}")
    check_writable("--out", args.out, args.overwrite)
    plots.figure(1, 1)
    loaded = LoadedModel.from_arguments(args)
    with common.backend_of(args, loaded.device):
        labels = labels_in_turn(loaded.labels(args.classes), 0, COLUMNS)
        drawing = Drawing(
            loaded.model,
            loaded.info.make_schedule(),
            {"prediction": loaded.info.prediction, "learned_variance": loaded.learns_variance},
            real_images.load(loaded, args)[0],
            lambda numbers: loaded.conditions(labels and [labels[i] for i in numbers]),
            args.seed,
        )
        parts = list(tqdm(sections(drawing), "drawing", 5, unit="picture", disable=args.no_progress))
    name, info = args.model or DEFAULT, loaded.info
    intro = (
        f"Drawn with the model {name}: {sum(p.numel() for p in loaded.model.parameters()):,} parameters, which predict "
        f"{info.prediction} over {info.num_timesteps} timesteps of the {info.schedule} schedule."
    )
    footer = f"python -m dd_kernels explain, seed {args.seed}."
    atomic_write(args.out, page("How a diffusion model draws", intro, parts, footer).encode())
    print(f"{args.out}: {len(parts)} pictures of the model {name}, on {loaded.device}")
    return 0
