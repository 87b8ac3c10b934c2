"""Rewrite: the sum of a residual stream before a norm is computed, and stored, in the norm's pass.

    total = x + branch; norm(total)  ->  y, total = group_norm_silu(x, residual=branch)

Equal where both terms and the sum have one shape and dtype. It pays on backends whose kernel reads both terms and
writes the sum; elsewhere the op would add first.
"""

from __future__ import annotations

from torch import fx

from .graph import ADD, mutates, operands, same_shape, tensor


def residual_of(total: fx.Node, last: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Returns both terms of ``total``; None where one of its readers beside the norm stands before ``last``."""
    pair, value = operands(total), tensor(total)
    if total not in ADD or mutates(total) or pair is None or value is None:
        return None
    for term in pair:
        part = tensor(term)
        if part is None or part.dtype != value.dtype or part.device != value.device or not same_shape(part, value):
            return None
    order = {node: i for i, node in enumerate(last.graph.nodes)}
    readers = [user for user in total.users if order[user] <= order[last]]
    return (pair[0], pair[1]) if len(readers) == 1 else None
