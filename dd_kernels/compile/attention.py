"""Rewrite: attention on a CPU by our kernel.

    scaled_dot_product_attention(q, k, v)  ->  the kernel of :func:`dd_kernels.ops.attention`

Equal for q, k and v [N, heads, tokens, D] of one dtype and of the same N and heads, without mask, dropout or causality.
It pays for every number of tokens. Where a gradient may be asked for, attention is PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import backend
from ..ops.attention import op
from ..ops.checks import KERNEL_DTYPES
from . import workspace
from .fused_convolution import Numbers, records
from .graph import Calls, argument, equal, tensor

_ATTENTION = Calls(F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention)
_PLAIN = {3: ("attn_mask", None), 4: ("dropout_p", 0.0), 5: ("is_causal", False)}  # arguments that must be so


def read_by(node: fx.Node) -> list[Any]:
    """Returns the queries, keys and values that a call reads."""
    return [argument(node, i, name) for i, name in enumerate(("query", "key", "value"))]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, numbers: Numbers) -> Tensor:
    """Returns ``F.scaled_dot_product_attention(q, k, v, scale=scale)``."""
    if records():
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    products = Numbers(*numbers).products == "bfloat16" or q.dtype == torch.bfloat16
    y = workspace.empty_tokens(q.shape[0], q.shape[2], q.shape[1], v.shape[3], q.dtype)
    return op.forward(q, k, v, op.scale_of(q, scale), products, y)


def _is_plain(node: fx.Node) -> bool:
    """Returns whether a call has neither mask, dropout, causality nor shared keys, and a scale that we take."""
    scale = node.kwargs.get("scale")
    if any(argument(node, i, name, default) != default for i, (name, default) in _PLAIN.items()):
        return False
    return not node.kwargs.get("enable_gqa") and (scale is None or (isinstance(scale, int | float) and scale >= 0))


def serves_attention(node: fx.Node) -> bool:
    """Returns whether a node is attention that our kernel computes."""
    if node not in _ATTENTION or not _is_plain(node):
        return False
    found = [tensor(v) for v in (*read_by(node), node)]
    tensors = [
        v for v in found if v is not None and v.ndim == 4 and v.device.type == "cpu" and v.dtype in KERNEL_DTYPES
    ]
    if len(tensors) < len(found):
        return False
    q, k, v, result = tensors
    if any(x.dtype != result.dtype for x in tensors):  # autocast shows in the dtype of the result
        return False
    if not all(equal(x.shape[d], q.shape[d]) for x in (k, v) for d in (0, 1)) or equal(k.shape[2], 0):
        return False
    # What reads the result may need its strides.
    return equal(q.shape[3], k.shape[3]) and result.transpose(1, 2).is_contiguous()


def replace_attention(graph: fx.Graph, numbers: Numbers) -> int:
    """Replaces the attention that our kernel computes; returns how often."""
    if backend.unavailable("cpu") is not None:
        return 0
    nodes = [node for node in graph.nodes if serves_attention(node)]
    for node in nodes:
        with graph.inserting_before(node):
            result = graph.call_function(attention, (*read_by(node), node.kwargs.get("scale"), tuple(numbers)))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return len(nodes)
