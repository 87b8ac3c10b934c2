"""Random calls of DDIMSampler on latent-diffusion's class and on ours.

    python tests/integrations/latent_diffusion/differential.py CHECKOUT 1500

CHECKOUT is a clone of CompVis/latent-diffusion, CompVis/stable-diffusion or Stability-AI/stablediffusion; cases are
printed whose float32 results are beyond their bound of theirs in float64, or of another dtype than theirs. The first
two know no parameterization "v".
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Sequence
from typing import Any

import latent_cases
import torch
from float64_runs import differences, theirs_in_float64
from latent_cases import SHAPE, Corrector, Model, conditionings, images
from running_error import UndecidedError
from torch import Tensor

from dd_kernels.integrations.latent_diffusion import DDIMSampler, ddim


def _options(pick: random.Random, parameterization: str, dtype: torch.dtype) -> dict[str, Any]:
    """Random options of ``sample``."""
    c, uncond = conditionings(dtype)
    options: dict[str, Any] = {
        "S": pick.choice([2, 5, 7, 10, 20]),
        "eta": pick.choice([0.0, 0.3, 1.0]),
        "temperature": pick.choice([1.0, 0.5]),
        "noise_dropout": pick.choice([0.0, 0.0, 0.3]),
        "quantize_x0": pick.random() < 0.2,
        "log_every_t": pick.choice([1, 3, 100]),
    }
    if pick.random() < 0.5:
        options |= {"conditioning": c, "unconditional_conditioning": uncond}
        options["unconditional_guidance_scale"] = pick.choice([1.0, 3.0, 0.0])
    if pick.random() < 0.5:
        x_T = images().to(pick.choice([torch.float32, torch.float16, torch.bfloat16]))
        options["x_T"] = x_T.to(dtype) if dtype.itemsize == 8 else x_T
    if pick.random() < 0.2:
        options |= {"mask": (images() > 0).to(dtype)[:, :1], "x0": images(dtype)}
    if parameterization == "eps" and pick.random() < 0.2:
        options |= {"score_corrector": Corrector(), "corrector_kwargs": {"factor": 0.9}}
    if pick.random() < 0.2:
        options |= {"normals_sequence": [1], "quantize_denoised": True}  # theirs accepts these and ignores them
    return options


def results(sampler_class: Any, seed: int, kinds: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The samples, what lies between, the buffers, and what torch draws next."""
    pick = random.Random(seed)
    parameterization = pick.choice(kinds)
    options = _options(pick, parameterization, dtype)
    torch.manual_seed(seed)
    sampler = sampler_class(Model(parameterization, dtype))
    if pick.random() < 0.2:
        sampler.make_schedule(10, ddim_eta=options["eta"], verbose=False)
        x, between = sampler.ddim_sampling(options.get("conditioning"), (3, *SHAPE), timesteps=pick.choice([3, 7, 20]))
    else:
        x, between = sampler.sample(batch_size=3, shape=SHAPE, verbose=False, **options)
    found = {f"{name} {i}": value for name, values in between.items() for i, value in enumerate(values)}
    buffers = {k: torch.as_tensor(v) for k, v in vars(sampler).items() if k.startswith(BUFFERS)}
    return {"x": x, **found, **buffers, "next": torch.randn(2)}


BUFFERS = ("ddim_sigmas", "ddim_alphas", "ddim_sqrt", "sqrt_", "log_", "betas", "alphas_cumprod")


def difference(theirs: Any, seed: int, kinds: Sequence[str]) -> list[str]:
    """Returns how ours differs from theirs in one case."""

    def ours(dtype: torch.dtype) -> dict[str, Tensor]:
        return results(DDIMSampler, seed, kinds, dtype)

    with theirs_in_float64():
        truth = results(theirs, seed, kinds, torch.float64)
    plain, again = results(theirs, seed, kinds, torch.float32), ours(torch.float32)
    dtypes = [f"{name} is {x.dtype}" for name, x in again.items() if x.dtype != plain[name].dtype]
    return [*dtypes, *differences(ours, truth, ddim)]


def main(checkout: str, count: int) -> None:
    theirs = latent_cases.sampler_on_cpu(checkout)
    kinds = ("eps", "eps", "v") if "dynamic_threshold" in inspect.signature(theirs.sample).parameters else ("eps",)
    found = undecided = 0
    for seed in range(count):
        try:
            texts = difference(theirs, seed, kinds)
        except UndecidedError:
            undecided += 1
            continue
        if texts:
            found += 1
            print(seed, *texts, sep="\n  ")
    print(f"{found} of {count} differ; {undecided} are quantised where rounding decides")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
