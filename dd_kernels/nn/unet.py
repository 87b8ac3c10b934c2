"""One U-Net with the shapes of DDPM (Ho et al. 2020) and of guided-diffusion (Dhariwal & Nichol 2021)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Attention, GroupNormSiLU, ResBlock, Upsample, channels_last, double, zeroed
from .configs import CONFIGS, UNetConfig
from .encoder import Encoder, Stage, skip_channels


class DecoderStage(Stage):
    """A stage that reads the encoder's feature maps."""

    def forward(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """Returns the stage's output; each residual block takes the last of ``skips`` behind x's channels."""
        for i in range(len(self.resnets)):
            x = self.block(i, torch.cat([x, skips.pop()], dim=1), embedding)
        return x if self.resample is None else self.resample(x, embedding)


class UNet(Encoder):
    """A U-Net that predicts from noisy images and their timesteps, [N, C, H, W] -> [N, C', H, W].

    Takes the options of :class:`~dd_kernels.nn.UNetConfig`. ``config`` holds them as a dict of plain JSON
    values, and ``UNet(**model.config)`` is the same model. All features and convolution weights are
    channels_last. The last layer of every residual branch and the output convolution start at 0, as in both papers.

    >>> model = UNet(image_size=32, in_channels=3, channels=(64, 128), attention_resolutions=(16,))
    >>> model = UNet.from_config("cifar10", dropout=0.0)
    """

    def __init__(self, **options: Any) -> None:
        config = UNetConfig(**options)
        super().__init__(config, 0 if config.num_classes is None else config.num_classes + config.null_class)
        self.up = _up_stages(config)
        self.norm_out = GroupNormSiLU(config.num_groups, config.channels[0], config.eps)
        self.conv_out = zeroed(nn.Conv2d(config.channels[0], config.model_channels_out, 3, padding=1))
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
    def num_classes(self) -> int | None:
        """The number of classes that the model is conditioned on, or None."""
        return self._config.num_classes

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or None where the model has none."""
        return self._config.num_classes if self._config.null_class else None

    @property
    def self_conditioning(self) -> bool:
        """Whether the model reads an estimate of x_0, which :func:`dd_kernels.sample` then hands to it."""
        return self._config.self_conditioning

    def forward(self, x: Tensor, t: Tensor | float, y: Tensor | None = None, x_self: Tensor | None = None) -> Tensor:
        """Returns the prediction for images x at timesteps t, of classes y.

        Args:
            x: [N, in_channels, H, W]; H and W divisible by 2 per level below the first. Cast to the
                dtype of the model's weights.
            t: [N], or one for all samples; int or float, on the scale that the model was trained with.
            y: [N] int64 labels in [0, num_classes), or ``null_label``. None stands for ``null_label`` in
                a model that has one, and is the only value for a model without classes.
            x_self: of a model with ``self_conditioning`` an estimate of x_0, of x's shape; None stands for zeros.

        Returns:
            [N, out_channels, H, W] (2 out_channels with ``learn_variance``), channels_last, in the
            dtype of the weights, or of autocast.

        Raises:
            ValueError, TypeError: wrong shape, dtype or label. Labels on an accelerator are not checked,
                since that would wait for the device.
        """
        self._check_images(x)
        embedding = self._embedded(x, t)
        y = self._labels(x, y)
        if y is not None and self.class_embedding is not None:
            embedding = embedding + self.class_embedding(y)
        embedding = F.silu(embedding)
        h, skips = self._encoded(self._with_estimate(x, x_self), embedding)
        for stage in self.up:
            h = stage(h, embedding, skips)
        return self.conv_out(self.norm_out(h))

    def _with_estimate(self, x: Tensor, x_self: Tensor | None) -> Tensor:
        """Returns x, and behind its channels the estimate of x_0 where the model reads one."""
        if not self.self_conditioning:
            if x_self is not None:
                raise ValueError("x_self must be None: the model has no self-conditioning")
            return x
        if x_self is None:
            x_self = torch.zeros_like(x)
        if x_self.shape != x.shape:
            raise ValueError(f"x_self must have the shape of x, {list(x.shape)}; got {list(x_self.shape)}")
        return torch.cat((x, x_self.to(x)), dim=1)

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


def _up_stages(config: UNetConfig) -> nn.ModuleList:
    """Builds the decoder, coarsest level first; each residual block reads one feature map of the encoder."""
    stages, skips = nn.ModuleList(), skip_channels(config)
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
