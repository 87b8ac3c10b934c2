"""What a rewritten graph calls: the kernel without the checks where nothing is recorded, else the public op."""

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within
from group_norm_bounds import Errors
from models import make
from networks import assert_same_network
from torch import nn

import dd_kernels as dd
from dd_kernels import backend
from dd_kernels.compile import Report, pays
from dd_kernels.compile import fused_norm as calls
from dd_kernels.ops.activation import Activation

NEEDS_CPU_LIBRARY = pytest.mark.skipif(backend.unavailable("cpu") is not None, reason="calls the CPU library")
SHAPES = {"tokens": (2, 8, 5), "image": (2, 8, 5, 3), "video": (2, 8, 2, 3, 3), "empty": (0, 8, 4, 4)}


def arguments(shape):
    """x, and weight, bias, pre_shift, scale and shift; scale and shift are halves of one tensor."""
    n, c = shape[:2]
    scale, shift = torch.randn(n, 2 * c).chunk(2, dim=1)
    return torch.randn(shape), torch.randn(c), torch.randn(c), torch.randn(n, c), scale, shift


def both(x, weight, bias, pre_shift, scale, shift, activation="mish"):
    options = {"pre_shift": pre_shift, "scale": scale, "shift": shift}
    public = dd.group_norm_silu(x, 4, weight, bias, 1e-5, activation=activation, **options)
    return calls.checked_norm(x, 4, weight, bias, 1e-5, int(Activation[activation.upper()]), **options), public


@pytest.fixture
def called(monkeypatch):
    """The calls of the kernel that skip the checks."""
    seen = []

    def kernel(*args):
        seen.append(args)
        return torch.ops.dd_kernels.group_norm_silu.default(*args)

    monkeypatch.setattr(calls, "FORWARD", kernel)
    return seen


@NEEDS_CPU_LIBRARY
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", [a.name.lower() for a in Activation])
def test_the_same_bits_as_the_public_op(shape, activation, called):
    given = arguments(SHAPES[shape])
    with torch.no_grad():
        for values in (given, (*given[:3], None, None, None), (given[0], None, None, given[3], None, None)):
            actual, wanted = both(*values, activation)
            assert torch.equal(actual, wanted)
    assert len(called) == 3


@NEEDS_CPU_LIBRARY
def test_channels_last_is_kept_and_other_strides_are_right(called):
    x, *small = arguments((2, 8, 5, 3))
    with torch.no_grad():
        actual, wanted = both(x.contiguous(memory_format=torch.channels_last), *small)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(actual, wanted)
        assert len(called) == 1
        for other in (x.transpose(2, 3), x[:, :, ::2]):
            assert torch.equal(*both(other, *small))
        tokens = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)  # summed in another order
        names = ("weight", "bias", "pre_shift", "scale", "shift")
        wide = {name: v.double() for name, v in zip(names, small, strict=True)}
        exact = both(tokens.double(), *wide.values())[1]
        with torch.enable_grad():
            error = Errors(tokens.double(), 0 * exact, 4, wide, Activation.MISH, False).by_name()["y"]
        for result in both(tokens, *small):
            assert_within(result, exact, error)
    assert len(called) == 1


def recorded(x, *small):
    actual, wanted = both(x.requires_grad_(), *small)
    assert actual.grad_fn is not None
    return actual, wanted


def by_the_reference(*given):
    with torch.no_grad(), dd.use_backend("reference"):
        return both(*given)


def under_vmap(x, *small):
    with torch.no_grad():
        return torch.func.vmap(lambda x: torch.stack(both(x, *small)), in_dims=0)(x[None])[0]


def forward_mode(x, *small):
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return tuple(torch.autograd.forward_ad.unpack_dual(y).tangent for y in both(dual, *small))


@pytest.mark.parametrize("call", [recorded, by_the_reference, under_vmap, forward_mode])
def test_what_only_the_public_op_serves(call, called):
    assert torch.equal(*call(*arguments((2, 8, 5, 3))))
    assert not called


@NEEDS_CPU_LIBRARY
def test_what_the_rewrite_must_know():
    x, weight = torch.randn(2, 8, 4, 4), torch.randn(8)
    assert calls.may_skip_checks(x, weight, None)
    assert calls.may_skip_checks(x.bfloat16(), weight.half(), None)
    assert not calls.may_skip_checks(x.double(), weight)
    assert not calls.may_skip_checks(x, weight.double())
    assert not calls.may_skip_checks(x, torch.randn(16)[::2])
    assert not calls.may_skip_checks(x.to("meta"), weight)


def test_without_the_cpu_library(monkeypatch):
    monkeypatch.setitem(backend._unavailable_reason, "cpu", "not built")
    assert not calls.may_skip_checks(torch.randn(2, 8, 4, 4))


@NEEDS_CPU_LIBRARY
@pytest.mark.parametrize(("style", "unchecked"), [("diffusion policy", 4), ("video", 2)])
def test_a_model_in_inference_skips_the_checks(style, unchecked, called):
    """In 2-D convolutions take their norm along; what a 3-D one gives, in channels_last_3d, the public op views."""
    model, x, emb = make(style)
    fast = torch.compile(model, backend="dd_kernels")
    with torch.no_grad():
        assert_same_network(fast(x, emb), model(x, emb))
    assert len(called) == unchecked
    x.requires_grad_()
    assert_same_network(fast(x, emb), model(x, emb))
    assert len(called) == unchecked


class Gelu(nn.Module):
    def forward(self, x):
        return F.gelu(F.group_norm(x, 4))


@pytest.mark.parametrize(("side", "fused"), [(8, ("gelu",)), (64, ())])
def test_an_exact_gelu_of_a_large_map_is_left_to_pytorch(side, fused):
    report = Report()
    x = torch.randn(1, 8, side, side)
    fast = torch.compile(Gelu(), backend="dd_kernels", options={"report": report})
    wide = x.double()
    error = Errors(wide, 0 * wide, 4, {}, Activation.GELU, False).by_name()["y"]
    assert_within(fast(x), Gelu()(wide), error)
    assert report.norms[0].fused == fused
    assert report.norms[0].left == (() if fused else ("on a CPU, an exact GELU on its own is as fast",))


def test_where_an_activation_pays():
    x = torch.randn(1, 8, 32, 32)
    assert pays.activation("gelu", x, channels_last=True) is not None
    assert pays.activation("gelu", x, channels_last=False) is None
    assert pays.activation("gelu", torch.empty(64, 64, 64, 64, device="meta"), channels_last=False) is None
    assert pays.activation("silu", torch.randn(8, 8, 64, 64), channels_last=True) is None
    at = [pays.activation("gelu", torch.empty(n), channels_last=False) for n in (2**15 - 1, 2**15)]
    assert [reason is None for reason in at] == [True, False]
