"""q_sample against float64, for every layout, dtype and source of noise."""

import itertools

import numpy as np
import pytest
import torch
from bounds import assert_within, q_sample_error
from budget import DTYPES, sentinels_survive, within_sentinels
from draws import for_draws
from hypothesis import strategies as st

import dd_kernels as dd
from dd_kernels.ops.randn import noise_key

SCHEDULE = dd.linear_schedule(1000)
STEPS = dd.ddpm(SCHEDULE, 20)
SHAPES = [(3, 3, 5, 7), (2, 1037), (4, 2, 8, 8), (5,)]


def timesteps(shape):
    return torch.tensor([0, 999, 10, 500, 1][: shape[0]])


def check(kernel, x, t, noise=None, seed=None):
    """x_t of a kernel; it and the noise are compared with float64."""
    x, t, noise = (v.to(kernel.device) if isinstance(v, torch.Tensor) else v for v in (x, t, noise))
    wide = noise if noise is None else noise.double()
    exact = dd.q_sample(x.double(), t, SCHEDULE, wide, seed=seed, return_noise=True, backend="reference")
    actual = dd.q_sample(x, t, SCHEDULE, noise, seed=seed, return_noise=True, backend=kernel.name)
    drawn = 0.0 if noise is not None else kernel.normal_error(x.dtype)
    exact, rows = [v.cpu() for v in exact], SCHEDULE.marginal[torch.as_tensor(t).cpu().expand(len(x))]
    allowed = q_sample_error(x.double().cpu(), exact[1], rows, drawn), torch.full_like(exact[1], drawn)
    for i, (a, e, error) in enumerate(zip(actual, exact, allowed, strict=True)):
        assert a.dtype == x.dtype
        # Given noise comes back by PyTorch's own conversion, which rounds.
        assert_within(a.cpu(), e, error, kernel.truncates(x.dtype) and not (i == 1 and noise is not None))
    return actual[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_drawn(kernel, shape, dtype):
    check(kernel, torch.randn(shape).to(dtype), timesteps(shape), seed=7)
    check(kernel, torch.randn(shape).to(dtype), 321, seed=7)


@pytest.mark.parametrize(("dtype", "noise_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_noise_given(kernel, dtype, noise_dtype):
    for shape in SHAPES[:1] if kernel.interpreted else SHAPES:
        check(kernel, torch.randn(shape).to(dtype), timesteps(shape), torch.randn(shape).to(noise_dtype))


@pytest.mark.parametrize("given_noise", [True, False])
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 4, 16, 33), (2, 40, 3, 11)], ids=str)
def test_channels_last_is_kept(kernel, shape, given_noise):
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    noise = torch.randn(shape) if given_noise else None
    x_t = check(kernel, x, timesteps(shape), noise, None if given_noise else 3)
    assert x_t.stride() == x.stride()
    contiguous = dd.q_sample(
        x.contiguous().to(kernel.device),
        timesteps(shape).to(kernel.device),
        SCHEDULE,
        noise if noise is None else noise.to(kernel.device),
        seed=None if given_noise else 3,
        backend=kernel.name,
    )
    assert x_t.equal(contiguous)


def test_any_strides(kernel):
    base = torch.randn(6, 4, 9, 10)
    noises = (torch.randn(5, 3, 9, 10)[::2, :2], torch.randn(3, 4, 9, 10).chunk(2, 1)[1], torch.randn(3, 2, 10, 9).mT)
    xs = (base[::2, :2], base[:3].chunk(2, 1)[0], base[:3, 1:3].mT.contiguous().mT, base[:3, :2].flip(0))
    for x in xs[2:3] if kernel.interpreted else xs:
        for noise in noises[1:2] if kernel.interpreted else noises:
            check(kernel, x, timesteps(x.shape), noise)
        check(kernel, x, timesteps(x.shape), seed=1)


def test_noise_is_that_of_randn(kernel):
    """With x_start 0 and a late timestep x_t is the noise of stream 2, but for one coefficient."""
    at = {"seed": 3, "first_sample": 5, "draw": 8}
    x = torch.zeros(2, 3, 6, 5, device=kernel.device)
    _, noise = dd.q_sample(x, 999, SCHEDULE, **at, return_noise=True, backend=kernel.name)
    assert noise.equal(dd.randn(x.shape, **at, stream=2, device=kernel.device, backend=kernel.name))


