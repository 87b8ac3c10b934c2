"""The activations of GroupNorm in Triton, the counterpart of ``ops/activation.py`` and ``csrc/common/activation.h``.

Each is one function: ``f(z, None)`` returns f(z), and ``f(z, dy)`` returns dy f'(z), both in float32. To add one, write
its function and add its branch to :func:`activate`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation import Activation
from ..triton_common import ASSEMBLY

_SILU = tl.constexpr(int(Activation.SILU))
_MISH = tl.constexpr(int(Activation.MISH))
_GELU = tl.constexpr(int(Activation.GELU))
_GELU_TANH = tl.constexpr(int(Activation.GELU_TANH))

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_NORMAL_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def inverse(v):
    """Returns 1 / v for v >= 1.

    On NVIDIA's GPUs by rcp.approx, which is at most 1 ulp off (PTX ISA): a division handles every exponent, and the
    registers that it takes make some kernels spill.
    """
    if ASSEMBLY:
        result = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, is_pure=True, pack=1)
    else:
        result = 1.0 / v
    return result


@triton.jit
def silu(z, dy):
    """z s, and its derivative s (1 + z (1 - s)), with s = 1 / (1 + exp(-z))."""
    if dy is None:
        result = z * (1.0 / (1.0 + tl.exp(-z)))
    else:
        s = inverse(1.0 + tl.exp(-z))
        result = dy * s * (1.0 + z * (1.0 - s))
    return result


@triton.jit
def mish(z, dy):
    """z t with t = tanh(ln(1 + exp(z))), and its derivative t + z (1 - t^2) sigmoid(z) (Misra, 2019).

    t = ((1 + exp z)^2 - 1) / ((1 + exp z)^2 + 1), written in w = exp(-|z|) so that nothing overflows, and 1 - t as a
    quotient of its own so that nothing cancels.
    """
    w = tl.exp(-tl.abs(z))
    positive = z >= 0
    reciprocal = inverse(tl.where(positive, 1.0 + 2.0 * w * (1.0 + w), 2.0 + w * (2.0 + w)))
    t = tl.where(positive, 1.0 + 2.0 * w, w * (2.0 + w)) * reciprocal
    if dy is None:
        result = z * t
    else:
        one_minus_t = tl.where(positive, 2.0 * w * w, 2.0) * reciprocal
        s = tl.where(positive, 1.0, w) * inverse(1.0 + w)
        result = dy * (t + z * (one_minus_t * (1.0 + t) * s))
    return result


@triton.jit
def gelu(z, dy):
    """z P(z), and its derivative P(z) + z p(z), with P and p the distribution and density of N(0, 1)."""
    probability = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
    if dy is None:
        result = z * probability
    else:
        density = _NORMAL_DENSITY_AT_0 * tl.exp(-0.5 * z * z)
        result = dy * (probability + z * density)
    return result


@triton.jit
def gelu_tanh(z, dy):
    """z s with s = (1 + tanh(v / 2)) / 2 = sigmoid(v), v = 2 sqrt(2 / pi) (z + 0.044715 z^3) (Hendrycks & Gimpel).

    The derivative is s + z s (1 - s) dv/dz; s (1 - s) is w / (1 + w)^2 in w = exp(-|v|).
    """
    square = z * z
    v = _TWICE_SQRT_2_OVER_PI * z * (1.0 + _GELU_CUBIC * square)
    w = tl.exp(-tl.abs(v))
    reciprocal = inverse(1.0 + w)
    s = tl.where(v >= 0, 1.0, w) * reciprocal
    if dy is None:
        result = z * s
    else:
        slope = _TWICE_SQRT_2_OVER_PI * (1.0 + 3.0 * _GELU_CUBIC * square)
        result = dy * (s + z * (w * reciprocal * reciprocal * slope))
    return result


@triton.jit
def activate(z, dy, ACTIVATION: tl.constexpr):
    """Returns act(z) where ``dy`` is None, else dy act'(z); ACTIVATION is a number of ``Activation``."""
    if ACTIVATION == _SILU:
        result = silu(z, dy)
    elif ACTIVATION == _MISH:
        result = mish(z, dy)
    elif ACTIVATION == _GELU:
        result = gelu(z, dy)
    elif ACTIVATION == _GELU_TANH:
        result = gelu_tanh(z, dy)
    else:
        result = z if dy is None else dy
    return result
