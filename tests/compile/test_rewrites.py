"""Each rewrite: where its pattern and its condition hold, where the condition is broken, and equal results in both."""

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same_network

from dd_kernels.compile import Report, pays

N, C, SIDE = 2, 8, 6
NORM, SILU = (), ("silu",)


def group_norm(x, groups=4):
    return F.group_norm(x, groups, torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype), None, 1e-6)


def rows(x):
    """[N, C, 1, 1], different for every sample and channel."""
    return x.mean((2, 3), keepdim=True).cos()


def swish_of_other(x):
    y = group_norm(x)
    return y * torch.sigmoid(x)


def read_twice(x):
    y = group_norm(x)
    return F.silu(y) + y


def sigmoid_read_twice(x):
    y = group_norm(x)
    s = torch.sigmoid(y)
    return y * s + s


def mish_written_out(x):
    y = group_norm(x)
    return y * torch.tanh(F.softplus(y))


def softplus_of_another_kind(x):
    y = group_norm(x)
    return y * torch.tanh(F.softplus(y, 2.0))


def in_place_silu(x):
    return F.silu(group_norm(x), inplace=True)


def scale_written_between(x):
    scale = rows(x).detach().clone()
    product = group_norm(x) * (1 + scale)
    scale.zero_()
    return F.silu(product + scale)


def mutated_embedding(x):
    e = rows(x)
    h = x * 2 + e
    e.zero_()
    return group_norm(h) + e


def scale_shift(x, product=lambda y, s: y * (1 + s)):
    return F.silu(product(group_norm(x), rows(x)) + rows(x + 1))


def of_one_batch(x):
    row = torch.linspace(-1, 1, C).reshape(1, C, 1, 1)
    return F.silu(group_norm(x) * (row + 1) + row)


def spatial(x):
    return F.silu(group_norm(x) * (1 + x.sin()) + x.cos())


def scale_of_two(x):
    return F.silu(group_norm(x) * (2 + rows(x)) + rows(x))


def scaled_sum(x):
    return F.silu(torch.add(group_norm(x) * (1 + rows(x)), rows(x), alpha=2))


def embedding(x):
    return F.silu(group_norm(x.sin() + rows(x)))


def embedding_first(x):
    return F.silu(group_norm(rows(x) + x.sin()))


def embedding_of_pixels(x):
    return F.silu(group_norm(x.sin() + x[:, :1]))


def sum_read_twice(x):
    h = x.sin() + rows(x)
    return F.silu(group_norm(h)) + h


def through_views(x):
    return F.silu(group_norm(x).flatten(2).transpose(1, 2).contiguous())


def through_slices(x):
    return F.silu(group_norm(x)[:, :, 1:])


def under_no_grad(x):
    y = group_norm(x)
    with torch.no_grad():
        return F.silu(y)


def gelu_tanh(x):
    return F.gelu(group_norm(x), approximate="tanh")


def of_tokens(x):
    """PyTorch's norm makes the tokens contiguous, so that they can be viewed as an image; ours keeps their strides."""
    tokens = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
    return F.silu(group_norm(tokens)).view(x.shape)


def by_keywords(x):
    return F.silu(F.group_norm(input=x, num_groups=2, bias=torch.linspace(-1, 1, C, dtype=x.dtype), eps=0.5))


CASES = {
    "SiLU": (lambda x: F.silu(group_norm(x)), SILU),
    "SiLU in place": (in_place_silu, SILU),
    "SiLU written out": (lambda x: (lambda y: torch.sigmoid(y) * y)(group_norm(x)), SILU),
    "SiLU by keywords": (by_keywords, SILU),
    "the sigmoid of something else": (swish_of_other, NORM),
    "the sigmoid read twice": (sigmoid_read_twice, NORM),
    "Mish": (lambda x: F.mish(group_norm(x)), ("mish",)),
    "Mish written out": (mish_written_out, ("mish",)),
    "softplus with beta 2": (softplus_of_another_kind, NORM),
    "GELU": (lambda x: F.gelu(group_norm(x)), ("gelu",)),
    "GELU by tanh": (gelu_tanh, ("gelu_tanh",)),
    "ReLU": (lambda x: F.relu(group_norm(x)), NORM),
    "the norm read twice": (read_twice, NORM),
    "through views": (through_views, SILU),
    "through slices": (through_slices, NORM),
    "tokens": (of_tokens, SILU),
    "the scale written to between": (scale_written_between, NORM),
    "SiLU without gradients": (under_no_grad, NORM),
    "scale-shift": (scale_shift, ("scale-shift", "silu")),
    "scale-shift of one batch": (of_one_batch, ("scale-shift", "silu")),
    "scale-shift, by another factor": (scale_of_two, NORM),
    "scale-shift over pixels": (spatial, NORM),
    "scale-shift with a factor of the shift": (scaled_sum, NORM),
    "embedding": (embedding, ("silu", "embedding")),
    "embedding first": (embedding_first, ("silu", "embedding")),
    "embedding of pixels": (embedding_of_pixels, SILU),
    "embedding, the sum read twice": (sum_read_twice, SILU),
    "embedding written to between": (mutated_embedding, NORM),
}


