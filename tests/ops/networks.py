"""Whether two results are of one network, which is not held to a bound of the arithmetic.

A worst-case bound of a whole network is of no use: through two residual blocks it grows to 10^4 times the result, where
errors are 5e-7 of it, since every convolution of 32 channels multiplies a bound by 14 and an error by 1. Layers are
held to their bounds in tests/ops. Of networks the tests claim that a rewritten graph computes the same: one that leaves
out a term, or reads a weight of the call before, agrees with it in a few bits of the result and not in BITS.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

BITS = 18  # of float32's 24, of the largest value


def assert_same_network(actual: Tensor | Sequence[Tensor], wanted: Tensor | Sequence[Tensor]) -> None:
    """Asserts that results, or sequences of them, agree in BITS of the largest value."""
    if not isinstance(actual, Tensor):
        for one, other in zip(actual, wanted, strict=True):
            assert_same_network(one, other)
        return
    assert isinstance(wanted, Tensor)
    assert actual.shape == wanted.shape
    assert is_same_network(actual, wanted), f"{(actual - wanted).abs().max():.3g} of {wanted.abs().max():.3g}"


def is_same_network(actual: Tensor, wanted: Tensor) -> bool:
    """Returns whether two results agree in BITS of the largest value."""
    if not actual.numel():
        return True
    return bool((actual.double() - wanted.double()).abs().max() <= 2.0**-BITS * wanted.double().abs().max())
