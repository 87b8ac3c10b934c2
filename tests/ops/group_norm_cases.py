"""Inputs of group_norm_silu with every option, its gradients by name, and both against float64."""

import importlib

import torch
from bounds import assert_within
from group_norm_bounds import Errors

import dd_kernels as dd
from dd_kernels.ops.activation import Activation, activation_of
from dd_kernels.ops.group_norm_silu.arguments import Arguments

op = importlib.import_module("dd_kernels.ops.group_norm_silu.op")
ACTIVATIONS = tuple(activation.name.lower() for activation in Activation)
NAMES = ("weight", "bias", "pre_shift", "scale", "shift")
# Presence of weight, bias, pre_shift, scale and shift, SiLU, channels_last: every pair of choices is in some row.
ROWS = (
    (1, 1, 1, 1, 1, 1, 1),
    (0, 1, 0, 1, 0, 1, 0),
    (1, 0, 0, 1, 1, 0, 0),
    (0, 0, 1, 1, 0, 0, 1),
    (1, 1, 1, 0, 0, 0, 0),
    (0, 1, 0, 0, 1, 0, 1),
    (1, 0, 0, 0, 0, 1, 1),
    (0, 0, 1, 0, 1, 1, 0),
)


def make(shape, dtype, row, seed=0, mean=0.5, device="cpu"):
    """x, dy, the options present in ``row`` and the activation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator)

    x, dy = (mean + 2 * draw(*shape)).to(dtype), draw(*shape).to(dtype)
    if row[6] and x.ndim == 4:
        x, dy = (v.contiguous(memory_format=torch.channels_last) for v in (x, dy))
    sizes = (shape[1:2],) * 2 + (shape[:2],) * 3
    options = {name: draw(*size) for name, size, there in zip(NAMES, sizes, row, strict=False) if there}
    options = {name: v.to(device) for name, v in options.items()}
    return x.to(device), dy.to(device), options, "silu" if row[5] else "none"


def call(x, groups, options, activation=Activation.SILU, residual=None, skip=None, eps=1e-5):
    """The value that backends take."""
    small = dict.fromkeys(NAMES) | options
    weight, bias, *rows = small.values()
    return Arguments(x, groups, weight, bias, eps, *rows, activation, residual, skip)


def statistics(name, x, groups, eps, pre_shift):
    """mean and rstd [N, G] by the kernels of a backend."""
    return op.forward(name, call(x, groups, {"pre_shift": pre_shift}, Activation.NONE, eps=eps))[2:]


def results(x, dy, groups, options, activation, backend, eps=1e-5):
    """y and the gradients of x and of each option, by name."""
    leaves = {name: v.detach().requires_grad_() for name, v in {"x": x, **options}.items()}
    small = {name: leaves[name] for name in options}
    y = dd.group_norm_silu(leaves["x"], groups, eps=eps, activation=activation, backend=backend, **small)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def errors(kernel, x, dy, groups, options, activation):
    """Bounds of a kernel's errors, by name of the result, before results are rounded to their dtype."""
    wide = {name: v.double() for name, v in options.items()}
    fast = kernel.name == "cuda" and x.dtype != torch.float32
    return Errors(x.double(), dy.double(), groups, wide, activation_of(activation), fast).by_name()


def check(kernel, x, dy, groups, options, activation):
    """Compares every result with float64, and checks that y and dx keep the layout; returns the results."""
    x, dy = x.to(kernel.device), dy.to(kernel.device)
    options = {name: v.to(kernel.device) for name, v in options.items()}
    wide = {name: v.double() for name, v in options.items()}
    exact = results(x.double(), dy.double(), groups, wide, activation, "reference")
    actual = results(x, dy, groups, options, activation, kernel.name)
    allowed = errors(kernel, x, dy, groups, options, activation)
    for name, v in actual.items():
        assert_within(v, exact[name], allowed[name], kernel.truncates(v.dtype))
        if name in ("y", "dx") and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            assert v.stride() == x.stride()
    return actual
