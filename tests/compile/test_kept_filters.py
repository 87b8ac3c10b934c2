"""Filters kept packed between calls: the same bits, changes are seen, and memory is bounded and given back."""

import copy
import gc
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd_kernels as dd
from dd_kernels import backend as backends
from dd_kernels.compile import dd_kernels as dynamo_backend
from dd_kernels.compile import kept_filters
from dd_kernels.compile.memory import state_of
from dd_kernels.ops import conv2d

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")


SMAPS = Path("/proc/self/smaps")


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    torch._dynamo.reset()
    gc.collect()
    monkeypatch.setattr(kept_filters, "_kept", type(kept_filters._kept)())


class Layer(nn.Module):
    def __init__(self, size=3, channels=32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, size, size) / channels)

    def forward(self, x):
        return F.conv2d(x, self.weight, padding=self.weight.shape[2] // 2)


def compiled(model, **options):
    return torch.compile(model, backend=dynamo_backend, options=options, dynamic=False)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("accuracy", ["default", "high"])
@pytest.mark.parametrize(("size", "side"), [(3, 4), (3, 16), (3, 15), (1, 8)])
def test_same_bits(size, side, accuracy, dtype):
    model, x = Layer(size), torch.randn(2, 32, side, side)
    run, products = compiled(model, accuracy=accuracy, dtype=dtype), "bfloat16" if dtype else "float32"
    wanted = conv2d(x, model.weight.detach(), padding=size // 2, accuracy=accuracy, products=products)
    with torch.no_grad():
        for _ in range(3):
            assert run(x).equal(wanted)
    assert kept_filters.held() > 0


def test_an_image_and_the_same_doubled_keep_filters_of_their_own():
    """The larger one takes another method, whose packed filters are more."""
    model, x = Layer(), torch.randn(1, 32, 3, 3)
    model.forward = lambda x: (F.conv2d(x, model.weight), F.conv2d(F.interpolate(x, (6, 6)), model.weight))
    run = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            small, large = run(x)
            assert small.equal(conv2d(x, model.weight.detach()))
            assert large.equal(conv2d(x, model.weight.detach(), input_doubled=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.mul_(2),
        lambda weight: setattr(weight, "data", weight.data * 2),
        lambda weight: weight.copy_(weight * 2),
    ],
)
def test_a_change_is_seen(change):
    model, x = Layer(), torch.randn(1, 32, 16, 16)
    run = compiled(model)
    with torch.no_grad():
        first = run(x)
        before = kept_filters.held()
        change(model.weight)
        assert run(x).equal(2 * first)
    assert kept_filters.held() == before > 0


def test_calls_of_one_method_share_their_memory():
    model = Layer()
    run = compiled(model)
    with torch.no_grad():
        for samples, side in ((1, 16), (2, 16), (1, 20)):
            x = torch.randn(samples, 32, side, side)
            assert run(x).equal(conv2d(x, model.weight.detach(), padding=1))
    (kept,) = kept_filters._kept.values()
    assert (len(kept.floats), len(kept.memory)) == (3, 1)


def test_a_parameter_that_takes_the_id_of_another_keeps_its_own():
    """An id is free again when its parameter is gone; nothing is forgotten for one that has taken it since."""
    gone, here = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    kept_filters.keep(gone, (), False, lambda: 4)
    stale = kept_filters._kept[id(here)] = kept_filters._kept[id(gone)]
    stale.of = state_of(here)
    memory = kept_filters.keep(here, (), False, lambda: 4)
    assert memory is not None
    assert memory is not stale.memory[4, False]
    kept_filters._forget(id(here), stale.owner)
    assert kept_filters.keep(here, (), False, lambda: 4) is memory
    kept_filters._forget(id(here), kept_filters._kept[id(here)].owner)
    assert id(here) not in kept_filters._kept


def test_what_is_not_kept():
    model, x = Layer(), torch.randn(1, 32, 16, 16)
    run = compiled(model)
    run(x)  # with gradients enabled no filters are kept
    with torch.no_grad():
        run(torch.randn(4, 32, 64, 64))  # an image of many tiles, where keeping filters does not pay
        assert all(not kept.memory for kept in kept_filters._kept.values())
        computed = torch.compile(lambda x, w: F.conv2d(x, w * 2, padding=1), backend=dynamo_backend)
        computed(x, model.weight.detach())
    with torch.inference_mode():  # parameters that are made in it count no versions
        compiled(Layer())(x)
    assert kept_filters.held() == 0


def test_no_more_than_the_limit(monkeypatch):
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(1, 32, 16, 16)
    # Bytes of the header and of the planes of 36 points with AVX-512; padding makes it more elsewhere.
    one = 4 * (64 + 36 * (32 * 32 + 32))
    monkeypatch.setattr(kept_filters, "LIMIT", 2 * one - 1)
    run = compiled(model)
    with torch.no_grad():
        wanted = conv2d(conv2d(x, model[0].weight, padding=1), model[1].weight, padding=1)
        assert run(x).equal(wanted)
        assert run(x).equal(wanted)
    assert kept_filters.held() <= 2 * one - 1


def test_it_goes_with_the_model_and_the_report_tells():
    model, x = dd.accelerate(Layer()), torch.randn(1, 32, 16, 16)
    model, report = model
    assert "packed filters" not in str(report)
    with torch.no_grad():
        model(x)
        assert "MiB of packed filters kept, of 512 at most" in str(report)
        copy.deepcopy(dd.restore(model))(x)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert kept_filters.held() == 0


@pytest.mark.parametrize("floats", [1, (2 << 20) // 4 - 1, (2 << 20) // 4, 3 * (2 << 20) // 4 + 5])
def test_memory_is_zeros_of_its_own(floats):
    memory, other = kept_filters._memory(floats), kept_filters._memory(floats)
    assert memory.shape == (floats,)
    assert not memory.any()
    memory.fill_(1)
    assert not other.any()


@pytest.mark.skipif(not SMAPS.exists(), reason="this system does not describe its memory in /proc/self/smaps")
def test_large_memory_asks_for_huge_pages():
    kept, flags = kept_filters._memory(3 << 20), {}
    assert kept.data_ptr() % (2 << 20) == 0
    for line in SMAPS.read_text().splitlines():
        if range_ := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(end, 16) for end in range_.groups())
        elif line.startswith("VmFlags:"):
            flags[range(first, last)] = line.split()
    asked = [names for places, names in flags.items() if kept.data_ptr() in places]
    assert len(asked) == 1
    assert "hg" in asked[0]
