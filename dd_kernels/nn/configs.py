"""The options of :class:`~dd_kernels.nn.UNet`, their checks, and the configurations that have a name."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

EMBEDDINGS = ("ddpm", "guided")
RESAMPLINGS = ("conv", "resblock", "plain")
PADDINGS = ("symmetric", "bottom_right")
_COUNTS = ("image_size", "in_channels", "num_res_blocks", "num_heads", "num_groups")
_OPTIONAL = ("out_channels", "head_channels", "embedding_channels", "time_channels", "num_classes")


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or abs(int(value)) >= 1 << 31:
        raise ValueError(f"{name} must be an integer below 2^31; got {value!r}")
    return int(value)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The options of a U-Net; every field has a plain JSON value.

    Args:
        image_size: side of the training images, in pixels; the levels' resolutions follow from it.
        in_channels: C of x.
        channels: feature channels of each level, finest first; a level halves the resolution.
        out_channels: C of the prediction (epsilon, x0 or v); None: ``in_channels``.
        num_res_blocks: residual blocks per level of the encoder; a level of the decoder has one more.
        attention_resolutions: sides, in pixels, of the levels that have self-attention.
        middle_attention: self-attention between the two residual blocks of the middle.
        num_heads: attention heads, where ``head_channels`` is None.
        head_channels: channels of one head; None: the channels divided by ``num_heads``.
        embedding_channels: length of the sinusoidal timestep embedding; None: ``channels[0]``.
        time_channels: width of the time embedding's two layers; None: 4 ``embedding_channels``.
        timestep_embedding: "ddpm" or "guided", see :func:`~dd_kernels.nn.timestep_embedding`.
        scale_shift: the embedding scales and shifts the second norm (Dhariwal & Nichol 2021,
            eq. 7) instead of being added before it (Ho et al. 2020).
        resample: "conv" (strided and after-nearest convolution), "resblock" (in a residual block:
            BigGAN's, Dhariwal & Nichol 2021) or "plain" (average pooling, nearest neighbour).
        downsample_padding: of a strided convolution: "symmetric" (1 on each side) or "bottom_right"
            (TensorFlow's "SAME", as in the original DDPM).
        dropout: probability, before the second convolution of a residual block.
        num_groups: groups of every GroupNorm.
        eps: of every GroupNorm: 1e-6 in the original DDPM, 1e-5 in guided-diffusion.
        num_classes: classes of a conditional model, or None.
        null_class: adds the label ``num_classes``, which means "no class": training for classifier-free
            guidance (Ho & Salimans 2022) puts it in place of dropped labels.
        learn_variance: doubles the output channels: the second half is the model's variance
            (Nichol & Dhariwal 2021, eq. 15).
        self_conditioning: the model reads an estimate of x_0 behind x's channels (Chen et al. 2022, "Analog Bits",
            section 3.2): in a sampler that of the step before.

    Raises:
        ValueError: an option is out of range, or two do not fit together.
    """

    image_size: int
    in_channels: int
    channels: Sequence[int]
    out_channels: int | None = None
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = ()
    middle_attention: bool = True
    num_heads: int = 1
    head_channels: int | None = None
    embedding_channels: int | None = None
    time_channels: int | None = None
    timestep_embedding: str = "ddpm"
    scale_shift: bool = False
    resample: str = "conv"
    downsample_padding: str = "symmetric"
    dropout: float = 0.0
    num_groups: int = 32
    eps: float = 1e-5
    num_classes: int | None = None
    null_class: bool = False
    learn_variance: bool = False
    self_conditioning: bool = False

    def __post_init__(self) -> None:
        self._make_plain()
        self._check_sizes()
        self._check_choices()
        self._check_attention()

    def _make_plain(self) -> None:
        """Turns numpy numbers into plain ones, and sequences into lists, as JSON gives them back."""
        for name in ("channels", "attention_resolutions"):
            value = getattr(self, name)
            if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
                raise ValueError(f"{name} must be a list of integers; got {value!r}")
            object.__setattr__(self, name, [_integer(name, item) for item in value])
        for name in (*_COUNTS, *(name for name in _OPTIONAL if getattr(self, name) is not None)):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        for name in ("dropout", "eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ValueError(f"{name} must be a number; got {value!r}")
            object.__setattr__(self, name, float(value))
        for name in ("middle_attention", "scale_shift", "null_class", "learn_variance", "self_conditioning"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; got {getattr(self, name)!r}")

    def _check_sizes(self) -> None:
        if not self.channels:
            raise ValueError("channels must name at least one level; got none")
        for name in (*_COUNTS, *(name for name in _OPTIONAL if getattr(self, name) is not None)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for channels in self.channels:
            if channels < 1 or channels % self.num_groups:
                raise ValueError(
                    f"channels must be positive multiples of num_groups={self.num_groups}; got {self.channels}"
                )
        if self.sinusoid_channels < 4:
            raise ValueError(f"embedding_channels must be at least 4; got {self.sinusoid_channels}")
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size must be divisible by {self.factor}, for {len(self.channels)} levels; got {self.image_size}"
            )

    def _check_choices(self) -> None:
        choices = {"timestep_embedding": EMBEDDINGS, "resample": RESAMPLINGS, "downsample_padding": PADDINGS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.downsample_padding != "symmetric" and self.resample != "conv":
            raise ValueError(f"downsample_padding={self.downsample_padding!r} needs resample='conv'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")
        if not self.eps > 0:
            raise ValueError(f"eps must be above 0; got {self.eps}")
        if self.null_class and self.num_classes is None:
            raise ValueError("null_class=True needs num_classes; got num_classes=None")

    def _check_attention(self) -> None:
        sides = [self.image_size >> level for level in range(len(self.channels))]
        for side in self.attention_resolutions:
            if side not in sides:
                raise ValueError(f"attention_resolutions must be among the levels' sides, {sides}; got {side}")
        attended = {c for side, c in zip(sides, self.channels, strict=True) if side in self.attention_resolutions}
        if self.middle_attention:
            attended.add(self.channels[-1])
        divisor, name = (
            (self.num_heads, "num_heads") if self.head_channels is None else (self.head_channels, "head_channels")
        )
        for channels in attended:
            if channels % divisor:
                raise ValueError(f"{name} must divide the {channels} channels of an attention; got {divisor}")

    @property
    def factor(self) -> int:
        """Returns the image's side divided by that of the coarsest level."""
        return 2 ** (len(self.channels) - 1)

    @property
    def sinusoid_channels(self) -> int:
        """Returns the length of the sinusoidal timestep embedding."""
        return self.channels[0] if self.embedding_channels is None else self.embedding_channels

    @property
    def embedding_width(self) -> int:
        """Returns the width of the time (and class) embedding that the residual blocks read."""
        return 4 * self.sinusoid_channels if self.time_channels is None else self.time_channels

    @property
    def model_channels_in(self) -> int:
        """Returns the channels of what the first convolution reads, those of an estimate of x_0 included."""
        return self.in_channels * (2 if self.self_conditioning else 1)

    @property
    def model_channels_out(self) -> int:
        """Returns the channels of the model's output, those of a learned variance included."""
        predicted = self.in_channels if self.out_channels is None else self.out_channels
        return predicted * (2 if self.learn_variance else 1)

    def heads(self, channels: int) -> int:
        """Returns the number of heads of an attention over ``channels``."""
        return self.num_heads if self.head_channels is None else channels // self.head_channels

    def has_attention(self, level: int) -> bool:
        """Returns whether the level has self-attention."""
        return self.image_size >> level in self.attention_resolutions


# Ho et al. 2020, appendix B.
_DDPM = {"in_channels": 3, "attention_resolutions": (16,), "downsample_padding": "bottom_right", "eps": 1e-6}
# Dhariwal & Nichol 2021: the class-conditional "ADM" models.
_ADM = {
    "in_channels": 3,
    "attention_resolutions": (32, 16, 8),
    "head_channels": 64,
    "timestep_embedding": "guided",
    "scale_shift": True,
    "resample": "resblock",
    "num_classes": 1000,
    "learn_variance": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "cifar10": {**_DDPM, "image_size": 32, "channels": (128, 256, 256, 256), "dropout": 0.1},
    "lsun256": {**_DDPM, "image_size": 256, "channels": (128, 128, 256, 256, 512, 512)},
    "imagenet64": {
        **_ADM,
        "image_size": 64,
        "channels": (192, 384, 576, 768),
        "num_res_blocks": 3,
        "dropout": 0.1,
    },
    "imagenet128": {
        **_ADM,
        "image_size": 128,
        "channels": (256, 256, 512, 768, 1024),
        "num_heads": 4,
        "head_channels": None,
    },
    "imagenet256": {**_ADM, "image_size": 256, "channels": (256, 256, 512, 512, 1024, 1024)},
    # For the 1,797 images of 8 x 8 in scikit-learn: trains in minutes on a CPU, samples in seconds.
    "digits": {
        "image_size": 8,
        "in_channels": 1,
        "channels": (32, 64),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "num_heads": 4,
        "num_groups": 8,
        "dropout": 0.1,
        "num_classes": 10,
        "null_class": True,
    },
    # For Fashion-MNIST's 28 x 28: trains in an hour or two on a CPU. Its levels have 28, 14 and 7 pixels a side.
    "fashion": {
        "image_size": 28,
        "in_channels": 1,
        "channels": (32, 64, 64),
        "num_res_blocks": 1,
        "attention_resolutions": (7,),
        "num_heads": 4,
        "num_groups": 8,
        "dropout": 0.0,
        "num_classes": 10,
        "null_class": True,
    },
}
"""Named options; see :meth:`dd_kernels.nn.UNet.from_config`."""

# Channels of the levels, by their number: those of CIFAR-10 and LSUN in Ho et al. 2020, and between them.
_LEVELS = {
    1: (128,),
    2: (128, 256),
    3: (128, 256, 256),
    4: (128, 256, 256, 256),
    5: (128, 128, 256, 256, 512),
    6: (128, 128, 256, 256, 512, 512),
}


def fitting_config(image_size: int, levels: int | None = None) -> dict[str, Any]:
    """Returns options of a U-Net for images of this size: "cifar10" at 32, "lsun256" with dropout at 256.

    The side is halved while it is even and above 4, at most five times, or for ``levels``. The finest level of at most
    16 pixels has attention.
    """
    sides = [image_size]
    while sides[-1] % 2 == 0 and sides[-1] > 4 and len(sides) < min(levels or len(_LEVELS), len(_LEVELS)):
        sides.append(sides[-1] // 2)
    attended = tuple(side for side in sides if side <= 16)[:1]
    channels = _LEVELS[len(sides)]
    return {**_DDPM, "attention_resolutions": attended, "image_size": image_size, "channels": channels, "dropout": 0.1}
