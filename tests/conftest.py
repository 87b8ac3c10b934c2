"""Set before anything imports Triton or torch."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels then run on CPU tensors
