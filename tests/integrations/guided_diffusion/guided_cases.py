"""Calls of guided-diffusion's interface whose results are recorded in ``data/guided_diffusion.npz``.

``results(module)`` makes the calls on any module with that interface. The recorded values are those of

- openai/guided-diffusion at 22e0df8183507e13a7813f8d38d51b072ca1e67c, and
- forever208/DDPM-IP at 1f767192e8b60e1694c670672d5adfd8b42256f5 (the names that start with "ip"),

run in float64, with the noise of ``same_noise``, by torch 2.13.0 on a CPU: they are the truth that a float32 result is
held to. They are recorded by
``python tests/integrations/guided_diffusion/guided_cases.py GUIDED_DIFFUSION_CHECKOUT DDPM_IP_CHECKOUT``.
"""

from __future__ import annotations

import itertools
import pathlib
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(pathlib.Path(__file__).parents[1]))

from float64_runs import theirs_in_float64

DATA = pathlib.Path(__file__).parents[2] / "data" / "guided_diffusion.npz"
MEANS = ("PREVIOUS_X", "START_X", "EPSILON")
VARIANCES = ("LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE")
LOSSES = ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL")
SHAPE = (3, 2, 3, 4)
STEPS = 12


def images(dtype: torch.dtype = torch.float32, scale: float = 1.2) -> Tensor:
    """A fixed batch; some values lie outside [-1, 1]."""
    values = scale * np.sin(np.arange(np.prod(SHAPE)) * 1.7)
    return torch.from_numpy(values.reshape(SHAPE)).to(dtype)


