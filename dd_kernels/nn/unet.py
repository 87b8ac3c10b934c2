"""One U-Net with the shapes of DDPM (Ho et al. 2020) and of guided-diffusion (Dhariwal & Nichol 2021)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import check_float
from .blocks import (
    Attention,
    Downsample,
    GroupNormSiLU,
    ResBlock,
    Upsample,
    channels_last,
    double,
    halve,
    timestep_embedding,
    zeroed,
)
from .configs import CONFIGS, UNetConfig


class Stage(nn.Module):
    """The blocks of one resolution: residual blocks, each followed by an attention or none, then resampling."""

    def __init__(self, resnets: list[ResBlock], attentions: list[Attention], resample: nn.Module | None = None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def block(self, i: int, x: Tensor, embedding: Tensor) -> Tensor:
        """Returns the output of residual block i and the attention after it."""
        x = self.resnets[i](x, embedding)
        return self.attentions[i](x) if i < len(self.attentions) else x


class MiddleStage(Stage):
    """The stage between encoder and decoder."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Returns the output of the last block; x is [N, C, H, W], embedding [N, E]."""
        for i in range(len(self.resnets)):
            x = self.block(i, x, embedding)
        return x


class EncoderStage(Stage):
    """A stage that keeps its feature maps for the decoder."""

    def forward(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """Returns the stage's output; appends the output of every block, and of the resampling, to ``skips``."""
        for i in range(len(self.resnets)):
            x = self.block(i, x, embedding)
            skips.append(x)
        if self.resample is not None:
            x = self.resample(x, embedding)
            skips.append(x)
        return x


class DecoderStage(Stage):
    """A stage that reads the encoder's feature maps."""

    def forward(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """Returns the stage's output; each residual block takes the last of ``skips`` behind x's channels."""
        for i in range(len(self.resnets)):
            x = self.block(i, torch.cat([x, skips.pop()], dim=1), embedding)
        return x if self.resample is None else self.resample(x, embedding)


class UNet(nn.Module):
    """A U-Net that predicts from noisy images and their timesteps, [N, C, H, W] -> [N, C', H, W].

    Takes the options of :class:`~dd_kernels.nn.UNetConfig`. ``config`` holds them as a dict of plain JSON
    values, and ``UNet(**model.config)`` is the same model. All features and convolution weights are
    channels_last. The last layer of every residual branch and the output convolution start at 0, as in both papers.

    >>> model = UNet(image_size=32, in_channels=3, channels=(64, 128), attention_resolutions=(16,))
    >>> model = UNet.from_config("cifar10", dropout=0.0)
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        config = UNetConfig(**options)
        self._config = config
        channels = config.channels
        width = config.embedding_width
        self.time_embedding = nn.Sequential(
            nn.Linear(config.sinusoid_channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        labels = 0 if config.num_classes is None else config.num_classes + config.null_class
        self.class_embedding = nn.Embedding(labels, width) if labels else None
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down, skips = _down_stages(config)
        self.middle = MiddleStage(
            [ResBlock(channels[-1], channels[-1], config) for _ in range(2)],
            [Attention(channels[-1], config)] if config.middle_attention else [],
        )
        self.up = _up_stages(config, skips)
        self.norm_out = GroupNormSiLU(config.num_groups, channels[0], config.eps)
        self.conv_out = zeroed(nn.Conv2d(channels[0], config.model_channels_out, 3, padding=1))
        channels_last(self)

    @classmethod
    def from_config(cls, name: str, **overrides: Any) -> UNet:
        """Builds the configuration called ``name`` in ``dd_kernels.nn.CONFIGS``, with some options replaced.

        "cifar10", "lsun256": Ho et al. 2020, appendix B. "imagenet64", "imagenet128", "imagenet256":
        ADM of Dhariwal & Nichol 2021. "digits": small, for 8 x 8 grey images of 10 classes.
        """
        if name not in CONFIGS:
            raise ValueError(f"name must be one of {', '.join(CONFIGS)}; got {name!r}")
        return cls(**{**CONFIGS[name], **overrides})

    @property
    def config(self) -> dict[str, Any]:
        """The options that the model was built from, as plain JSON values."""
        return dataclasses.asdict(self._config)

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or None where the model has none."""
        return self._config.num_classes if self._config.null_class else None

    def forward(self, x: Tensor, t: Tensor | float, y: Tensor | None = None) -> Tensor:
        """Returns the prediction for images x at timesteps t, of classes y.

        Args:
            x: [N, in_channels, H, W]; H and W divisible by 2 per level below the first. Cast to the
                dtype of the model's weights.
            t: [N], or one for all samples; int or float, on the scale that the model was trained with.
            y: [N] int64 labels in [0, num_classes), or ``null_label``. None stands for ``null_label`` in
                a model that has one, and is the only value for a model without classes.

        Returns:
            [N, out_channels, H, W] (2 out_channels with ``learn_variance``), channels_last, in the
            dtype of the weights, or of autocast.

        Raises:
            ValueError, TypeError: wrong shape, dtype or label. Labels on an accelerator are not checked,
                since that would wait for the device.
        """
        self._check_images(x)
        embedding = F.silu(self._embedding(x, t, y))
        h = self.conv_in(x.to(self.conv_in.weight.dtype))
        skips = [h]
        for stage in self.down:
            h = stage(h, embedding, skips)
        h = self.middle(h, embedding)
        for stage in self.up:
            h = stage(h, embedding, skips)
        return self.conv_out(self.norm_out(h))

    def _embedding(self, x: Tensor, t: Tensor | float, y: Tensor | None) -> Tensor:
        """Returns the sum of the time and class embeddings, [N, E]."""
        config = self._config
        t = torch.as_tensor(t, device=x.device)
        if t.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise TypeError(f"t must be an int or float tensor; got {t.dtype}")
        if t.ndim > 1 or t.numel() not in (1, x.shape[0]):
            raise ValueError(f"t must have the shape [] or [{x.shape[0]}], one per sample; got {list(t.shape)}")
        waves = timestep_embedding(t.reshape(-1), config.sinusoid_channels, config.timestep_embedding)
        embedding = self.time_embedding(waves.to(self.conv_in.weight.dtype)).expand(x.shape[0], -1)
        y = self._labels(x, y)
        return embedding if y is None or self.class_embedding is None else embedding + self.class_embedding(y)

    def _labels(self, x: Tensor, y: Tensor | None) -> Tensor | None:
        """Returns the checked labels [N], or None for a model without classes."""
        classes, null = self._config.num_classes, self.null_label
        if classes is None:
            if y is not None:
                raise ValueError("y must be None: the model has no classes (num_classes=None)")
            return None
        if y is None:
            if null is None:
                raise ValueError(
                    f"y must hold the labels of the {classes} classes; got None, and there is no null class"
                )
            return torch.full((x.shape[0],), null, device=x.device)
        if not isinstance(y, Tensor) or y.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"y must be an integer tensor; got {y.dtype if isinstance(y, Tensor) else type(y).__name__}"
            )
        if list(y.shape) != [x.shape[0]]:
            raise ValueError(f"y must have the shape [{x.shape[0]}], one label per sample; got {list(y.shape)}")
        if y.device.type == "cpu" and y.numel() > 0 and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(y))
            last = classes - 1 if null is None else null
            if low < 0 or high > last:
                raise ValueError(f"y must be in [0, {last}]; got {low if low < 0 else high}")
        return y.to(x.device)

    def _check_images(self, x: Tensor) -> None:
        check_float("x", x)
        config = self._config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ValueError(f"x must be [N, {config.in_channels}, H, W]; got {list(x.shape)}")
        if x.shape[2] % config.factor or x.shape[3] % config.factor or 0 in x.shape[2:]:
            raise ValueError(
                f"x must have a height and width divisible by {config.factor}, for the model's "
                f"{len(config.channels)} levels; got {list(x.shape)}"
            )


