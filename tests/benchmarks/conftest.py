"""A fake device whose time advances with the calls that run on it, and models and shapes of tiny sizes."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from tiny import TINY_ADM, TINY_IMAGES, TINY_NORMS, TINY_UNET

from benchmarks import (
    bench_attention,
    bench_conv2d,
    bench_group_norm_silu,
    bench_q_sample,
    bench_randn,
    bench_reverse_step,
    harness,
    machine,
    models,
    timing,
)
from dd_kernels.nn import CONFIGS


class FakeCuda:
    """A device whose time advances by :meth:`tick`; a graph replays the ticks that were captured."""

    def __init__(self):
        self.now = 0.0  # milliseconds
        self.capturing = None
        self.captures = 0
        self.refuses = False
        self.cuda = self

    def tick(self, milliseconds):
        if self.capturing is None:
            self.now += milliseconds
        else:
            self.capturing.milliseconds += milliseconds

    def get_device_properties(self, index):
        return types.SimpleNamespace(L2_cache_size=1 << 20)

    def Stream(self):
        return object()

    def stream(self, stream):
        return contextlib.nullcontext(stream)

    def synchronize(self):
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    def empty_cache(self):
        pass

    def Event(self, enable_timing):
        fake = self

        class Event:
            def record(self):
                self.at = fake.now

            def synchronize(self):
                fake.synchronize()

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()

    def CUDAGraph(self):
        fake = self

        class Graph:
            milliseconds = 0.0

            def capture_begin(self, capture_error_mode):
                if fake.refuses:
                    raise RuntimeError("this device captures nothing")
                fake.captures += 1
                fake.capturing = self

            def capture_end(self):
                fake.capturing = None

            def replay(self):
                fake.now += self.milliseconds

        return Graph()


@pytest.fixture
def cuda():
    return FakeCuda()


@pytest.fixture
def gpu_clock(cuda):
    """Returns the GPU's clock on the fake device; its tensors are on the CPU."""
    clock = timing.GpuClock(cuda)
    clock.device = "cpu"
    return clock


class TickingClock(timing.GpuClock):
    """A clock for which each call takes a millisecond of the fake device, whatever it does."""

    device = "cpu"
    case_seconds = 0.01

    def timer(self, call, inputs, bytes_moved=0, graph=True):
        def ticking(*arguments):
            self.cuda.tick(1.0)
            return call(*arguments)

        return super().timer(ticking, inputs, bytes_moved, graph)


@pytest.fixture
def few_rounds(monkeypatch):
    """Makes benchmarks measure as little as possible."""
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-6)
    monkeypatch.setattr(timing, "GRAPH_SECONDS", 1e-6)
    monkeypatch.setattr(timing, "MAX_COPIES", 2)
    monkeypatch.setattr(harness, "MIN_ROUNDS", 2)
    monkeypatch.setattr(harness, "MAX_ROUNDS", 2)
    monkeypatch.setattr(harness, "SLOW_ROUNDS", 2)
    monkeypatch.setattr(harness, "SLOWEST_ROUNDS", 2)
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 1 << 12, "cuda": 1 << 12})
    monkeypatch.setattr(machine, "MATMUL_SIZE", {"cpu": 16, "cuda": 16})
    monkeypatch.setattr(machine, "_limits", {})


@pytest.fixture
def cpu_target(few_rounds):
    clock = timing.CpuClock()
    clock.case_seconds = 1e-3
    return harness.Target("cpu", "cpu", clock)


@pytest.fixture
def gpu_target(few_rounds, cuda, monkeypatch):
    """Returns a target with the cases and the code paths of a GPU, on CPU tensors."""
    names = {"device": "Fake GPU", "torch": "2.13.0", "isa": None}
    monkeypatch.setattr(machine, "described", lambda device: dict(names))
    clock = TickingClock(cuda)
    return harness.Target("cuda", "cpu", clock)


@pytest.fixture
def tiny(monkeypatch):
    """Replaces the shapes and models of the plans by small ones."""
    both = dict.fromkeys(("cpu", "cuda"), TINY_IMAGES)
    for module in (bench_randn, bench_q_sample, bench_reverse_step):
        monkeypatch.setattr(module, "SHAPES", both)
    monkeypatch.setattr(bench_conv2d, "SHAPES", [(2, 16, 8, 8), (1, 16, 4, 4)])
    monkeypatch.setattr(bench_attention, "SHAPES", [(1, 1, 9, 8), (2, 2, 9, 8), (2, 8, 9, 8)])
    monkeypatch.setattr(bench_q_sample, "EVERY_PEER", {"cpu": None, "cuda": None})
    monkeypatch.setattr(bench_reverse_step, "MAIN", dict.fromkeys(both, (3, 3, 8, 8)))
    monkeypatch.setattr(bench_group_norm_silu, "MAIN", dict.fromkeys(both, TINY_NORMS))
    monkeypatch.setattr(bench_group_norm_silu, "EVERY_PEER", dict.fromkeys(both, TINY_NORMS[:1]))
    monkeypatch.setattr(bench_group_norm_silu, "MODELS", {name: [(32, 4)] for name in bench_group_norm_silu.MODELS})
    monkeypatch.setattr(
        bench_group_norm_silu, "SELECTION", {k: [("cifar10", 2, None), ("imagenet64", 1, None)] for k in both}
    )
    monkeypatch.setitem(CONFIGS, "cifar10", {**CONFIGS["cifar10"], **TINY_UNET})
    monkeypatch.setitem(CONFIGS, "imagenet64", {**CONFIGS["imagenet64"], **TINY_ADM})
    sd = {"sample_size": 8, "block_out_channels": (32, 64), "cross_attention_dim": 16, "attention_head_dim": 4}
    sd |= {"layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    sd |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 16}
    monkeypatch.setattr(models, "SD_UNET", {**models.SD_UNET, **sd})
    monkeypatch.setattr(models, "SD_TOKENS", (3, 16))
    monkeypatch.setattr(machine, "THREADS", (1,))
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)  # the compiler is not what is tested


@pytest.fixture(params=["cpu", "cuda"])
def target(request, tiny):
    return request.getfixturevalue("cpu_target" if request.param == "cpu" else "gpu_target")
