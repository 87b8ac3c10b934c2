"""The half of a U-Net that reads: the timestep's embedding, the encoder and the middle."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import check_float
from .blocks import Attention, Downsample, ResBlock, halve, timestep_embedding
from .configs import UNetConfig


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


def _embedding(labels: int, width: int) -> nn.Embedding:
    """Returns an embedding with the draws of ``nn.Embedding``.

    Its own import Dynamo under ``torch.device("meta")``, where a model is built that is loaded: that takes a second.
    """
    return nn.Embedding.from_pretrained(torch.randn(labels, width), freeze=False)


class Encoder(nn.Module):
    """What a U-Net and a classifier share: x and t go in, the feature map of the coarsest level comes out.

    Args:
        config: the options.
        labels: how many labels have an embedding, which is added to that of the timestep.
    """

    def __init__(self, config: UNetConfig, labels: int = 0) -> None:
        super().__init__()
        self._config = config
        channels, width = config.channels, config.embedding_width
        self.time_embedding = nn.Sequential(
            nn.Linear(config.sinusoid_channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.class_embedding = _embedding(labels, width) if labels else None
        self.conv_in = nn.Conv2d(config.model_channels_in, channels[0], 3, padding=1)
        self.down = _down_stages(config)
        self.middle = MiddleStage(
            [ResBlock(channels[-1], channels[-1], config) for _ in range(2)],
            [Attention(channels[-1], config)] if config.middle_attention else [],
        )

    @property
    def config(self) -> dict[str, Any]:
        """The options that the model was built from, as plain JSON values."""
        return dataclasses.asdict(self._config)

    def _embedded(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Returns the embedding of the timesteps, [N, E]."""
        config = self._config
        t = torch.as_tensor(t, device=x.device)
        if t.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise TypeError(f"t must be an int or float tensor; got {t.dtype}")
        if t.ndim > 1 or t.numel() not in (1, x.shape[0]):
            raise ValueError(f"t must have the shape [] or [{x.shape[0]}], one per sample; got {list(t.shape)}")
        waves = timestep_embedding(t.reshape(-1), config.sinusoid_channels, config.timestep_embedding)
        return self.time_embedding(waves.to(self.conv_in.weight.dtype)).expand(x.shape[0], -1)

    def _encoded(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the middle's feature map, and those that a decoder reads, for x and SiLU(embedding) [N, E]."""
        h = self.conv_in(x.to(self.conv_in.weight.dtype))
        skips = [h]
        for stage in self.down:
            h = stage(h, embedding, skips)
        return self.middle(h, embedding), skips

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


def skip_channels(config: UNetConfig) -> list[int]:
    """Returns the channels of every feature map that the encoder hands to the decoder."""
    found, last = [config.channels[0]], len(config.channels) - 1
    for level, channels in enumerate(config.channels):
        found += [channels] * (config.num_res_blocks + (level < last))
    return found


def _down_stages(config: UNetConfig) -> nn.ModuleList:
    """Builds the encoder's stages, finest level first."""
    stages, above = nn.ModuleList(), config.channels[0]
    last = len(config.channels) - 1
    for level, channels in enumerate(config.channels):
        inputs = [above] + [channels] * (config.num_res_blocks - 1)
        resnets = [ResBlock(c, channels, config) for c in inputs]
        attentions = [Attention(channels, config) for _ in resnets if config.has_attention(level)]
        resample: nn.Module | None = None
        if level < last:
            block = config.resample == "resblock"
            resample = ResBlock(channels, channels, config, halve) if block else Downsample(channels, config)
        stages.append(EncoderStage(resnets, attentions, resample))
        above = channels
    return stages
