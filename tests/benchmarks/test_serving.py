"""The benchmark of a running batch: the load, what is timed, and its table."""

import itertools
import statistics

import dd_kernels as dd
from benchmarks import serving

TABLES = [dd.ddim(dd.linear_schedule(100), steps) for steps in (1, 2)]


def test_a_poisson_load():
    load = serving.arrivals(TABLES, 2000, 50.0)
    gaps = [b.second - a.second for a, b in itertools.pairwise(load)]
    # Exponential gaps have a deviation of their mean; both estimates have standard errors of 2 % and 3 %.
    assert 0.018 < statistics.mean(gaps) < 0.022
    assert 0.017 < statistics.stdev(gaps) < 0.023
    assert {arrival.request.table for arrival in load} == set(TABLES)
    again = serving.arrivals(TABLES, 5, 50.0)
    assert [arrival.second for arrival in again] == [arrival.second for arrival in load[:5]]


def test_a_clock_gives_each_request_once_and_not_before_its_time():
    load = serving.arrivals(TABLES, 20, 2000.0)
    clock, seen = serving._Clock(load), []
    while clock.next < len(load):
        new = clock.arrived(wait=True)
        assert all(arrival.second <= clock.now for arrival in new)
        seen += new
    assert seen == load
    clock.done(load[0])
    assert clock.seconds[0] >= clock.load[-1].second - load[0].second


def test_the_table_has_a_row_for_each_way_and_load():
    lines = list(serving.table_of([500.0], count=4, batch=2, rounds=1))
    assert lines[0] == ("requests/s", "way", "images/s", "p50, ms", "p99, ms")
    assert [line[:2] for line in lines[1:]] == [("500", name) for name in serving.WAYS]
    assert all(float(cell.replace(",", "")) > 0 for line in lines[1:] for cell in line[2:])
