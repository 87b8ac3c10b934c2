"""How far group_norm_silu and its gradients may be from the exact results: for every element, by counting roundings.

With u = 2^-24 a float32 operation returns its exact result times (1 + d), |d| <= u. A sum of n terms is within
min(n, 8 sqrt(n)) u of the sum of their absolute values: n u always, in any order (Higham, 2002, section 4.2), and
8 sqrt(n) u but for a probability below 1e-13 (Higham & Mary, 2019, theorem 2.4). Each symbol below is that of
csrc/group_norm_silu/formula.h, exact and in float64, and e_symbol bounds the error of a kernel's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from bounds import UNIT
from torch import Tensor

from dd_kernels.ops.activation import Activation, activate

LARGEST_SLOPE = 1.13  # of every activation; GELU's is the largest
LARGEST_CURVATURE = 1.0  # of every activation
FAST_SIGMOID = 2.0**-20  # two instructions of a GPU's special function unit, each within 2^-21
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def sum_error(count: int) -> float:
    return min(count, 8 * math.sqrt(count)) * UNIT


# Of activation(z) = z gate(z): the gate, and the size of the argument of its exponential, which is rounded.
_GATES: dict[Activation, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    Activation.SILU: (torch.sigmoid, torch.abs),
    Activation.MISH: (lambda z: torch.nn.functional.softplus(z).tanh(), torch.abs),
    Activation.GELU: (lambda z: 0.5 * torch.erfc(-z / math.sqrt(2)), torch.square),
    Activation.GELU_TANH: (
        lambda z: torch.sigmoid(2 * SQRT_2_OVER_PI * (z + 0.044715 * z**3)),
        lambda z: 2 * SQRT_2_OVER_PI * (z.abs() + 0.044715 * z.abs() ** 3),
    ),
}


def activation_errors(z: Tensor, activation: Activation, fast: bool) -> tuple[Tensor, Tensor]:
    """Returns the errors of the value and of the derivative for an exact z; ``fast``: by a GPU's special functions."""
    if activation == Activation.NONE:
        return torch.zeros_like(z), torch.zeros_like(z)
    gate, exponent = (f(z) for f in _GATES[activation])
    leaf = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(activate(leaf, activation).sum(), leaf)
    # The exponential inherits the rounding of its argument; quotient and products add a few roundings.
    relative = (24 * UNIT + (FAST_SIGMOID if fast else 0.0)) * (1 + exponent)
    value, derivative = relative * (z * gate).abs(), relative * (gate.abs() + (slope - gate).abs())
    if activation in (Activation.GELU, Activation.GELU_TANH):  # 1 + erf and 1 + tanh cancel
        value, derivative = value + 4 * UNIT * z.abs(), derivative + 4 * UNIT * (1 + z.abs())
    underflow = gate.abs().clamp(max=2.0**-126)  # a gate that is no normal number of float32 may be 0
    return value + z.abs() * underflow + 2.0**-126, derivative + (1 + z.abs()) * underflow + 2.0**-126