def test_values_do_not_depend_on_batch(kernel):
    x, t = torch.randn(5, 3, 8, 9, device=kernel.device), torch.tensor([5, 999, 0, 70, 7], device=kernel.device)
    together = dd.q_sample(x, t, SCHEDULE, seed=3, backend=kernel.name)
    for i in range(5):
        alone = dd.q_sample(x[i : i + 1], t[i : i + 1], SCHEDULE, seed=3, first_sample=i, backend=kernel.name)
        assert alone.equal(together[i : i + 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(kernel, value):
    x, noise = torch.randn(2, 3, 5, 5, device=kernel.device), torch.randn(2, 3, 5, 5, device=kernel.device)
    x[0, 1, 2, 3], noise[1, 0, 4, 4] = value, value
    actual = dd.q_sample(x, 500, SCHEDULE, noise, backend=kernel.name).cpu()
    x, noise = x.double().cpu(), noise.double().cpu()
    exact = dd.q_sample(x, 500, SCHEDULE, noise, backend="reference")
    finite = exact.isfinite()
    assert actual[~finite].double().allclose(exact[~finite], rtol=0, atol=0, equal_nan=True)
    limits = q_sample_error(x, noise, SCHEDULE.marginal[[500] * 2], 0.0)
    assert_within(actual[finite], exact[finite], limits[finite])


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF - (1 << 32)], ids=["positive", "negative"])
def test_nan_stays_nan_when_rounded(kernel, bits):
    """Rounded like a number, a NaN of all ones would carry over into the sign."""
    noise = torch.full((1, 1, 4, 4), bits, dtype=torch.int32).view(torch.float32).to(kernel.device)
    for dtype in DTYPES:
        x_start = torch.ones(noise.shape, dtype=dtype, device=kernel.device)
        assert dd.q_sample(x_start, 3, SCHEDULE, noise, backend=kernel.name).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(kernel, dtype):
    x_start = torch.randn(2, 3, 9, 7).to(kernel.device, dtype)
    at = {"seed": 1, "backend": kernel.name}
    expected, z = dd.q_sample(x_start, 3, SCHEDULE, return_noise=True, **at)
    x_t = torch.full_like(x_start, float("nan"))
    assert dd.q_sample(x_start, 3, SCHEDULE, x_t=x_t, **at) is x_t
    assert x_t.equal(expected)
    strided = torch.full((2, 3, 7, 9), float("nan"), dtype=dtype, device=kernel.device).mT
    assert dd.q_sample(x_start, 3, SCHEDULE, x_t=strided, **at) is strided
    assert strided.equal(expected)
    result, noise = dd.q_sample(x_start, 3, SCHEDULE, x_t=x_start, return_noise=True, **at)
    assert result is x_start
    assert x_start.equal(expected)
    assert noise.equal(z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_all_of_the_outputs_and_nothing_else(kernel, dtype):
    shape = (3, 3, 5, 7)
    x = within_sentinels(shape, dtype, kernel.device).normal_()
    x_t, noise = (within_sentinels(shape, dtype, kernel.device) for _ in range(2))
    table = SCHEDULE.on(x.device)
    key = noise_key(1, 0, 0, x.device)
    kernel.op("q_sample")(x, None, table.rows, table.steps[9], key, x_t, noise)
    assert all(map(sentinels_survive, (x, x_t, noise)))
    expected = dd.q_sample(x, 9, SCHEDULE, seed=1, return_noise=True, backend=kernel.name)
    assert x_t.equal(expected[0])
    assert noise.equal(expected[1])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0)], ids=str)
def test_empty(kernel, shape):
    x = torch.randn(shape, device=kernel.device)
    assert dd.q_sample(x, 3, SCHEDULE, seed=0, backend=kernel.name).shape == shape


def test_any_shape_layout_dtype_and_timestep(kernel):
    def test(data):
        shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=4, max_size=4), label="shape"))
        x = torch.randn(shape).to(data.draw(st.sampled_from(DTYPES), label="dtype"))
        x = x.permute(0, *data.draw(st.permutations([1, 2, 3]), label="order"))
        t = torch.tensor(data.draw(st.lists(st.integers(0, 999), min_size=shape[0], max_size=shape[0]), label="t"))
        noise = torch.randn(x.shape).to(data.draw(st.sampled_from(DTYPES), label="noise dtype"))
        seed = data.draw(st.none() | st.integers(0, 2**64 - 1), label="seed")
        noise = noise if seed is None else None
        check(kernel, x, t, noise, seed)

    for_draws(kernel, test)


