"""group_norm_silu and its gradients against float64, for every layout, dtype and option."""

import pytest
import torch
from bounds import UNIT, assert_within
from budget import DTYPES
from draws import for_draws
from group_norm_bounds import Errors
from group_norm_cases import ACTIVATIONS, ROWS, check, errors, make, results, statistics
from hypothesis import strategies as st

import dd_kernels as dd
from dd_kernels.ops.activation import Activation

# 1, 3, 10, 12 and 40 channels per group; one pixel, fewer than a vector, odd, several tiles.
SHAPES = [
    ((2, 12, 5, 5), 4),
    ((3, 40, 4, 4), 4),
    ((2, 9, 3, 11), 9),
    ((2, 24, 1, 7), 2),
    ((2, 40, 33), 1),
    ((3, 20), 2),
    ((2, 80, 1, 1), 8),
    ((1, 4, 50, 70), 2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_forward_and_backward(kernel, shape, groups, dtype):
    # The interpreter takes a third of the rows with each dtype, and so all of them with every shape.
    third = slice(DTYPES.index(dtype), None, 3) if kernel.interpreted else slice(None)
    for seed, row in list(enumerate(ROWS))[third]:
        x, dy, options, activation = make(shape, dtype, row, seed)
        check(kernel, x, dy, groups, options, activation)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4), (2, 8, 0), (0, 8)], ids=str)
@pytest.mark.parametrize("channels_last", [0, 1])
def test_nothing_to_normalise(kernel, channels_last, shape):
    """An empty batch or image: the sums are zeros; y and dx have no elements."""
    row = (1, 1, 1, 1, 1, 1, channels_last)
    x, dy, options, activation = make(shape, torch.float32, row, device=kernel.device)
    reference = results(
        x.double(), dy.double(), 4, {k: v.double() for k, v in options.items()}, activation, "reference"
    )
    actual = results(x, dy, 4, options, activation, kernel.name)
    assert all(v.equal(torch.zeros_like(v)) and v.shape == actual[name].shape for name, v in reference.items())
    for name, v in {"y": x, "dx": x, **{f"d{name}": v for name, v in options.items()}}.items():
        assert actual[name].equal(torch.zeros_like(v))


@pytest.mark.parametrize("channels_last", [0, 1])
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_large_mean(kernel, offset, channels_last):
    """The deviation survives a mean far above it, where E[x^2] - mean^2 in float32 would not."""
    row = (0,) * 6 + (channels_last,)
    x, _, _, _ = make((2, 12, 9, 11), torch.float32, row, mean=offset, device=kernel.device)
    exact = dd.group_norm_silu(x.double(), 3)
    actual = dd.group_norm_silu(x, 3, backend=kernel.name)
    # The input itself is exact, so only the statistics and the arithmetic on x - mean round.
    assert (actual.double() - exact).abs().max() <= offset * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("apart", [0, 1000])
@pytest.mark.parametrize("channels_last", [0, 1])
def test_pre_shift_that_takes_large_means_away(kernel, channels_last, apart):
    """Plain PyTorch adds it exactly; a kernel that subtracts mean - pre_shift must give back what that rounds off."""
    row = (0, 0, 1, 0, 0, 0, channels_last)
    x, _, options, _ = make((2, 12, 6, 8), torch.float32, row, mean=0, device=kernel.device)
    shift = 100 + (1 + apart) * options["pre_shift"]
    x = x - shift[:, :, None, None]
    exact, actual = (
        dd.group_norm_silu(v, 3, pre_shift=s, activation="none", backend=backend)
        for v, s, backend in ((x.double(), shift.double(), "reference"), (x, shift, kernel.name))
    )
    assert_within(actual, exact, errors(kernel, x, torch.zeros_like(x), 3, {"pre_shift": shift}, "none")["y"])


@pytest.mark.parametrize("apart", [0, 1000])
@pytest.mark.parametrize("channels_last", [0, 1])
def test_gradients_where_pre_shift_takes_large_means_away(kernel, channels_last, apart):
    """The CPU's kernels account for the centre's rounding in gradients too; CUDA's and Triton's are off by it."""
    x, dy, options, activation = make((2, 12, 6, 8), torch.float32, (1, 1, 1, 0, 0, 1, channels_last), mean=0)
    options["pre_shift"] = 100 + (1 + apart) * options["pre_shift"]
    x = x - options["pre_shift"][:, :, None, None]
    if kernel.name == "cpu":
        check(kernel, x, dy, 3, options, activation)
        return
    wide = {name: v.double() for name, v in options.items()}
    exact = results(x.double(), dy.double(), 3, wide, activation, "reference")
    options = {name: v.to(kernel.device) for name, v in options.items()}
    actual = results(x.to(kernel.device), dy.to(kernel.device), 3, options, activation, kernel.name)
    for name, v in exact.items():
        assert (actual[name].cpu() - v).abs().max() <= 1e-4 * v.abs().max(), name


