"""The op suite of tests/ops, run on the CUDA kernels: every test there that takes a kernel."""

import importlib
import inspect

SUITE = ("test_randn", "test_q_sample", "test_reverse_step", "test_group_norm_silu")
# These are about torch's tracing, which sees the host library's ops under another name.
NOT_OF_KERNELS = ("opcheck", "compiles")


def _collect():
    for name in SUITE:
        for test, function in vars(importlib.import_module(name)).items():
            if test.startswith("test_") and "kernel" in inspect.signature(function).parameters:
                yield f"{name}_{test.removeprefix('test_')}", function


globals().update({name: f for name, f in _collect() if not any(word in name for word in NOT_OF_KERNELS)})
