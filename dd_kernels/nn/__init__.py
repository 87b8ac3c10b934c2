"""Models: the U-Net of DDPM and guided-diffusion, the autoencoder of latent diffusion, and the modules of both."""

from .autoencoder import AutoencoderKL, kl_to_normal
from .blocks import GroupNormSiLU, timestep_embedding
from .configs import CONFIGS, UNetConfig, fitting_config
from .unet import UNet

__all__ = [
    "CONFIGS",
    "AutoencoderKL",
    "GroupNormSiLU",
    "UNet",
    "UNetConfig",
    "fitting_config",
    "kl_to_normal",
    "timestep_embedding",
]
