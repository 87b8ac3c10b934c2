"""What :func:`dd_kernels.fuse` knows of diffusers' modules; imported only where diffusers is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .fused import FoldedSiLU, FusedGroupNorm, FusedModule


def _conv_and_bias(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The convolution without its bias, and the bias, for the norm to add; whole where it is not plain.

    Not plain: an adapter (LoRA) or a quantised layer in its place, hooks, a forward that was replaced
    (offloading).
    """
    watched = conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or "forward" in vars(conv)
    if type(conv) is not nn.Conv2d or watched:
        return conv(x), None
    return conv._conv_forward(x, conv.weight, None), conv.bias


class FusedResnetBlock2D(FusedModule, ResnetBlock2D):
    """``ResnetBlock2D`` with bias, time embedding, norm, scale-shift and SiLU in one pass, twice."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """input_tensor [N, C, H, W], temb [N, E] or [1, E] or None -> [N, C', H', W']."""
        if args or kwargs or (temb is None) != (self.time_emb_proj is None):
            return super().forward(input_tensor, temb, *args, **kwargs)  # its errors and deprecations
        x, h = input_tensor, self.norm1(input_tensor, activation="silu")
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.dropout(self._second_norm(*_conv_and_bias(self.conv1, h), temb))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        total = shortcut + self.conv2(h)
        return total if self.output_scale_factor == 1 else total / self.output_scale_factor

    def _second_norm(self, h: Tensor, bias: Tensor | None, temb: Tensor | None) -> Tensor:
        """The norm after conv1, told what is to be added before it and what scales and shifts after."""

        def rows(v: Tensor | None) -> Tensor | None:  # [C], [1, C] or [N, C] -> [N, C]
            return None if v is None else v.expand(h.shape[0], -1)

        if self.time_emb_proj is None:
            return self.norm2(h, pre_shift=rows(bias), activation="silu")
        emb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            scale, shift = rows(emb).chunk(2, dim=1)
            return self.norm2(h, pre_shift=rows(bias), scale=scale, shift=shift, activation="silu")
        return self.norm2(h, pre_shift=rows(emb if bias is None else emb + bias), activation="silu")


def _is_fusible(block: nn.Module) -> bool:
    """A ResnetBlock2D of two norms with SiLU, its time embedding where its kind needs one."""
    if type(block) is not ResnetBlock2D or type(block.nonlinearity) is not nn.SiLU:
        return False
    norms = isinstance(block.norm1, FusedGroupNorm) and isinstance(block.norm2, FusedGroupNorm)
    return norms and not (block.time_embedding_norm == "scale_shift" and block.time_emb_proj is None)


def fuse_diffusers(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Fuses diffusers' blocks, whose norms are fused already; the norms and what each computes now."""
    for module in list(model.modules()):
        if _is_fusible(module):
            FusedResnetBlock2D.take(module)
            before = "" if module.time_emb_proj is None else "time embedding, "
            after = "GroupNorm, SiLU"
            if module.time_embedding_norm == "scale_shift":
                before, after = "", "GroupNorm, scale-shift, SiLU"
            yield module.norm1, "GroupNorm, SiLU"
            yield module.norm2, before + after
        elif type(module).__module__.startswith("diffusers."):
            norm, act = (getattr(module, name, None) for name in ("conv_norm_out", "conv_act"))
            if isinstance(norm, FusedGroupNorm) and type(act) is nn.SiLU:
                norm.activation = "silu"
                FoldedSiLU.take(act)
                yield norm, "GroupNorm, SiLU"
