"""randn: the noise contract, and that what comes out is normal and independent."""

import math
import pathlib
import re

import pytest
import torch
from budget import DTYPES, FAST_NORMAL_ERROR, NORMAL_ERROR, sentinels_survive, within_sentinels
from draws import for_draws
from hypothesis import strategies as st

import dd_kernels as dd
from dd_kernels.apps import data
from dd_kernels.ops.randn import Stream, noise_key, reference

SHAPES = [(3, 3, 5, 7), (2, 4, 8, 8), (1, 2, 33, 9), (2, 1037), (3,), (1, 1, 1, 1), (2, 3, 4, 2, 3)]


def exact(shape, **coordinates):
    return dd.randn(shape, dtype=torch.float64, backend="reference", **coordinates)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    got = reference.philox4x32_10(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert " ".join(f"{int(word):08x}" for word in got) == words


@pytest.mark.parametrize("stream", [0, 3, 2**32 - 1])
@pytest.mark.parametrize(("seed", "first_sample", "draw"), [(0, 0, 0), (2**63 + 12345, 2**32 - 3, 2**32 - 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(kernel, shape, seed, first_sample, draw, stream):
    at = {"seed": seed, "first_sample": first_sample, "draw": draw, "stream": stream}
    z = dd.randn(shape, device=kernel.device, backend=kernel.name, **at)
    assert (z.cpu().double() - exact(shape, **at)).abs().max() <= NORMAL_ERROR


def test_error_bound_over_many(kernel):
    shape = (1, 1 << (19 if kernel.name == "cpu" else 12))
    z = dd.randn(shape, seed=1, device=kernel.device, backend=kernel.name).cpu()
    error = (z.double() - exact(shape, seed=1)).abs()
    assert error.max() <= NORMAL_ERROR
    assert error.mean() <= 6e-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_to_dtype(kernel, dtype):
    shape = (2, 3, 9, 7)
    z = dd.randn(shape, seed=5, device=kernel.device, backend=kernel.name)
    rounded = dd.randn(shape, seed=5, dtype=dtype, device=kernel.device, backend=kernel.name)
    assert rounded.dtype == dtype
    if kernel.truncates(dtype):
        assert ((rounded.float() - z).abs() <= z.abs() * torch.finfo(dtype).eps).all()
    elif kernel.has_fast_sines(dtype):
        rounding = z.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
        assert ((rounded.float() - z).abs() <= rounding + FAST_NORMAL_ERROR).all()
    else:
        assert rounded.equal(z.to(dtype))


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 32, 32), (2, 40, 3, 11), (3, 2, 17, 31), (1, 1, 6, 6)], ids=str)
def test_values_do_not_depend_on_layout(kernel, shape):
    at = {"seed": 5, "device": kernel.device, "backend": kernel.name}
    z = dd.randn(shape, memory_format=torch.channels_last, **at)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert z.equal(dd.randn(shape, **at))


def test_values_do_not_depend_on_batch(kernel):
    at = {"seed": 9, "draw": 4, "device": kernel.device, "backend": kernel.name}
    together = dd.randn((7, 3, 11, 13), **at)
    for i in (0, 3, 6):
        assert dd.randn((1, 3, 11, 13), first_sample=i, **at).equal(together[i : i + 1])


def test_values_do_not_depend_on_threads(kernel):
    at = {"seed": 9, "device": kernel.device, "backend": kernel.name}
    shape = (5, 3, 64, 64) if kernel.name == "cpu" else (2, 3, 4, 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = dd.randn(shape, **at)
        torch.set_num_threads(2)
        assert dd.randn(shape, **at).equal(alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_all_of_the_output_and_nothing_else(kernel, dtype):
    shape = (3, 3, 5, 7)
    z = within_sentinels(shape, dtype, kernel.device)
    kernel.op("randn")(z, noise_key(3, 0, 0, z.device), 0)
    assert sentinels_survive(z)
    assert z.equal(dd.randn(shape, seed=3, dtype=dtype, device=kernel.device, backend=kernel.name))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0), (0,)], ids=str)
def test_empty(kernel, shape):
    assert dd.randn(shape, seed=0, device=kernel.device, backend=kernel.name).shape == shape


def test_any_shape_and_coordinates(kernel):
    def test(data):
        shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5), label="shape"))
        at = {name: data.draw(st.integers(0, 2**32 - 1), label=name) for name in ("draw", "stream")}
        at["first_sample"] = data.draw(st.integers(0, 2**32 - max(1, shape[0])), label="first_sample")
        at["seed"] = data.draw(st.integers(0, 2**64 - 1), label="seed")
        z = dd.randn(shape, device=kernel.device, backend=kernel.name, **at).cpu()
        assert z.numel() == 0 or (z.double() - exact(shape, **at)).abs().max() <= NORMAL_ERROR

    for_draws(kernel, test)


