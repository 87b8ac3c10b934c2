"""The modules of the U-Net: norm, residual block, self-attention, resampling, timestep embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import group_norm_silu
from ..ops.activation import activation_of
from .configs import UNetConfig

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def timestep_embedding(t: Tensor, channels: int, convention: str = "ddpm", max_period: float = 10000.0) -> Tensor:
    r"""Returns sinusoids of the timestep (Vaswani et al. 2017, section 3.5), in float32.

    .. math:: e_i = \sin(t\,\omega_i),\ e_{half+i} = \cos(t\,\omega_i), \qquad \omega_i = max\_period^{-i / d}

    "ddpm" (Ho et al. 2020): sines first, d = half - 1. "guided" (Nichol & Dhariwal 2021): cosines
    first, d = half; half is channels // 2, and an odd last channel is 0.

    Args:
        t: [N], int or float.
        channels: length of one embedding.
        convention: "ddpm" or "guided".
        max_period: the longest wavelength, divided by 2 pi.

    Returns:
        [N, channels] float32.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    # Follows the papers' order of operations: at t = 1000 another order differs by 1e-5.
    frequencies = torch.exp(-math.log(max_period) * steps / (half - 1 if convention == "ddpm" else half))
    angles = t.to(torch.float32)[:, None] * frequencies
    waves = [angles.sin(), angles.cos()]
    if convention == "guided":
        waves.reverse()
    return F.pad(torch.cat(waves, dim=1), (0, channels % 2))


class GroupNormSiLU(nn.GroupNorm):
    """:func:`dd_kernels.group_norm_silu` as a module, with the parameters of ``nn.GroupNorm``."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, activation: str = "silu") -> None:
        super().__init__(num_groups, num_channels, eps)
        activation_of(activation)  # raises for an unknown name
        self.activation = activation

    def forward(
        self, x: Tensor, *, pre_shift: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Returns act(GroupNorm(x + pre_shift) (1 + scale) + shift); x is [N, C, ...], the others are [N, C]."""
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            pre_shift=pre_shift,
            scale=scale,
            shift=shift,
            activation=self.activation,
        )


def channels_last(module: ModuleT) -> ModuleT:
    """Moves the convolution weights of ``module`` to the memory format channels_last, and returns it."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def zeroed(layer: ModuleT) -> ModuleT:
    """Sets the parameters of ``layer`` to 0 and returns it; a residual block that ends in it starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def halve(x: Tensor) -> Tensor:
    """Averages 2 x 2 pixels: [N, C, H, W] -> [N, C, H/2, W/2]."""
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """Repeats each pixel 2 x 2 times: [N, C, H, W] -> [N, C, 2H, 2W]."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """Halves the resolution, by a strided 3 x 3 convolution or by the mean of 2 x 2 pixels."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.bottom_right = config.downsample_padding == "bottom_right"
        padding = 0 if self.bottom_right else 1
        self.conv = nn.Conv2d(channels, channels, 3, 2, padding) if config.resample == "conv" else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Returns [N, C, H/2, W/2]; ``embedding`` is ignored, so that a residual block can stand here instead."""
        if self.conv is None:
            return halve(x)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.bottom_right else x)


class Upsample(nn.Module):
    """Doubles the resolution by nearest neighbour, with or without a 3 x 3 convolution after it."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if config.resample == "conv" else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Returns [N, C, 2H, 2W]; ``embedding`` is ignored, so that a residual block can stand here instead."""
        x = double(x)
        return x if self.conv is None else self.conv(x)


class ResBlock(nn.Module):
    """The residual block: twice (norm, SiLU, convolution), with the embedding in the second norm, plus a shortcut.

    ``resample`` (:func:`halve` or :func:`double`) changes the resolution after the first SiLU and on the shortcut.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        config: UNetConfig,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.scale_shift = config.scale_shift
        width = channels_out * (2 if config.scale_shift else 1)
        self.norm1 = GroupNormSiLU(config.num_groups, channels_in, config.eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.embedding = nn.Linear(config.embedding_width, width)
        self.norm2 = GroupNormSiLU(config.num_groups, channels_out, config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Returns [N, C', H', W'] for x [N, C, H, W] and SiLU(embedding) [N, E]."""
        h = self.norm1(x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        # norm2 adds conv1's bias, which saves a pass over memory, since norm2 reads h anyway.
        weight, conv_bias = self.conv1.weight, self.conv1.bias
        assert conv_bias is not None
        h = self.conv1._conv_forward(h, weight, None)
        bias = conv_bias.expand(h.shape[0], -1)
        emb = self.embedding(embedding)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h, pre_shift=bias, scale=scale, shift=shift)
        else:
            h = self.norm2(h, pre_shift=emb + bias)
        return self.shortcut(x) + self.conv2(self.dropout(h))


# Below so many tokens PyTorch's backward pass of attention on a CPU takes up to nine times as long in bfloat16 as in
# float32 (35 ms beside 4 for 49 tokens of 16 channels, 4 heads, 64 images); from there on it is the faster one.
_FEW_TOKENS = 256


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(d)) v, eq. 1 of Vaswani et al. 2017, of q, k, v [N, heads, tokens, d]."""
    slow = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-2] < _FEW_TOKENS
    if not (slow and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


class Attention(nn.Module):
    """Self-attention over the H W positions (Vaswani et al. 2017, eq. 1), added to its input.

    The rows of ``qkv`` are the queries of all heads, then the keys, then the values.
    """

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = config.heads(channels)
        self.norm = GroupNormSiLU(config.num_groups, channels, config.eps, activation="none")
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the same shape as x [N, C, H, W]."""
        n, c, height, width = x.shape
        # Of a channels_last x these tokens [N, H, W, C] are a view, and so is the permutation back.
        tokens = self.norm(x).permute(0, 2, 3, 1)
        qkv = self.qkv(tokens).reshape(n, height * width, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, H*W, C/heads]
        attended = attend(q, k, v).transpose(1, 2)
        return x + self.proj(attended.reshape(n, height, width, c)).permute(0, 3, 1, 2)