def test_a_first_value_far_from_the_rest(kernel):
    """Statistics must not depend on the first value as a shift: here it is far from all others."""
    for channels_last in (0, 1):
        x, dy, options, activation = make((2, 8, 12, 12), torch.float32, (1, 1, 0, 0, 0, 0, channels_last))
        x[:, ::2, 0, 0] = 1e4
        check(kernel, x, dy, 4, options, activation)


@pytest.mark.parametrize("pre_shift", [0, 1])
@pytest.mark.parametrize("channels_last", [0, 1])
def test_a_sample_of_the_values_far_from_the_rest(kernel, channels_last, pre_shift):
    """Statistics must not depend on the few values that the CPU's kernels estimate the mean from: here all of them are
    outliers.
    """
    if kernel.interpreted:
        pytest.skip("Triton's kernels take no sample")
    x, _, options, _ = make((32, 8, 16, 16), torch.float32, (0, 0, pre_shift, 0, 0, 0, channels_last))
    if channels_last:
        x.flatten(2)[..., ::32] = 1e4
    elif pre_shift:
        for place in range(4):
            x.view(32, 8, 4, 64)[:, 2 * place, place, :8] = 1e4
    else:
        x.view(32, 4, 512)[..., :8] = 1e4
    x, shift = x.to(kernel.device), options["pre_shift"].to(kernel.device) if pre_shift else None
    mean, rstd = statistics(kernel.name, x, 1, 1e-5, shift)
    h = (x.double() if shift is None else x.double() + shift.double()[:, :, None, None]).flatten(1)
    exact = h.mean(1, keepdim=True), (h.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
    for statistic, true in zip((mean, rstd), exact, strict=True):
        assert (statistic.double() / true - 1).square().mean().sqrt() <= torch.finfo(torch.float32).eps


def test_large_groups_keep_their_accuracy(kernel):
    if kernel.name != "cpu":
        pytest.skip("too slow for an interpreter; each kernel's long sums are tested where it runs")
    for channels_last in (0, 1):
        x, dy, options, activation = make((1, 4, 700, 400), torch.float32, (1, 1, 0, 0, 0, 1, channels_last))
        check(kernel, x, dy, 1, options, activation)


def test_samples_beyond_the_cache(kernel):
    """In channels_last, samples larger than the cache are visited in the order of memory."""
    if kernel.name != "cpu":
        pytest.skip("only the CPU's kernels take another way")
    for dtype in DTYPES:
        x, dy, options, activation = make((2, 24, 80, 61), dtype, ROWS[0])
        check(kernel, x, dy, 4, options, activation)


@pytest.mark.parametrize("mean_of", ["x", "pre_shift"])
def test_statistics_are_of_the_shifted_input(kernel, mean_of):
    for row in ((0, 0, 1, 0, 0, 0, 0), (0, 0, 1, 0, 0, 0, 1)):
        x, _, options, _ = make((2, 12, 6, 5), torch.float32, row, device=kernel.device)
        shift = options["pre_shift"] * (1 if mean_of == "x" else 50)
        mean, rstd = statistics(kernel.name, x, 3, 0.5, shift)
        h = (x.double() + shift.double()[:, :, None, None]).contiguous().view(2, 3, -1)
        wide = {"pre_shift": shift.double(), "eps": 0.5}
        limits = Errors(x.double(), x.double(), 3, wide, Activation.NONE, False)
        assert_within(mean, h.mean(2), limits.e_mean.view(2, 3))
        true_rstd = (h.var(2, unbiased=False) + 0.5).rsqrt()
        assert_within(rstd, true_rstd, limits.e_rstd.view(2, 3) * true_rstd)


def test_any_strides(kernel):
    base = torch.randn(4, 12, 9, 10, generator=torch.Generator().manual_seed(0))
    views = [
        base[::2, 4:],
        base.mT,
        base.flip(0),
        base[:, :, ::2],
        base[:, :8].permute(0, 2, 1, 3),
        base[1:2, :, :1, :1],
    ]
    for x in views:
        groups = x.shape[1] // 2 if x.shape[1] % 2 == 0 else x.shape[1]
        _, dy, options, _ = make(tuple(x.shape), x.dtype, ROWS[0], seed=1)
        check(kernel, x, dy, groups, options, "silu")
        check(kernel, x, dy.mT.contiguous().mT, groups, options, "silu")
    expanded = torch.randn(2, 1, 5, 5).expand(2, 6, 5, 5)
    x, _, _, _ = make((2, 6, 5, 5), torch.float32, (0,) * 7)
    check(kernel, x, expanded, 2, {}, "silu")


def test_options_of_any_dtype_and_strides(kernel):
    x, dy, options, activation = make((3, 8, 5, 6), torch.bfloat16, ROWS[0])
    options = {name: v.bfloat16() for name, v in options.items()}
    options["scale"] = options["scale"].T.contiguous().T
    actual = check(kernel, x, dy, 4, options, activation)
    assert all(v.dtype == torch.bfloat16 for v in actual.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channels_last", [0, 1])
def test_nan_and_inf_stay_in_their_group(kernel, channels_last, value):
    x, dy, options, activation = make((2, 12, 5, 5), torch.float32, (1, 1, 0, 0, 1, 1, channels_last))
    x[1, 4, 2, 3] = value
    actual, plain = (
        results(
            x.to(kernel.device),
            dy.to(kernel.device),
            4,
            {k: v.to(kernel.device) for k, v in options.items()},
            activation,
            name,
        )
        for name in (kernel.name, "reference")
    )
    for name in ("y", "dx", "dshift"):
        assert actual[name].isnan().equal(plain[name].isnan())
    x, dy, options, activation = make((2, 12, 5, 5), torch.float32, (1, 1, 0, 0, 1, 1, channels_last))
    limits = errors(kernel, x, dy, 4, options, activation)["y"]
    options["shift"][0, 5] = value
    on = {k: v.to(kernel.device) for k, v in options.items()}
    actual = dd.group_norm_silu(x.to(kernel.device), 4, backend=kernel.name, **on).cpu()
    exact = dd.group_norm_silu(x.double(), 4, backend="reference", **{k: v.double() for k, v in options.items()})
    assert_within(actual[:, :5], exact[:, :5], limits[:, :5])
    assert_within(actual[:, 6:], exact[:, 6:], limits[:, 6:])
    assert actual[0, 5].double().allclose(exact[0, 5], rtol=0, atol=0, equal_nan=True)


def test_silu_far_from_zero(kernel):
    """silu(z) -> 0 and z, silu'(z) -> 0 and 1, with nothing in between that is not finite."""
    shift = torch.tensor([[-3e38, -1e30, -104.0, -89.0, -88.0, -40.0, 0.0, 40.0, 88.0, 104.0, 1e30, 3e38]])
    x = torch.zeros(1, 12, 2, 2)
    shift, x = shift.to(kernel.device), x.to(kernel.device)
    actual = results(x, torch.ones_like(x), 12, {"shift": shift}, "silu", kernel.name)
    # z is the shift to the bit. The exponential's error is that of its argument, and shows by 1 - gate in the gate.
    z = shift.double()
    gate, rest = torch.sigmoid(z), torch.sigmoid(-z)
    # A gate that is no normal number of float32 may be 0.
    e_gate = 24 * UNIT * (1 + z.abs() * rest) * gate + gate.clamp(max=2.0**-126)
    assert_within(actual["y"][:, :, 0, 0], z * gate, z.abs() * e_gate)
    assert_within(actual["dshift"], 4 * gate * (1 + z * rest), 4 * (1 + z.abs() * rest) * e_gate)


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3), (7, 9, 3, 1)])
def test_constant_shifted_input_leaves_nothing(kernel, shape):
    """A group of one value twice is its own mean, however x + pre_shift rounds; 1 / sqrt(eps) would show the rest."""
    if kernel.name != "cpu":
        pytest.skip("only the CPU's kernel carries the mean in double")
    shift = torch.randn(shape[:2], generator=torch.Generator().manual_seed(0))
    x = torch.randn((*shape[:2], *(1 for _ in shape[2:])), generator=torch.Generator().manual_seed(1)).expand(shape)
    y = dd.group_norm_silu(x, 9, pre_shift=shift, activation="none", backend=kernel.name)
    assert y.abs().max() <= 1e-9 * 1e-5**-0.5


