"""Calls of DDIMSampler whose results are recorded in ``data/latent_diffusion.npz``.

``results(sampler_class)`` makes the calls on any class with that interface. They are recorded in float64, with the
noise of ``same_noise``, by torch 2.13.0 on a CPU, from Stability-AI/stablediffusion at
cf1d67a6fd5ea1aa600c4df58e5b47da45f6bdbf, which has CompVis' sampler with ``encode`` and ``decode``: the truth that a
float32 result is held to. ``python tests/integrations/latent_diffusion/latent_cases.py CHECKOUT`` records them.
"""

from __future__ import annotations

import itertools
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dd_kernels as dd

sys.path.append(str(pathlib.Path(__file__).parents[1]))

from float64_runs import theirs_in_float64

DATA = pathlib.Path(__file__).parents[2] / "data" / "latent_diffusion.npz"
SHAPE = (2, 3, 4)


class Model:
    """The part of LatentDiffusion that the sampler sees, its network a smooth function."""

    def __init__(self, parameterization: str = "eps", dtype: torch.dtype = torch.float32) -> None:
        schedule = dd.scaled_linear_schedule(100, 0.0015, 0.0195)
        self.num_timesteps, self.parameterization, self.device = len(schedule), parameterization, "cpu"
        tensors = {"betas": schedule.beta, "alphas_cumprod": schedule.alpha_bar}
        tensors |= {"alphas_cumprod_prev": schedule.alpha_bar_prev}
        for name, values in tensors.items():
            setattr(self, name, torch.from_numpy(values.astype(np.float32)).to(dtype))
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        self.first_stage_model = SimpleNamespace(quantize=lambda x: (torch.round(x * 4) / 4, None))

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def apply_model(self, x: Tensor, t: Tensor, c: Any) -> Tensor:
        c = c["c"][0] if isinstance(c, dict) else c
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        t = t.to(x.dtype).reshape(-1, 1, 1, 1)
        return torch.sin(1.5 * x + 0.03 * t) + (0 if c is None else c.reshape(-1, 1, 1, 1))

    def q_sample(self, x0: Tensor, t: Tensor) -> Tensor:
        signal, noise = self._scales(t)
        return signal * x0 + noise * torch.randn_like(x0)

    def predict_eps_from_z_and_v(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        signal, noise = self._scales(t)
        return signal * v + noise * x

    def predict_start_from_z_and_v(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        signal, noise = self._scales(t)
        return signal * x - noise * v


class Corrector:
    """A score_corrector."""

    def modify_score(self, model: Any, e_t: Tensor, x: Tensor, t: Tensor, c: Any, factor: float) -> Tensor:
        return e_t * factor


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    """Three latents of float32 numbers."""
    values = np.sin(np.arange(3.0 * 24)).reshape(3, *SHAPE)
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


def conditionings(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A conditioning of each sample, and an unconditional one."""
    c, uncond = np.float32([[0.1, -0.2, 0.3], [0.0, 0.1, -0.1]])
    return torch.from_numpy(c).to(dtype), torch.from_numpy(uncond).to(dtype)


def sampling_options(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Arguments of ``sample`` by name."""
    c, uncond = conditionings(dtype)
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uncond}
    in_dicts = {"conditioning": {"c": [c]}, **guidance, "unconditional_conditioning": {"c": [uncond]}}
    x, mask = images(dtype), (images() > 0).to(dtype)[:, :1]
    return {
        "plain": {"S": 10},
        "seven": {"S": 7, "eta": 0.6, "log_every_t": 3},
        "start": {"S": 10, "x_T": x, "temperature": 0.5, "eta": 1.0, "conditioning": c},
        "guided": {"S": 10, "conditioning": c, **guidance, "eta": 0.3},
        "dict": {"S": 5, **in_dicts},
        "mask": {"S": 5, "mask": mask, "x0": x},
        "dropout": {"S": 5, "eta": 1.0, "noise_dropout": 0.3},
        "corrected": {"S": 5, "score_corrector": Corrector(), "corrector_kwargs": {"factor": 0.9}},
        "quantized": {"S": 5, "quantize_x0": True, "eta": 0.5, "conditioning": c, **guidance},
    }


def sampled(sampler_class: Any, parameterization: str, dtype: torch.dtype, call: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the samples of one call, what lies between, and what torch draws next."""
    torch.manual_seed(1)  # which draws no x_0 that is quantised where rounding decides
    sampler = sampler_class(Model(parameterization, dtype))
    x, between = sampler.sample(batch_size=3, shape=SHAPE, verbose=False, **call)
    return {"x": x, **{name: torch.stack(values) for name, values in between.items()}, "next": torch.randn(2)}


def results(sampler_class: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every recorded call."""
    flat: dict[str, Tensor] = {}
    for parameterization, (name, call) in itertools.product(("eps", "v"), sampling_options(dtype).items()):
        if (parameterization, name) != ("v", "corrected"):
            values = sampled(sampler_class, parameterization, dtype, call)
            flat |= {f"{parameterization}/{name}/{key}": value for key, value in values.items()}
    return flat | coded(sampler_class, dtype)


def coded(sampler_class: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The results of encoding and decoding."""
    (c, uncond), x_start = conditionings(dtype), images(dtype)
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uncond}
    flat: dict[str, Tensor] = {}
    sampler = sampler_class(Model(dtype=dtype))
    sampler.make_schedule(10, verbose=False)
    torch.manual_seed(0)
    for original in (False, True):
        t = torch.from_numpy(np.array([0, 4, 9]))
        flat[f"stochastic_{original}"] = sampler.stochastic_encode(x_start, t, use_original_steps=original)
    # With a schedule of fewer steps, theirs asks the model at the step's number, not at its timestep.
    x, kept = sampler.encode(x_start, c, 8, use_original_steps=True, return_intermediates=3)
    flat |= {"encoded": x, "steps": torch.from_numpy(np.array(kept["intermediate_steps"]))}
    flat["between"] = torch.stack(kept["intermediates"])
    flat["guided_encode"] = sampler.encode(x_start, c, 5, use_original_steps=True, **guidance)[0]
    flat["decoded"] = sampler.decode(x_start, c, 8, **guidance)
    sampler.make_schedule(6, ddim_discretize="quad", verbose=False)
    flat["quad/decoded"] = sampler.decode(x_start, c, 6)
    return flat


def sampler_on_cpu(checkout: str) -> Any:
    """DDIMSampler of a checkout, its ``register_buffer``, which wants a GPU, replaced by ``setattr``."""
    sys.path.insert(0, checkout)
    # Imported by their module of helpers, and not used by the sampler.
    sys.modules.setdefault("einops", SimpleNamespace(repeat=None, rearrange=None))
    sys.modules.setdefault("ldm.util", SimpleNamespace(instantiate_from_config=None))
    from ldm.models.diffusion.ddim import DDIMSampler

    class OnCpu(DDIMSampler):
        def register_buffer(self, name: str, value: Any) -> None:
            setattr(self, name, value)

    return OnCpu


if __name__ == "__main__":
    theirs = sampler_on_cpu(sys.argv[1])
    with theirs_in_float64():
        found = results(theirs, torch.float64)
    np.savez_compressed(DATA, **{name: value.numpy() for name, value in found.items()})
