"""Triton's kernels beyond the op suite: what they compile to, how often, and the branches of large inputs."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import test_group_norm_silu as suite
import torch
from group_norm_cases import ROWS, call, check, make, op, results
from hypothesis import given
from hypothesis import strategies as st

import dd_kernels as dd
from dd_kernels import backend as backends

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from dd_kernels.ops import triton_common  # noqa: E402
from dd_kernels.ops.activation import Activation  # noqa: E402
from dd_kernels.ops.group_norm_silu import triton_activations, triton_tiles  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
WRITES_TILES = ("_whole_groups", "_apply", "_whole_groups_backward", "_apply_backward", "_randn", "_q_sample")
READS_TILES = (*WRITES_TILES[:4], "_partial_moments", "_partial_sums", "_q_sample", "_reverse_step")


interpreted = pytest.mark.skipif(not backends.interpreting_triton(), reason="the op suite runs these on a GPU")


def compiling(*arguments):
    """What a Python process in which Triton compiles, and does not interpret, prints as JSON."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@functools.cache
def checks():
    return compiling(
        *("tests/ops/triton_checks.py", "recompiles", "alignments", "activations", "clips", "graph", "huge", "table"),
        "training_graphs",
    )


def spills_in(row):
    """Stores to local memory of a row: Triton 3.9 spills two registers of a float32 tile in channels_last."""
    tile = row["kernel"], row["dtype"], row["layout"]
    return {0, 2} if triton.__version__.startswith("3.9.") and tile == ("_whole_groups", "float32", "NHWC") else {0}


def assert_compiled_well(rows):
    """No local memory, and tiles moved by the widest access that their layout allows."""
    for row in rows:
        name = f"{row['kernel']} {row['shape']} {row['dtype']} {row['layout']} sm_{row['arch']}"
        assert row["spills"] in spills_in(row), name
        assert row["stack"] == 4 * row["spills"], name
        assert row["registers"] <= 65536 // (32 * row["warps"]), name
        if row["kernel"] in READS_TILES:
            assert max(row["loads"].values()) > 0, name
            assert max(map(int, row["loads"])) >= row["allowed_bits"], name
            assert min(map(int, row["loads"])) >= min(32, row["allowed_bits"]), name
        if row["kernel"] in WRITES_TILES:
            assert max(map(int, row["stores"])) >= row["allowed_bits"], name
            assert min(map(int, row["stores"])) >= min(32, row["allowed_bits"]), name


@pytest.mark.slow
def test_compiled_kernels_do_not_spill_and_move_whole_vectors():
    rows = compiling("-m", "tools.triton_aot", "--quick", "--arch", "90", "--dtypes", "bfloat16", "--json")
    assert {row["kernel"] for row in rows} >= {*WRITES_TILES, *READS_TILES}
    assert {row["allowed_bits"] for row in rows if row["layout"] == "NCHW"} == {128}
    assert_compiled_well(rows)


@pytest.mark.slow
def test_every_kernel_for_every_architecture():
    rows = compiling("-m", "tools.triton_aot", "--json")
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert_compiled_well(rows)


@pytest.mark.slow
def test_every_kernel_compiles_for_amd():
    kernels = {*WRITES_TILES, *READS_TILES, "_combine_moments", "_combine_sums", "_parameter_gradients"}
    assert compiling("tests/ops/triton_checks.py", "amd")["amd"] == dict.fromkeys(kernels, 0)


