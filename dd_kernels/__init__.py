"""Fast exact kernels for denoising diffusion, and everything around them."""

from .backend import BackendUnavailableError, use_backend
from .ops import group_norm_silu, q_sample, randn, reverse_step

__all__ = ["BackendUnavailableError", "group_norm_silu", "q_sample", "randn", "reverse_step", "use_backend"]
