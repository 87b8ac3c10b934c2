"""The sampling functions of DDIM's own repository (ermongroup/ddim) over the ops.

``from functions.denoising import generalized_steps`` becomes
``from dd_kernels.integrations.ddim.denoising import generalized_steps``.
"""

from .denoising import compute_alpha, ddpm_steps, generalized_steps

__all__ = ["compute_alpha", "ddpm_steps", "generalized_steps"]
