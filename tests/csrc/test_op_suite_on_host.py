"""The op suite of tests/ops, run on the CUDA kernels: every test there that takes a kernel."""

import importlib
import inspect

import pytest
import test_group_norm_silu_of_two
import torch

import dd_kernels as dd

pytestmark = pytest.mark.slow  # Building the kernels for the host takes half a minute.

NORMS = ("test_group_norm_silu", "test_group_norm_silu_as_op", "test_group_norm_silu_of_two")
STEPS = ("test_reverse_step", "test_reverse_step_as_op", "test_reverse_step_history")
SUITE = ("test_randn", "test_q_sample", "test_range", *STEPS, *NORMS)
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
    """Checks the ops with a residual and a skip, which only the CUDA library takes."""
    op = test_group_norm_silu_of_two.OPERATORS[which]
    arguments = test_group_norm_silu_of_two.operators("cpu")[which]
    torch.library.opcheck(getattr(torch.ops.dd_kernels_host, op).default, arguments)


def test_a_kernel_that_cannot_start_is_named(host):
    """An op raises if any of its kernels cannot start, and the error names the op."""
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    norm = dd.group_norm_silu(x, 2, backend="cuda")
    schedule = dd.linear_schedule(10)
    calls = {
        "randn": lambda: dd.randn((2, 3), seed=0, backend="cuda"),
        "q_sample": lambda: dd.q_sample(x.detach(), 3, schedule, seed=0, backend="cuda"),
        "reverse_step": lambda: dd.reverse_step(x.detach(), x.detach(), dd.ddim(schedule, steps=5), 2, backend="cuda"),
        "group_norm_silu": lambda: dd.group_norm_silu(x, 2, backend="cuda"),
        "group_norm_silu_backward": lambda: norm.sum().backward(),
    }
    host.set_refuses(True)
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"the CUDA kernel of {name} cannot be launched: invalid argument"):
            call()


def test_no_grid_is_cut_short(host):
    """A grid that CUDA's 32-bit sizes cannot hold is refused."""
    assert host.launches(1)
    assert not any(host.launches(blocks) for blocks in (1 << 31, (1 << 32) + 1))
