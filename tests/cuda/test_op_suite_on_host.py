"""The op suite of tests/ops, run on the CUDA kernels: every test there that takes a kernel."""

import importlib
import inspect

import pytest
import test_group_norm_silu_of_two
import torch

NORMS = ("test_group_norm_silu", "test_group_norm_silu_as_op", "test_group_norm_silu_of_two")
SUITE = ("test_randn", "test_q_sample", "test_reverse_step", *NORMS)
# These are about torch's tracing, which sees the host library's ops under another name.
NOT_OF_KERNELS = ("opcheck", "compiles")


def _collect():
    for name in SUITE:
        for test, function in vars(importlib.import_module(name)).items():
            if test.startswith("test_") and "kernel" in inspect.signature(function).parameters:
                yield f"{name}_{test.removeprefix('test_')}", function


globals().update({name: f for name, f in _collect() if not any(word in name for word in NOT_OF_KERNELS)})


@pytest.mark.parametrize("which", [0, 1])
def test_opcheck_of_two(host, which):
    """Of the operators that only the CUDA library has, under their name on the host."""
    op, arguments = list(test_group_norm_silu_of_two.operators("cpu"))[which]
    torch.library.opcheck(getattr(torch.ops.dd_kernels_host, op).default, arguments)
