"""Videos and tokens in channels_last: read and written as they lie, forward and backward, on every backend."""

import pytest
import torch
from bounds import assert_within
from group_norm_cases import ROWS, check, errors, make

import dd_kernels as dd
from dd_kernels.ops.checks import image_of

SHAPES = {"video": (2, 12, 3, 4, 5), "one frame": (2, 12, 1, 4, 5), "tokens": (2, 12, 7)}


def channels_last(x):
    """Returns x in channels_last."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(kernel, shape, dtype):
    for row in ROWS[:: 4 if kernel.interpreted else 1]:
        x, dy, options, activation = make(SHAPES[shape], dtype, row)
        check(kernel, channels_last(x), channels_last(dy), 3, options, activation)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_is_kept(kernel, shape):
    x = channels_last(torch.randn(SHAPES[shape])).to(kernel.device).requires_grad_()
    y = dd.group_norm_silu(x, 3, backend=kernel.name)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.stride() == x.stride()
    assert dx.stride() == x.stride()


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_copied(shape):
    x = channels_last(torch.randn(SHAPES[shape]))
    image = image_of(x)
    assert image.data_ptr() == x.data_ptr()
    assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alike", [False, True])
def test_residual_and_skip(kernel, shape, alike):
    """Checks that a tensor has the layout of x, or is contiguous."""
    x, residual = (channels_last(torch.randn(SHAPES[shape])).to(kernel.device) for _ in range(2))
    skip = torch.randn(2, 6, *SHAPES[shape][2:]).to(kernel.device)
    if alike:
        skip = channels_last(skip)
    else:
        residual = residual.contiguous()
    y, total = dd.group_norm_silu(x, 3, residual=residual, skip=skip, backend=kernel.name)
    assert total.equal(x + residual)
    joined = torch.cat([total, skip], 1)
    exact = dd.group_norm_silu(joined.double(), 3, backend="reference")
    assert_within(y, exact, errors(kernel, joined, joined, 3, {}, "silu")["y"])
    assert total.stride() == x.stride()
    if alike:
        assert channels_last(y).stride() == y.stride()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 4, 5, 6),
        torch.randn(2, 3, 4, 5, 6).transpose(2, 4),
        torch.randn(2, 3, 8).transpose(1, 2)[:, ::2],
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 3).t(),
        channels_last(torch.randn(2, 3, 2, 2, 2, 2)),
    ],
)
def test_other_strides_are_no_image(x):
    assert image_of(x) is None


def test_an_error_names_the_shape_that_was_given():
    x = channels_last(torch.randn(2, 12, 3, 4, 5))
    with pytest.raises(ValueError, match=r"residual must have the shape \[2, 12, 3, 4, 5\]; got \[2, 12, 12, 5\]"):
        dd.group_norm_silu(x, 3, residual=torch.randn(2, 12, 12, 5))
    with pytest.raises(ValueError, match="activation must be one of"):
        dd.group_norm_silu(x, 3, activation="relu")


def test_traced_and_exported():
    x = channels_last(torch.randn(2, 12, 3, 4, 5))
    call = lambda x: dd.group_norm_silu(x, 3)  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
