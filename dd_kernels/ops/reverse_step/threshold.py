"""Dynamic thresholding of x_0 (Imagen, Saharia et al., 2022, section 2.3): each sample's own range."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .reference import columns, guide, predict_x0, wide_dtype
from .table import DynamicThreshold


def quantile(values: Tensor, ratio: float) -> Tensor:
    """torch.quantile of each row, before 2.14 to the bit: that refuses 2^24 elements, and 2.11 does not trace it."""
    # torch's rank is a float32 too.
    rank = float(np.float32(ratio) * np.float32(values.shape[1] - 1))
    ordered, below = values.sort(dim=1).values, math.floor(rank)
    between = torch.lerp(ordered[:, below], ordered[:, math.ceil(rank)], rank - below)
    return torch.where(ordered[:, -1].isnan(), torch.nan, between)


def dynamic_threshold(
    x: Tensor,
    out: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    rows: Tensor,
    step: Tensor,
    rule: DynamicThreshold,
) -> Tensor:
    """Returns s [N]: the quantile of each sample's |x_0|, at least 1 and at most the rule's largest value."""
    dtype = wide_dtype(x, out)
    guided = guide(out.to(dtype), None if uncond is None else uncond.to(dtype), guidance_scale)
    x0 = predict_x0(x.to(dtype), guided, columns(rows, step, x, dtype))
    return quantile(x0.abs().flatten(1), rule.ratio).clamp(min=1.0, max=rule.max_value)
