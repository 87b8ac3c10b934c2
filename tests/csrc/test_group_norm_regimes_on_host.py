"""GroupNorm's plan for every kind of shape and chip, and each regime's kernels against the reference."""

import group_norm_cases as cases
import pytest
import test_group_norm_silu_as_op as suite
import test_group_norm_silu_of_two as suite_of_two
import torch
from budget import DTYPES
from group_norm_cases import call
from group_norm_cases import op as norm

import dd_kernels as dd

pytestmark = pytest.mark.slow  # Building the kernels for the host takes half a minute.

H200 = {"sm_count": 132, "major": 9, "l2_bytes": 60 << 20}
A100 = {"sm_count": 108, "major": 8, "l2_bytes": 40 << 20}
TINY = {"sm_count": 4, "major": 8, "l2_bytes": 1 << 17}  # a chip so small that most shapes are split, in several waves
TINY_HOPPER = {"sm_count": 16, "major": 9, "l2_bytes": 1 << 17}
SLICE = {"sm_count": 16, "major": 9, "l2_bytes": 10 << 20, "largest_cluster": 2}  # of a Hopper chip
NO_CLUSTERS = {**SLICE, "largest_cluster": 0}
FROM_OLDER_PTX = {**H200, "ptx_version": 80}  # compiled for Ampere, and again by the driver


@pytest.mark.parametrize(
    ("chip", "shape", "groups", "options", "expected"),
    [
        (H200, (256, 512, 4, 4), 32, {}, {"regime": "warp", "resident": 2}),
        (H200, (256, 256, 16, 16), 32, {}, {"regime": "warp", "resident": 8}),
        (H200, (256, 128, 32, 32), 32, {}, {"regime": "resident", "cluster": 1, "resident": 2}),
        (H200, (16, 320, 64, 64), 32, {}, {"regime": "resident", "cluster": 2, "resident": 12}),
        (H200, (2, 320, 64, 64), 32, {}, {"regime": "resident", "cluster": 4, "resident": 12}),
        (A100, (16, 320, 64, 64), 32, {}, {"regime": "split", "splits": 2}),
        (H200, (8, 128, 512, 512), 32, {}, {"regime": "split", "splits": 32, "wave_tiles": 12}),
        (H200, (256, 128, 32, 32), 32, {"channels_last": True}, {"tile_channels": 64, "cluster": 4, "resident": 8}),
        (H200, (256, 256, 16, 16), 32, {"channels_last": True}, {"tile_channels": 64, "cluster": 1, "resident": 8}),
        (H200, (256, 256, 8, 8), 32, {"channels_last": True}, {"tile_channels": 64, "cluster": 1, "resident": 2}),
        (H200, (16, 320, 64, 64), 32, {"channels_last": True}, {"regime": "split", "access": "channels_last"}),
        (A100, (16, 320, 64, 64), 32, {"channels_last": True}, {"regime": "split", "access": "channels_last"}),
        (H200, (256, 256, 8, 8), 32, {"backward": True}, {"regime": "resident", "resident": 2}),
        (H200, (256, 128, 32, 32), 32, {"backward": True}, {"regime": "resident", "cluster": 1, "resident": 2}),
        (SLICE, (2, 320, 64, 64), 32, {}, {"regime": "resident", "cluster": 2, "resident": 12}),
        (SLICE, (1, 64, 64, 72), 8, {}, {"regime": "resident", "cluster": 2, "resident": 12}),
        (SLICE, (2, 640, 64, 64), 32, {}, {"regime": "split"}),
        (NO_CLUSTERS, (2, 320, 64, 64), 32, {}, {"regime": "split"}),
        (FROM_OLDER_PTX, (2, 320, 64, 64), 32, {}, {"regime": "split"}),
        (FROM_OLDER_PTX, (2, 64, 64, 64), 8, {"backward": True}, {"regime": "split"}),
        # 33 rows in clusters of eight would leave the last block none.
        (H200, (1, 1024, 3, 11), 1, {"channels_last": True}, {"regime": "resident", "cluster": 4, "resident": 8}),
        (H200, (1, 1024, 2, 7), 1, {"channels_last": True}, {"regime": "resident", "cluster": 4, "resident": 2}),
        (SLICE, (2, 64, 32, 64), 8, {"backward": True}, {"regime": "resident", "cluster": 2}),
        (NO_CLUSTERS, (2, 64, 32, 64), 8, {"backward": True}, {"regime": "split"}),
        (H200, (2, 64, 8, 8), 8, {"x_channels": 36}, {"regime": "warp"}),
        (H200, (2, 64, 8, 8), 8, {"channels_last": True, "x_channels": 40}, {"regime": "resident"}),
        (H200, (2, 64, 8, 8), 8, {"channels_last": True, "x_channels": 36}, {"regime": "split", "access": "scalar"}),
        (H200, (2, 64, 7, 7), 8, {}, {"regime": "split", "access": "scalar"}),
        (H200, (2, 30, 8, 8), 3, {"channels_last": True}, {"regime": "split", "access": "scalar"}),
        (H200, (2, 64, 8, 8), 8, {"aligned": False}, {"regime": "split", "access": "scalar"}),
        (H200, (5, 64, 1, 1), 8, {}, {"regime": "resident", "access": "channels_last"}),
        # A cluster could hold it in rows of 16 bytes, which waste half of what DRAM fetches.
        (H200, (2, 64, 128, 128), 8, {"channels_last": True}, {"regime": "split", "tile_channels": 64}),
        # The sums of so many channels fit no block's shared memory.
        (H200, (1, 2048, 1, 8), 1, {"backward": True}, {"regime": "split", "access": "contiguous"}),
        # The pixels of a channel, and the vectors of a group, are counted in 32 bits.
        (H200, (1, 4, 1 << 14, 1 << 13), 1, {}, {"regime": "split", "access": "contiguous"}),
        (H200, (1, 4, 1 << 14, 1 << 14), 4, {}, {"regime": "split", "access": "scalar"}),
        (H200, (1, 16, 1 << 14, 1 << 13), 1, {}, {"regime": "split", "access": "scalar"}),
    ],
    ids=str,
)
def test_plan(host, chip, shape, groups, options, expected):
    host.set_chip(**chip)
    plan = host.plan(shape, groups, **options)._asdict()
    assert {name: plan[name] for name in expected} == expected


