"""group_norm_affine: a norm as factor x + term per sample and channel, for what reads x next."""

import pytest
import torch
from bounds import UNIT
from budget import sentinels_survive, within_sentinels
from group_norm_bounds import Errors
from group_norm_cases import ROWS, call, make

import dd_kernels as dd
from dd_kernels.ops.activation import Activation
from dd_kernels.ops.group_norm_silu.op import AFFINE


@pytest.fixture(autouse=True)
def _on_a_cpu(kernel):
    if kernel.name != "cpu":
        pytest.skip("only the CPU's convolution applies a norm")


def affine(x, groups, options, eps=1e-5):
    factor, term = (
        within_sentinels(x.shape[:2], torch.float32, "cpu"),
        within_sentinels(x.shape[:2], torch.float32, "cpu"),
    )
    AFFINE(*call(x, groups, options, eps=eps)[:8], factor, term)
    assert sentinels_survive(factor)
    assert sentinels_survive(term)
    return factor, term


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (3, 40, 1, 1), (1, 12, 50, 51), (2, 64, 16, 16)])
@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 0.5), (torch.float32, 3e3), (torch.bfloat16, 0.5)])
def test_is_the_norm(kernel, row, shape, dtype, mean):
    """Beside the norm's own errors only the term is rounded."""
    x, dy, options, _ = make(shape, dtype, row, mean=mean)
    factor, term = (v.double()[:, :, None, None] for v in affine(x, 4, options))
    wide = {name: v.double() for name, v in options.items()}
    exact = dd.group_norm_silu(x.double(), 4, activation="none", backend="reference", **wide)
    allowed = Errors(x.double(), dy.double(), 4, wide, Activation.NONE, False).by_name()["y"] + UNIT * term.abs()
    assert ((factor * x.double() + term - exact).abs() <= allowed).all()


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("channels_last", [0, 1])
def test_same_bits_on_any_number_of_threads(kernel, samples, channels_last):
    x, _, options, _ = make((samples, 12, 50, 50), torch.float32, (1, 1, 1, 1, 1, 1, channels_last))
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(torch.stack(affine(x, 4, options)))
    finally:
        torch.set_num_threads(before)
    assert all(run.equal(runs[0]) for run in runs)


def test_opcheck(kernel):
    x, _, options, _ = make((2, 8, 5, 6), torch.float32, ROWS[0])
    arguments = (*call(x, 4, options)[:8], torch.zeros(2, 8), torch.zeros(2, 8))
    torch.library.opcheck(AFFINE, arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.zeros(2, 8, 0, 5)}, "x must be of pixels; got an image of none"),
        ({1: 3}, "num_groups must be a divisor of the channels, 8; got 3"),
        ({2: torch.zeros(7)}, r"weight must be of the shape \[8\]; got"),
        ({5: torch.zeros(1, 8)}, r"pre_shift must be of the shape \[2, 8\]"),
        ({8: torch.zeros(2, 7)}, r"factor must be of the shape \[2, 8\]"),
        ({9: torch.zeros(2, 8, dtype=torch.bfloat16)}, "term must be float32"),
    ],
)
def test_refuses(kernel, changed, message):
    arguments = [torch.zeros(2, 8, 5, 5), 4, None, None, 1e-5, None, None, None, torch.zeros(2, 8), torch.zeros(2, 8)]
    for place, value in changed.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        AFFINE(*arguments)


def test_refuses_what_overlaps(kernel):
    memory = torch.zeros(3, 8)
    with pytest.raises(RuntimeError, match="term must be apart from factor"):
        AFFINE(torch.zeros(2, 8, 5, 5), 4, None, None, 1e-5, None, None, None, memory[:2], memory[1:])
