"""guided-diffusion's module ``nn``, as far as code around the diffusion imports it; the networks are theirs."""

from ...losses import mean_flat

__all__ = ["mean_flat"]