def test_float64_and_gradients_go_to_the_reference():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert dd.q_sample(x, 5, SCHEDULE, seed=1).dtype == torch.float64
    with pytest.raises(dd.BackendUnavailableError, match=r"q_sample.*'cpu'.*float64"):
        dd.q_sample(x, 5, SCHEDULE, seed=1, backend="cpu")
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    dd.q_sample(x, 5, SCHEDULE, seed=1).sum().backward()
    assert x.grad.eq(torch.tensor(SCHEDULE.alpha_bar[5] ** 0.5, dtype=torch.float32)).all()
    with pytest.raises(dd.BackendUnavailableError, match=r"q_sample.*'cpu'.*gradient"):
        dd.q_sample(x, 5, SCHEDULE, seed=1, backend="cpu")
    with torch.no_grad():
        dd.q_sample(x, 5, SCHEDULE, seed=1, backend="cpu")


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x_start": [1.0]}, TypeError, "x_start must be a torch.Tensor; got list"),
        ({"x_start": X.int()}, TypeError, "x_start must be float32.*int32"),
        ({"x_start": X.sum()}, ValueError, r"x_start must be \[N, ...\]"),
        ({"seed": None}, ValueError, "one of noise and seed must be given; got neither"),
        ({"noise": X}, ValueError, "one of noise and seed must be given; got both"),
        ({"seed": None, "noise": X[:, :1]}, ValueError, r"noise must have the shape of x_start, \[2, 3, 4, 4\]"),
        ({"seed": None, "noise": X.int()}, TypeError, "noise must be float32"),
        ({"x_t": X[:1]}, ValueError, "x_t must have the shape of x_start"),
        ({"x_t": X.half()}, TypeError, "x_t must have the dtype of x_start, torch.float32; got torch.float16"),
        ({"seed": None, "noise": X.to("meta")}, ValueError, "noise must be on the device of x_start, cpu; got meta"),
        ({"t": -1}, ValueError, r"t must be in \[0, 1000\); got -1"),
        ({"t": 1000}, ValueError, r"t must be in \[0, 1000\); got 1000"),
        ({"t": True}, TypeError, "t must be an int or an integer tensor; got bool"),
        ({"t": 1.0}, TypeError, "t must be an int or an integer tensor; got float"),
        ({"t": torch.zeros(2)}, TypeError, "t must be an int or an integer tensor; got torch.float32"),
        ({"t": torch.tensor([0, 1, 2])}, ValueError, r"t must have the shape \[\] or \[2\].*got \[3\]"),
        ({"t": torch.tensor([[0, 1]])}, ValueError, r"t must have the shape \[\] or \[2\].*got \[1, 2\]"),
        ({"t": torch.tensor([0, 1000])}, ValueError, r"t must be in \[0, 1000\); got 1000"),
        ({"t": torch.tensor([-3, 5])}, ValueError, r"t must be in \[0, 1000\); got -3"),
        ({"backend": "cuda"}, dd.BackendUnavailableError, "q_sample: backend='cuda' was asked for but cannot run"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        dd.q_sample(**{"x_start": X, "t": 3, "schedule": SCHEDULE, "seed": 0, **arguments})


def test_int32_and_scalar_timesteps():
    x = torch.randn(2, 3, 4, 4)
    expected = dd.q_sample(x, 7, SCHEDULE, seed=0)
    for t in (torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7], dtype=torch.int32), torch.tensor([7] * 4)[::2]):
        assert dd.q_sample(x, t, SCHEDULE, seed=0).equal(expected)


@pytest.mark.parametrize(
    "t",
    [
        np.int64(7),
        np.array(7),
        np.array([7]),
        np.array([7, 7], dtype=np.int32),
        [7, 7],
        (7,),
        torch.tensor([7, 7]).byte(),
    ],
)
def test_what_counts_as_timesteps(t):
    x = torch.randn(2, 3, 4, 4)
    expected = dd.q_sample(x, 7, SCHEDULE, seed=0), dd.reverse_step(x, x, STEPS, 7, seed=0)
    assert dd.q_sample(x, t, SCHEDULE, seed=0).equal(expected[0])
    assert dd.reverse_step(x, x, STEPS, t, seed=0).equal(expected[1])


@pytest.mark.parametrize("seed", [np.int64(7), np.uint64(7), np.int8(7)])
def test_numpy_seeds(seed):
    x = torch.randn(2, 3)
    at = {"seed": seed, "first_sample": np.int32(3), "draw": np.int64(2)}
    assert dd.q_sample(x, 7, SCHEDULE, **at).equal(dd.q_sample(x, 7, SCHEDULE, seed=7, first_sample=3, draw=2))


@pytest.mark.parametrize(
    ("t", "error"),
    [
        ("7", TypeError),
        (None, TypeError),
        (np.array([True, False]), TypeError),
        ([1.5, 2.0], TypeError),
        ([7] * 3, ValueError),
        ([7, 1000], ValueError),
        (np.array([[7, 7]]), ValueError),
        (np.float32(7), TypeError),
    ],
)
def test_what_does_not(t, error):
    with pytest.raises(error, match="t must"):
        dd.q_sample(torch.randn(2, 3), t, SCHEDULE, seed=0)


def test_opcheck(kernel):
    if kernel.name == "triton":
        return
    x = torch.randn(2, 3, 4, 4, device=kernel.device)
    table, key = SCHEDULE.on(x.device), noise_key(1, 0, 0, x.device)
    op = torch.ops.dd_kernels.q_sample.default
    torch.library.opcheck(op, (x, None, table.rows, table.steps[9], key, x.clone(), x.clone()))
    torch.library.opcheck(op, (x, x.clone(), table.rows, table.steps[9], None, x.clone(), None))


def test_compiles_in_one_graph():
    x, t = torch.randn(2, 3, 5, 5), torch.tensor([3, 999])
    run = lambda x, t: dd.q_sample(x * 2, t, SCHEDULE, seed=4)  # noqa: E731
    assert torch.compile(run, fullgraph=True, backend="aot_eager")(x, t).equal(run(x, t))
