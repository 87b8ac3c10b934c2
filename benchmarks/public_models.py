"""Models of diffusers by their public configurations, and blocks in the styles of other codebases, with inputs.

Each comes at widths that a small machine runs, and ``full`` at its public width; all weights are random.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.compile.models import STYLES, make

Inputs = tuple[Any, ...]
Built = tuple[nn.Module, Callable[[int], Inputs]]


class First(nn.Module):
    """A model of diffusers as a function that returns its first tensor."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, *inputs: Any) -> Tensor:
        """Returns the first tensor of the model's result."""
        result = self.model(*inputs, **self.options)
        while not isinstance(result, Tensor):
            result = result[0]
        return result


def _diffusers() -> Any:
    """Returns the module, whose types do not say that its models are modules of torch."""
    return importlib.import_module("diffusers")


def _cifar10(full: bool) -> Built:
    diffusers = _diffusers()

    width = 128 if full else 64
    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return First(model), lambda n: (torch.randn(n, 3, 32, 32), torch.tensor([3] * n))


def _celebahq(full: bool) -> Built:
    diffusers = _diffusers()

    width, side = (128, 256) if full else (32, 64)
    down, up = ["DownBlock2D"] * 6, ["UpBlock2D"] * 6
    down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
    model = diffusers.UNet2DModel(
        sample_size=side,
        block_out_channels=(width, width, 2 * width, 2 * width, 4 * width, 4 * width),
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return First(model), lambda n: (torch.randn(n, 3, side, side), torch.tensor([3] * n))


def _conditional(full: bool, **options: Any) -> nn.Module:
    diffusers = _diffusers()

    width = 320 if full else 64
    widths = (width, 2 * width, 4 * width, 4 * width)
    sizes = {"block_out_channels": widths, "cross_attention_dim": 768 if full else 64, "attention_head_dim": 8}
    model: nn.Module = diffusers.UNet2DConditionModel(**{**sizes, **options})
    return model


def _sd(full: bool) -> Built:
    side, tokens = (64, 768) if full else (32, 64)
    return First(_conditional(full)), lambda n: (
        torch.randn(n, 4, side, side), torch.tensor([3] * n), torch.randn(n, 77, tokens)
    )  # fmt: skip


class ControlNet(First):
    """A ControlNet as a function that returns all its tensors in one: a compiler leaves out what nobody reads."""

    def forward(self, *inputs: Any) -> Tensor:
        """Returns the residuals for the U-Net, [N, all their values]."""
        down, middle = self.model(*inputs, return_dict=False)
        return torch.cat([residual.flatten(1) for residual in (*down, middle)], dim=1)


def _controlnet(full: bool) -> Built:
    diffusers = _diffusers()

    unet: Any = _conditional(full)
    model = diffusers.ControlNetModel.from_unet(unet)
    side, tokens = (64, 768) if full else (32, 64)
    return ControlNet(model), lambda n: (
        torch.randn(n, 4, side, side),
        torch.tensor([3] * n),
        torch.randn(n, 77, tokens),
        torch.randn(n, 3, 8 * side, 8 * side),
    )


def _motion(full: bool) -> Built:
    diffusers = _diffusers()

    unet: Any = _conditional(full)
    model = diffusers.UNetMotionModel.from_unet2d(unet)
    side, tokens = (64, 768) if full else (16, 64)
    return First(model), lambda n: (
        torch.randn(n, 4, 4, side, side), torch.tensor([3] * n), torch.randn(n, 77, tokens).repeat_interleave(4, 0)
    )  # fmt: skip


class Sdxl(First):
    """SDXL's U-Net as a function of tensors alone."""

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, text: Tensor, sizes: Tensor) -> Tensor:
        """Returns the model's output."""
        out: Tensor = self.model(x, t, tokens, added_cond_kwargs={"text_embeds": text, "time_ids": sizes})[0]
        return out


def _sdxl(full: bool) -> Built:
    width, tokens = (320, 2048) if full else (32, 64)
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    model = _conditional(
        full,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=blocks,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(blocks)),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20) if full else (1, 2, 4),
        cross_attention_dim=tokens,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    side = 128 if full else 32
    return Sdxl(model), lambda n: (
        torch.randn(n, 4, side, side),
        torch.tensor([3] * n),
        torch.randn(n, 77, tokens),
        torch.randn(n, 1280),
        torch.full((n, 6), 8.0 * side),
    )


def _decoder(full: bool) -> Built:
    diffusers = _diffusers()

    width = 128 if full else 32
    names = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    model = diffusers.AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width), layers_per_block=2, **names
    )
    side = 64 if full else 32
    return First(model.decoder), lambda n: (torch.randn(n, 4, side, side),)


def _temporal(full: bool) -> Built:
    diffusers = _diffusers()

    width = 128 if full else 32
    names = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    model = diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(width, 2 * width, 4 * width, 4 * width), **names)
    return First(model.decoder, num_frames=2), lambda n: (torch.randn(2 * n, 4, 16, 16), torch.zeros(n, 2))


def _hunyuan(full: bool) -> Built:
    diffusers = _diffusers()

    width = 128 if full else 32
    model = diffusers.AutoencoderKLHunyuanVideo(block_out_channels=(width, 2 * width, 4 * width, 4 * width))
    return First(model.decoder), lambda n: (torch.randn(n, 16, 2, 8, 8),)


def _ltx(full: bool) -> Built:
    diffusers = _diffusers()

    model = diffusers.AutoencoderKLLTXVideo() if full else diffusers.AutoencoderKLLTXVideo(
        block_out_channels=(32, 64, 64, 64), decoder_block_out_channels=(32, 64, 64, 64)
    )  # fmt: skip
    return First(model.decoder), lambda n: (torch.randn(n, 128, 2, 8, 8),)


def _style(name: str) -> Callable[[bool], Built]:
    def build(full: bool) -> Built:
        channels = 128 if full else 64
        model, _, _ = make(name, blocks=4, channels=channels)
        return model, lambda n: make(name, blocks=0, batch=n, channels=channels, side=32)[1:]

    return build


MODELS: dict[str, Callable[[bool], Built]] = {
    "cifar10": _cifar10,
    "celebahq": _celebahq,
    "sd 1.5": _sd,
    "sdxl": _sdxl,
    "controlnet": _controlnet,
    "motion": _motion,
    "vae decoder": _decoder,
    "temporal decoder": _temporal,
    "hunyuan decoder": _hunyuan,
    "ltx decoder": _ltx,
    **{name: _style(name) for name in STYLES},
}

# What takes minutes: only where it is named, at its public width, one sample at a time.
LARGE: dict[str, Callable[[], Built]] = {"vae 512": lambda: _decoder(full=True)}
