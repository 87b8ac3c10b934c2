"""Random models, and the error budget that the tests of the models hold them to."""

import copy
import math

import torch
from torch import nn


def randomise(model: nn.Module) -> nn.Module:
    """``model`` with every parameter random, of a size that keeps features near 1: no branch is silent."""
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=1 / math.sqrt(p[0].numel()))
        else:
            nn.init.normal_(p, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
    return model


def double(model: nn.Module) -> nn.Module:
    """A float64 copy."""
    return copy.deepcopy(model).double()


def assert_within_budget(ours, plain, exact, what="output"):
    """The error of ``ours`` is at most twice that of plain PyTorch, plus one rounding of the output."""
    assert ours.dtype == plain.dtype
    error, budget = ((v.double() - exact).abs().max().item() for v in (ours, plain))
    rounding = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= 2 * budget + rounding, f"{what}: error {error:.3g}, plain PyTorch's {budget:.3g}, {rounding=:.3g}"


def assert_all_within_budget(ours, plain, exact):
    """Output, gradient of x, and all parameters' gradients together: of one small tensor the error is chance."""

    def joined(run):
        parameters = torch.cat([value.flatten() for name, value in run.items() if name not in ("output", "x")])
        return {"output": run["output"], "gradient of x": run["x"], "gradient of the parameters": parameters}

    assert ours.keys() == plain.keys() == exact.keys()
    ours, plain, exact = joined(ours), joined(plain), joined(exact)
    for name, value in exact.items():
        assert_within_budget(ours[name], plain[name], value, name)
