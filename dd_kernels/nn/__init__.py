"""Models: the U-Net of DDPM and guided-diffusion, latent diffusion's autoencoder, a classifier; and their modules."""

from .autoencoder import AutoencoderKL, kl_to_normal
from .blocks import GroupNormSiLU, timestep_embedding
from .classifier import NoisyClassifier
from .configs import CONFIGS, UNetConfig, fitting_config
from .unet import UNet

__all__ = [
    "CONFIGS",
    "AutoencoderKL",
    "GroupNormSiLU",
    "NoisyClassifier",
    "UNet",
    "UNetConfig",
    "fitting_config",
    "kl_to_normal",
    "timestep_embedding",
]
