"""Rewrite: a norm of a concatenation along the channels reads its two parts.

    norm(cat([h, skip], 1))  ->  group_norm_silu(h, skip=skip)

Equal for every two tensors of one dtype. It pays where nothing else reads the concatenation, which then is not
made, on backends whose kernel reads two tensors.
"""

from __future__ import annotations

from torch import fx

from .concatenation import parts_of
from .graph import only_user


def skip_of(x: fx.Node, norm: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Returns (h, skip) of the concatenation ``x`` that only ``norm`` reads, or None."""
    parts = parts_of(x)
    if parts is None or len(parts) != 2 or only_user(x) is not norm:
        return None
    return parts[0], parts[1]