@pytest.mark.parametrize("chip", [H200, A100, TINY, TINY_HOPPER], ids=["h200", "a100", "tiny", "tiny_hopper"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_every_plan_covers_the_tensor(host, chip, channels_last, backward):
    host.set_chip(**chip)
    for channels in (3, 8, 10, 32, 60, 64, 320, 512, 1024, 1280, 4096):
        for pixels in (1, 4, 9, 14, 16, 35, 49, 64, 256, 1024, 4096, 65536):
            for groups in (g for g in (1, 2, 3, 10, 32) if channels % g == 0):
                for dtype in DTYPES:
                    shape = (2, channels, pixels)
                    plan = host.plan(shape, groups, dtype, channels_last, backward=backward)
                    assert plan.tiles * plan.tile_channels == 2 * channels
                    assert plan.tile_channels % (channels // groups) == 0
                    assert 1 <= plan.cluster <= (8 if chip["major"] >= 9 else 1)
                    assert 1 <= plan.wave_tiles <= plan.tiles
                    assert plan.tile_channels <= 1024 or plan.access != "channels_last"
                    assert plan.regime == "split" or plan.resident in (2, 4, 8, 12)
                    blocks = plan.splits * plan.cluster
                    # No block is without rows.
                    assert (blocks - 1) * plan.rows_each < plan.rows <= blocks * plan.rows_each
                    columns = plan.tile_channels * dtype.itemsize // 16 if plan.access == "channels_last" else 1
                    rows_at_once = 32 if plan.regime == "warp" else 256 // columns
                    assert plan.regime == "split" or plan.rows_each <= plan.resident * rows_at_once


def memory_formats(shape):
    """Tensors of this shape that hold nothing, contiguous and, where that differs, channels_last."""
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    last = x.contiguous(memory_format=torch.channels_last)
    return [x] if last.is_contiguous() else [x, last]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("chip", [H200, A100, TINY, NO_CLUSTERS], ids=["h200", "a100", "tiny", "no_clusters"])
def test_workspace_suffices(host, chip, aligned):
    """The workspace that Python allocates suffices whatever the chip is and wherever tensors start."""
    host.set_chip(**chip)
    fullest = {False: 0.0, True: 0.0}
    for channels in (3, 8, 60, 320, 1016, 3000, 40000):
        for size in ((1, 1), (5, 7), (64, 64), (200, 300), (2048, 2048)):
            for groups in (g for g in (1, 2, 8, 30, 127) if channels % g == 0):
                for x in memory_formats((2, channels, *size)):
                    for backward in (False, True):
                        last = not x.is_contiguous()
                        plan = host.plan(tuple(x.shape), groups, x.dtype, last, aligned, backward)
                        if backward:
                            allocated = norm.backward_workspace("cuda", x).numel()
                        else:
                            allocated = norm.forward_workspace("cuda", x, groups).numel()
                        assert plan.partials <= allocated
                        fullest[backward] = max(fullest[backward], plan.partials / allocated)
    assert fullest == {False: 1.0, True: 1.0}  # the largest need takes all of what is allocated


@pytest.mark.parametrize("missing", [1, None])
def test_too_small_a_workspace_is_refused(host, missing):
    host.set_chip(**TINY)
    x, dweight = torch.randn(2, 8, 3, 5), torch.empty(8)
    given_, (mean, rstd) = call(x, 8, {}), torch.ones(2, 2, 8)
    forward = (*given_[:9], torch.empty_like(x), mean, rstd)
    backward = (x, x, mean, rstd, *given_[1:9], torch.empty_like(x), dweight, *[None] * 4)
    for op, arguments, needed in (("group_norm_silu", forward, 32), ("group_norm_silu_backward", backward, 80)):
        given = 0 if missing is None else needed - missing
        with pytest.raises(RuntimeError, match=f"partials must be of {needed} floats; got {given}"):
            getattr(torch.ops.dd_kernels, op)(*arguments, None if missing is None else torch.empty(given))


@pytest.mark.parametrize("which", range(4), ids=["of_one", "of_one_backward", "of_two", "of_two_backward"])
def test_every_tensor_may_start_anywhere(host, which):
    """A tensor that starts at no multiple of 16 bytes is read by elements: a vector access would end the process."""
    op = suite_of_two.OPERATORS[which % 2]
    arguments = [*suite.operators("cuda", "cpu"), *suite_of_two.operators("cpu")][which]

    def run(moved=None):
        given = [v.clone() if isinstance(v, torch.Tensor) else v for v in arguments]
        if moved is not None:
            x = arguments[moved]
            given[moved] = torch.empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)
        function = getattr(torch.ops.dd_kernels, op).default
        function(*given)
        names = [argument.name for argument in function._schema.arguments]
        return {n: v for n, v in zip(names, given, strict=False) if isinstance(v, torch.Tensor) and n != "partials"}

    aligned = run()
    for i in (i for i, v in enumerate(arguments) if isinstance(v, torch.Tensor) and v.ndim == 4):
        for name, v in run(i).items():
            # At most 96 terms, the largest of a result's size, are summed in another order: a rounding of each at most.
            assert (v - aligned[name]).abs().max() <= 96 * 2**-24 * aligned[name].abs().max(), name


def test_one_channel_is_read_in_vectors(host):
    """With one channel both layouts are the same memory; read element by element, its tiles would be split."""
    x, mean, rstd = torch.randn(2, 1, 8, 8), torch.empty(2, 1), torch.empty(2, 1)
    torch.ops.dd_kernels.group_norm_silu(*call(x, 1, {})[:9], torch.empty_like(x), mean, rstd)


def test_no_op_allocates(library):
    """All the tensors that an op writes are handed to it: the library knows no function of torch that makes one."""
    assert b"aten::" not in library.path.read_bytes()


# shape, groups, channels_last, chip: one for every regime, number of vectors held, and kind of access.
CASES = {
    "warp_2": ((2, 32, 4, 4), 4, False, H200),
    "warp_8": ((1, 16, 16, 16), 2, False, H200),
    "resident": ((1, 8, 48, 48), 2, False, TINY),
    "resident_ragged": ((3, 12, 24, 40), 2, False, TINY),
    "cluster_2": ((2, 8, 64, 64), 4, False, TINY_HOPPER),
    "cluster_8": ((1, 8, 64, 72), 1, False, H200),
    "cluster_of_a_slice": ((1, 8, 64, 72), 1, False, SLICE),
    "split": ((1, 4, 160, 208), 1, False, TINY),  # the sums over a channel are split too
    "last_resident": ((2, 64, 8, 8), 8, True, H200),
    "last_straddling": ((2, 60, 6, 6), 5, True, TINY),
    "last_straddling_wide": ((1, 40, 12, 12), 4, True, TINY_HOPPER),
    "last_cluster": ((1, 64, 40, 40), 8, True, H200),
    "last_cluster_of_one_group": ((1, 1024, 5, 7), 1, True, H200),
    "last_split": ((2, 32, 64, 64), 4, True, TINY),
    "last_split_straddling": ((1, 40, 72, 72), 4, True, TINY),
    "pixel": ((5, 64, 1, 1), 8, False, H200),
    "scalar": ((2, 6, 7, 5), 2, False, H200),
    "scalar_last": ((2, 6, 7, 5), 2, True, H200),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_regime(kernel, host, case, dtype):
    shape, groups, channels_last, chip = CASES[case]
    host.set_chip(**chip)
    x, dy, options, activation = cases.make(shape, dtype, (1, 1, 1, 1, 1, 1, channels_last))
    cases.check(kernel, x, dy, groups, options, activation)
    # A missing barrier shows where the last thread of a block runs first.
    once = cases.results(x, dy, groups, options, activation, kernel.name)
    host.set_backwards(True)
    again = cases.results(x, dy, groups, options, activation, kernel.name)
    assert all(again[name].equal(value) for name, value in once.items())


# Channels of x, the others of skip: in the middle of a group, and of what a thread reads at a time where that can be.
X_CHANNELS = {
    name: (3 * shape[1] // 8 + 7) // 8 * 8 if "last_" in name else shape[1] // 2 + 1
    for name, (shape, *_) in CASES.items()
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_regime_of_two_inputs(kernel, host, case, dtype):
    """The second pass reads the sum that the first has written; no concatenation is made, forward or backward."""
    shape, groups, channels_last, chip = CASES[case]
    host.set_chip(**chip)
    row = (1, 1, 1, 1, 1, 1, channels_last)
    x_channels = X_CHANNELS[case]
    divided = (shape[0], x_channels, *shape[2:])
    x, residual, skip, dy, dsum, options, activation = suite_of_two.parts(divided, shape[1] - x_channels, dtype, row)
    suite_of_two.check(kernel, x, None, skip, dy, dsum, groups, options, activation)
    suite_of_two.check(kernel, x, residual, skip, dy, dsum, groups, options, activation)
    x, residual, _, dy, dsum, options, activation = suite_of_two.parts(shape, 0, dtype, row)
    suite_of_two.check(kernel, x, residual, None, dy, dsum, groups, options, activation)
    # The same bits as of one tensor: only where the vectors come from differs.
    host.set_backwards(True)
    y, total = dd.group_norm_silu(x, groups, residual=residual, activation=activation, backend="cuda", **options)
    assert y.equal(dd.group_norm_silu(total, groups, activation=activation, backend="cuda", **options))


@pytest.mark.parametrize("channels_last", [False, True])
def test_waves_give_the_same_bits(kernel, host, channels_last):
    """A tile's partial sums are added in their order, however many tiles the L2 cache holds."""
    case = cases.make((3, 32, 48, 48), torch.bfloat16, (1, 1, 1, 1, 1, 1, channels_last))
    x, dy, options, activation = case
    runs, waves = [], []
    for l2_bytes in (1 << 10, 1 << 20, 60 << 20):
        host.set_chip(sm_count=4, major=8, l2_bytes=l2_bytes)
        plan = host.plan(tuple(x.shape), 2, channels_last=channels_last)
        assert plan.regime == "split"
        tile_bytes = 2 * x.numel() // plan.tiles
        assert plan.wave_tiles == 1 or plan.wave_tiles * tile_bytes <= l2_bytes * 2 / 5
        waves.append(plan.wave_tiles)
        runs.append(cases.results(x, dy, 2, options, activation, kernel.name))
    assert waves[0] == 1 < waves[1] < waves[2] == plan.tiles
    assert all(other[name].equal(value) for other in runs[1:] for name, value in runs[0].items())
