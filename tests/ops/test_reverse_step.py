"""The reverse step against float64, for every sampler, option, layout and dtype."""

import itertools

import numpy as np
import pytest
import torch
from bounds import assert_within
from budget import DTYPES, sentinels_survive, within_sentinels
from draws import for_draws
from guard_page import guard_page
from hypothesis import strategies as st
from step_cases import TABLES, check, errors, tensors

import dd_kernels as dd
from dd_kernels.ops.randn import noise_key
from dd_kernels.ops.reverse_step.table import from_columns


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_every_sampler(kernel, table):
    last = len(table) - 1
    shapes, steps = (
        ([(2, 3, 5, 7)], [0]) if kernel.interpreted else ([(3, 3, 5, 7), (2, 2, 1531)], [0, last // 2, last])
    )
    for shape, step in itertools.product(shapes, steps):
        x, out = tensors(table, shape)
        check(kernel, x, out, table, step)
        check(kernel, x, out, table, step, uncond=torch.randn_like(out), guidance_scale=2.5)
        if table.stochastic:
            check(kernel, x, out, table, step, noise=torch.randn(shape))


@pytest.mark.parametrize(("dtype", "out_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_dtypes(kernel, dtype, out_dtype):
    for name in ("ddpm, learned_range",) if kernel.interpreted else ("ddpm", "ddpm, learned_range", "ddim"):
        table = TABLES[name]
        for noise_dtype in (*DTYPES, None) if table.stochastic and not kernel.interpreted else (None,):
            x, out = tensors(table, (2, 3, 9, 5), dtype, out_dtype)
            noise = {} if noise_dtype is None else {"noise": torch.randn(x.shape).to(noise_dtype)}
            check(kernel, x, out, table, 3, uncond=torch.randn_like(out), guidance_scale=1.5, **noise)


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 4, 9, 64), (2, 40, 3, 11)], ids=str)
@pytest.mark.parametrize("name", ["ddpm", "ddpm, learned_range", "ddim"])
def test_channels_last_is_kept(kernel, name, shape):
    table = TABLES[name]
    x, out = tensors(table, shape)
    last = torch.channels_last
    x_prev = check(kernel, x.contiguous(memory_format=last), out.contiguous(memory_format=last), table, 3)
    assert x_prev.is_contiguous(memory_format=last)
    contiguous = check(kernel, x, out, table, 3)
    torch.testing.assert_close(x_prev, contiguous.contiguous(), rtol=0, atol=0)
    assert check(kernel, x.contiguous(memory_format=last), out, table, 3).equal(contiguous)


def test_any_strides(kernel):
    table = TABLES["ddpm"]
    base = torch.randn(6, 4, 9, 10)
    outs = (torch.randn(5, 3, 9, 10)[::2, :2], torch.randn(3, 4, 9, 10).chunk(2, 1)[1], torch.randn(3, 2, 10, 9).mT)
    xs = (base[::2, :2], base[:3].chunk(2, 1)[0], base[:3, 1:3].mT.contiguous().mT, base[:3, :2].flip(0))
    for x in xs[2:3] if kernel.interpreted else xs:
        for out in outs[1:2] if kernel.interpreted else outs:
            check(kernel, x, out, table, 3)
            check(kernel, x, out, table, 3, noise=outs[0], uncond=outs[1])


def test_a_step_per_sample(kernel):
    table = TABLES["ddpm"]
    x, out = tensors(table, (5, 3, 6, 7))
    steps = torch.tensor([0, 19, 7, 3, 18])
    together = check(kernel, x, out, table, steps)
    for i, step in enumerate(steps.tolist()):
        at = {"seed": 7, "first_sample": i, "backend": kernel.name}
        one = slice(i, i + 1)
        alone = dd.reverse_step(x[one].to(kernel.device), out[one].to(kernel.device), table, step, **at)
        assert alone.equal(together[one])


def test_noise_is_that_of_randn(kernel):
    table = TABLES["ddpm"]
    x, out = (v.to(kernel.device) for v in tensors(table, (2, 3, 8, 8)))
    at = {"seed": 3, "first_sample": 5}
    noise = dd.randn(x.shape, **at, draw=int(table.timesteps[4]), stream=1, device=kernel.device, backend=kernel.name)
    drawn = dd.reverse_step(x, out, table, 4, **at, backend=kernel.name)
    assert dd.reverse_step(x, out, table, 4, noise=noise, backend=kernel.name).equal(drawn)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(kernel, dtype):
    table = TABLES["ddpm"]
    x, out = (v.to(kernel.device) for v in tensors(table, (2, 3, 9, 7), dtype))
    expected = dd.reverse_step(x, out, table, 3, seed=1, backend=kernel.name)
    x_prev = torch.full_like(x, float("nan"))
    assert dd.reverse_step(x, out, table, 3, seed=1, x_prev=x_prev, backend=kernel.name) is x_prev
    assert x_prev.equal(expected)
    strided = torch.full((2, 3, 7, 9), float("nan"), dtype=dtype, device=kernel.device).mT
    assert dd.reverse_step(x, out, table, 3, seed=1, x_prev=strided, backend=kernel.name).equal(expected)
    assert strided.equal(expected)
    assert dd.reverse_step(x, out, table, 3, seed=1, x_prev=x, backend=kernel.name) is x
    assert x.equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_nothing_behind_the_inputs(kernel, dtype):
    if kernel.device != "cpu":
        pytest.skip("compute-sanitizer tells of a GPU's memory")
    table = TABLES["ddpm, learned_range"]
    x, out = tensors(table, (1, 3, 3, 5), dtype, dtype)
    uncond, noise = torch.randn_like(out), torch.randn_like(x)
    step = {"step": 3, "guidance_scale": 2.0, "backend": kernel.name}
    expected = dd.reverse_step(x, out, table, uncond=uncond, noise=noise, **step)
    with guard_page() as end:
        ends = {"uncond": end(uncond), "noise": end(noise), "x_prev": end(x)}
        assert dd.reverse_step(end(x), end(out), table, **ends, **step).equal(expected)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounds_to_nearest_even(kernel, dtype):
    bits = torch.randint(-(2**31), 2**31, (1, 1, 64, 64), dtype=torch.int32)
    bits[..., ::2] &= -(2**12)  # of float16 and bfloat16 alike, many ties
    bits[..., ::4] &= -(2**15)
    size = bits.view(torch.float32).abs()
    bits = torch.where((size > 1e-30) & (size < 1e30), bits, 0)
    values = bits.view(torch.float32).to(kernel.device)
    x = torch.zeros(values.shape, dtype=dtype, device=kernel.device)
    table = from_columns(np.arange(1), prev_from_out=1.0)
    result = dd.reverse_step(x, values, table, 0, backend=kernel.name)
    rounded = (bits.to(kernel.device) & -(2**16)).view(torch.float32) if kernel.truncates(dtype) else values
    torch.testing.assert_close(result, rounded.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_all_of_the_outputs_and_nothing_else(kernel, dtype):
    shape, table = (3, 3, 5, 7), TABLES["ddpm"]
    x, out = (within_sentinels(shape, dtype, kernel.device).normal_() for _ in range(2))
    x_prev, x0 = (within_sentinels(shape, dtype, kernel.device) for _ in range(2))
    on, key = table.on(x.device), noise_key(1, 0, 0, x.device)
    arguments = (x, out, None, None, 1.0, None, None, on.rows, on.timesteps, on.steps[3], key, x_prev, x0)
    kernel.op("reverse_step")(*arguments)
    assert all(map(sentinels_survive, (x, out, x_prev, x0)))
    expected = dd.reverse_step(x, out, table, 3, seed=1, return_x0=True, backend=kernel.name)
    assert x_prev.equal(expected[0])
    assert x0.equal(expected[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["ddpm", "ddpm, no clip, fixed_large, v", "ddpm, learned_range", "prev_from_out"])
def test_not_finite(kernel, name, value):
    table = TABLES[name]
    x, out = (v.to(kernel.device) for v in tensors(table, (2, 4, 5, 5)))
    x[0, 1, 2, 3], out[1, 0, 4, 4], out[1, -1, 0, 0] = value, value, value
    noise = torch.randn_like(x)
    noise[0, 0, 0, 0] = value
    given, finite = (x, out, noise), [v.nan_to_num(0.0, 1e4, -1e4) for v in (x, out, noise)]
    for step in (0,) if kernel.interpreted else (0, len(table) - 1):
        actual, exact = (
            dd.reverse_step(v, w, table, step, noise=z, return_x0=True, backend=backend)
            for (v, w, z), backend in ((given, kernel.name), ([v.double() for v in given], "reference"))
        )
        limits = errors(table, *finite[:2], step, 0.0, {"noise": finite[2]})
        for a, e, limit in zip(actual, exact, limits, strict=True):
            there = e.isfinite()
            assert a[~there].double().allclose(e[~there], rtol=0, atol=0, equal_nan=True)
            assert_within(a[there].cpu(), e[there].cpu(), limit[there.cpu()])


def test_terms_with_coefficient_0_are_left_out(kernel):
    """inf times 0 would be NaN: the last step of a stochastic table takes no notice of its noise."""
    x = torch.randn(2, 3, 4, 4, device=kernel.device)
    infinite = torch.full_like(x, float("inf"))
    table = from_columns(np.arange(2), x0_num_out=1.0, x0_clip=1.0, prev_from_x0=0.5, sigma=np.array([0.0, 1.0]))
    x_prev = dd.reverse_step(infinite, infinite, from_columns(np.arange(1), prev_from_x=0.0), 0, backend=kernel.name)
    assert x_prev.isnan().all()  # 0 inf / 1: x_0 itself has no term to leave out
    x_prev = dd.reverse_step(x, infinite, table, 0, noise=infinite, backend=kernel.name)
    assert (x_prev == 0.5).all()
    assert (dd.reverse_step(x, infinite, table, 1, noise=infinite, backend=kernel.name) == float("inf")).all()


def test_no_signal_left(kernel):
    """At alpha_bar 0 x_0 is a quotient by 0: +-inf, which the clip makes finite."""
    table = from_columns(np.arange(1), x0_num_x=1.0, x0_num_out=-1.0, x0_den=0.0, x0_clip=1.0, prev_from_x0=1.0)
    x, out = (v.to(kernel.device) for v in tensors(table, (2, 3, 4, 5)))
    assert dd.reverse_step(x, out, table, 0, backend=kernel.name).equal((x - out).sign())


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0)], ids=str)
def test_empty(kernel, shape):
    x = torch.randn(shape, device=kernel.device)
    for name in ("ddpm", "ddim"):
        x_prev, x0 = dd.reverse_step(x, x, TABLES[name], 3, seed=0, return_x0=True, backend=kernel.name)
        assert x_prev.shape == x0.shape == shape


def test_any_shape_layout_dtype_and_step(kernel):
    def test(data):
        table = TABLES[data.draw(st.sampled_from(list(TABLES)), label="table")]
        shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=4, max_size=4), label="shape"))
        dtypes = [data.draw(st.sampled_from(DTYPES), label=name) for name in ("dtype", "out dtype", "noise dtype")]
        x, out = tensors(table, shape, *dtypes[:2])
        order = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]), label="layout")
        x = x.contiguous(memory_format=order)
        steps = st.integers(0, len(table) - 1)
        step = data.draw(steps | st.lists(steps, min_size=shape[0], max_size=shape[0]).map(torch.tensor), label="step")
        options = {}
        if table.stochastic and data.draw(st.booleans(), label="noise given"):
            options["noise"] = torch.randn(shape).to(dtypes[2])
        elif table.stochastic:
            options["seed"] = data.draw(st.integers(0, 2**64 - 1), label="seed")
        if data.draw(st.booleans(), label="guided"):
            options |= {"uncond": torch.randn_like(out), "guidance_scale": 3.0}
        check(kernel, x, out, table, step, **options)

    for_draws(kernel, test)