@pytest.mark.slow
def test_the_table_lists_the_kernels_that_are_compiled():
    lines = (ROOT / "benchmarks" / "results" / "triton_aot.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    known = checks()["table"]
    assert [line[: len(known[0])] for line in cells[1:]] == known, "run python -m tools.triton_aot"
    columns = dict(zip(cells[0], zip(*cells[1:], strict=True), strict=True))
    assert set(columns["stack"]) == set(columns["spills"]) == {"0"}
    assert set(columns["sm"]) == {"80 90 100"}


@pytest.mark.slow
def test_processes_share_a_cache(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "tests/ops/triton_checks.py", "cubins"]
    started = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    first, second = (process.communicate()[0] for process in started)
    assert [process.returncode for process in started] == [0, 0]
    assert json.loads(first) == json.loads(second)


@pytest.mark.slow
def test_values_and_batch_sizes_do_not_recompile():
    """Each call compiles one kernel; the split pass has three forward and four backward, the whole one two backward."""
    assert checks()["recompiles"] == {
        "reverse_step": 1,
        "q_sample": 1,
        "randn": 1,
        "group_norm_silu": 1,
        "group_norm_silu split": 3,
        "group_norm_silu sides": 3,
        "group_norm_silu_backward": 2,
        "group_norm_silu_backward split": 4,
    }


@pytest.mark.slow
def test_the_alignment_of_small_tensors_does_not_recompile():
    assert checks()["alignments"] == 1


@pytest.mark.slow
def test_every_activation_compiles_without_local_memory():
    """Forward and backward, in one program and split: three kernels and five, less one that both share."""
    compiled = checks()["activations"]
    assert set(compiled) == {activation.name.lower() for activation in Activation}
    for name, kernels_ in compiled.items():
        assert set(kernels_) == {*READS_TILES[:6], "_combine_moments", "_combine_sums", "_parameter_gradients"}, name
        assert set(kernels_.values()) == {0}, name


@pytest.mark.slow
def test_more_than_2_to_the_31_elements_per_sample_compile():
    assert checks()["huge"] == ["_randn", "_randn", "_partial_moments", "_combine_moments", "_apply"]


@pytest.mark.slow
def test_a_clip_lets_nan_through():
    """The compiled clip returns NaN for a NaN (PTX's ".NaN"), as does the interpreter's.

    It is a max and a min, or, as x0's limits are -c and c, one min of |x0| and c that keeps the sign (".xorsign.abs").
    """
    instructions = [name.split(".") for name in checks()["clips"]]
    assert all("NaN" in modifiers for _, *modifiers in instructions), instructions
    operations = {operation for operation, *_ in instructions}
    assert operations == {"min", "max"} or any({"xorsign", "abs"} <= set(name) for name in instructions), instructions


@interpreted
@pytest.mark.parametrize("name", ["weight", "bias", "pre_shift", "scale", "shift"])
def test_options_of_any_strides(name):
    """An option in float32 that is not contiguous gives the same bits as its contiguous copy, gradients included."""
    x, dy, options, activation = make((2, 6, 3, 5), torch.float32, ROWS[0])
    strided = options[name].repeat_interleave(2, -1)[..., ::2]
    assert not strided.is_contiguous()
    wanted = results(x, dy, 3, options, activation, "triton")
    actual = results(x, dy, 3, {**options, name: strided}, activation, "triton")
    assert all(torch.equal(actual[key], wanted[key]) for key in wanted)


@pytest.mark.slow
def test_one_graph_on_cuda_tensors():
    """Dynamo traces every op into one graph with its Triton kernel in it."""
    assert checks()["graph"].count("triton_kernel_wrapper_mutation") == 4


@pytest.mark.slow
def test_one_graph_forward_and_one_backward_in_training():
    """A residual block has two norms: one kernel each forward, and one more for the parameters backward."""
    assert checks()["training_graphs"] == {"forward": 2, "backward": 4}


@st.composite
def images(draw):
    groups, group = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    sides = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x = torch.empty(draw(st.integers(1, 4)), groups * group, *sides, dtype=dtype, device="meta")
    last = draw(st.booleans())
    return (x.contiguous(memory_format=torch.channels_last) if last else x), groups


@given(images(), st.sampled_from(["forward", "backward"]))
def test_plans_cover_the_image(image, kind):
    x, groups = image
    sizes, cut = triton_tiles.SIZES[kind], triton_tiles.plan(x, groups, kind)
    _, channels, pixels = triton_tiles.dimensions(x)
    assert cut == triton_tiles.plan(x[:1], groups, kind), "the batch size changes the cut, and so the bits"
    assert cut.block_c & (cut.block_c - 1) == cut.block_p & (cut.block_p - 1) == 0
    assert cut.block_channels <= cut.block_c
    if cut.one_program:
        assert cut.block_channels % (channels // groups) == 0
        assert cut.block_p >= pixels
        assert cut.block_channels * cut.block_p <= sizes.one_program
    else:
        assert cut.splits <= sizes.splits
        covered = cut.splits * cut.tiles * cut.block_p
        assert pixels <= covered < pixels + cut.tiles * cut.block_p
        assert cut.block_c * cut.block_p <= sizes.split_tile


@pytest.mark.parametrize(("channels", "groups", "held"), [(64, 64, 32), (48, 8, 12)])
def test_tiles_in_channels_last_grow_until_their_rows_are_aligned(channels, groups, held):
    """The rows of one group, of 1 and of 6 float32, are no whole 16 bytes; those of 32 and of 12 are."""
    x = torch.randn(2, channels, 4, 4).contiguous(memory_format=torch.channels_last)
    assert triton_tiles.plan(x, groups, "forward").block_channels == held


SPLIT_CASES = {
    "every pixel block partial": ((2, 6, 5, 7), 3),
    "one split, several groups": ((1, 8, 3, 3), 4),
    "many tiles per split": ((2, 2, 16, 17), 1),
    "more channels than a block": ((1, 40, 2, 3), 4),
}


def split_everything(monkeypatch):
    small = triton_tiles.Sizes(1, 1, 1, 64, 3, 16, 64)
    monkeypatch.setattr(triton_tiles, "SIZES", {"forward": small, "backward": small})


@interpreted
@pytest.mark.parametrize("channels_last", [0, 1])
def test_split_groups_of_shifted_means(kernel, channels_last, monkeypatch):
    if kernel.name != "triton":
        pytest.skip("of Triton's kernels")
    split_everything(monkeypatch)
    suite.test_pre_shift_that_takes_large_means_away(kernel, channels_last, apart=1000)


@interpreted
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("case", SPLIT_CASES)
def test_split_groups(kernel, case, memory_format, monkeypatch):
    """Runs the kernels of large groups at small sizes: forward and every gradient."""
    if kernel.name != "triton":
        pytest.skip("of Triton's kernels")
    split_everything(monkeypatch)
    shape, groups = SPLIT_CASES[case]
    x, dy, options, activation = make(shape, torch.float32, ROWS[0], mean=3.0)
    x, dy = (v.contiguous(memory_format=memory_format) for v in (x, dy))
    assert not triton_tiles.plan(x, groups, "forward").one_program
    check(kernel, x, dy, groups, options, activation)


@triton.jit
def _inverse_down(v):
    """1 / v rounded down and subnormal results to 0: less than an ulp off, and always to the same side."""
    nearest = 1.0 / v
    bits = nearest.to(tl.int32, bitcast=True) - (nearest.to(tl.float64) > 1.0 / v.to(tl.float64)).to(tl.int32)
    return tl.where(bits >= 0x00800000, bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _inverse_up(v):
    """1 / v rounded up, but subnormal results to 0."""
    nearest = 1.0 / v
    bits = nearest.to(tl.int32, bitcast=True) + (nearest.to(tl.float64) < 1.0 / v.to(tl.float64)).to(tl.int32)
    return tl.where(bits >= 0x00800000, bits, 0).to(tl.float32, bitcast=True)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("inverse", [_inverse_down, _inverse_up])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_has_room_for_the_reciprocal_of_a_gpu(kernel, dtype, inverse, monkeypatch):
    """Compiled kernels take rcp.approx, at most an ulp off (PTX ISA); the interpreter, having no assembly, divides."""
    if kernel.name != "triton":
        pytest.skip("of Triton's kernels")
    monkeypatch.setattr(triton_activations, "inverse", inverse)
    for seed, row in enumerate(row for row in ROWS if row[5]):
        x, dy, options, activation = make((3, 40, 4, 4), dtype, row, seed)
        check(kernel, x, dy, 4, options, activation)


@interpreted
@pytest.mark.parametrize("mean", [1000, 300000])
def test_a_large_mean_costs_nothing_in_one_program(mean):
    """Mean / deviation 1000: as exact as at 1, where plain PyTorch has lost three digits."""
    x = torch.randn(2, 8, 16, 16) + mean
    exact = dd.group_norm_silu(x.double(), 2, backend="reference")
    y, _, kept, _ = op.forward("triton", call(x, 2, {}))
    # x and its centre are exact; eight roundings, and the sums' dozen, are of deviations that lie within 5.
    assert (y - exact).abs().max() < 5 * (8 + 2) * 2.0**-24
    true = x.double().view(2, 2, -1).mean(2)
    # The mean that is kept is the float next to the exact one.
    assert ((kept - true).abs() <= 0.51 * 2.0**-23 * 2.0 ** true.log2().floor()).all()


def test_sizes_can_be_replaced(monkeypatch):
    x = torch.empty(1, 3, 32, 32)
    before = triton_common.plan("randn", x, draws=True)
    sizes = dataclasses.replace(triton_common.SIZES["randn"], elements=512)
    monkeypatch.setitem(triton_common.SIZES, "randn", sizes)
    assert triton_common.plan("randn", x, draws=True).grid[0] == 2 * before.grid[0]
