"""The former place of :mod:`dd_kernels.integrations.diffusers.unet`, kept for code that imports it."""

from .diffusers.unet import from_diffusers, to_diffusers

__all__ = ["from_diffusers", "to_diffusers"]
