"""The activations that an op can apply: their names, the numbers that kernels know them by, and their equations.

To add one: a member of :class:`Activation` and a line of ``_FUNCTIONS`` here, a functor in
``csrc/common/activation.h``, a function and its branch in ``group_norm_silu/triton_activations.py``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor


class Activation(enum.IntEnum):
    """An activation as the op schemas carry it, ``int activation``; csrc/common/activation.h has the same numbers."""

    NONE = 0
    SILU = 1
    MISH = 2
    GELU = 3
    GELU_TANH = 4


# Plain ints: PyTorch's dispatcher takes 0.7 us longer to convert a member of an enum, in every call.
_BY_NAME = {activation.name.lower(): int(activation) for activation in Activation}

_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda z: z,
    Activation.SILU: F.silu,
    Activation.MISH: F.mish,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}


def activation_of(name: str) -> int:
    """Returns the number of the activation that has a public name: "none", "silu", "mish", "gelu" or "gelu_tanh".

    Raises:
        ValueError: no activation has that name.
    """
    found = _BY_NAME.get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"activation must be one of {', '.join(map(repr, _BY_NAME))}; got {name!r}")
    return found


def name_of(activation: int) -> str:
    """Returns the public name of an activation."""
    return Activation(activation).name.lower()


def activate(z: Tensor, activation: Activation | int) -> Tensor:
    r"""Applies an activation in plain PyTorch, in the dtype of ``z`` and differentiable any number of times.

    .. math::
        \mathrm{silu}(z) &= z\,\sigma(z) = z / (1 + e^{-z}) \qquad
        \mathrm{mish}(z) = z \tanh(\ln(1 + e^z)) \\
        \mathrm{gelu}(z) &= z\,\Phi(z) = \tfrac{z}{2}\big(1 + \mathrm{erf}(z / \sqrt 2)\big) \\
        \mathrm{gelu\_tanh}(z) &= \tfrac{z}{2}\big(1 + \tanh(\sqrt{2 / \pi}\,(z + 0.044715\,z^3))\big)

    SiLU and GELU: Hendrycks & Gimpel (2016), equations 1 to 3 of "Gaussian error linear units"; Mish: Misra (2019).
    """
    return _FUNCTIONS[Activation(activation)](z)
