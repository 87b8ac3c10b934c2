"""Requests that come at random moments: a running batch beside one image at a time and beside whole batches.

``python -m benchmarks.serving`` prints, for a Poisson load, images per second and the time from a request to its image.

- running batch: :class:`dd_kernels.Sampler`, where a new request takes a free place at the next step.
- whole batches: as many requests as wait, up to the same number, are drawn together from the first step to the last,
  with those that ask for the same sampler and number of steps; the others wait.
- one at a time: the oldest request is drawn alone.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch

import dd_kernels as dd
from dd_kernels import Sampler, SampleRequest, StepTable
from dd_kernels.apps import checkpoint

from .results import figure, markdown


@dataclass(frozen=True)
class Arrival:
    """A request and the second at which it comes."""

    second: float
    request: SampleRequest


def arrivals(tables: Sequence[StepTable], count: int, rate: float, seed: int = 0) -> list[Arrival]:
    """Returns requests of a Poisson process, ``rate`` a second, with one of the tables each."""
    choose, second, found = random.Random(seed), 0.0, []
    for number in range(count):
        second += choose.expovariate(rate)
        kwargs = {"y": torch.tensor([number % 10])}
        found.append(Arrival(second, SampleRequest(choose.choice(tables), number, model_kwargs=kwargs)))
    return found


class _Clock:
    """Tells which requests have come, and notes how long each took."""

    def __init__(self, load: Sequence[Arrival]) -> None:
        self.load, self.next, self.seconds = load, 0, list[float]()
        self.start = time.perf_counter()

    def arrived(self, wait: bool) -> list[Arrival]:
        """Returns the requests that have come since the last call; waits for the next one where told."""
        if wait and self.next < len(self.load):
            time.sleep(max(0.0, self.load[self.next].second - self.now))
        first = self.next
        while self.next < len(self.load) and self.load[self.next].second <= self.now:
            self.next += 1
        return list(self.load[first : self.next])

    @property
    def now(self) -> float:
        """Returns the seconds since the load began."""
        return time.perf_counter() - self.start

    def done(self, arrival: Arrival) -> None:
        """Notes that an image is ready."""
        self.seconds.append(self.now - arrival.second)


def _done(clock: _Clock, arrival: Arrival, future: Future[torch.Tensor]) -> None:
    clock.done(arrival)


def _running(model: torch.nn.Module, shape: Sequence[int], clock: _Clock, batch: int) -> None:
    sampler = Sampler(model, shape, max_batch=batch)
    while True:
        for arrival in clock.arrived(wait=not sampler.busy):
            sampler.submit(arrival.request).add_done_callback(partial(_done, clock, arrival))
        if not sampler.step() and clock.next == len(clock.load):
            return


def _whole(model: torch.nn.Module, shape: Sequence[int], clock: _Clock, batch: int) -> None:
    waiting: list[Arrival] = []
    while waiting or clock.next < len(clock.load):
        waiting += clock.arrived(wait=not waiting)
        table = waiting[0].request.table
        chosen = [arrival for arrival in waiting if arrival.request.table is table][:batch]
        waiting = [arrival for arrival in waiting if arrival not in chosen]
        y = torch.cat([arrival.request.model_kwargs["y"] for arrival in chosen])
        x_T = torch.cat([dd.randn((1, *shape), seed=arrival.request.seed) for arrival in chosen])
        dd.sample(model, x_T, table, seed=0, model_kwargs={"y": y})
        for arrival in chosen:
            clock.done(arrival)


def _single(model: torch.nn.Module, shape: Sequence[int], clock: _Clock, batch: int) -> None:
    _whole(model, shape, clock, 1)


WAYS: dict[str, Callable[[torch.nn.Module, Sequence[int], _Clock, int], None]] = {
    "running batch": _running,
    "whole batches": _whole,
    "one at a time": _single,
}


def table_of(loads: Sequence[float], count: int, batch: int, rounds: int) -> Iterator[tuple[str, ...]]:
    """Yields the rows of the table; loads are requests per second, each way takes turns in every round."""
    model, info = checkpoint.load_model("digits")
    schedule = info.make_schedule()
    tables = [dd.ddim(schedule, steps, prediction=info.prediction) for steps in (10, 20, 50)]
    yield ("requests/s", "way", "images/s", "p50, ms", "p99, ms")
    for rate in loads:
        rates: dict[str, list[float]] = {name: [] for name in WAYS}
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for number, (name, way) in itertools.product(range(rounds), WAYS.items()):
            clock = _Clock(arrivals(tables, count, rate, seed=number))
            way(model, info.sample_shape, clock, batch)
            rates[name].append(count / clock.now)
            seconds[name] += clock.seconds
        for name in WAYS:
            half, most = statistics.median(seconds[name]), statistics.quantiles(seconds[name], n=100)[98]
            yield (figure(rate), name, figure(statistics.median(rates[name])), figure(1e3 * half), figure(1e3 * most))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[10.0, 20.0, 40.0], help="requests per second")
    parser.add_argument("--count", type=int, default=80, help="requests in each round (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images in flight (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="in which the ways take turns (%(default)s)")
    options = parser.parse_args()
    print(
        f"Requests for the bundled model's digits by DDIM with 10, 20 or 50 steps, at most {options.batch} in flight, "
        f"{torch.get_num_threads()} threads:\n"
    )
    print(markdown(list(table_of(options.rates, options.count, options.batch, options.rounds))))


if __name__ == "__main__":
    main()
