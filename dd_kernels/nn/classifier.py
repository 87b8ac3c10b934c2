"""A classifier of noisy images, whose gradient guides a diffusion model (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import GroupNormSiLU, channels_last
from .configs import UNetConfig
from .encoder import Encoder


class NoisyClassifier(Encoder):
    """Tells the class of noisy images at their timesteps, [N, C, H, W] -> logits [N, num_classes].

    It is the encoder and the middle of a :class:`~dd_kernels.nn.UNet`, then the mean over the positions and a linear
    layer: the ``EncoderUNetModel`` of guided-diffusion with the pool "adaptive". It takes the options of
    :class:`~dd_kernels.nn.UNetConfig`; ``num_classes`` is how many classes it tells apart. ``config`` holds them as a
    dict of plain JSON values.

    >>> classifier = NoisyClassifier(image_size=32, in_channels=3, channels=(64, 128), num_classes=10)

    Raises:
        ValueError: an option is out of range, or ``num_classes`` is missing.
    """

    def __init__(self, **options: Any) -> None:
        config = UNetConfig(**options)
        if config.num_classes is None:
            raise ValueError("num_classes must be given for a classifier; got None")
        if config.self_conditioning:
            raise ValueError("self_conditioning must be false for a classifier, which reads x alone; got True")
        super().__init__(config)
        self.norm_out = GroupNormSiLU(config.num_groups, config.channels[-1], config.eps)
        self.head = nn.Linear(config.channels[-1], config.num_classes)
        channels_last(self)

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Returns the logits of the classes.

        Args:
            x: [N, in_channels, H, W]; H and W divisible by 2 per level below the first. Cast to the weights' dtype.
            t: [N], or one for all samples; int or float, on the scale that the classifier was trained with.

        Returns:
            [N, num_classes], in the dtype of the weights, or of autocast.

        Raises:
            ValueError, TypeError: wrong shape or dtype.
        """
        self._check_images(x)
        h, _ = self._encoded(x, F.silu(self._embedded(x, t)))
        return self.head(self.norm_out(h).mean(dim=(2, 3)))

    def log_probability(self, x: Tensor, t: Tensor | float, label: Tensor) -> Tensor:
        """Returns log p(label | x_t), [N] float32, for labels [N]; differentiable in x."""
        return -F.cross_entropy(self(x, t).float(), label, reduction="none")