@pytest.mark.parametrize("value", [3.7, 3.7e22])
def test_constant_input(kernel, value):
    """A constant is normalised to 0, however large it is: its square overflows, and must not meet a count of 0."""
    x = torch.full((2, 8, 5, 5), value, device=kernel.device)
    bias = torch.arange(8.0, device=kernel.device)
    y = dd.group_norm_silu(x, 4, None, bias, activation="none", backend=kernel.name)
    assert (y - bias[:, None, None]).abs().max() <= value * 2**-23 * 1e-5**-0.5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(kernel, activation, dtype):
    """Forward and backward, where z is moderate, large and small."""
    for channels_last in (0, 1):
        x, dy, options, _ = make((2, 24, 5, 7), dtype, (1, 1, 1, 1, 1, 1, channels_last))
        for factor in (1, 20, 1e-3):
            scaled = {name: v * (factor if name in ("weight", "bias", "shift") else 1) for name, v in options.items()}
            check(kernel, x, dy, 4, scaled, activation)


def test_any_shape_and_options(kernel):
    def test(data):
        width, groups = data.draw(st.integers(1, 13)), data.draw(st.integers(1, 5))
        samples, spatial = data.draw(st.integers(1, 4)), data.draw(st.lists(st.integers(1, 5), max_size=3))
        row, dtype = data.draw(st.tuples(*[st.integers(0, 1)] * 7)), data.draw(st.sampled_from(DTYPES))
        mean, activation = data.draw(st.sampled_from([0.0, 0.5, 30.0])), data.draw(st.sampled_from(ACTIVATIONS))
        shape, seed = (samples, width * groups, *spatial), data.draw(st.integers(0, 999))
        x, dy, options, _ = make(shape, dtype, row, seed, mean)
        check(kernel, x, dy, groups, options, activation)

    for_draws(kernel, test)
