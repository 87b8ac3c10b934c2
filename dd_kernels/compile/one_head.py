"""Rewrite: attention of one head between linear layers takes two of these in place of four.

    q = W_q x + b_q,  k = W_k c + b_k,  v = W_v c + b_v,  y = W_o attention(q, k, v) + b_o
    ->  q' = (W_k^T W_q) x + W_k^T b_q,  y = (W_o W_v) attention(q', c, c) + (W_o b_v + b_o)

Equal: q_i . k_j = q'_i . c_j + q_i . b_k, whose last term is the same for every key j, so that the softmax does not see
it; and the weights of a query sum to 1, so that what is linear in v may come after their sum. It pays where the heads
are no narrower than c. Where a gradient may be asked for, each layer is PyTorch's.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, fx

from .. import backend
from .attention import attention, read_by, serves_attention
from .derived_weights import Layer, folded
from .fused_convolution import Numbers, records, tokens_linear
from .graph import argument, between, equal, hint, is_barrier, known, only_user, tensor
from .linear import LINEAR, layer_of, replace_with_residual, serves_linear


def _folded_pair(query: Layer, key: Layer, value: Layer, out: Layer) -> tuple[Layer, Layer] | None:
    """Returns the layers before and after the attention; None where they are not kept."""
    before = folded(query, Layer(key.weight, None), transposed=True)
    after = None if before is None else folded(value, out)
    return None if before is None or after is None else (before, after)


def one_head_attention(
    x: Tensor,
    context: Tensor,
    query: Layer,
    key: Layer,
    value: Layer,
    out: Layer,
    scale: float | None,
    residual: Tensor | None,
    numbers: Numbers,
) -> Tensor:
    """Returns out(attention(query(x), key(context), value(context))) of tokens [N, T, C], plus the residual."""
    query, key, value, out = Layer(*query), Layer(*key), Layer(*value), Layer(*out)
    pair = None if records() else _folded_pair(query, key, value, out)
    if pair is None:
        q, k, v = (
            tokens_linear(tokens, *layer, None, numbers)[:, None]
            for tokens, layer in ((x, query), (context, key), (context, value))
        )
        return tokens_linear(attention(q, k, v, scale, numbers)[:, 0], *out, residual, numbers)
    before, after = pair
    q, c = tokens_linear(x, *before, None, numbers)[:, None], context.contiguous()[:, None]
    scale = key.weight.shape[0] ** -0.5 if scale is None else scale
    return tokens_linear(attention(q, c, c, scale, numbers)[:, 0], *after, residual, numbers)


def _shows(view: Tensor, tokens: Tensor) -> bool:
    """Returns whether a view [N, 1, T, D] is the tokens [N, T, D], for every input that the graph serves."""
    if view.ndim != 4 or tokens.ndim != 3 or not equal(view.shape[1], 1):
        return False
    if view.untyped_storage()._cdata != tokens.untyped_storage()._cdata:
        return False
    dims = ((0, 0), (2, 1), (3, 2))
    if not all(equal(view.shape[a], tokens.shape[b]) for a, b in dims):
        return False
    return all(equal(view.stride(a), tokens.stride(b)) or equal(view.shape[a], 1) for a, b in dims)


def _layer_before(node: fx.Node) -> fx.Node | None:
    """Returns the linear layer of whose result [N, T, D] a node is a view [N, 1, T, D], or None."""
    view, layer = tensor(node), node
    while layer not in LINEAR:
        if not isinstance(layer, fx.Node) or not layer.args or not isinstance(layer.args[0], fx.Node):
            return None
        layer = layer.args[0]
    tokens = tensor(layer)
    if view is None or tokens is None or not serves_linear(layer) or not _shows(view, tokens):
        return None
    return layer


def _layer_after(node: fx.Node) -> fx.Node | None:
    """Returns the linear layer that alone reads an attention's result [N, 1, T, D], as tokens [N, T, D]; or None."""
    result, reader = tensor(node), only_user(node)
    while reader is not None and reader not in LINEAR:
        reader = only_user(reader)
    if reader is None or not serves_linear(reader):
        return None
    tokens = tensor(argument(reader, 0, "input"))
    return reader if result is not None and tokens is not None and _shows(result, tokens) else None


class _Found(NamedTuple):
    """An attention of one head, and the linear layers around it."""

    attention: fx.Node
    layers: tuple[fx.Node, fx.Node, fx.Node, fx.Node]  # of queries, keys and values, and of the result
    first: fx.Node  # of the layers


def _pays(*layers: fx.Node) -> bool:
    """Returns whether the results of these layers are no narrower than what they read."""
    weights = [known(layer_of(node)[0]) for node in layers]
    return all(hint(weight.shape[0]) >= hint(weight.shape[1]) for weight in weights)


def _find(node: fx.Node) -> _Found | None:
    """Returns an attention with the layers around it, where they can be folded and should."""
    if not serves_attention(node):
        return None
    query, key, value = map(_layer_before, read_by(node))
    out = _layer_after(node)
    if query is None or key is None or value is None or out is None or not _pays(key, value):
        return None
    if argument(key, 0, "input") is not argument(value, 0, "input"):
        return None
    first = next(other for other in node.graph.nodes if other in (query, key, value))
    if any(map(is_barrier, between(first, out))):
        return None
    return _Found(node, (query, key, value, out), first)


def _replace(graph: fx.Graph, found: _Found, numbers: Numbers) -> None:
    """Puts one call in the place of an attention and its layers."""
    query, key, _, out = found.layers
    tokens = argument(query, 0, "input"), argument(key, 0, "input")
    scale, before = found.attention.kwargs.get("scale"), list(between(found.first, out))
    arguments = (*tokens, *map(layer_of, found.layers), scale)
    replace_with_residual(
        out, lambda residual: graph.call_function(one_head_attention, (*arguments, residual, tuple(numbers)))
    )
    for node in reversed([found.first, *before]):
        if not node.users:
            graph.erase_node(node)


def fold_one_heads(graph: fx.Graph, numbers: Numbers) -> int:
    """Replaces attention of one head and the linear layers around it; returns how often."""
    if backend.unavailable("cpu") is not None:
        return 0
    found = [one for node in graph.nodes if (one := _find(node)) is not None]
    for one in found:
        _replace(graph, one, numbers)
    return len(found)
