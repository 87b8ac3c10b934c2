"""The activations of the Triton kernels against float64, by an error bound that follows from their arithmetic."""

import math

import pytest
import torch
from group_norm_cases import ROWS, check, make

from dd_kernels.ops import activation as activations
from dd_kernels.ops.activation import Activation

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from dd_kernels.ops.group_norm_silu import triton_tiles  # noqa: E402
from dd_kernels.ops.group_norm_silu.triton_activations import activate  # noqa: E402

U = 2.0**-24  # the largest relative error of one float32 rounding
EXP = 5 * U  # of exp: 2.52 ulp in NumPy's vector code, 2 ulp on GPUs
BLOCK = 1024
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _elementwise(z, dy, y, dz, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(z + at)
    tl.store(y + at, activate(value, None, ACTIVATION))
    tl.store(dz + at, activate(value, tl.load(dy + at), ACTIVATION))


def bounds(z: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the largest errors of f(z) and of f'(z), given the roundings of each term of their equations."""
    sigmoid = torch.sigmoid(z)
    if activation == Activation.SILU:  # 1 - s cancels where s is close to 1, by a rounding of s
        relative = EXP + 4 * U
        return z.abs() * sigmoid * relative, sigmoid * (3 * relative * (1 + z.abs()))
    if activation == Activation.MISH:  # t, 1 - t, 1 + t and s are quotients of polynomials in exp(-|z|)
        t = torch.tanh(torch.nn.functional.softplus(z))
        relative = 2 * EXP + 6 * U
        return z.abs() * t * relative, relative * t + 4 * relative * (z * (1 - t * t) * sigmoid).abs()
    if activation == Activation.GELU:  # 1 + erf cancels below 0: an absolute error of the distribution
        density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        distribution = 6 * U
        return z.abs() * distribution, distribution + (z * density).abs() * (EXP + (z * z + 5) * U)
    assert activation == Activation.GELU_TANH, f"{activation.name} has no bound yet"
    v = 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)  # v is 6 U off, which exp(v) multiplies by |v|
    s = torch.sigmoid(v)
    relative = EXP + (6 * v.abs() + 6) * U
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
    return z.abs() * s * relative, s * relative + (z * slope).abs() * s * torch.sigmoid(-v) * 4 * relative


@pytest.mark.parametrize("activation", [a for a in Activation if a != Activation.NONE], ids=lambda a: a.name.lower())
def test_value_and_derivative(activation):
    """z runs from -60 to 60, where exp(-z) neither overflows nor vanishes, and near 0."""
    z = torch.cat([torch.linspace(-60, 60, 3 * BLOCK), torch.randn(BLOCK) * 1e-3]).to(DEVICE)
    dy = torch.rand_like(z) + 0.5
    y, dz = torch.empty_like(z), torch.empty_like(z)
    _elementwise[(z.numel() // BLOCK,)](z, dy, y, dz, BLOCK=BLOCK, ACTIVATION=int(activation))

    exact_z = z.double().requires_grad_()
    exact = activations.activate(exact_z, activation)
    (slope,) = torch.autograd.grad(exact.sum(), exact_z)
    value_bound, slope_bound = bounds(z.double(), activation)
    # A GPU may round results below 2^-126 to 0; in PyTorch's float64 1 + tanh(v) and 1 - tanh(v)^2 cancel.
    floor = 2.0**-126 + 2.0**-51 * (1 + z.double().abs() ** 3)
    assert ((y.double() - exact).abs() <= value_bound + floor).all()
    error = (dz.double() - dy.double() * slope).abs()
    assert (error <= dy.double() * (slope_bound + 2 * U * slope.abs()) + floor).all()


def test_none_is_the_identity():
    z = torch.randn(BLOCK, device=DEVICE)
    dy, y, dz = torch.randn_like(z), torch.empty_like(z), torch.empty_like(z)
    _elementwise[(1,)](z, dy, y, dz, BLOCK=BLOCK, ACTIVATION=int(Activation.NONE))
    assert torch.equal(y, z)
    assert torch.equal(dz, dy)


@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.name.lower())
def test_nan_goes_through(activation):
    z = torch.full((BLOCK,), float("nan"), device=DEVICE)
    y, dz = torch.zeros_like(z), torch.zeros_like(z)
    _elementwise[(1,)](z, torch.ones_like(z), y, dz, BLOCK=BLOCK, ACTIVATION=int(activation))
    assert y.isnan().all()
    assert dz.isnan().all() == (activation != Activation.NONE)


@pytest.mark.parametrize("split", [False, True], ids=["one program", "split"])
@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.name.lower())
def test_norm_with_activation(kernel, activation, split, monkeypatch):
    """The norm, forward and backward with every option, against float64."""
    if kernel.name != "triton":
        pytest.skip("of Triton's kernels")
    if split:
        small = triton_tiles.Sizes(1, 1, 1, 64, 3, 16, 64)
        monkeypatch.setattr(triton_tiles, "SIZES", {"forward": small, "backward": small})
    x, dy, options, _ = make((2, 6, 5, 7), torch.float32, ROWS[0])
    check(kernel, x, dy, 3, options, activation.name.lower())
