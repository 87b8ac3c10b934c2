"""torch.ops.dd_kernels.* called with wrong tensors: one error that names the argument, and nothing is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dd_kernels import backend as backends

SHAPE = (2, 3, 4, 5)
KEY = torch.tensor([1, 0, 0])
STORAGE = torch.zeros(3, *SHAPE[1:])  # two overlapping batches


def arguments(op: str) -> dict[str, Any]:
    """Right arguments of ``op``, by name and in the order of its schema."""
    x, table = torch.zeros(SHAPE), torch.ones(7, 12)
    if op == "randn":
        return {"z": x, "key": KEY, "stream": 0}
    index = torch.tensor([6, 0])
    if op == "q_sample":
        rows = {"rows": table[:, :2].contiguous(), "t": index}
        return {"x_start": x, "noise": None, **rows, "key": KEY, "x_t": x.clone(), "noise_out": x.clone()}
    inputs = {"x": x, "out": x.clone(), "variance": x.clone(), "uncond": x.clone(), "guidance_scale": 1.0}
    given = {"noise": x.clone(), "threshold": torch.ones(2), "rows": table, "timesteps": torch.arange(7)}
    outputs = {"x_prev": x.clone(), "x0": x.clone(), "even": x.clone(), "odd": x.clone()}
    return {**inputs, **given, "step": index, "key": None, **outputs}


WRONG = [
    ("randn", {"z": torch.zeros(())}, r"z must be \[N, ...\]; got float32 \[\]"),
    ("randn", {"z": torch.zeros(SHAPE, dtype=torch.float64)}, "z must be float32, bfloat16 or float16; got float64"),
    ("randn", {"z": torch.zeros(SHAPE).transpose(1, 2)}, "z must be contiguous or channels_last; got float32"),
    ("randn", {"z": torch.zeros(1, 3).expand(2, 3)}, "z must be contiguous or channels_last"),
    ("randn", {"key": KEY[:2]}, r"key must be of the shape \[3\]; got int64 \[2\]"),
    ("randn", {"key": KEY.int()}, "key must be int64; got int32"),
    ("randn", {"key": torch.zeros(6, dtype=torch.int64)[::2]}, r"key must be contiguous; got int64 \[3\] with strides"),
    ("randn", {"stream": -1}, r"stream must be in \[0, 2\^32\); got -1"),
    ("randn", {"stream": 1 << 32}, r"stream must be in \[0, 2\^32\)"),
    ("q_sample", {"key": None}, "key must be given where noise is not; got neither"),
    ("q_sample", {"noise": torch.zeros(2, 3, 4, 4)}, r"noise must be of the shape of x_start, \[2, 3, 4, 5\]; got"),
    ("q_sample", {"noise": torch.zeros(SHAPE, dtype=torch.int32)}, "noise must be float32, bfloat16 or float16"),
    ("q_sample", {"noise": torch.zeros(2, 4, 5, 3).permute(0, 3, 1, 2)}, "noise must be dense in a sample"),
    ("q_sample", {"rows": torch.ones(7, 3)}, r"rows must be of the shape \[7, 2\]; got float32 \[7, 3\]"),
    ("q_sample", {"rows": torch.tensor(1.0)}, r"rows must be of the shape \[0, 2\]; got float32 \[\]"),
    ("q_sample", {"rows": torch.ones(2, 7).t()}, "rows must be contiguous"),
    ("q_sample", {"rows": torch.ones(7, 2).double()}, "rows must be float32; got float64"),
    ("q_sample", {"t": torch.tensor([1, 2, 3])}, r"t must be of the shape \[2\]; got int64 \[3\]"),
    ("q_sample", {"t": torch.tensor(1)}, r"t must be of the shape \[2\]; got int64 \[\]"),
    ("q_sample", {"t": torch.tensor([1.0, 2.0])}, "t must be int64; got float32"),
    ("q_sample", {"x_t": torch.zeros(SHAPE, dtype=torch.bool)}, "x_t must be float32, bfloat16 or float16; got Bool"),
    (
        "q_sample",
        {"x_t": torch.zeros(1, *SHAPE[1:]).expand(SHAPE)},
        "x_t must be a tensor whose samples do not overlap",
    ),
    (
        "q_sample",
        {"x_start": STORAGE[:2], "x_t": STORAGE[1:]},
        "x_t must be apart from x_start; got tensors",
    ),
    ("reverse_step", {"out": torch.zeros(2, 6, 4, 5)}, "out must be of the shape of x"),
    ("reverse_step", {"variance": torch.zeros(3, 3, 4, 5)}, "variance must be of the shape of x"),
    ("reverse_step", {"uncond": torch.zeros(2, 3, 20)}, "uncond must be of the shape of x"),
    ("reverse_step", {"threshold": torch.ones(1)}, r"threshold must be of the shape \[2\]; got float32 \[1\]"),
    ("reverse_step", {"rows": torch.ones(7, 9)}, r"rows must be of the shape \[7, 12\]"),
    ("reverse_step", {"timesteps": torch.arange(6)}, r"timesteps must be of the shape \[7\]; got int64 \[6\]"),
    ("reverse_step", {"step": torch.tensor([0, 1], dtype=torch.int32)}, "step must be int64; got int32"),
    ("reverse_step", {"x_prev": STORAGE[:2], "noise": STORAGE[1:]}, "x_prev must be apart from noise"),
    ("reverse_step", {"x_prev": STORAGE[:2], "x0": STORAGE[1:]}, "x0 must be apart from x_prev"),
    ("reverse_step", {"x_prev": STORAGE[:2], "x0": STORAGE[:2]}, "x0 must be apart from x_prev"),
    ("reverse_step", {"even": torch.zeros(2, 3, 5, 4)}, "even must be of the shape of x"),
    ("reverse_step", {"odd": torch.zeros(SHAPE, dtype=torch.int64)}, "odd must be float32, bfloat16 or float16"),
    ("reverse_step", {"odd": torch.zeros(1, *SHAPE[1:]).expand(SHAPE)}, "odd must be a tensor whose samples do not"),
    ("reverse_step", {"x": STORAGE[:2], "even": STORAGE[:2]}, "even must be apart from x"),
    ("reverse_step", {"even": STORAGE[:2], "odd": STORAGE[1:]}, "odd must be apart from even"),
    ("reverse_step", {"even": None}, "even must be given with odd; got none"),
    ("reverse_step", {"threshold": STORAGE[0, 0, 0, :2], "x0": STORAGE[:2]}, "x0 must be apart from threshold"),
]


@pytest.fixture(params=["cpu", "cuda on the host"])
def ops(request: pytest.FixtureRequest) -> Any:
    """The operators of a library, as torch knows them."""
    if request.param == "cpu":
        if backends.unavailable("cpu") is not None:
            pytest.skip("the CPU library was not built")
        return torch.ops.dd_kernels
    request.getfixturevalue("library")
    return torch.ops.dd_kernels_host


def written(given: dict[str, Any]) -> list[Tensor]:
    return [given[name].clone() for name in ("z", "x_t", "noise_out", "x_prev", "x0") if name in given]


@pytest.mark.parametrize(("op", "wrong", "message"), WRONG)
def test_a_wrong_argument_is_named(ops, op, wrong, message):
    given = {**arguments(op), **wrong}
    before = written(given)
    with pytest.raises(RuntimeError, match=f"^dd_kernels::{op}: {message}"):
        getattr(ops, op)(*given.values())
    assert all(map(torch.equal, written(given), before))


@pytest.mark.parametrize("op", ["randn", "q_sample", "reverse_step"])
def test_right_arguments_are_taken(ops, op):
    getattr(ops, op)(*arguments(op).values())


@pytest.mark.parametrize(("op", "name"), [("q_sample", "t"), ("reverse_step", "step")])
@pytest.mark.parametrize("value", [-1, 7])
def test_an_index_beyond_the_table(op, name, value):
    """The CPU's ops read it; a GPU's are not read here and give NaN, see test_elementwise_on_host.py."""
    given = {**arguments(op), name: torch.tensor([0, value])}
    with pytest.raises(RuntimeError, match=rf"{name} must be in \[0, 7\); got {value}"):
        getattr(torch.ops.dd_kernels, op)(*given.values())


@pytest.mark.parametrize(("op", "source", "target"), [("q_sample", "x_start", "x_t"), ("reverse_step", "x", "x_prev")])
def test_in_place(ops, op, source, target):
    """The one overlap that is allowed gives the bits of a call without it."""
    given = arguments(op)
    given[source].normal_()
    getattr(ops, op)(*given.values())
    expected = given[target].clone()
    given = {**arguments(op), source: given[source], target: given[source]}
    getattr(ops, op)(*given.values())
    assert given[source].equal(expected)


def test_samples_that_share_memory_with_none_of_an_output(ops):
    """Halves of one tensor: their ranges in memory interlock, their samples do not overlap."""
    halves = torch.zeros(2, 6, 4, 5)
    given = {**arguments("reverse_step"), "out": halves[:, :3], "variance": halves[:, 3:]}
    ops.reverse_step(*{**given, "x_prev": halves[:, 3:], "variance": None}.values())
    with pytest.raises(RuntimeError, match="x_prev must be apart from variance"):
        ops.reverse_step(*{**given, "x_prev": halves[:, 3:]}.values())


def test_an_empty_batch_is_taken(ops):
    given = {
        name: v[:0] if isinstance(v, Tensor) and v.shape == SHAPE else v for name, v in arguments("q_sample").items()
    }
    ops.q_sample(*{**given, "t": torch.tensor([3])}.values())


def test_tensors_between_two_elements(ops):
    memory = torch.zeros(4 * 120 + 1, dtype=torch.uint8).numpy()[1:].view("float32")
    with pytest.raises(RuntimeError, match="x0 must be aligned to its elements"):
        ops.reverse_step(*{**arguments("reverse_step"), "x0": torch.from_numpy(memory).view(SHAPE)}.values())
