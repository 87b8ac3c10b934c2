"""Weights of two linear layers in a row as those of one, kept while their parameters live.

    W_2 (W_1 x + b_1) + b_2  =  (W_2 W_1) x + (W_2 b_1 + b_2)

They are computed in float64, of parameters alone, in inference, at most LIMIT bytes of the process. A change of a
weight in place is seen by its version counter, one through ``.data`` by the weight's diagonal. The operator
``dd_kernels::fold`` compares that, and all of the biases, in each call, of a recorded graph too.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from ..ops.tracing import operator

LIMIT = 64 << 20

_FOLD = operator(
    "fold",
    "(Tensor first, Tensor? first_bias, Tensor second, Tensor? second_bias, Tensor(a!) seen, Tensor(b!) weight, "
    "Tensor(c!) bias) -> ()",
)


@torch.library.impl("dd_kernels::fold", "CPU")
def _fold(
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    seen: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> None:
    """Computes weight and bias of both layers together, unless ``seen`` tells that they are those of these layers."""
    biases = [value for value in (first_bias, second_bias) if value is not None]
    now = torch.cat([first.diagonal(), second.diagonal(), *biases])
    if torch.equal(now, seen):
        return
    weight.copy_(second.double() @ first.double())
    total = torch.zeros(bias.shape, dtype=torch.float64)
    if first_bias is not None:
        total += second.double() @ first_bias.double()
    if second_bias is not None:
        total += second_bias
    bias.copy_(total)
    seen.copy_(now)


@dataclass
class _Folded:
    """The weight and bias of two layers together, and what of the layers these were computed from."""

    owners: tuple[weakref.ref[Tensor], weakref.ref[Tensor]]
    of: tuple[int, ...]  # the weights' versions and addresses
    seen: Tensor  # their diagonals and the biases, or NaN before the first call
    weight: Parameter
    bias: Parameter

    def is_of(self, first: Tensor, second: Tensor, outputs: int) -> bool:
        """Returns whether they are these layers', in these shapes."""
        owned = self.owners[0]() is first and self.owners[1]() is second
        return owned and self.weight.shape == (outputs, first.shape[1])

    @property
    def nbytes(self) -> int:
        """Returns the bytes that they take."""
        return self.seen.nbytes + self.weight.nbytes + self.bias.nbytes


_folded: dict[tuple[int, int, bool], _Folded] = {}


def held() -> int:
    """Returns the bytes that folded weights take."""
    return sum(folded.nbytes for folded in _folded.values())


def _forget(key: tuple[int, int, bool], owner: weakref.ref[Tensor]) -> None:
    """Drops what is kept of parameters of which one is gone, unless others have taken their ids."""
    folded = _folded.get(key)
    if folded is not None and any(ref is owner for ref in folded.owners):
        del _folded[key]


def _made(key: tuple[int, int, bool], first: Tensor, second: Tensor, outputs: int, seen: int) -> _Folded | None:
    """Returns memory for the weights of two layers; None where there is no room."""
    if held() + 4 * (outputs * (first.shape[1] + 1) + seen) > LIMIT:
        return None
    owners = weakref.ref(first, partial(_forget, key)), weakref.ref(second, partial(_forget, key))
    with torch.inference_mode(False):
        weight, bias = torch.empty(outputs, first.shape[1]), torch.empty(outputs)
        kept = Parameter(weight, requires_grad=False), Parameter(bias, requires_grad=False)
        return _Folded(owners, (), torch.full((seen,), torch.nan), *kept)


def folded(
    first: Tensor, first_bias: Tensor | None, second: Tensor, second_bias: Tensor | None, transposed: bool = False
) -> tuple[Parameter, Parameter] | None:
    """Returns the weight and bias of ``second`` after ``first``; None where they are not to be kept.

    Args:
        first: W_1 [D, C], a parameter.
        first_bias: b_1 [D] or None.
        second: W_2 [E, D], a parameter, or [D, E] where it is ``transposed``.
        second_bias: b_2 [E] or None.
        transposed: whether the second layer multiplies by the transposed weight.
    """
    if type(first) is not Parameter or type(second) is not Parameter or first.is_inference() or second.is_inference():
        return None
    layer = second.t() if transposed else second
    key = id(first), id(second), transposed
    found = _folded.get(key)
    if found is None or not found.is_of(first, second, layer.shape[0]):
        _folded.pop(key, None)
        biases = sum(bias.shape[0] for bias in (first_bias, second_bias) if bias is not None)
        found = _made(key, first, second, layer.shape[0], min(first.shape) + min(layer.shape) + biases)
        if found is None:
            return None
        _folded[key] = found
    now = first._version, first.data_ptr(), second._version, second.data_ptr()
    if found.of != now:
        found.seen.fill_(torch.nan)
        found.of = now
    _FOLD(first, first_bias, layer, second_bias, found.seen, found.weight, found.bias)
    return found.weight, found.bias
