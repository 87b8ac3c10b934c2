"""Random models, and the error that their roundings may make."""

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


def relative_error(model: nn.Module, dtype: torch.dtype) -> float:
    """Returns the error that every layer's roundings allow, relative to the output's largest value.

    n roundings of relative size u make 8 sqrt(n) u, but for a probability below 1e-13 (Higham & Mary, 2019).
    A layer sums as many products in float32 as an output of it has weights; it, its activation and the residual are
    rounded to ``dtype`` 4 times, twice for each of weight and bias. :func:`randomise` keeps features near 1, so that
    layers hand errors on as they are.
    """
    parameters = list(model.parameters())
    summed = sum(p[0].numel() for p in parameters)
    return 8 * (math.sqrt(summed) * 2.0**-24 + math.sqrt(2 * len(parameters)) * torch.finfo(dtype).eps / 2)


def assert_within(ours, exact, model, what="output", passes=1, dtype=None):
    """Checks that the largest error of ``ours`` is at most that of ``passes`` through the model's layers.

    The layers compute in ``dtype``, by default that of the result.
    """
    assert ours.shape == exact.shape
    error = ((ours.double() - exact).abs().max() / exact.abs().max()).item()
    allowed = passes * relative_error(model, dtype or ours.dtype)
    print(f"{what} error {error:.3g} allowed {allowed:.3g} ratio {error / allowed:.3g}")
    assert error <= allowed, f"{what}: relative error {error:.3g}, allowed {allowed:.3g}"


def assert_all_within(ours, exact, model, dtype=None):
    """Checks output, gradient of x and each parameter's gradient, whose errors pass through the layers twice.

    A gradient is compared with the largest of all the parameters' gradients.
    """

    def joined(run):
        parameters = torch.cat([value.flatten() for name, value in run.items() if name not in ("output", "x")])
        return {"output": run["output"], "gradient of x": run["x"], "gradient of the parameters": parameters}

    assert ours.keys() == exact.keys()
    ours, exact = joined(ours), joined(exact)
    for name, value in exact.items():
        assert_within(ours[name], value, model, name, passes=1 if name == "output" else 2, dtype=dtype)
