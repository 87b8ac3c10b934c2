"""AVX2 and AVX-512 give the same bits: which of them runs depends on the processor and on what a call computes."""

import ctypes
from pathlib import Path

import pytest
import torch

import dd_kernels as dd
from dd_kernels import backend as backends

SCHEDULE = dd.linear_schedule(50)
TABLES = {
    "ddpm": dd.ddpm(SCHEDULE, 20),
    "learned": dd.ddpm(SCHEDULE, 20, variance="learned_range"),
    "one x_0 kept": dd.dpm_solver(SCHEDULE, 20, stochastic=True),
    "two x_0 kept": dd.dpm_solver(SCHEDULE, 20, order=3),
}


@pytest.fixture
def force():
    """Makes every op use the instruction set of a name."""
    if backends.unavailable("cpu") is not None:
        pytest.skip("the CPU library was not built")
    function = ctypes.CDLL(str(next(Path(dd.__file__).parent.glob("_cpu.*so")))).dd_kernels_cpu_isa
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
    if function(b"avx512") is None:
        pytest.skip("this processor lacks AVX-512")
    yield function
    function(b"")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 7), (3, 3, 17, 12), (1, 5, 33, 31), (2, 4, 40, 40)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_same_bits(force, shape, dtype, channels_last):
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    x, out = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    both = torch.cat([out, x], 1).contiguous(memory_format=layout)

    def results():
        yield dd.randn(shape, seed=3, dtype=dtype, memory_format=layout, backend="cpu")
        yield from dd.q_sample(x, 30, SCHEDULE, seed=4, return_noise=True, backend="cpu")
        yield dd.q_sample(x, 30, SCHEDULE, out, backend="cpu")
        yield from dd.reverse_step(x, out, TABLES["ddpm"], 7, seed=5, uncond=x, return_x0=True, backend="cpu")
        yield dd.reverse_step(x, both, TABLES["learned"], 7, seed=5, backend="cpu")
        for name in ("one x_0 kept", "two x_0 kept"):
            history = [x.clone() for _ in range(TABLES[name].history)]
            yield dd.reverse_step(x, out, TABLES[name], 7, seed=5, history=history, backend="cpu")
            yield from history

    sets = []
    for name in (b"avx2", b"avx512", b""):
        force(name)
        sets.append(list(results()))
    for others in sets[1:]:
        assert all(map(torch.equal, sets[0], others))
