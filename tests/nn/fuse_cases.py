"""Models that have a GroupNorm and a SiLU in every way that fuse knows, and how they are run."""

import torch
import torch.nn.functional as F
from model_checks import randomise
from torch import nn

GROUPS = {"norm_num_groups": 4, "layers_per_block": 1}


def unet2d(**options):
    from diffusers import UNet2DModel

    defaults = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "dropout": 0.2,
    }
    return UNet2DModel(**GROUPS, **{**defaults, **options}), (torch.randn(2, 3, 8, 8), torch.tensor([3, 700]))


def unet2d_scale_shift():
    model, arguments = unet2d(
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        mid_block_scale_factor=2,
        attn_norm_num_groups=4,
        num_class_embeds=3,
    )
    return model, (*arguments, torch.tensor([0, 2]))


def unet2d_condition():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        **GROUPS,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        resnet_skip_time_act=True,
    )
    return model, (torch.randn(2, 4, 8, 8), 5, torch.randn(2, 3, 8))


def autoencoder():
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        **GROUPS,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return model, (torch.randn(2, 3, 8, 8),)


class GroupNorm32(nn.GroupNorm):
    """As in guided-diffusion, but float64 stays: there is an exact answer."""

    def forward(self, x):
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32))).type(x.dtype)


class SiLU(nn.Module):
    """As in improved-diffusion."""

    def forward(self, x):
        return x * torch.sigmoid(x)


class Guided(nn.Module):
    """The calls of guided-diffusion's ResBlock with scale-shift: slices and single layers of a Sequential."""

    def __init__(self, norm=nn.GroupNorm, silu=nn.SiLU):
        super().__init__()
        self.in_layers = nn.Sequential(norm(2, 8), silu(), nn.Conv2d(8, 8, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4, 16))
        self.out_layers = nn.Sequential(norm(4, 8), silu(), nn.Dropout(0.2), nn.Conv2d(8, 8, 1))
        self.last = nn.Sequential(norm(1, 8, affine=False), nn.ReLU(), norm(2, 8))

    def forward(self, x, emb):
        h = self.in_layers[-1](F.avg_pool2d(self.in_layers[:-1](x), 2)) + F.avg_pool2d(self.in_layers(x), 2)
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.last(h + self.out_layers(h))


def guided(norm=nn.GroupNorm, silu=nn.SiLU):
    return Guided(norm, silu), (torch.randn(2, 8, 6, 6), torch.randn(2, 4))


def improved():
    return guided(GroupNorm32, SiLU)


MODELS = [unet2d, unet2d_scale_shift, unet2d_condition, autoencoder, guided, improved]


def build(make):
    model, arguments = make()
    return randomise(model).eval(), arguments


def output(model, arguments):
    out = model(*arguments)
    return out if isinstance(out, torch.Tensor) else out.sample


def run(model, arguments):
    """Output and every gradient, each dropout drawn from the same seed."""
    model.zero_grad()
    x = arguments[0].clone().requires_grad_()
    torch.manual_seed(1)
    out = output(model, (x, *arguments[1:]))
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "x": x.grad, **gradients}


def to_double(arguments):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)
