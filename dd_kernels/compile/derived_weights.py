"""Weights that are computed from those of several linear layers, kept while their parameters live.

    two layers in a row:  W_2 (W_1 x + b_1) + b_2  =  (W_2 W_1) x + (W_2 b_1 + b_2)
    layers of one input:  W_1 x + b_1, W_2 x + b_2, ...  =  the parts of W x + b, whose rows are theirs

They are computed of parameters alone, products in float64, in inference, at most LIMIT bytes of the process. A change
of a weight in place is seen by its version counter, one through ``.data`` by the weight's diagonal, of which 64
elements at most are compared since each lies in another line of memory. The operators
``dd_kernels::fold`` and ``dd_kernels::stack`` compare that, and all of the biases, in each call, of a recorded graph
too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..ops.tracing import operator
from . import kept_filters
from .memory import state_of

LIMIT = 64 << 20

_FOLD = operator(
    "fold",
    "(Tensor first, Tensor? first_bias, Tensor second, Tensor? second_bias, Tensor(a!) seen, Tensor(b!) weight, "
    "Tensor(c!) bias) -> ()",
)
_STACK = operator(
    "stack", "(Tensor[] weights, Tensor?[] biases, Tensor(a!) seen, Tensor(b!) weight, Tensor(c!) bias) -> ()"
)


class Layer(NamedTuple):
    """The weight [outputs, inputs] and the bias [outputs], if any, of a linear layer."""

    weight: Any
    bias: Any


def _compared(weight: Tensor) -> Tensor:
    """Returns the elements of a weight that are compared in each call."""
    diagonal = weight.diagonal()
    return diagonal[:: max(diagonal.shape[0] // 64, 1)][:64]


def _signs(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Returns what tells these layers from others."""
    return torch.cat([*map(_compared, weights), *(bias for bias in biases if bias is not None)])


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
    signs = _signs((first, second), (first_bias, second_bias))
    if torch.equal(signs, seen):
        return
    weight.copy_(second.double() @ first.double())
    total = torch.zeros(bias.shape, dtype=torch.float64)
    if first_bias is not None:
        total += second.double() @ first_bias.double()
    if second_bias is not None:
        total += second_bias
    bias.copy_(total)
    seen.copy_(signs)  # last, for other threads


@torch.library.impl("dd_kernels::stack", "CPU")
def _stack(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], seen: Tensor, weight: Tensor, bias: Tensor
) -> None:
    """Copies weights, and biases or zeros, one below the other, unless ``seen`` tells that these layers' are there."""
    signs = _signs(weights, biases)
    if torch.equal(signs, seen):
        return
    torch.cat(list(weights), out=weight)
    torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)], out=bias)
    seen.copy_(signs)


@dataclass
class _Derived:
    """A layer that was computed from others, and what these were like."""

    owners: tuple[weakref.ref[Tensor], ...]
    of: tuple[tuple[int, int], ...]  # the owners' states
    seen: Tensor  # what is compared of them, NaN before the first call
    layer: Layer

    @property
    def nbytes(self) -> int:
        """Returns the bytes that are kept."""
        return sum(value.nbytes for value in (self.seen, *self.layer))

    def is_of(self, weights: Sequence[Tensor], shape: tuple[int, int]) -> bool:
        """Returns whether it was computed from these weights, in this shape."""
        owned = all(owner() is weight for owner, weight in zip(self.owners, weights, strict=True))
        return owned and self.layer.weight.shape == shape


_derived: dict[tuple[Any, ...], _Derived] = {}  # by what was computed, and of the parameters of which ids


def held() -> int:
    """Returns the bytes that derived weights take."""
    return sum(derived.nbytes for derived in list(_derived.values()))  # which a collected parameter may change


def _forget(key: tuple[Any, ...], owner: weakref.ref[Tensor]) -> None:
    """Drops what was computed from parameters of which one is gone, unless others have taken their ids."""
    derived = _derived.get(key)
    if derived is not None and any(ref is owner for ref in derived.owners):
        del _derived[key]


def _made(key: tuple[Any, ...], weights: Sequence[Tensor], shape: tuple[int, int], seen: int) -> _Derived | None:
    """Returns memory for a layer of this shape; None where there is no room."""
    if held() + 4 * (shape[0] * (shape[1] + 1) + seen) > LIMIT:
        return None
    owners = tuple(weakref.ref(weight, partial(_forget, key)) for weight in weights)
    with torch.inference_mode(False):
        weight, bias = torch.empty(shape), torch.empty(shape[0])
        layer = Layer(Parameter(weight, requires_grad=False), Parameter(bias, requires_grad=False))
        return _Derived(owners, (), torch.full((seen,), torch.nan), layer)


def _derive(
    kind: str,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    shape: tuple[int, int],
    compute: Callable[[Tensor, Tensor, Tensor], None],
) -> Layer | None:
    """Returns the layer that ``compute(seen, weight, bias)`` makes of these; None where it is not to be kept."""
    if any(type(weight) is not Parameter or weight.is_inference() for weight in weights):
        return None
    key = (kind, *map(id, weights))
    found = _derived.get(key)
    if found is None or not found.is_of(weights, shape):
        _derived.pop(key, None)
        found = _made(key, weights, shape, len(_signs(weights, biases)))
        if found is None:
            return None
        _derived[key] = found
    now = tuple(map(state_of, weights))
    if found.of != now:
        found.seen.fill_(torch.nan)
        found.of = now
    compute(found.seen, *found.layer)
    return found.layer


def folded(first: Layer, second: Layer, transposed: bool = False) -> Layer | None:
    """Returns ``second`` after ``first``; None where that is not to be kept.

    Args:
        first: W_1 [D, C], b_1 [D].
        second: W_2 [E, D], or [D, E] where the layer multiplies by the ``transposed`` weight; b_2 [E].
        transposed: whether it does.
    """
    weight, kind = (second.weight.t(), "transposed") if transposed else (second.weight, "product")
    compute = partial(_FOLD, *first, weight, second.bias)
    shape = int(weight.shape[0]), int(first.weight.shape[1])
    return _derive(kind, (first.weight, second.weight), (first.bias, second.bias), shape, compute)


def stacked(layers: Sequence[Layer]) -> Layer | None:
    """Returns the layer whose outputs are those of the layers, in their order; None where that is not to be kept.

    It is not where its filters could not be kept packed, without which it is slower than the layers.
    """
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    shape = sum(weight.shape[0] for weight in weights), int(weights[0].shape[1])
    is_known = ("stack", *map(id, weights)) in _derived
    if not is_known and kept_filters.held() + 4 * shape[0] * shape[1] > kept_filters.LIMIT:
        return None
    return _derive("stack", weights, biases, shape, partial(_STACK, weights, biases))
