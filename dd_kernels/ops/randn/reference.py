"""Counter-based normals in plain PyTorch: the definition that every kernel is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .op import Arguments

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Returns the high and low 32 bits of a * multiplier, by halves, since int64 holds no 64-bit unsigned product."""
    high = (a * (multiplier >> 16) + ((a * (multiplier & 0xFFFF)) >> 16)) >> 16
    return high, (a * multiplier) & _MASK


def philox4x32_10(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32 with 10 rounds (Salmon et al., 2011): four words, as int64 in [0, 2^32), per counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def words(key: Tensor, batch: int, elements: int, draw: Tensor, stream: int) -> Tensor:
    """The Philox words [batch, ceil(elements / 4), 4] of the noise contract, as int64.

    ``key`` is (seed, first_sample, draw), ``draw`` an int64 tensor [1] or [batch].
    """
    quad = torch.arange((elements + 3) // 4, device=key.device)[None, :]
    sample = ((key[1] + torch.arange(batch, device=key.device)) & _MASK)[:, None]
    draw = (draw & _MASK)[:, None]
    counter = torch.broadcast_tensors(quad, sample, draw, torch.full_like(quad, stream))
    return torch.stack(philox4x32_10(counter, (key[0] & _MASK, (key[0] >> 32) & _MASK)), dim=-1)


def box_muller(words: Tensor) -> Tensor:
    """Normals (float64) from words [..., 4], pairwise; u is rounded to float32 as in the kernels."""
    u = (words[..., 0::2].to(torch.float32) + 1.0).to(torch.float64) * 2.0**-32
    angle = words[..., 1::2].to(torch.float64) * (2.0 * math.pi * 2.0**-32)
    radius = torch.sqrt(-2.0 * torch.log(u))
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)


def normals(key: Tensor, shape: torch.Size, draw: Tensor, stream: int) -> Tensor:
    """N(0, 1) in float64, of ``shape`` [N, ...], elements counted in logical order inside a sample."""
    elements = math.prod(shape[1:])
    z = box_muller(words(key, shape[0], elements, draw, stream)).flatten(1)
    return z[:, :elements].reshape(shape)


def randn(call: Arguments) -> Tensor:
    """The values of :func:`dd_kernels.randn`, in float64."""
    return normals(call.key, call.z.shape, call.key[2:3], call.stream)
