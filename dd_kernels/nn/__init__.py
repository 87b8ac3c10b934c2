"""Models: the U-Net of DDPM and guided-diffusion, and the modules it is built from."""

from .blocks import GroupNormSiLU, timestep_embedding
from .configs import CONFIGS, UNetConfig, fitting_config
from .unet import UNet

__all__ = ["CONFIGS", "GroupNormSiLU", "UNet", "UNetConfig", "fitting_config", "timestep_embedding"]
