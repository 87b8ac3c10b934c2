"""Rewrite: a norm of a concatenation along the channels reads its two parts.

    norm(cat([h, skip], 1))  ->  group_norm_silu(h, skip=skip)

Equal for every two tensors of one dtype. It pays where nothing else reads the concatenation, which then is not
made, on backends whose kernel reads two tensors.
"""

from __future__ import annotations

from torch import fx

from .concatenation import CAT
from .graph import argument, only_user, tensor


def skip_of(x: fx.Node, norm: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Returns (h, skip) of the concatenation ``x`` that only ``norm`` reads, or None."""
    if x not in CAT or only_user(x) is not norm or "out" in x.kwargs:
        return None
    parts, value = argument(x, 0, "tensors"), tensor(x)
    if not isinstance(parts, list | tuple) or len(parts) != 2 or argument(x, 1, "dim", 0) != 1 or value is None:
        return None
    tensors = [tensor(part) for part in parts]
    if any(t is None or t.dtype != value.dtype or t.ndim != value.ndim for t in tensors):
        return None
    return parts[0], parts[1]
