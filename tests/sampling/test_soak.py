"""A running batch under a long load, with requests that are cancelled, fail or exceed the memory among the others."""

import ctypes
import gc
import os
import random
import sys

import pytest
import torch

import dd_kernels as dd
from dd_kernels import Sampler, SampleRequest

SCHEDULE = dd.linear_schedule(100)
SHAPE = (3, 32, 32)
TABLES = [dd.ddim(SCHEDULE, 3), dd.ddpm(SCHEDULE, 4), dd.dpm_solver(SCHEDULE, 5), dd.euler(SCHEDULE, 2)]
COUNT, IN_FLIGHT, WARM = 2000, 24, 500


class Moody:
    """A model that fails for a sample whose y is above 1, and now and then has no memory for a batch."""

    def __init__(self):
        self.chance, self.short = random.Random(0), 0

    def __call__(self, x, t, y):
        if (y > 1).any():
            raise ValueError("y is too large")
        if len(x) > 1 and self.chance.random() < 0.01:
            self.short += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.sin(0.7 * x + t[:, None, None, None] / 100 + y[:, None, None, None])


def resident():
    """Returns the memory of this process, in MB, without what is free and the C library keeps."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def request_of(number, choose):
    y = torch.tensor([2.0 if choose.random() < 0.03 else choose.random()])
    return SampleRequest(choose.choice(TABLES), seed=number, model_kwargs={"y": y})


def settle(number, request, future, counts):
    """Waits until a request has ended, and counts how; every seventh image is compared with the one drawn alone."""
    if future.cancelled():
        counts["cancelled"] += 1
    elif request.model_kwargs["y"] > 1:
        assert isinstance(future.exception(60), ValueError)
        counts["failed"] += 1
    else:
        image = future.result(60)
        counts["drawn"] += 1
        if number % 7 == 0:
            options = {"seed": request.seed, "model_kwargs": dict(request.model_kwargs)}
            assert torch.equal(image, dd.sample(Moody(), (1, *SHAPE), request.table, **options))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_thousand_requests_leave_no_memory_and_no_wrong_image():
    choose, counts = random.Random(1), dict.fromkeys(("cancelled", "failed", "drawn"), 0)
    running, warm, model = [], 0.0, Moody()
    with Sampler(model, SHAPE, max_batch=8, max_queue=IN_FLIGHT).serving() as sampler:
        for number in range(COUNT):
            request = request_of(number, choose)
            running.append((number, request, sampler.submit(request, priority=choose.randrange(3))))
            if choose.random() < 0.05:
                running[choose.randrange(len(running))][2].cancel()
            if len(running) == IN_FLIGHT:
                settle(*running.pop(0), counts)
            if number == WARM:
                warm = resident()
        while running:
            settle(*running.pop(0), counts)
    grown = resident() - warm
    print(f"{counts}, {model.short} out of memory; {warm:.0f} MB after {WARM} requests, {grown:+.1f} MB at the end")
    assert sum(counts.values()) == COUNT
    assert min(counts.values()) > 20
    assert model.short
    # One kept image in ten of those that follow the warm-up would be 1.8 MB; without any it is -0.8 to 0.7.
    assert grown < 1.2
