"""Predicts the time of 50,000 images on many devices, from the figures of one: a simulation of the queue of shards.

``python -m benchmarks.many_devices`` prints the table. Each device starts, loads the model, and
takes the next free shard until none is left, as ``dd_kernels.apps.shards`` does. To make a shard count, a device reads
and rewrites the manifest under a lock, one device at a time. Devices differ: the speed of each, in each shard, is that
of one device times a log-normal factor, and a share of the devices is slower throughout.

What is not in it: a file system that slows down where many write, the search for a shard that no other device has
begun, a restart after a failure, and the speed of a batch that is smaller than the one that was measured.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dd_kernels.apps.shards import Job, Manifest, formats

from .results import figure, markdown

RESULTS = Path(__file__).parent / "results" / "amd_epyc.json"


@dataclass(frozen=True)
class Device:
    """Figures of a single device.

    Args:
        rate: images per second.
        load: seconds from the start of the process to its first batch.
        write: seconds to write a shard of 500 images and to bring it to the disk; of others in proportion.
        commit: seconds to rewrite a manifest without shards, and what each shard in it adds.
        spread: standard deviation of the logarithm of a shard's speed.
        slow: share of the devices that are slower throughout, and by what factor.
    """

    rate: float
    load: float
    write: float
    commit: tuple[float, float]
    spread: float = 0.02
    slow: tuple[float, float] = (0.02, 1.3)


@dataclass(frozen=True)
class Outcome:
    """Seconds until the last shard counts, and what the devices spent them on, in the mean over all devices."""

    seconds: float
    loading: float
    drawing: float
    writing: float
    waiting: float

    @property
    def idle(self) -> float:
        """Seconds after a device's last shard, while others still draw."""
        return max(0.0, self.seconds - self.loading - self.drawing - self.writing - self.waiting)


def simulate(device: Device, devices: int, images: int, shard_size: int, seed: int = 0) -> Outcome:
    """Runs the queue: the device that is free first takes the next shard, and waits for the manifest after it."""
    draw = random.Random(seed)
    (slow, factor), (first, further) = device.slow, device.commit
    pace = [(factor if draw.random() < slow else 1.0) / device.rate for _ in range(devices)]
    events = [(device.load, number, False) for number in range(devices)]  # when, which device, whether it has drawn
    begun = committed = 0
    drawing = writing = waiting = manifest = 0.0
    while events:
        now, number, has_drawn = heapq.heappop(events)
        if has_drawn:
            waiting += max(0.0, manifest - now)
            seconds = first + further * committed
            manifest, committed = max(now, manifest) + seconds, committed + 1
            writing += seconds
            heapq.heappush(events, (manifest, number, False))
        elif begun < images:
            count = min(shard_size, images - begun)
            begun += count
            drawn, written = count * pace[number] * draw.lognormvariate(0.0, device.spread), count / 500 * device.write
            drawing, writing = drawing + drawn, writing + written
            heapq.heappush(events, (now + drawn + written, number, True))
    return Outcome(manifest, device.load, drawing / devices, writing / devices, waiting / devices)


def measured_files(image: Sequence[int] = (3, 32, 32)) -> tuple[float, tuple[float, float]]:
    """Returns ``write`` and ``commit`` of this machine and its disk: the least of nine times, since others use it."""
    with tempfile.TemporaryDirectory() as name:
        job = Job("", "", {}, "", None, 0, 0, 50_000, list(image), 50, "npz")
        manifest, shards = Manifest(Path(name), job), job.shards
        pixels = torch.randint(256, (500, *image), dtype=torch.uint8)
        file = manifest.folder / "a.npz"
        write = _least(lambda: formats.write(file, job.format, 0, pixels, None))
        commits = []
        for count in (0, len(shards) - 1):
            manifest.start()
            manifest._write({job.name(shard): "0" * 64 for shard in shards[:count]})
            commits.append(_least(lambda: manifest.add(shards[-1], "1" * 64)))
    return write, (commits[0], max(0.0, commits[1] - commits[0]) / len(shards))


def _least(action: Callable[[], object]) -> float:
    times = []
    for _ in range(9):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def measured_rate(results: Path, case: str, steps: int) -> float:
    """Returns the images per second of a run of ``steps`` steps, from the largest batch of a case in the results.

    Raises:
        ValueError: no row has the case.
    """
    rows = [row for row in json.loads(results.read_text())["parts"]["end_to_end"]["rows"] if row["case"] == case]
    if not rows:
        raise ValueError(f"case must be that of a row in {str(results)!r}; got {case!r}")
    row = max(rows, key=lambda row: row["shape"][0])
    return row["shape"][0] / (1e-6 * row["us"] * steps)


def table_of(device: Device, images: int, counts: list[int], sizes: list[int]) -> Iterator[tuple[str, ...]]:
    """Yields the rows of the table."""
    yield ("devices", "images per shard", "seconds", "images/s", "load", "draw", "write", "wait", "idle", "efficiency")
    for count in counts:
        for size in sizes:
            outcome = simulate(device, count, images, size)
            share = (outcome.loading, outcome.drawing, outcome.writing, outcome.waiting, outcome.idle)
            yield (
                str(count),
                str(size),
                figure(outcome.seconds),
                figure(images / outcome.seconds),
                *(f"{100 * part / outcome.seconds:.1f}%" for part in share),
                f"{images / outcome.seconds / (count * device.rate):.0%}",
            )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many_devices", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="single-device figures (%(default)s)")
    parser.add_argument("--case", default="cifar10 ddim", help="model and sampler in them (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--images-per-second", type=float, help="of one device, in place of the results'")
    parser.add_argument("--load", type=float, default=10.0, help="seconds from start to first batch (%(default)s)")
    parser.add_argument("--spread", type=float, default=0.02, help="of a shard's speed (%(default)s)")
    parser.add_argument(
        "--slow", type=float, nargs=2, default=(0.02, 1.3), metavar=("SHARE", "FACTOR"), help="(%(default)s)"
    )
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--shard-sizes", type=int, nargs="+", default=[500, 100, 25])
    options = parser.parse_args()
    rate = options.images_per_second or measured_rate(options.results, options.case, options.steps)
    device = Device(rate, options.load, *measured_files(), options.spread, tuple(options.slow))
    print(f"Predicted, not measured. {options.images} images; of one device: {device}\n")
    print(markdown(list(table_of(device, options.images, options.devices, options.shard_sizes))))


if __name__ == "__main__":
    main()
