"""Random calls of DDIMSampler on latent-diffusion's class and on ours.

    python tests/integrations/latent_diffusion/differential.py CHECKOUT 1500

CHECKOUT is a clone of CompVis/latent-diffusion, CompVis/stable-diffusion or Stability-AI/stablediffusion; cases that
differ are printed. The first two know no parameterization "v".
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Sequence
from typing import Any

import latent_cases
import torch
from latent_cases import SHAPE, Corrector, Model, images
from torch import Tensor

from dd_kernels.integrations.latent_diffusion import DDIMSampler


def _options(pick: random.Random, parameterization: str) -> dict[str, Any]:
    """Random options of ``sample``."""
    uncond = torch.tensor([0.0, 0.1, -0.1])
    options: dict[str, Any] = {
        "S": pick.choice([2, 5, 7, 10, 20]),
        "eta": pick.choice([0.0, 0.3, 1.0]),
        "temperature": pick.choice([1.0, 0.5]),
        "noise_dropout": pick.choice([0.0, 0.0, 0.3]),
        "quantize_x0": pick.random() < 0.2,
        "log_every_t": pick.choice([1, 3, 100]),
    }
    if pick.random() < 0.5:
        options |= {"conditioning": torch.tensor([0.1, -0.2, 0.3]), "unconditional_conditioning": uncond}
        options["unconditional_guidance_scale"] = pick.choice([1.0, 3.0, 0.0])
    if pick.random() < 0.5:
        options["x_T"] = images().to(pick.choice([torch.float32, torch.float16, torch.bfloat16]))
    if pick.random() < 0.2:
        options |= {"mask": (images() > 0).float()[:, :1], "x0": images()}
    if parameterization == "eps" and pick.random() < 0.2:
        options |= {"score_corrector": Corrector(), "corrector_kwargs": {"factor": 0.9}}
    if pick.random() < 0.2:
        options |= {"normals_sequence": [1], "quantize_denoised": True}  # theirs accepts these and ignores them
    return options


def result(sampler_class: Any, seed: int, kinds: Sequence[str]) -> list[Tensor]:
    """The samples, what lies between, the buffers, and what torch draws next."""
    pick = random.Random(seed)
    parameterization = pick.choice(kinds)
    options = _options(pick, parameterization)
    torch.manual_seed(seed)
    sampler = sampler_class(Model(parameterization))
    if pick.random() < 0.2:
        sampler.make_schedule(10, ddim_eta=options["eta"], verbose=False)
        x, between = sampler.ddim_sampling(options.get("conditioning"), (3, *SHAPE), timesteps=pick.choice([3, 7, 20]))
    else:
        x, between = sampler.sample(batch_size=3, shape=SHAPE, verbose=False, **options)
    buffers = [torch.as_tensor(v) for k, v in sorted(vars(sampler).items()) if k.startswith(BUFFERS)]
    return [x, *between["x_inter"], *between["pred_x0"], *buffers, torch.randn(2)]


BUFFERS = ("ddim_sigmas", "ddim_alphas", "ddim_sqrt", "sqrt_", "log_", "betas", "alphas_cumprod")


def main(checkout: str, count: int) -> None:
    theirs = latent_cases.sampler_on_cpu(checkout)
    kinds = ("eps", "eps", "v") if "dynamic_threshold" in inspect.signature(theirs.sample).parameters else ("eps",)
    found = 0
    for seed in range(count):
        ours, their = (result(one, seed, kinds) for one in (DDIMSampler, theirs))
        same = len(ours) == len(their) and all(
            a.shape == b.shape and a.dtype == b.dtype and (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))
            for a, b in zip(ours, their, strict=True)
        )
        if not same:
            found += 1
            pairs = zip(ours, their, strict=False)
            print(seed, [(tuple(a.shape), a.dtype, b.dtype, float((a - b).abs().max())) for a, b in pairs])
    print(f"{found} of {count} differ")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
