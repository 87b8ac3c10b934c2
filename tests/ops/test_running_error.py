"""The bounds that the other tests hold results to: each operation's holds for what float32 makes of random numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bounds import UNIT
from running_error import running_error
from torch import Tensor

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, y: x + 0.3 * y - 1.1,
    "product": lambda x, y: (0.7 * x) * (y / 3),
    "quotient": lambda x, y: (x - 0.1) / (y * y + 0.2),
    "powers": lambda x, y: (x - 0.4) ** 2 - (y + x) ** 3,
    "sine": lambda x, y: torch.stack((torch.sin(9 * x), torch.cos(9 * y))),
    "exponential": lambda x, y: torch.exp(5 * (x - y)),
    "logarithm": lambda x, y: torch.log(x * x + 0.1),
    "logarithm of nothing": lambda x, y: torch.log(((1 + x.abs()) - 1 - x.abs()).clamp(min=1e-12)),
    "root": lambda x, y: torch.stack(((x * y).abs().sqrt(), (x * y).abs() ** 0.5)),
    "reciprocal": lambda x, y: 1 / (x * y - 5),
    "exponential less 1": lambda x, y: torch.expm1(x * y),
    "tanh": lambda x, y: 1 - torch.tanh((x + 30) - 30),
    "clamp": lambda x, y: (1.5 * x).clamp(-1, 1) + (y * 1.3).clamp(min=0.1),
    "where": lambda x, y: torch.where(torch.arange(20) > 9, x * y, x / 3),
    "mean": lambda x, y: torch.stack(((x * y).mean(dim=1), x.sum(dim=1))),
    "deviation": lambda x, y: (x + 5).std((1,), keepdim=True),
    "matmul": lambda x, y: torch.einsum("ij,kj->ik", x, y),
    "moves": lambda x, y: torch.stack((x / 3, 0.7 * y)).flatten(1).chunk(2)[1][:, 3:].expand(2, -1),
}


def _draw(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 30, 20, generator=generator).unbind()
    return x, y


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_bound_holds_and_is_not_far_off(name: str) -> None:
    operation, largest = OPERATIONS[name], 0.0
    for seed in range(30):
        x, y = _draw(seed)
        with running_error() as running:
            exact = operation(x.double(), y.double())
            error = running.error(exact)
        off = (operation(x, y).double() - exact).abs()
        assert (off <= error).all()
        largest = max(largest, float((off / error).nan_to_num().max()))
    assert largest > 0.02


def test_numbers_of_float32_are_exact_and_others_are_rounded_once() -> None:
    x, _ = _draw(0)
    other = torch.full((3,), 0.1, dtype=torch.float64)
    with running_error() as running:
        assert (running.error(x.double()) == 0).all()
        assert torch.equal(running.error(other), UNIT * other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.mul_(2), "writes in place"),
        (lambda x: torch.erf(x), "erf is not bounded"),
        (lambda x: x**5, "the power .* is not bounded"),
        (lambda x: x + 1e-9 > x, "rounding decides"),
    ],
)
def test_what_is_not_bounded_is_refused(call: Callable[[Tensor], Tensor], message: str) -> None:
    x = torch.ones(3, dtype=torch.float64)
    with running_error(), pytest.raises(AssertionError, match=message):
        call(x)