def _down_stages(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """Builds the encoder; returns its stages and the channels of every feature map that it hands to the decoder."""
    stages, skips = nn.ModuleList(), [config.channels[0]]
    last = len(config.channels) - 1
    for level, channels in enumerate(config.channels):
        inputs = [skips[-1]] + [channels] * (config.num_res_blocks - 1)
        resnets = [ResBlock(c, channels, config) for c in inputs]
        attentions = [Attention(channels, config) for _ in resnets if config.has_attention(level)]
        skips += [channels] * config.num_res_blocks
        resample: nn.Module | None = None
        if level < last:
            block = config.resample == "resblock"
            resample = ResBlock(channels, channels, config, halve) if block else Downsample(channels, config)
            skips.append(channels)
        stages.append(EncoderStage(resnets, attentions, resample))
    return stages, skips


def _up_stages(config: UNetConfig, skips: list[int]) -> nn.ModuleList:
    """Builds the decoder, coarsest level first; each residual block reads one feature map of the encoder."""
    stages, skips = nn.ModuleList(), list(skips)
    below = config.channels[-1]
    for level, channels in reversed(list(enumerate(config.channels))):
        inputs = [below] + [channels] * config.num_res_blocks
        resnets = [ResBlock(c + skips.pop(), channels, config) for c in inputs]
        attentions = [Attention(channels, config) for _ in resnets if config.has_attention(level)]
        resample: nn.Module | None = None
        if level > 0:
            block = config.resample == "resblock"
            resample = ResBlock(channels, channels, config, double) if block else Upsample(channels, config)
        stages.append(DecoderStage(resnets, attentions, resample))
        below = channels
    return stages
