"""The ops: one folder each, holding its public function, its reference and its Triton kernel."""

from .attention import attention
from .conv2d import conv2d
from .group_norm_silu import group_norm_silu
from .q_sample import q_sample
from .randn import randn
from .reverse_step import reverse_step

__all__ = ["attention", "conv2d", "group_norm_silu", "q_sample", "randn", "reverse_step"]
