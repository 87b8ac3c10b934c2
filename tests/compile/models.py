"""Small models in the block styles of public codebases, written for these tests: how each calls its norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Float32Norm(nn.GroupNorm):
    """Computes in float32 whatever x is, then casts back; applies SiLU itself where told, as GLIDE's does."""

    def __init__(self, groups: int, channels: int, swish: float = 0.0) -> None:
        super().__init__(groups, channels)
        self.swish = swish

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x if x.dtype == torch.float64 else x.float()).to(x.dtype)
        if self.swish == 1.0:
            return F.silu(y)
        return y * F.sigmoid(y * float(self.swish)) if self.swish else y


class AdmBlock(nn.Module):
    """guided-diffusion's: Sequentials, scale-shift between the second norm and its SiLU, checkpointing in training."""

    def __init__(self, channels: int, embedding: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.in_layers = nn.Sequential(Float32Norm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * channels))
        self.out_layers = nn.Sequential(
            Float32Norm(8, channels), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.body, x, emb, use_reentrant=False)
        return self.body(x, emb)

    def body(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb).type(h.dtype)[..., None, None].chunk(2, dim=1)
        norm, rest = self.out_layers[0], self.out_layers[1:]
        return x + rest(norm(h) * (1 + scale) + shift)


class SwishBlock(nn.Module):
    """latent-diffusion's: x * sigmoid(x) written out, the embedding added before the norm."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(8, channels, eps=1e-6) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.temb_proj = nn.Linear(embedding, channels)
        self.dropout = nn.Dropout(0.1)

    @staticmethod
    def nonlinearity(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = h + self.temb_proj(self.nonlinearity(emb))[:, :, None, None]
        return x + self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))


class DdimBlock(SwishBlock):
    """DDIM's repository: as latent-diffusion's, between a strided convolution of padded maps and an interpolation."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__(channels, embedding)
        self.down = nn.Conv2d(channels, channels, 3, stride=2)
        self.shortcut = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = super().forward(self.down(F.pad(x, (0, 1, 0, 1))), emb)
        return self.shortcut(x) + F.interpolate(h, scale_factor=2.0, mode="nearest")


class GlideBlock(nn.Module):
    """GLIDE's: the norm applies SiLU itself, or not where scale-shift follows."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.first, self.second = Float32Norm(8, channels, swish=1.0), Float32Norm(8, channels, swish=0.0)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.emb = nn.Linear(embedding, 2 * channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.first(x))
        scale, shift = torch.chunk(self.emb(emb)[:, :, None, None], 2, dim=1)
        return x + self.conv2(F.silu(self.second(h) * (1 + scale) + shift))


class ScoreBlock(nn.Module):
    """score_sde's: one activation module used again and again, the embedding added in place, the sum scaled."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.norm0, self.norm1 = (nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6) for _ in range(2))
        self.conv0, self.conv1 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.dense = nn.Linear(embedding, channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self.act(self.norm0(x)))
        h += self.dense(self.act(emb))[:, :, None, None]
        h = self.conv1(self.act(self.norm1(h)))
        return (x + h) / 2.0**0.5


class PolicyBlock(nn.Module):
    """diffusion policy's: Conv1d, GroupNorm, Mish in a Sequential; FiLM after it."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(channels, channels, 5, padding=2), nn.GroupNorm(8, channels), nn.Mish())
            for _ in range(2)
        )
        self.cond = nn.Sequential(nn.Mish(), nn.Linear(embedding, 2 * channels), nn.Unflatten(-1, (-1, 1)))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.blocks[0](x)
        film = self.cond(emb).reshape(x.shape[0], 2, -1, 1)
        return x + self.blocks[1](film[:, 0] * h + film[:, 1])


class VideoBlock(nn.Module):
    """A 5-D block of video autoencoders: GroupNorm, SiLU, Conv3d, GELU in the second half."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(8, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, 3, padding=1) for _ in range(2))
        self.temb = nn.Linear(embedding, channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb(emb)[:, :, None, None, None]
        return x + self.conv2(F.gelu(self.norm2(h)))


class RmsBlock(nn.Module):
    """lucidrains': RMSNorm over channels, scale-shift, SiLU; no GroupNorm anywhere."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.proj, self.g = nn.Conv2d(channels, channels, 3, padding=1), nn.Parameter(torch.ones(1, channels, 1, 1))
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * channels))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.mlp(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.normalize(self.proj(x), dim=1) * self.g * x.shape[1] ** 0.5
        return x + F.silu(h * (scale + 1) + shift)


class Stack(nn.Module):
    """Blocks one after another, with one embedding."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, emb)
        return x


CHANNELS, EMBEDDING, SIDE = 32, 16, 12
# name: the block, the dimensions of its map, and how often each thing is fused with a norm of one block
STYLES: dict[str, tuple[type[nn.Module], int, dict[tuple[str, ...], int]]] = {
    "guided-diffusion": (AdmBlock, 2, {("silu",): 1, ("scale-shift", "silu"): 1}),
    "latent-diffusion": (SwishBlock, 2, {("silu",): 1, ("silu", "embedding"): 1}),
    "ddim": (DdimBlock, 2, {("silu",): 1, ("silu", "embedding"): 1}),
    "glide": (GlideBlock, 2, {("silu",): 1, ("scale-shift", "silu"): 1}),
    "score_sde": (ScoreBlock, 2, {("silu",): 1, ("silu", "embedding"): 1}),
    "diffusion policy": (PolicyBlock, 1, {("mish",): 2}),
    "video": (VideoBlock, 3, {("silu",): 1, ("gelu", "embedding"): 1}),
    "lucidrains": (RmsBlock, 2, {}),
}


def to_bfloat16(model: nn.Module) -> nn.Module:
    """Converts everything but the norms' parameters, as guided-diffusion's ``convert_to_fp16`` does."""
    for module in model.bfloat16().modules():
        if isinstance(module, nn.GroupNorm):
            module.float()
    return model


def make(
    style: str, blocks: int = 2, batch: int = 2, channels: int = CHANNELS, side: int = SIDE, **options: object
) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a model of a style in evaluation, and its inputs; a video has half the side."""
    block, dimensions, _ = STYLES[style]
    model = Stack(*(block(channels, EMBEDDING, **options) for _ in range(blocks))).eval()
    x = torch.randn(batch, channels, *[side if dimensions < 3 else side // 2] * dimensions)
    return model, x, torch.randn(batch, EMBEDDING)
