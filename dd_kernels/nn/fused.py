"""The classes that :func:`dd_kernels.fuse` gives to the modules of a model."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import group_norm_silu


class FusedModule:
    """A module whose class was changed by :func:`fuse`."""

    _unfused_class: type[nn.Module]

    @classmethod
    def take(cls, module: nn.Module) -> None:
        """Makes ``module`` one of this class."""
        module._unfused_class = type(module)
        module.__class__ = cls

    def give_back(self) -> None:
        """Makes it again what it was."""
        self.__class__ = self.__dict__.pop("_unfused_class")


class FusedGroupNorm(FusedModule, nn.GroupNorm):
    """``nn.GroupNorm`` through :func:`dd_kernels.group_norm_silu`; returns x's dtype, under autocast too."""

    activation = "none"

    def give_back(self) -> None:
        self.__dict__.pop("activation", None)
        super().give_back()

    def forward(
        self,
        x: Tensor,
        *,
        pre_shift: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """act(GroupNorm(x + pre_shift) (1 + scale) + shift); x [N, C, ...], the others [N, C]."""
        # Tokens [N, C, L] that lie as [N, L, C] are an image of one row in channels_last: no copy.
        tokens = x.ndim == 3 and not x.is_contiguous()
        y = group_norm_silu(
            x.unsqueeze(2) if tokens else x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            pre_shift=pre_shift,
            scale=scale,
            shift=shift,
            activation=activation or self.activation,
        )
        return y.squeeze(2) if tokens else y


class FoldedSiLU(FusedModule, nn.SiLU):
    """Where the norm before it has applied the SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedSequential(FusedModule, nn.Sequential):
    """``nn.Sequential`` in which a norm applies the SiLU that follows it.

    The norm alone and a slice without it stay what they were: guided-diffusion's scale-shift calls
    ``out_layers[0]`` and ``out_layers[1:]`` apart.
    """

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        i = 0
        while i < len(layers):
            if isinstance(layers[i], FusedGroupNorm) and is_silu(layers[i + 1 : i + 2]):
                x = layers[i](x, activation="silu")
                i += 2
            else:
                x = layers[i](x)
                i += 1
        return x


def is_silu(layers: list[nn.Module]) -> bool:
    """Whether the first of ``layers`` is a SiLU: PyTorch's, or improved-diffusion's class of that name."""
    # Not bool(layers): torch 2.11 does not trace it.
    return len(layers) > 0 and type(layers[0]).__name__ == "SiLU"