def model(learned: bool) -> Any:
    """A smooth function of x and t in place of a network, with an optional keyword."""

    def call(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        t = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        out = torch.sin(2.0 * x + 0.05 * t + shift)
        return torch.cat((out, torch.cos(3.0 * x - 0.1 * t) - 1.0), dim=1) if learned else out

    return call


def cond_fn(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
    """Stands in place of the gradient of a classifier's log-probability."""
    return 0.3 * torch.cos(x + 0.02 * t.to(x.dtype).reshape(-1, 1, 1, 1) + shift)


def make(module: Any, mean: str, variance: str, loss: str = "MSE", spaced: str | None = None, **options: Any) -> Any:
    """A diffusion; ``spaced`` is the section_counts of a SpacedDiffusion."""
    steps = STEPS if spaced is None else 40
    options = {
        "betas": module.get_named_beta_schedule("linear" if spaced is None else "cosine", steps) * 0.2,
        "model_mean_type": module.ModelMeanType[mean],
        "model_var_type": module.ModelVarType[variance],
        "loss_type": module.LossType[loss],
        **options,
    }
    if spaced is None:
        return module.GaussianDiffusion(**options)
    return module.SpacedDiffusion(use_timesteps=module.space_timesteps(steps, spaced), **options)


def step_results(module: Any, mean: str, variance: str, dtype: torch.dtype) -> dict[str, Any]:
    """Single steps of one kind of model."""
    diffusion = make(module, mean, variance)
    net, x, t = model(variance.startswith("LEARNED")), images(dtype), torch.tensor([0, 5, STEPS - 1])
    kwargs = {"model_kwargs": {"shift": 0.25}}
    calls = {
        "p_mean_variance": lambda: diffusion.p_mean_variance(net, x, t, **kwargs),
        "unclipped": lambda: diffusion.p_mean_variance(net, x, t, clip_denoised=False),
        "denoised": lambda: diffusion.p_mean_variance(net, x, t, denoised_fn=lambda y: 0.8 * y + 0.1),
        "p_sample": lambda: diffusion.p_sample(net, x, t, **kwargs),
        "p_sample_denoised": lambda: diffusion.p_sample(net, x, t, denoised_fn=lambda y: 0.5 * y),
        "p_sample_cond": lambda: diffusion.p_sample(net, x, t, cond_fn=cond_fn, **kwargs),
        "ddim": lambda: diffusion.ddim_sample(net, x, t, **kwargs),
        "ddim_eta": lambda: diffusion.ddim_sample(net, x, t, clip_denoised=False, eta=0.7),
        "ddim_denoised": lambda: diffusion.ddim_sample(net, x, t, denoised_fn=lambda y: 0.5 * y, eta=1.0),
        "ddim_cond": lambda: diffusion.ddim_sample(net, x, t, cond_fn=cond_fn, eta=0.3, **kwargs),
        "ddim_reverse": lambda: diffusion.ddim_reverse_sample(net, x, t, **kwargs),
    }
    return named(calls)


def loop_results(module: Any, mean: str, variance: str, dtype: torch.dtype) -> dict[str, Any]:
    """Whole loops, and the bound, of one kind of model; the state that the generator is left in."""
    diffusion = make(module, mean, variance)
    net = model(variance.startswith("LEARNED"))
    noise = images(dtype)
    calls = {
        "p_loop": lambda: diffusion.p_sample_loop(net, SHAPE, noise=noise, device="cpu"),
        "ddim_loop": lambda: diffusion.ddim_sample_loop(net, SHAPE, noise=noise, device="cpu", eta=0.5),
        "cond_loop": lambda: diffusion.p_sample_loop(
            net, SHAPE, device="cpu", noise=noise, cond_fn=cond_fn, model_kwargs={}
        ),
        "ddim_draws": lambda: (diffusion.ddim_sample_loop(net, SHAPE, noise=noise, device="cpu"), torch.randn(2)),
        "bpd": lambda: diffusion.calc_bpd_loop(net, images(dtype, 1.0)),
    }
    return named(calls)


def loss_results(module: Any, mean: str, variance: str, dtype: torch.dtype) -> dict[str, Any]:
    """Every loss of one kind of model."""
    net, x, t = model(variance.startswith("LEARNED")), images(dtype, 1.0), torch.tensor([0, 5, STEPS - 1])
    calls = {
        loss: lambda loss=loss: make(module, mean, variance, loss).training_losses(net, x, t, {"shift": 0.1})
        for loss in LOSSES
    }
    return named(calls)


def process_results(module: Any, dtype: torch.dtype) -> dict[str, Any]:
    """q, the timesteps that the model sees, and processes of fewer steps."""
    plain = make(module, "EPSILON", "FIXED_SMALL", rescale_timesteps=True)
    x, t, net = images(dtype), torch.tensor([0, 5, STEPS - 1]), model(True)
    calls = {
        "q_mean_variance": lambda: plain.q_mean_variance(x, t),
        "q_sample": lambda: plain.q_sample(x, t),
        "q_posterior": lambda: plain.q_posterior_mean_variance(x.clamp(-1, 1), x, t),
        "xstart_from_eps": lambda: plain._predict_xstart_from_eps(x, t, x.sin()),
        "xstart_from_xprev": lambda: plain._predict_xstart_from_xprev(x, t, x.sin()),
        "eps_from_xstart": lambda: plain._predict_eps_from_xstart(x, t, x.sin()),
        "rescaled": lambda: plain.p_sample(model(False), x, t),
        "prior": lambda: plain._prior_bpd(x),
    }
    for spaced, rescale in itertools.product(("ddim10", "5,3,2", "7"), (False, True)):
        spaced_one = make(module, "EPSILON", "LEARNED_RANGE", "RESCALED_MSE", spaced, rescale_timesteps=rescale)
        options = {"noise": x, "device": "cpu"}
        name = f"{spaced}_{rescale}"
        calls |= {
            f"{name}/p_loop": lambda d=spaced_one, o=options: d.p_sample_loop(net, SHAPE, **o),
            f"{name}/cond": lambda d=spaced_one, o=options: d.ddim_sample_loop(
                net, SHAPE, cond_fn=cond_fn, model_kwargs={}, **o
            ),
            f"{name}/loss": lambda d=spaced_one: d.training_losses(net, images(dtype, 1.0), torch.tensor([0, 2, 6])),
            f"{name}/bpd": lambda d=spaced_one: d.calc_bpd_loop(net, images(dtype, 1.0)),
        }
    return named(calls)


def perturbed_results(module: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """DDPM-IP's losses."""
    x, t = images(dtype, 1.0), torch.tensor([0, 5, STEPS - 1])
    calls = {
        mean: lambda mean=mean: make(module, mean, "FIXED_LARGE", input_pertub=0.15).training_losses(model(False), x, t)
        for mean in MEANS
    }
    return named(calls)


def named(calls: dict[str, Any]) -> dict[str, Tensor]:
    """The calls' results, flattened to {"name/key": tensor}; the generator is seeded before each."""
    flat: dict[str, Tensor] = {}
    for number, (name, call) in enumerate(calls.items()):
        torch.manual_seed(number)
        result = call()
        if isinstance(result, Tensor):
            result = {"": result}
        elif isinstance(result, tuple):
            result = dict(enumerate(result))
        flat |= {f"{name}/{key}".rstrip("/"): value for key, value in result.items()}
    return flat


def results(module: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every recorded call of guided-diffusion."""
    flat = {f"process/{k}": v for k, v in process_results(module, dtype).items()}
    for mean, variance in itertools.product(MEANS, VARIANCES):
        for part in (step_results, loop_results, loss_results):
            flat |= {f"{mean}/{variance}/{k}": v for k, v in part(module, mean, variance, dtype).items()}
    return flat


def _record(guided: str, ddpm_ip: str) -> None:
    import importlib
    import types

    def load(checkout: str) -> Any:
        for name in [name for name in sys.modules if name.startswith("guided_diffusion")]:
            del sys.modules[name]
        sys.path.insert(0, checkout)
        names = {}
        for part in ("gaussian_diffusion", "respace"):
            names |= vars(importlib.import_module(f"guided_diffusion.{part}"))
        sys.path.pop(0)
        return types.SimpleNamespace(**{k: v for k, v in names.items() if not k.startswith("__")})

    with theirs_in_float64():
        flat = results(load(guided), torch.float64)
        flat |= {f"ip/{k}": v for k, v in perturbed_results(load(ddpm_ip), torch.float64).items()}
    np.savez_compressed(DATA, **{name: value.numpy() for name, value in flat.items()})


if __name__ == "__main__":
    _record(*sys.argv[1:])