def run(function, x, weights):
    x = x.detach().requires_grad_()
    y = function(x)
    if y.requires_grad:
        (gradient,) = torch.autograd.grad((y * weights(y)).sum(), x)
        return y.detach(), gradient
    return (y,)


def weights(y):
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)


def assert_rewritten(function, x, fused):
    """Checks what was fused, and y and dx against float64."""
    report = Report()
    fast = torch.compile(function, backend="dd_kernels", options={"report": report}, fullgraph=True)
    actual, plain, exact = run(fast, x, weights), run(function, x, weights), run(function, x.double(), weights)
    assert [norm.fused for norm in report.norms] == fused
    assert len(actual) == len(plain)
    assert_same_network(actual, exact)
    return report


@pytest.mark.parametrize("always", [False, True], ids=["where it pays", "always"])
@pytest.mark.parametrize("case", CASES)
def test_rewrite(case, always, monkeypatch):
    """``always``: a norm that nothing is fused with is replaced on small maps, too."""
    if always:
        monkeypatch.setattr(pays, "norm_alone", lambda x, channels_last: None)
    function, fused = CASES[case]
    report = assert_rewritten(function, torch.randn(N, C, SIDE, SIDE), [fused])
    assert report.share == (fused != NORM or always)


REASONS = {
    "ReLU": "no kernel for relu",
    "the norm read twice": "the norm's result is read by more than its activation",
    "scale-shift over pixels": "scale and shift vary over the pixels",
    "the scale written to between": "an operation in place, or a change of grad mode or autocast, stands within it",
}


@pytest.mark.parametrize("case", REASONS)
def test_the_report_says_why_not(case):
    report = assert_rewritten(CASES[case][0], torch.randn(N, C, SIDE, SIDE), [NORM])
    assert report.norms[0].left == (REASONS[case],)
    assert f"1 x not fused: {REASONS[case]}" in str(report)


def test_float64_stays():
    report = Report()
    x = torch.randn(N, C, SIDE, SIDE, dtype=torch.float64)
    fast = torch.compile(CASES["SiLU"][0], backend="dd_kernels", options={"report": report})
    assert torch.equal(fast(x), CASES["SiLU"][0](x))
    assert report.norms[0].kept == "no kernel for float64"


def residual_stream(x):
    total = x.sin() + x.cos()
    h = F.silu(group_norm(total))
    return h + total * 3


def residual_read_before(x):
    total = x.sin() + x.cos()
    y = group_norm(total)
    early = total * 3
    return F.silu(y * early.mean()) + F.silu(y) + early


def residual_scaled(x):
    total = torch.add(x.sin(), x.cos(), alpha=2)
    return F.silu(group_norm(total)) + total


def residual_in_place(x):
    total = x.sin()
    total += x.cos()
    return F.silu(group_norm(total)) + total


def residual_of_a_number(x):
    total = x.sin() + 2
    return F.silu(group_norm(total)) + total


def residual_subtracted(x):
    total = x.sin() - x.cos()
    return F.silu(group_norm(total)) + total


def residual_that_broadcasts(x):
    total = x.sin() + x[:, :1]
    return F.silu(group_norm(total)) + total


def skip_connection(x):
    return F.silu(group_norm(torch.cat([x.sin(), x[:, :4]], 1), 3))


def skip_read_twice(x):
    joined = torch.cat([x.sin(), x[:, :4]], dim=1)
    return F.silu(group_norm(joined, 3)) + joined


def skip_along_rows(x):
    return F.silu(group_norm(torch.cat([x.sin(), x], 2)))


TWO_INPUTS = {
    "residual": (residual_stream, ("silu", "residual")),
    "residual, the sum read before": (residual_read_before, ("residual",)),
    "residual that broadcasts": (residual_that_broadcasts, SILU),
    "residual with a factor": (residual_scaled, SILU),
    "residual added in place": (residual_in_place, SILU),
    "residual of a number": (residual_of_a_number, SILU),
    "residual subtracted": (residual_subtracted, SILU),
    "skip": (skip_connection, ("silu", "skip")),
    "skip read twice": (skip_read_twice, SILU),
    "skip along the rows": (skip_along_rows, SILU),
}


