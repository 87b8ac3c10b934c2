"""The norm's ops of torch.ops called with wrong tensors: one error that names the argument, and nothing is written."""

import pytest
import torch
from test_raw_ops import ops  # noqa: F401

SHAPE = (2, 6, 4, 5)
STORAGE = torch.zeros(3, *SHAPE[1:])  # two overlapping batches
SMALL = {"weight": torch.ones(6), "bias": torch.ones(6)} | {
    n: torch.ones(2, 6) for n in ("pre_shift", "scale", "shift")
}
NAMES = ("weight", "bias", "pre_shift", "scale", "shift")


def forward():
    """Right arguments, by name and in the order of the schema."""
    x, statistics = torch.randn(SHAPE), {"mean": torch.zeros(2, 3), "rstd": torch.ones(2, 3)}
    options = {"num_groups": 3, "weight": SMALL["weight"], "bias": SMALL["bias"], "eps": 1e-5}
    options |= {name: SMALL[name] for name in NAMES[2:]} | {"activation": 1}
    last = {"partials": torch.zeros(4096), "residual": None, "skip": None, "sum": None}
    return {"x": x, **options, "y": x.clone(), **statistics, **last}


def backward():
    given = forward()
    options = {name: given[name] for name in ("num_groups", "weight", "bias", "eps", *NAMES[2:], "activation")}
    gradients = {"dx": given["x"].clone(), **{f"d{name}": SMALL[name].clone() for name in NAMES}}
    inputs = {"dy": given["x"].clone(), "x": given["x"], "mean": given["mean"], "rstd": given["rstd"]}
    return {**inputs, **options, **gradients, "partials": given["partials"], "skip": None, "dsum": None, "dskip": None}


CALLS = {"group_norm_silu": forward, "group_norm_silu_backward": backward}
COMMON = [
    ({"x": torch.zeros(2)}, r"x must be \[N, C, ...\]; got a tensor of 1 dimensions"),
    ({"x": torch.zeros(SHAPE).double()}, "x must be float32, bfloat16 or float16; got float64"),
    ({"x": torch.zeros(SHAPE).mT.contiguous().mT}, "x must be contiguous or channels_last"),
    ({"num_groups": 4}, "num_groups must be a divisor of the channels, 6; got 4"),
    ({"num_groups": 0}, "num_groups must be a divisor of the channels, 6; got 0"),
    ({"activation": 5}, r"activation must be in \[0, 5\); got 5"),
    ({"activation": -1}, r"activation must be in \[0, 5\); got -1"),
    ({"weight": torch.ones(5)}, r"weight must be of the shape \[6\]; got float32 \[5\]"),
    ({"bias": torch.ones(12)[::2]}, "bias must be contiguous"),
    ({"pre_shift": torch.ones(6)}, r"pre_shift must be of the shape \[2, 6\]"),
    ({"scale": torch.ones(2, 6).double()}, "scale must be float32, bfloat16 or float16; got float64"),
    ({"shift": torch.ones(2, 6).long()}, "shift must be float32, bfloat16 or float16; got int64"),
    ({"mean": torch.ones(2, 2)}, r"mean must be of the shape \[2, 3\]"),
    ({"rstd": torch.ones(2, 3).half()}, "rstd must be float32; got float16"),
    ({"skip": torch.zeros(2, 3, 4)}, "skip must be of the dimensions of x"),
    ({"partials": torch.zeros(4096).double()}, "partials must be float32; got float64"),
]
WRONG = [(op, *case) for op in CALLS for case in COMMON] + [
    ("group_norm_silu", {"y": torch.zeros(2, 6, 4, 4)}, r"y must be of the shape of x, \[2, 6, 4, 5\]"),
    ("group_norm_silu", {"y": torch.zeros(SHAPE).half()}, "y must be of the dtype of x"),
    ("group_norm_silu", {"y": torch.zeros(1, *SHAPE[1:]).expand(SHAPE)}, "y must be a tensor whose samples do not"),
    ("group_norm_silu", {"x": STORAGE[:2], "y": STORAGE[1:]}, "y must be apart from x; got tensors"),
    ("group_norm_silu", {"sum": torch.zeros(SHAPE)}, "sum must be given where residual is"),
    ("group_norm_silu", {"residual": torch.zeros(SHAPE)}, "sum must be given where residual is"),
    ("group_norm_silu", {"y": torch.zeros(2, 4, 5, 6).permute(0, 3, 1, 2)}, "y must be dense in a sample"),
    ("group_norm_silu_backward", {"dy": torch.zeros(2, 3, 4, 5)}, "dy must be of the shape of x"),
    ("group_norm_silu_backward", {"dx": torch.zeros(SHAPE).half()}, "dx must be of the dtype of x"),
    ("group_norm_silu_backward", {"dy": STORAGE[:2], "dx": STORAGE[1:]}, "dx must be apart from dy"),
    ("group_norm_silu_backward", {"dweight": torch.ones(5)}, r"dweight must be of the shape \[6\]"),
    ("group_norm_silu_backward", {"dskip": torch.zeros(SHAPE)}, "dskip must be given where skip is"),
    ("group_norm_silu_backward", {"dbias": SMALL["bias"]}, "dbias must be apart from bias"),
]


@pytest.mark.parametrize(("op", "wrong", "message"), WRONG)
def test_a_wrong_argument_is_named(ops, op, wrong, message):  # noqa: F811
    given = {**CALLS[op](), **wrong}
    before = [v.clone() for v in given.values() if isinstance(v, torch.Tensor)]
    with pytest.raises(RuntimeError, match=f"^dd_kernels::{op}: {message}"):
        getattr(ops, op)(*given.values())
    assert all(map(torch.equal, (v for v in given.values() if isinstance(v, torch.Tensor)), before))


@pytest.mark.parametrize("op", CALLS)
def test_right_arguments_are_taken(ops, op):  # noqa: F811
    getattr(ops, op)(*CALLS[op]().values())


def test_only_the_cuda_library_reads_two(ops):  # noqa: F811
    given = forward() | {"residual": torch.zeros(SHAPE), "sum": torch.zeros(SHAPE)}
    if ops is torch.ops.dd_kernels:
        with pytest.raises(RuntimeError, match="residual must be left out: the CPU's kernel adds"):
            ops.group_norm_silu(*given.values())
        given = backward() | {"dsum": torch.zeros(SHAPE)}
        with pytest.raises(RuntimeError, match="dsum must be left out: the CPU's kernel adds"):
            ops.group_norm_silu_backward(*given.values())
    else:
        ops.group_norm_silu(*given.values())
        with pytest.raises(RuntimeError, match="weight must be float32"):
            ops.group_norm_silu(*(forward() | {"weight": torch.ones(6).half()}).values())
        with pytest.raises(RuntimeError, match="mean and rstd must be given to the CUDA kernels"):
            ops.group_norm_silu(*(forward() | {"mean": None}).values())
        apart = torch.zeros(2, 12, 4, 5)[:, :6]
        with pytest.raises(RuntimeError, match="y must be dense; got one whose samples lie apart"):
            ops.group_norm_silu(*(forward() | {"y": apart}).values())
