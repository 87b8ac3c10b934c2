"""Draws a folder of shards for ``sample``, alone or among the processes that torchrun started."""

from __future__ import annotations

import argparse
import pathlib
import time
import warnings

from torch import Tensor
from tqdm import tqdm

from ... import __version__
from ...ops.reverse_step.table import StepTable
from .. import checkpoint
from ..images import NPZ_NAMES
from ..processes import Processes
from ..shards import FORMATS, MANIFEST, Job, Manifest, Shard, draw_all
from ..shards.job import model_digest, table_digest
from . import common, guidance
from .common import LoadedModel

SHARD_SIZE = 500  # images, where torchrun starts several processes and no size is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --shard-size and --shard-format."""
    parser.add_argument(
        "--shard-size",
        type=common.count,
        help=f"draw into the folder --out in shards of so many images, which the same command resumes (default: one "
        f"piece; {SHARD_SIZE} with torchrun, whose processes share the shards)",
    )
    parser.add_argument("--shard-format", choices=FORMATS, help="(default: npz; tar is WebDataset's)")


def job_of(loaded: LoadedModel, table: StepTable, labels: list[int] | None, args: argparse.Namespace) -> Job:
    """Returns what the arguments ask for.

    Raises:
        ValueError: an argument that shards have no use for.
    """
    for name in ("columns", "overwrite"):
        if getattr(args, name):
            raise ValueError(f"--{name} must be left out with shards; got it")
    names = ("sampler", "dtype", *guidance.OPTIONS, "accelerate", "npz_names")
    options = {name: getattr(args, name) for name in names}
    options |= {"classifier": None, "classifier_scale": loaded.classifier_scale}
    if args.classifier is not None:
        options["classifier"] = model_digest(args.classifier)
    options |= {"steps": len(table), "eta": args.eta, "variance": args.variance, "clip": repr(args.clip)}
    return Job(
        version=__version__,
        model=model_digest(checkpoint.model_path(args.model)),
        table=table_digest(table),
        options=options,
        labels=labels,
        seed=args.seed,
        first_sample=args.first_sample,
        num_samples=args.num_samples,
        image=list(loaded.info.sample_shape),
        shard_size=SHARD_SIZE if args.shard_size is None else args.shard_size,
        format=args.shard_format or "npz",
    )


def run(loaded: LoadedModel, table: StepTable, job: Job, args: argparse.Namespace, processes: Processes) -> None:
    """Draws the job's missing shards into --out, and prints the speed of all processes together."""
    common.check_images(loaded, job.shard_size)
    manifest = Manifest(_folder(args.out), job)
    processes.first_alone(lambda: _begin(manifest))
    there = job.num_samples - sum(shard.count for shard in manifest.missing())
    batches = common.Batches(args.batch_size)

    def draw(shard: Shard) -> Tensor:
        labels = job.labels_of(shard)
        return batches.draw(loaded, table, shard.count, labels, seed=job.seed, first_sample=shard.first)

    silent = args.no_progress or processes.rank > 0
    start = time.perf_counter()
    with tqdm(total=job.num_samples, initial=there, desc="sampling", unit="image", disable=silent) as bar:
        draw_all(manifest, draw, lambda count: bar.update(count - bar.n), NPZ_NAMES[args.npz_names])
    seconds = time.perf_counter() - start
    if processes.rank == 0:
        drawn = job.num_samples - there
        print(
            f"{args.out}: {job.num_samples} images in {len(job.shards)} shards, {drawn} of them drawn now in "
            f"{seconds:.2f} s by {processes.count} processes: {drawn / seconds:.1f} images/s"
        )


def _folder(out: str) -> pathlib.Path:
    """Returns the folder --out.

    Raises:
        ValueError: it is a file, or a folder with files that are no shards.
    """
    folder = pathlib.Path(out)
    if folder.suffix or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"--out must be a folder (a name without a suffix) with shards; got {out!r}")
    if (
        folder.is_dir()
        and not (folder / MANIFEST).exists()
        and any(not p.name.startswith(".") for p in folder.iterdir())
    ):
        raise ValueError(f"--out: the folder {out!r} holds files already, and no {MANIFEST}")
    return folder


def _begin(manifest: Manifest) -> None:
    """Starts the job or goes on with it; shards that were altered since are drawn again."""
    manifest.start()
    damaged = manifest.damaged()
    if damaged:
        manifest.forget(damaged)
        named = ", ".join(damaged[:5])
        warnings.warn(f"shards missing or altered, drawn again: {len(damaged)} ({named})", stacklevel=2)
