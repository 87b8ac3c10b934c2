"""Rewrite: adaptive GroupNorm (Dhariwal & Nichol, 2021, equation 7) is computed in the norm's pass.

    norm(x) * (1 + scale) + shift  ->  group_norm_silu(x, scale=scale, shift=shift)

Equal where scale and shift are [N, C, 1, ...] or [1, C, 1, ...]: one value per sample and channel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from .graph import ADD, MUL, only_user, operands, other_operand, per_channel


@dataclass(frozen=True)
class ScaleShift:
    """The nodes of a scale and a shift, and those of the product and the sum, of which the last has the result."""

    scale: fx.Node
    shift: fx.Node
    nodes: list[fx.Node]


def _scale_of(factor: fx.Node | None) -> fx.Node | None:
    """Returns scale of the factor 1 + scale."""
    if factor is None or factor not in ADD:
        return None
    pair = operands(factor)
    if pair is None or not any(isinstance(v, int | float) and v == 1 for v in pair):
        return None
    return next((v for v in pair if isinstance(v, fx.Node)), None)


def scale_shift_of(node: fx.Node, like: Tensor) -> ScaleShift | str | None:
    """Returns the scale and shift of ``node``, the reason why they cannot be fused, or None where there are none."""
    product = only_user(node)
    if product is None or product not in MUL:
        return None
    scale = _scale_of(other_operand(product, node))
    total = only_user(product)
    if scale is None or total is None or total not in ADD:
        return None
    shift = other_operand(total, product)
    if shift is None or not per_channel(scale, like) or not per_channel(shift, like):
        return "scale and shift vary over the pixels"
    return ScaleShift(scale, shift, [product, total])
