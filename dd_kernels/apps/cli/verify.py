"""Check a folder of shards that sample drew: every image is there, and no byte has changed."""

from __future__ import annotations

import argparse
import pathlib

from ..shards import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folder", help="that holds the shards and manifest.json")


def run(args: argparse.Namespace) -> int:
    """Prints which shards are missing or altered, which the same ``sample`` command draws; then the status is 1."""
    manifest = Manifest.read(pathlib.Path(args.folder))
    job, missing, damaged = manifest.job, manifest.missing(), manifest.damaged()
    wrong = [f"{name} is missing or altered" for name in damaged]
    wrong += [f"{job.name(shard)} is not drawn yet" for shard in missing]
    for line in wrong:
        print(line)
    print(
        f"{args.folder}: {len(job.shards) - len(wrong)} of {len(job.shards)} shards are whole, {job.num_samples} images"
    )
    return 1 if wrong else 0
