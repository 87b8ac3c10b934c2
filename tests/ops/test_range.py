"""Values near the largest float32: finite wherever the docstrings say so, as float64 tells."""

import pytest
import torch
from bounds import assert_within
from group_norm_cases import check as check_norm
from group_norm_cases import errors, make, results

import dd_kernels as dd

# Triton's interpreter is NumPy's, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
SCHEDULE = dd.linear_schedule(1000)
LARGEST = torch.finfo(torch.float32).max
VALUES = torch.tensor([3e38, -3e38, LARGEST, -LARGEST, 1e38, -1e38, 1e19, -1e19, 1.0, 0.0])
CLIPPED = {"ddpm": dd.ddpm(SCHEDULE, 50), "ddim": dd.ddim(SCHEDULE, 50), "v": dd.ddim(SCHEDULE, 50, prediction="v")}


def draw(rows=200):
    return VALUES[torch.randint(len(VALUES), (rows, 4))]


def assert_finite_where_exact(actual, exact):
    """Results that leave the range, or stand at its very end, may be inf; none may be NaN."""
    actual = actual.cpu()
    inside = exact.abs() <= LARGEST * (1 - 1e-6)
    assert inside.any()
    assert actual[inside].isfinite().all()
    assert not actual.isnan().any()
    assert ((actual.double() - exact).abs() <= 1e-6 * LARGEST)[inside].all()


def test_q_sample(kernel):
    x, noise, t = draw(), draw(), torch.randint(0, 1000, (200,))
    exact = dd.q_sample(x.double(), t, SCHEDULE, noise.double(), backend="reference")
    for backend in (kernel.name, "reference"):
        on = [v.to(kernel.device) for v in (x, t, noise)]
        assert_finite_where_exact(dd.q_sample(on[0], on[1], SCHEDULE, on[2], backend=backend), exact)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", CLIPPED)
def test_reverse_step_with_a_clip(kernel, name, guided):
    """The clip takes back an x_0, or a guided output, that left the range."""
    table, samples = CLIPPED[name], 50 if kernel.interpreted else 200
    step = torch.randint(0, 50, (samples,))
    given = {"x": draw(samples), "out": draw(samples)}
    given |= {"uncond": draw(samples)} if guided else {}
    given |= {"noise": draw(samples)} if table.stochastic else {}

    def run(backend, device, dtype):
        tensors = {key: v.to(device, dtype) for key, v in given.items()}
        return dd.reverse_step(table=table, step=step.to(device), guidance_scale=2.5, backend=backend, **tensors)

    exact = run("reference", "cpu", torch.float64)
    for backend in (kernel.name, "reference"):
        assert_finite_where_exact(run(backend, kernel.device, torch.float32), exact)


@pytest.mark.parametrize("size", [1e20, 1e30, 3e38])
@pytest.mark.parametrize("channels_last", [0, 1])
def test_norm_beyond_its_squares_is_nan(kernel, channels_last, size):
    """A group whose squares float32 does not hold is NaN, with its gradients; the groups beside it are right."""
    x, dy, options, activation = make((2, 8, 4, 6), torch.float32, (1, 1, 0, 0, 0, 1, channels_last))
    allowed = errors(kernel, x, dy, 4, options, activation)
    exact = results(x.double(), dy.double(), 4, {k: v.double() for k, v in options.items()}, activation, "reference")
    x[0, 2:4] = size * torch.linspace(-1, 1, 48).reshape(2, 4, 6)
    on = [v.to(kernel.device) for v in (x, dy)]
    options = {k: v.to(kernel.device) for k, v in options.items()}
    actual = results(*on, 4, options, activation, kernel.name)
    for name in ("y", "dx"):
        beyond = torch.zeros(x.shape, dtype=torch.bool)
        beyond[0, 2:4] = True
        v = actual[name].cpu()
        assert v[beyond].isnan().all()
        assert_within(v[~beyond], exact[name][~beyond], allowed[name][~beyond])


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (2, 12, 9, 7)])
def test_norm_while_its_squares_have_a_sum(kernel, shape):
    """Deviations of 1e17 have squares of 1e34, which float32 holds."""
    for row in ((0,) * 7, (0,) * 6 + (1,)):
        x, dy, _, _ = make(shape, torch.float32, row)
        check_norm(kernel, x * 1e17, dy, 4, {}, "none")
