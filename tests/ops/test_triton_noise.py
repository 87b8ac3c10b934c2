"""The noise that Triton's kernels draw: its words, its functions, and what is rounded to 16 bits."""

import pytest
import torch
from budget import DTYPES, FAST_NORMAL_ERROR, FAST_SINE_ERROR

import dd_kernels as dd
from dd_kernels import backend as backends
from dd_kernels.ops.randn import noise_key, reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from dd_kernels.ops import triton_common  # noqa: E402

pytestmark = pytest.mark.skipif(not backends.interpreting_triton(), reason="the op suite runs these on a GPU")


@triton.jit
def _store_words(out, key, stream, quads, BLOCK: tl.constexpr):
    quad = tl.arange(0, BLOCK)[None, :]
    drawn = triton_common.words(key, 3, tl.load(key + 2), stream.to(tl.uint32), quad)
    at = out + quad * 4
    for i in tl.static_range(4):
        tl.store(at + i, drawn[i].to(tl.int64), mask=quad < quads)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x123456789ABCDEF0])
def test_words_equal_the_reference_to_the_bit(seed):
    key = noise_key(seed, 2**32 - 2, 2**32 - 1, torch.device("cpu"))
    out = torch.full((21, 4), -1)
    _store_words[(1,)](out, key, 2**32 - 1, 21, BLOCK=32)
    expected = reference.words(key, 4, 84, key[2:3], 2**32 - 1)
    assert out.equal(expected[3])


@triton.jit
def _store_sine_cosine(out, words, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    sine, cosine = triton_common.sine_cosine(tl.load(words + i).to(tl.uint32))
    tl.store(out + i, sine)
    tl.store(out + BLOCK + i, cosine)


def test_sine_and_cosine():
    corners = torch.tensor([1 << 29, 1 << 30, 3 << 29, 1 << 31, 5 << 29, 3 << 30, 7 << 29, 1 << 32])
    words = torch.cat([corners + d for d in (-1, 0, 1)] + [torch.arange(0, 1 << 32, 2**32 // 4072 + 1)]) % (1 << 32)
    words = words[:4096]
    words = torch.cat([words, words.new_zeros(4096 - len(words))])
    out = torch.empty(2, 4096)
    _store_sine_cosine[(1,)](out, words, BLOCK=4096)
    angle = words.double() * (2 * torch.pi * 2.0**-32)
    exact = torch.stack((angle.sin(), angle.cos()))
    assert (out.double() - exact).abs().max() <= 2.0**-22


@triton.jit
def _store_minus_two_log(out, values, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, triton_common.minus_two_log(tl.load(values + i) * -2))


def test_logarithm_to_two_ulps():
    """The logarithm is exact to two ulps from 2^-32 to 1, and next to 1, where it is small."""
    values = torch.cat([torch.logspace(-32, 0, 4000, base=2), 1 - torch.arange(96) * 2.0**-24])
    out = torch.empty(4096)
    _store_minus_two_log[(1,)](out, values, BLOCK=4096)
    exact = values.double().log() * -2
    assert ((out.double() - exact).abs() <= 2.0**-22 * exact.abs()).all()


@triton.jit
def _too_low(word):
    sine, cosine = triton_common.sine_cosine(word)
    return sine - 5.1e-7, cosine - 5.1e-7


@triton.jit
def _too_high(word):
    sine, cosine = triton_common.sine_cosine(word)
    return sine + 5.1e-7, cosine + 5.1e-7


@pytest.mark.parametrize("fast", [_too_low, _too_high])
def test_rounding_to_16_bits_hides_fast_sines(fast, monkeypatch):
    """NVIDIA's instructions are at most 2^-20.9 off (PTX ISA); the interpreter, having none, takes the polynomials."""
    assert pytest.approx(FAST_SINE_ERROR, rel=0.01) == 5.1e-7
    shape, at = (1, 1 << 14), {"seed": 3, "backend": "triton"}
    z = dd.randn(shape, seed=3, dtype=torch.float64, backend="reference")
    half = dd.randn(shape, dtype=torch.float16, **at)
    monkeypatch.setattr(triton_common, "fast_sine_cosine", fast)
    other = dd.randn(shape, dtype=torch.float16, **at)
    assert ((other.double() - z).abs() <= z.abs() * 2.0**-11 + 2.0**-24 + FAST_NORMAL_ERROR).all()
    assert 0 < (half != other).float().mean() < 0.01


@triton.jit
def _nothing(word):
    zero = (word * 0).to(tl.float32)
    return zero, zero


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_noise_of_16_bits_takes_fast_sines(dtype, monkeypatch):
    monkeypatch.setattr(triton_common, "fast_sine_cosine", _nothing)
    x, at = torch.zeros(1, 3, 4, 4, dtype=dtype), {"seed": 3, "backend": "triton"}
    schedule = dd.linear_schedule(10)
    schedule = dd.linear_schedule(10)
    table = dd.ddpm(schedule)
    drawn = dd.randn(x.shape, dtype=dtype, **at), dd.q_sample(x, 5, schedule, **at)
    for noisy in (*drawn, dd.reverse_step(x, x, table, 3, **at)):
        assert noisy.count_nonzero() == (48 if dtype == torch.float32 else 0)
    # A state of float32 has exact noise, whatever the model's output is made of.
    assert dd.reverse_step(x.float(), x, table, 3, **at).count_nonzero() == 48
