"""What a CUDA graph replays: the ops, and whole loops whose seed and step lie on the device."""

from __future__ import annotations

import pytest
import torch
from cuda_graphs import NEEDS_CUDA, capture
from group_norm_cases import ROWS, make, results
from torch import Tensor

import dd_kernels as dd

pytestmark = NEEDS_CUDA
SCHEDULE = dd.linear_schedule(100)
TABLES = {
    "ddpm": dd.ddpm(SCHEDULE, 6),
    "ddim": dd.ddim(SCHEDULE, 6),
    "eta": dd.ddim(SCHEDULE, 6, eta=1.0),
    "dpm++ sde": dd.dpm_solver(SCHEDULE, 6, stochastic=True),
    "dpm++ of third order": dd.dpm_solver(SCHEDULE, 6, order=3),
}


def model(x: Tensor, t: Tensor | None = None) -> Tensor:
    return 0.5 * torch.sin(2 * x)


def key(*values: int) -> Tensor:
    """(seed, first_sample, draw) on the device."""
    return torch.tensor(values, dtype=torch.int64, device="cuda")


@pytest.fixture(autouse=True)
def _on_the_gpu(kernel) -> None:
    if kernel.device != "cuda":
        pytest.skip("a kernel of the CPU")


@pytest.mark.parametrize("name", TABLES)
def test_a_loop_takes_another_seed_at_every_replay(kernel, name):
    table, start, seed = TABLES[name], torch.randn(2, 3, 8, 8, device="cuda"), key(0, 0, 0)

    def loop(seed: int | Tensor, first_sample: int = 0) -> Tensor:
        x = start.clone()
        options = {"first_sample": first_sample, "x_prev": x, "backend": kernel.name}
        options["history"] = table.history_like(x)
        for step in range(len(table)):
            dd.reverse_step(x, model(x), table, step, seed=seed, **options)
        return x

    graph, x = capture(lambda: loop(seed))
    for value, first_sample in ((1, 0), (2**40 + 7, 3)):
        seed.copy_(key(value, first_sample, 0))
        graph.replay()
        assert x.equal(loop(value, first_sample))


@pytest.mark.parametrize("name", ["ddpm", "dpm++ sde", "dpm++ of third order"])
def test_one_step_captured_is_every_step(kernel, name):
    table, x, step = TABLES[name], torch.randn(2, 3, 8, 8, device="cuda"), torch.zeros(1, dtype=torch.int64).cuda()
    start, history = x.clone(), table.history_like(x)
    options = {"seed": 5, "history": history, "backend": kernel.name}

    def one() -> None:
        dd.reverse_step(x, model(x), table, step, x_prev=x, **options)
        step.add_(1)

    graph, _ = capture(one)
    x.copy_(start)
    step.zero_()
    for _ in range(len(table)):
        graph.replay()
    for index in range(len(table)):
        dd.reverse_step(start, model(start), table, index, x_prev=start, **options)
    assert x.equal(start)


@pytest.mark.parametrize("name", TABLES)
def test_sample(kernel, name):
    start = torch.randn(2, 3, 8, 8, device="cuda")
    graph, x = capture(lambda: dd.sample(model, start, TABLES[name], seed=3, backend=kernel.name))
    start.copy_(torch.randn_like(start))
    graph.replay()
    assert x.equal(dd.sample(model, start, TABLES[name], seed=3, backend=kernel.name))


def test_diffusing_with_other_timesteps_and_another_draw(kernel):
    x_start, t, seed = torch.randn(2, 3, 8, 8, device="cuda"), torch.tensor([3, 50], device="cuda"), key(0, 0, 0)
    graph, x_t = capture(lambda: dd.q_sample(x_start, t, SCHEDULE, seed=seed, backend=kernel.name))
    t.copy_(torch.tensor([99, 0]))
    seed.copy_(key(1, 2, 3))
    graph.replay()
    options = {"seed": 1, "first_sample": 2, "draw": 3, "backend": kernel.name}
    assert x_t.equal(dd.q_sample(x_start, t, SCHEDULE, **options))


def test_noise(kernel):
    seed = key(0, 0, 0)
    graph, z = capture(lambda: dd.randn((2, 3, 8, 8), seed=seed, device="cuda", backend=kernel.name))
    seed.copy_(key(1, 2, 3))
    graph.replay()
    options = {"seed": 1, "first_sample": 2, "draw": 3, "device": "cuda", "backend": kernel.name}
    assert z.equal(dd.randn((2, 3, 8, 8), **options))


@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (2, 32, 64, 64), (1, 4, 512, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_silu_forward_and_backward(kernel, shape, dtype):
    for row in ROWS[:2]:  # channels_last and contiguous
        x, dy, options, activation = make(shape, dtype, row, device="cuda")
        graph, captured = capture(lambda: results(x, dy, 4, options, activation, kernel.name))  # noqa: B023
        x.copy_(torch.randn_like(x))
        graph.replay()
        for name, value in results(x, dy, 4, options, activation, kernel.name).items():
            assert captured[name].equal(value), name