@pytest.mark.parametrize("case", TWO_INPUTS)
def test_two_inputs(case, monkeypatch):
    """The op reads both tensors where a backend's kernel does; elsewhere it adds or concatenates first."""
    monkeypatch.setattr(pays, "two_inputs", lambda device: True)
    monkeypatch.setattr(pays, "norm_alone", lambda x, channels_last: None)
    function, fused = TWO_INPUTS[case]
    assert_rewritten(function, torch.randn(N, C, SIDE, SIDE), [fused])


def test_two_inputs_where_it_does_not_pay():
    assert_rewritten(residual_stream, torch.randn(N, C, SIDE, SIDE), [SILU])
    torch._dynamo.reset()
    assert_rewritten(skip_connection, torch.randn(N, C, SIDE, SIDE), [SILU])


class Convolution(torch.nn.Module):
    """A convolution, an embedding, a norm and SiLU; ``shared`` reads the convolution's result once more."""

    def __init__(self, dtype=torch.float32, shared=False):
        super().__init__()
        self.conv, self.shared = torch.nn.Conv2d(C, C, 3, padding=1, dtype=dtype), shared

    def forward(self, x, embedded=True):
        h = self.conv(x)
        y = F.silu(group_norm(h + rows(x) if embedded else h))
        return y + h if self.shared else y


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_bias_of_a_convolution(embedded, shared, monkeypatch):
    """The norm adds it where a backend's convolution would need a pass for it, unless another reads the sum."""
    monkeypatch.setattr(pays, "convolution_bias", lambda device: True)
    model = Convolution(shared=shared)
    state = {name: v.clone() for name, v in model.state_dict().items()}
    fused = ("silu", *["embedding"] * embedded, *["bias"] * (not shared))

    def function(x):
        return (model if x.dtype == torch.float32 else model.double())(x, embedded)

    x = torch.randn(N, C, SIDE, SIDE)
    report = Report()
    fast = torch.compile(model, backend="dd_kernels", options={"report": report})

    def everything(call, x):
        x = x.detach().requires_grad_()
        y = call(x, embedded)
        return y, *torch.autograd.grad((y * weights(y)).sum(), [x, model.conv.weight, model.conv.bias])

    actual = everything(fast, x)
    exact = everything(model.double(), x.double())
    assert [norm.fused for norm in report.norms] == [fused]
    assert_same_network(actual, exact)
    assert all(torch.equal(v.float(), state[name]) for name, v in model.state_dict().items())


def test_casts_around_a_norm():
    """16-bit x widened for the norm alone: the kernel reads 16 bits; a result in float32 keeps the cast before."""
    x = torch.randn(N, C, SIDE, SIDE).bfloat16()
    for function in (
        lambda x: F.silu(group_norm(x.float()).to(x.dtype)),
        lambda x: F.silu(group_norm(x.float())),
        lambda x: F.silu(group_norm(x.float() + rows(x.float()))).bfloat16(),
    ):
        torch._dynamo.reset()
        report = Report()
        fast = torch.compile(function, backend="dd_kernels", options={"report": report})
        actual, plain, exact = fast(x), function(x), function(x.double())
        assert actual.dtype == plain.dtype
        assert report.norms[0].fused[0] == "silu"
        error, plain_error = ((v.double() - exact.double()).abs().max() for v in (actual, plain))
        assert error <= plain_error + torch.finfo(plain.dtype).eps * exact.abs().max()


def divided(x):
    return (x.sin() / 1.0) * 1


def divided_and_written(x):
    h = x.sin()
    other = h / 1.0
    other.add_(1)
    return h + other


def divided_of_an_integer(x):
    return (x.long() / 1.0) + x


def dropped_in_training(x):
    return F.dropout(x.sin(), 0.0, True) + 1


def dropped_in_place(x):
    h = x.sin()
    return F.dropout(h, 0.0, True, True) + h


@pytest.mark.parametrize(
    ("function", "removed"),
    [
        (divided, 1),
        (divided_and_written, 0),
        (divided_of_an_integer, 0),
        (dropped_in_training, 1),
        (dropped_in_place, 0),
    ],
)
def test_identities(function, removed):
    """The last is not removed where it is the output: a copy is what the caller may write to."""
    report = Report()
    x = torch.randn(3, 4)
    fast = torch.compile(function, backend="dd_kernels", options={"report": report})
    assert torch.equal(fast(x), function(x))
    assert report.graphs[0].identities == removed
