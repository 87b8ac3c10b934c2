"""attention against float64 on every instruction set; as an op of PyTorch; what it writes, reads and refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_bounds import PACKED_EXP2, bound
from attention_bounds import attention as exact_attention
from bounds import UNIT, assert_within
from budget import DTYPES, sentinels_survive, within_sentinels
from draws import for_draws
from guard_page import guard_page
from hypothesis import strategies as st

import dd_kernels as dd
from dd_kernels.ops.attention import attention

ATTENTION = torch.ops.dd_kernels.attention
# [N, heads, queries, keys, D, D of the values]: part of a panel, one and more; blocks of keys; groups of panels.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 7, 4, 3),
    (2, 2, 33, 49, 40, 40),
    (1, 2, 20, 300, 17, 33),
    (1, 1, 70, 520, 130, 20),
    (1, 1, 200, 700, 96, 100),
    (1, 1, 9, 140, 600, 8),
]


@pytest.fixture(autouse=True)
def _on_a_cpu(kernel):
    if kernel.name != "cpu":
        pytest.skip("attention has kernels for the CPU alone")


def drawn(n, heads, queries, keys, depth, outputs, dtype=torch.float32):
    """Draws q, k and v [N, heads, tokens, D] as projections of tokens make them: [N, tokens, heads, D] in memory."""
    sizes = ((queries, depth), (keys, depth), (keys, outputs))
    return tuple(torch.randn(n, tokens, heads, d).to(dtype).transpose(1, 2) for tokens, d in sizes)


def check(kernel, q, k, v, scale=None, **options):
    y = attention(q, k, v, scale, backend="cpu", **options)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide = [x.double() for x in (q, k, v)]
    bfloat16 = options.get("products") == "bfloat16"
    assert y.dtype == q.dtype
    assert_within(y, exact_attention(*wide, scale), bound(*wide, scale, kernel.isa, bfloat16))
    return y


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(kernel, shape, products):
    check(kernel, *drawn(*shape), products=products)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(kernel, dtype):
    check(kernel, *drawn(2, 2, 35, 49, 24, 20, dtype=dtype))
    check(kernel, *drawn(2, 2, 35, 49, 24, 20, dtype=dtype), products="bfloat16")


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_scale(kernel, scale):
    check(kernel, *drawn(1, 2, 18, 40, 8, 8), scale=scale)


def test_any_strides(kernel):
    q, k, v = torch.randn(2, 37, 3, 4, 8).permute(2, 0, 3, 1, 4)  # one product of all three, as U-Nets have it
    check(kernel, q, k, v)
    check(kernel, q.mT.contiguous().mT, k.mT.contiguous().mT, v.flip(2))
    check(kernel, q, k[:, :1].expand(k.shape), v[:1].expand(v.shape))
    check(kernel, q[:, :, ::2], k[:, :, 3:], v[:, :, 3:, ::2])


def test_any_shape(kernel):
    def test(data):
        size = [data.draw(st.integers(1, most)) for most in (2, 3, 80, 600, 200, 80)]
        products = data.draw(st.sampled_from(["float32", "bfloat16"]))
        spreads = [0.1, 1.0, 10.0] if products == "float32" else [0.1, 1.0]  # at 10 bfloat16 bounds nothing
        spread = data.draw(st.sampled_from(spreads), label="spread of the scores")
        q, k, v = drawn(*size, dtype=data.draw(st.sampled_from(DTYPES)))
        check(kernel, q, k, v, spread / math.sqrt(size[4]), products=products)

    for_draws(kernel, test)


def test_large_scores(kernel):
    """Scores of several thousands: no power overflows, and the largest score takes all, also where it comes last."""
    q, k, v = drawn(1, 1, 3, 520, 4, 5)
    k[:, :, -1] = 50 * q[:, :, 0] / q[:, :, 0].square().sum()
    y = check(kernel, q, k, v, 400.0)
    assert torch.equal(y[0, 0, 0], v[0, 0, -1])


def test_weights_before_they_are_rounded(kernel):
    """Of two keys, values 1 and 0 and exponents 0 and e the result is 1 / (1 + 2^e), which no product rounds."""
    e = -torch.arange(0, 480.0).view(-1, 1, 1, 1) / 16
    keys = torch.cat([torch.zeros_like(e), e], 2)
    values = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1).expand(keys.shape)
    y = attention(torch.ones_like(e), keys, values, math.log(2), backend="cpu", products="bfloat16")
    exact = 1 / (1 + torch.exp2(e.double()))
    # Both weights are off by the polynomial's error, in the sum alone; the exponents of float32 by roundings of scale.
    assert_within(y, exact, exact * (PACKED_EXP2 + 4 * UNIT * (1 - e.double())))


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(value, products):
    """A score that is no number, or infinite, makes its query's outputs NaN, and no other's."""
    for row in (3, 37, 299):
        q, k, v = drawn(1, 2, 40, 300, 8, 8)
        q[0, 1, min(row, 39), 2] = value
        y = attention(q, k, v, backend="cpu", products=products)
        expected = torch.zeros(1, 2, 40, dtype=torch.bool)
        expected[0, 1, min(row, 39)] = True
        assert y.isnan().all(-1).equal(expected)
        assert y.isnan().any(-1).equal(expected)
        k[0, 0, row, 1] = value  # a score of minus infinity is a weight of 0
        exact = exact_attention(q.double(), k.double(), v.double(), 8**-0.5)
        assert attention(q, k, v, backend="cpu", products=products).isnan().equal(exact.isnan())


def test_a_key_of_minus_infinity_has_no_weight(kernel):
    q, k, v = drawn(1, 1, 5, 6, 4, 4)
    q = q.abs() + 0.1
    k[0, 0, 2, 1] = -math.inf
    y = attention(q, k, v, backend="cpu")
    keep = [0, 1, 3, 4, 5]
    assert_within(
        y, exact_attention(*(x.double() for x in (q, k[:, :, keep], v[:, :, keep])), 0.5), 1e-6 * v.abs().max()
    )


def test_same_bits_on_any_number_of_threads_and_in_any_batch():
    q, k, v = drawn(3, 2, 130, 300, 160, 160)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(attention(q, k, v))
    finally:
        torch.set_num_threads(before)
    assert all(y.equal(runs[0]) for y in runs)
    assert torch.cat([attention(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(3)]).equal(runs[0])


def test_sums_of_64_weights_are_added_up():
    """All weights are 1: a value of 2^24 absorbs the ones of its own 64 one by one, but not the sums of the others."""
    q, k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 256, 4), torch.ones(1, 1, 256, 1)
    v[0, 0, 0] = 2.0**24
    assert attention(q, k, v).item() * 256 == 2.0**24 + 192


def test_memory_order_of_the_result():
    y = attention(*drawn(2, 3, 5, 7, 4, 6))
    assert y.shape == (2, 3, 5, 6)
    assert y.transpose(1, 2).is_contiguous()


def test_writes_all_of_its_outputs_and_nothing_else():
    q, k, v = drawn(2, 3, 37, 20, 9, 7)
    y = within_sentinels((2, 37, 3, 7), torch.float32, "cpu")
    ATTENTION(q, k, v, 0.5, False, y)
    assert sentinels_survive(y)
    assert y.transpose(1, 2).equal(attention(q, k, v, 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_nothing_beyond_its_inputs(dtype):
    q, k, v = (x.contiguous() for x in drawn(1, 2, 5, 7, 9, 7, dtype=dtype))
    with guard_page() as at_the_end:
        y = at_the_end(torch.zeros(1, 5, 2, 7, dtype=dtype))
        placed = [at_the_end(x) for x in (q, k, v)]
        ATTENTION(*placed, 0.5, False, y)
        assert y.transpose(1, 2).equal(attention(q, k, v, 0.5))
        del y, placed


def test_nothing_to_compute():
    assert attention(*drawn(0, 2, 5, 6, 4, 4)).shape == (0, 2, 5, 4)
    assert attention(*drawn(2, 2, 0, 6, 4, 4)).shape == (2, 2, 0, 4)
    assert attention(*drawn(2, 2, 5, 6, 4, 0)).shape == (2, 2, 5, 0)


def test_opcheck():
    torch.library.opcheck(ATTENTION.default, (*drawn(1, 2, 5, 6, 4, 3), 0.5, False, torch.empty(1, 5, 2, 3)))


def test_gradients_are_the_references():
    leaves = [x.detach().clone().requires_grad_() for x in drawn(1, 2, 5, 6, 4, 3)]
    found = torch.autograd.grad(attention(*leaves).square().sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = torch.autograd.grad(exact_attention(*exact, 0.5).square().sum(), exact)
    limit = 100 * 2.0**-24  # of a dozen sums of six terms at most
    assert all((a.double() - b).abs().max() <= limit * b.abs().max() for a, b in zip(found, wanted, strict=True))
    with pytest.raises(dd.BackendUnavailableError, match="a gradient is asked for"):
        attention(*leaves, backend="cpu")


def test_float64_and_other_devices_are_the_references():
    q, k, v = drawn(1, 2, 5, 6, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(dd.BackendUnavailableError, match="q is float64"):
        attention(q, k, v, backend="cpu")
    far = [x.float().to("meta") for x in (q, k, v)]
    assert attention(*far).shape == (1, 2, 5, 3)
    with pytest.raises(dd.BackendUnavailableError, match=r"q is on meta|these are on meta"):
        attention(*far, backend="cpu")


Q, K, V = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 6, 4), torch.zeros(2, 3, 6, 8)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, r"q must be a torch\.Tensor; got list", ([1.0], K, V), {}),
        (TypeError, r"v must be float32, .* got torch\.int64", (Q, K, V.long()), {}),
        (ValueError, r"k must be \[N, heads, tokens, D\]; got \[3, 6, 4\]", (Q, K[0], V), {}),
        (ValueError, "v must be on the device of q, cpu; got meta", (Q, K, V.to("meta")), {}),
        (TypeError, "k must have the dtype of q, .*float32; got .*float16", (Q, K.half(), V), {}),
        (ValueError, r"k must be \[2, 3, keys, 4\], .* got \[2, 3, 6, 3\]", (Q, K[..., :3], V), {}),
        (ValueError, r"k must be \[2, 3, keys, 4\], .* got \[2, 3, 0, 4\]", (Q, K[:, :, :0], V[:, :, :0]), {}),
        (ValueError, r"v must be \[2, 3, 6, D\]; got \[2, 3, 5, 8\]", (Q, K, V[:, :, :5]), {}),
        (ValueError, r"scale must be at least 0; got -1\.0", (Q, K, V, -1.0), {}),
        (ValueError, "products must be 'float32' or 'bfloat16'; got 'half'", (Q, K, V), {"products": "half"}),
        (ValueError, "backend must be one of auto, .* got 'fast'", (Q, K, V), {"backend": "fast"}),
    ],
)
def test_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=message):
        attention(*arguments, **options)


STORAGE = torch.zeros(1000)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("y must be contiguous", {"y": torch.zeros(2, 3, 5, 8).transpose(1, 2)}),
        (r"y must be of the shape \[2, 5, 3, 8\]", {"y": torch.zeros(2, 5, 3, 7)}),
        (r"q must be of 4 dimensions; got", {"q": Q[0]}),
        (r"k must be of the shape \[2, 3, 6, 4\]", {"k": K[:, :, :5]}),
        (r"v must be of the shape \[2, 3, 6, 8\]|k must be of the shape", {"v": V[:, :2]}),
        ("q must be of the dtype of y, float32|q must be of the dtype of y", {"q": Q.half()}),
        ("k must be float32, bfloat16 or float16; got float64", {"k": K.double()}),
        ("v must be dense in its last dimension", {"v": V.mT.contiguous().mT}),
        ("q must be with keys of some depth; got none", {"q": Q[..., :0], "k": K[..., :0]}),
        ("scale must be at least 0; got -1", {"scale": -1.0}),
        ("scale must be at least 0; got nan", {"scale": math.nan}),
        ("y must be apart from q", {"q": STORAGE[:120].view(2, 3, 5, 4), "y": STORAGE[60:300].view(2, 5, 3, 8)}),
    ],
)
def test_wrong_arguments_of_the_operator(message, changes):
    given = {"q": Q, "k": K, "v": V, "scale": 0.5, "bfloat16": False, "y": torch.zeros(2, 5, 3, 8)} | changes
    with pytest.raises(RuntimeError, match=f"^dd_kernels::attention: ({message})"):
        ATTENTION(*given.values())


def test_exports_and_compiles():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(2 * q, k, v) + 1

    inputs = drawn(2, 3, 5, 6, 4, 8)
    with torch.no_grad():
        assert torch.export.export(Layer(), inputs).module()(*inputs).equal(Layer()(*inputs))
        run = torch.compile(Layer(), fullgraph=True, backend="aot_eager", dynamic=True)
        assert run(*inputs).equal(Layer()(*inputs))