def assert_standard_normal(z):
    """Moments and the Kolmogorov-Smirnov distance, each within four or so of its standard deviations."""
    z = z.double().flatten()
    n = z.numel()
    for power, (moment, deviation) in enumerate([(0, 1), (1, 2**0.5), (0, 15**0.5), (3, 96**0.5)], start=1):
        assert abs((z**power).mean() - moment) < 4.5 * deviation / n**0.5
    cdf = torch.special.ndtr(z.sort().values)
    distance = torch.maximum((cdf - torch.arange(n) / n).abs(), (cdf - torch.arange(1, n + 1) / n).abs()).max()
    assert distance * n**0.5 < 1.95  # exceeded with probability 0.001
    assert 4 < z.abs().max() < 6.7  # sqrt(-2 ln 2^-32) = 6.66


def assert_independent(a, b):
    """No correlation of the values or of their squares."""
    a, b = a.double().flatten(), b.double().flatten()
    for f in (lambda v: v, lambda v: (v**2 - 1) / math.sqrt(2)):
        assert abs((f(a) * f(b)).mean()) < 4.5 / len(a) ** 0.5


def test_normal_and_independent():
    z = dd.randn((4, 1 << 17), seed=11)
    assert_standard_normal(z)
    for lag in (1, 2, 3, 4, 32, 1024):
        assert_independent(z[:, lag:], z[:, :-lag])
    assert_independent(z[0], z[1])
    assert_independent(z, dd.randn(z.shape, seed=11, draw=1))
    assert_independent(z, dd.randn(z.shape, seed=11, stream=1))
    assert_independent(z, dd.randn(z.shape, seed=12))
    assert_independent(z, dd.randn(z.shape, seed=11 + (1 << 32)))


def test_one_element_across_samples_and_draws_is_normal():
    assert_standard_normal(dd.randn((1 << 17, 1), seed=3))
    draws = torch.cat([dd.randn((256, 8), seed=3, draw=t) for t in range(128)])
    assert_standard_normal(draws)


def test_float64_is_the_reference():
    z = dd.randn((2, 5), seed=0, dtype=torch.float64)
    assert z.equal(exact((2, 5), seed=0))
    with pytest.raises(dd.BackendUnavailableError, match=r"randn.*'cpu'.*float64"):
        dd.randn((2, 5), seed=0, dtype=torch.float64, backend="cpu")


def test_key_tensor():
    key = noise_key(2**64 - 1, 7, 3, torch.device("cpu"))
    assert dd.randn((2, 5), seed=key).equal(dd.randn((2, 5), seed=2**64 - 1, first_sample=7, draw=3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": ()}, ValueError, r"shape must be \[N, ...\]"),
        ({"shape": (1, 1 << 20, 1 << 20)}, ValueError, r"shape must have at most 2\^34 elements"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32.*int32"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^64\); got -1"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\^64\)"),
        ({"seed": 1.5}, TypeError, "seed must be an int; got float"),
        ({"seed": True}, TypeError, "seed must be an int; got bool"),
        (
            {"seed": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            r"seed must be an int, or a dense int64 tensor \[3\]",
        ),
        ({"first_sample": 2**32}, ValueError, r"first_sample must be in \[0, 2\^32\)"),
        ({"shape": (2, 4), "first_sample": 2**32 - 1}, ValueError, r"first_sample \+ 2 samples must be at most 2\^32"),
        ({"draw": -1}, ValueError, r"draw must be in \[0, 2\^32\); got -1"),
        ({"stream": 2**32}, ValueError, r"stream must be in \[0, 2\^32\)"),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, cpu"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        dd.randn(**{"shape": (1, 4), "seed": 0, **arguments})


def test_streams_are_those_of_the_kernels():
    """The numbers that csrc draws with, an enumeration that counts from 0."""
    header = (pathlib.Path(__file__).parents[2] / "csrc" / "common" / "layout.h").read_text()
    names = re.search(r"enum Stream : uint32_t \{(.*?)\};", header, re.DOTALL)[1].replace(" ", "").split(",")
    ours = ["kStream" + stream.name.title().replace("_", "") for stream in Stream]
    assert names == ours[: len(names)]
    assert [*Stream] == [*range(len(Stream))]


def test_streams_of_the_applications_are_those_of_the_enumeration():
    """Whatever name an application has for a stream, its number is the one that this name has here."""
    named = {name: value for name, value in vars(data).items() if name.startswith("STREAM_")}
    assert all(Stream[name.removeprefix("STREAM_")] == value for name, value in named.items())


def test_opcheck(kernel):
    if kernel.name != "triton":
        z = torch.empty(2, 3, 4, 4, device=kernel.device)
        torch.library.opcheck(torch.ops.dd_kernels.randn.default, (z, noise_key(0, 0, 0, z.device), 0))


def test_compiles_in_one_graph():
    compiled = torch.compile(lambda: dd.randn((2, 3, 5, 5), seed=4) * 2, fullgraph=True, backend="aot_eager")
    assert compiled().equal(dd.randn((2, 3, 5, 5), seed=4) * 2)
