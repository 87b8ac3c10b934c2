"""A small KL autoencoder, the first stage of latent diffusion (Rombach et al., 2022), of the U-Net's fused norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .blocks import GroupNormSiLU, channels_last, double, zeroed


class Residual(nn.Module):
    """Twice (norm, SiLU, 3 x 3 convolution), added to the input: the U-Net's residual block without an embedding."""

    def __init__(self, channels_in: int, channels_out: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(num_groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = GroupNormSiLU(num_groups, channels_out)
        self.conv2 = zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N, C', H, W] for x [N, C, H, W]."""
        return self.shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Double(nn.Module):
    """Repeats each pixel 2 x 2 times, then a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N, C, 2 H, 2 W] for x [N, C, H, W]."""
        return self.conv(double(x))


class AutoencoderKL(nn.Module):
    r"""Encodes images [N, C, H, W] to Gaussians of latents [N, L, H / f, W / f], f = 2^(levels - 1), and decodes them.

    The latents that diffusion sees are divided by their standard deviation (Rombach et al., appendix G), which
    :meth:`fit_scale` measures.

    Args:
        in_channels: C of the images.
        channels: feature channels of each level, finest first; a level halves the resolution.
        latent_channels: L.
        num_groups: groups of every GroupNorm.

    Raises:
        ValueError: no level, or channels that the groups do not divide.
    """

    scale: Tensor

    def __init__(
        self, in_channels: int, channels: Sequence[int] = (32, 64, 64), latent_channels: int = 4, num_groups: int = 8
    ) -> None:
        super().__init__()
        if not channels or any(c < 1 or c % num_groups for c in channels):
            raise ValueError(f"channels must be positive multiples of num_groups={num_groups}; got {list(channels)}")
        self.factor, self.latent_channels = 2 ** (len(channels) - 1), latent_channels
        first, last = channels[0], channels[-1]
        encoder: list[nn.Module] = [nn.Conv2d(in_channels, first, 3, padding=1)]
        decoder: list[nn.Module] = [nn.Conv2d(latent_channels, last, 3, padding=1), Residual(last, last, num_groups)]
        for fine, coarse in zip(channels, [*channels[1:], None], strict=True):
            encoder.append(Residual(fine, fine, num_groups))
            if coarse is not None:
                encoder.append(nn.Conv2d(fine, coarse, 3, 2, 1))
        for coarse, fine in zip(channels[::-1], channels[-2::-1], strict=False):
            decoder += [Double(coarse), Residual(coarse, fine, num_groups)]
        encoder += [GroupNormSiLU(num_groups, last), nn.Conv2d(last, 2 * latent_channels, 3, padding=1)]
        decoder += [GroupNormSiLU(num_groups, first), nn.Conv2d(first, in_channels, 3, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.register_buffer("scale", torch.ones(()))
        channels_last(self)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the log of the variance of the latents of x [N, C, H, W], each [N, L, H / f, W / f].

        Raises:
            ValueError: H or W is no multiple of f.
        """
        if x.ndim != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x must be [N, C, H, W], H and W divisible by {self.factor}; got {list(x.shape)}")
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, x: Tensor) -> Tensor:
        """Returns the latents' mean, scaled as diffusion sees it, [N, L, H / f, W / f]."""
        return self.moments(x)[0] * self.scale

    def decode(self, latent: Tensor) -> Tensor:
        """Returns images [N, C, H, W] of latents that are scaled as diffusion sees them."""
        return self.decoder(latent / self.scale)

    @torch.no_grad()
    def fit_scale(self, batches: Iterable[Tensor]) -> None:
        """Sets the scale at which the latents of these images have a standard deviation of 1, over all elements."""
        latents = torch.cat([self.moments(x)[0].flatten() for x in batches])
        self.scale.copy_(1 / latents.std())


def kl_to_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""Returns KL(N(mean, exp(log_variance)) || N(0, 1)) in nats of each sample, [N]: eq. 10 of Kingma & Welling, 2014.

    .. math:: \tfrac12 \sum (\mu^2 + \sigma^2 - 1 - \log \sigma^2)
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
