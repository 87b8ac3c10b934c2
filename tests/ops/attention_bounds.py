"""How far attention's kernel may be from the exact result: a bound from the arithmetic.

A weight p = 2^e is off by the error of its exponent, e = s q.k / ln 2 less that of the largest score, and by that of
2^e. Sums of weights, and of weighted values, are of 64 terms, then of blocks of keys; between two blocks what is
summed is multiplied by 2 to the difference of their largest exponents.
"""

from __future__ import annotations

import math

import torch
from bounds import UNIT, gamma, unit
from torch import Tensor

CHUNK, MOST_KEYS, BLOCK = 64, 256, 1 << 16
EXP2 = 2.3 * 2.0**-23  # relative, of the kernel's 2^e; tests/csrc/test_vec_math.py measures it
PACKED_EXP2 = 7.6e-5  # of one that is rounded to bfloat16 next; csrc/common/packed.h
BFLOAT16 = 2.0**-8


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Returns the exact result of float64 inputs."""
    return (scale * (q @ k.mT)).softmax(-1) @ v


def _blocks(keys: int, depth: int) -> int:
    """Returns the blocks of keys at most: csrc/attention/arguments.h halves them where keys are deep."""
    block = MOST_KEYS
    while block > 8 and block * (depth + 15) > BLOCK:
        block //= 2
    return math.ceil(keys / block)


def bound(q: Tensor, k: Tensor, v: Tensor, scale: float, isa: str | None, bfloat16: bool = False) -> Tensor:
    """Returns the bound of every output, of inputs in float64."""
    depth, keys = k.shape[-1], k.shape[-2]
    blocks = _blocks(keys, depth)
    products = unit(min(depth, CHUNK) + math.ceil(depth / CHUNK), isa) + 2 * BFLOAT16 * bfloat16
    factor = scale / math.log(2)
    exponents = factor * (q @ k.mT)
    largest = exponents.abs().amax(-1, keepdim=True)
    # The factor, its product with the largest score, and their difference with the score's round.
    off = factor * products * (q.abs() @ k.abs().mT) + 4 * UNIT * (exponents.abs() + largest)
    between = (blocks - 1) * (math.log(2) * 2 * UNIT * largest + EXP2 + UNIT)
    weight = torch.expm1(math.log(2) * off + (PACKED_EXP2 if bfloat16 else EXP2) + between)
    p = exponents.mul(math.log(2)).softmax(-1)
    sums = CHUNK + MOST_KEYS // CHUNK + 2 * blocks
    values = ((p * (weight + unit(sums, isa) + 2 * BFLOAT16 * bfloat16)) @ v.abs()) + keys * 2.0**-126 * v.abs().max()
    total = (p * weight).sum(-1, keepdim=True) + gamma(sums)
    exact = (p @ v).abs()
    return (values + exact * total) / (1 - total) + 3 * UNIT * (exact + values)