class Errors:
    """Bounds of what a kernel computes in float32, before the results are rounded to their dtype.

    Every argument is exact, in float64: x [N, C, ...] with the residual added, dy, and the options by name.
    """

    def __init__(self, x: Tensor, dy: Tensor, groups: int, options: dict, activation: Activation, fast: bool) -> None:
        samples, channels, self.pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        self.shape, self.activation, self.fast = x.shape, activation, fast
        self.samples, self.count = samples, channels // groups * self.pixels
        self._grouped = (samples, groups, channels // groups, self.pixels)
        self.dy = dy.reshape(self._grouped)

        def option(name: str, absent: float) -> Tensor:
            v = options.get(name, torch.full((channels,), absent, dtype=torch.float64, device=x.device))
            return v.expand(samples, channels).reshape(*self._grouped[:3], 1)

        self.weight, self.bias, self.scale, self.shift = (
            option(name, absent) for name, absent in (("weight", 1.0), ("bias", 0.0), ("scale", 0.0), ("shift", 0.0))
        )
        self._normalise(x.reshape(self._grouped), option("pre_shift", 0.0), options.get("eps", 1e-5))
        self._activate()
        self._group_means()

    def _mean(self, v: Tensor) -> Tensor:
        return v.mean((2, 3), keepdim=True)

    def _normalise(self, x: Tensor, pre_shift: Tensor, eps: float) -> None:
        h = x + pre_shift
        mean = self._mean(h)
        d = h - mean
        variance = self._mean(d.square())
        self.deviation = (variance + eps).sqrt()
        self.n = d / self.deviation
        of_sum = sum_error(self.count)
        self.e_mean = e_mean = (of_sum + 4 * UNIT) * self._mean(h.abs())
        e_variance = (of_sum + 8 * UNIT) * variance + 4 * UNIT * self._mean(d.abs() * h.abs()) + e_mean.square()
        self.e_rstd = 0.5 * e_variance / (variance + eps) + 6 * UNIT  # relative
        e_centre = e_mean + UNIT * (mean - pre_shift).abs()
        self.e_n = self.n.abs() * (4 * UNIT + self.e_rstd) + e_centre / self.deviation

    def _activate(self) -> None:
        factor = 1 + self.scale
        self.gain, size = self.weight * factor, self.weight.abs() * (1 + self.scale.abs())
        self.z = self.n * self.gain + self.bias * factor + self.shift
        sizes = self.n.abs() * size + self.bias.abs() * (1 + self.scale.abs()) + self.shift.abs()
        self.e_z = size * self.e_n + 8 * UNIT * sizes
        self.e_value, self.e_slope = activation_errors(self.z, self.activation, self.fast)
        slopes = (0.0, 1.0) if self.activation == Activation.NONE else (LARGEST_CURVATURE, LARGEST_SLOPE)
        self.e_y = slopes[1] * self.e_z + self.e_value
        leaf = self.z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(activate(leaf, self.activation).sum(), leaf)
        self.dz = self.dy * slope
        self.e_dz = self.dy.abs() * (slopes[0] * self.e_z + self.e_slope) + 4 * UNIT * self.dz.abs()
        self.dn, self.e_dn = self.dz * self.gain, size * (self.e_dz + 6 * UNIT * self.dz.abs())

    def _group_means(self) -> None:
        of_sum, product = sum_error(self.count), self.dn * self.n
        self.mean_dn, self.mean_dn_n = self._mean(self.dn), self._mean(product)
        e_mean_dn = of_sum * self._mean(self.dn.abs()) + self._mean(self.e_dn)
        e_product = self.e_dn * self.n.abs() + self.dn.abs() * self.e_n
        e_mean_dn_n = (of_sum + 4 * UNIT) * self._mean(product.abs()) + self._mean(e_product)
        self.terms = (self.dn.abs() + self.mean_dn.abs() + (self.n * self.mean_dn_n).abs()) / self.deviation
        errors = self.e_dn + e_mean_dn + self.n.abs() * e_mean_dn_n + self.e_n * self.mean_dn_n.abs()
        self.e_dx = errors / self.deviation + (2 * self.e_rstd + 8 * UNIT) * self.terms

    def _sum(self, v: Tensor, e_v: Tensor, over_samples: bool) -> Tensor:
        """Returns the error of a sum of v over the pixels, and over the samples where wanted."""
        count = self.pixels * (self.samples if over_samples else 1)
        total = ((sum_error(count) + 8 * UNIT) * v.abs() + e_v).sum(3).flatten(1)
        return total.sum(0) if over_samples else total

    def by_name(self) -> dict[str, Tensor]:
        """Returns the bounds of y, dx and the gradients of the options by name."""
        factor, e_product = 1 + self.scale.abs(), self.e_dz * self.n.abs() + self.dz.abs() * self.e_n
        scaled, of_weight = self.dz * (1 + self.scale), self.dz * self.n * factor
        of_scale = self.dz.abs() * ((self.n * self.weight).abs() + self.bias.abs())
        e_of_scale = e_product * self.weight.abs() + self.e_dz * self.bias.abs()
        return {
            "y": self.e_y.reshape(self.shape),
            "dx": self.e_dx.reshape(self.shape),
            "dweight": self._sum(of_weight, e_product * factor, True),
            "dbias": self._sum(scaled, self.e_dz * factor, True),
            "dpre_shift": self._sum(self.terms, self.e_dx, False),
            "dscale": self._sum(of_scale, e_of_scale, False),
            "dshift": self._sum(self.dz, self.e_dz, False),
        }
