"""latent-diffusion's and stable-diffusion's ``DDIMSampler`` over the ops."""

from .ddim import DDIMSampler

__all__ = ["DDIMSampler"]
