"""Random cases of the schedulers, and the loop that samples with one."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

NAMES = ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "UnCLIPScheduler")
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def random_config(name: str, pick: random.Random) -> dict[str, Any]:
    """Random options of one scheduler, without those where theirs is NaN (but for one of DDIMInverse)."""
    config: dict[str, Any] = {"clip_sample": pick.random() < 0.7, "clip_sample_range": pick.choice([1.0, 0.5, 3.0])}
    config["prediction_type"] = pick.choice(["epsilon", "sample", "v_prediction"])
    config["num_train_timesteps"] = pick.choice([1000, 100, 37])
    if name == "UnCLIPScheduler":
        config["prediction_type"] = pick.choice(["epsilon", "sample"])
        return config | {"variance_type": pick.choice(["fixed_small_log", "learned_range"])}
    config["beta_schedule"] = pick.choice(["linear", "scaled_linear", "squaredcos_cap_v2"])
    config["timestep_spacing"] = pick.choice(["leading", "trailing"])
    config["steps_offset"] = pick.choice([0, 1])
    if name == "DDIMInverseScheduler":
        return config | {"set_alpha_to_one": pick.random() < 0.5}
    config["timestep_spacing"] = pick.choice(["leading", "trailing", "linspace"])
    config["thresholding"] = pick.random() < 0.3
    config |= {
        "dynamic_thresholding_ratio": pick.choice([0.995, 0.8]),
        "sample_max_value": pick.choice([1.0, 1.5, 0.5]),
    }
    clips = config["clip_sample"] and not config["thresholding"]  # a quantile of +-inf is NaN
    finite = clips or config["prediction_type"] != "epsilon"
    config["rescale_betas_zero_snr"] = finite and pick.random() < 0.3
    if name == "DDIMScheduler":
        return config | {"set_alpha_to_one": pick.random() < 0.5}
    variances = ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]
    return config | {"variance_type": pick.choice(variances), "beta_schedule": pick.choice(["linear", "sigmoid"])}


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "transposed" else x


class Case:
    """One random case: a scheduler's options, and the arguments of its step."""

    def __init__(self, name: str, seed: int) -> None:
        pick = random.Random(seed)
        torch.manual_seed(seed)
        self.name, self.config = name, random_config(name, pick)
        self.steps = pick.choice([2, 5, 7, 20, 30])
        shape = pick.choice([(2, 3, 8, 8), (1, 4, 5, 7), (3, 6, 11), (2, 32), (2, 3, 2, 4, 4), (0, 3, 4, 4)])
        if self.config.get("thresholding") and (len(shape) == 2 or shape[0] == 0):  # where theirs raises
            shape = (2, 3, 8, 8)
        dtype, out_dtype = pick.choice(DTYPES), pick.choice(DTYPES)
        out_dtype = dtype if pick.random() < 0.6 else out_dtype
        layout = pick.choice(["contiguous", "channels_last", "transposed"])
        self.sample = lay_out(torch.randn(shape), layout).to(dtype)
        learned = self.config.get("variance_type", "").startswith("learned")
        out = torch.randn(shape[0], shape[1] * (2 if learned else 1), *shape[2:])
        if learned:
            # Theirs takes the root of a "learned" variance; away from 0, where a logarithm has no digits left.
            out[:, shape[1] :] = torch.rand(shape) * 0.5 + 0.01
        self.out = lay_out(out, layout).to(out_dtype)
        self.generators = pick.choice(["global", "one", "list"])
        self.index = pick.random()
        self.options: dict[str, Any] = {}
        if name == "DDIMScheduler":
            self.options = {"eta": pick.choice([0.0, 0.3, 1.0]), "use_clipped_model_output": pick.random() < 0.4}
            if pick.random() < 0.3:
                self.generators = "noise"
                self.options["variance_noise"] = torch.randn(shape).to(out_dtype)

    def scheduler(self, module: Any) -> Any:
        one = getattr(module, self.name)(**self.config)
        one.set_timesteps(self.steps)
        return one

    def timestep(self, one: Any) -> tuple[int, int | None]:
        """The timestep that is taken, and the one after it."""
        in_range = [t for t in one.timesteps.tolist() if t < self.config["num_train_timesteps"]]
        place = int(self.index * len(in_range))
        return in_range[place], in_range[place + 1] if place + 1 < len(in_range) else None

    def step(self, one: Any, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(previous sample, x_0, the noise that would come next)."""
        (t, after), options = self.timestep(one), dict(self.options)
        if self.name == "UnCLIPScheduler" and after is not None:
            options["prev_timestep"] = torch.tensor(after)
        sources = [torch.Generator().manual_seed(n) for n in range(max(len(self.sample), 1))]
        if self.generators == "list" and len(self.sample):
            options["generator"] = sources
        elif self.generators == "one":
            options["generator"] = sources[0]
        if self.name == "DDIMInverseScheduler":
            options.pop("generator", None)
        torch.manual_seed(7)
        sample, out = (x.double() if exact else x for x in (self.sample, self.out))
        if exact and "variance_noise" in options:  # theirs multiplies it in its own dtype
            options["variance_noise"] = options["variance_noise"].double()
        result = one.step(out, torch.tensor(t), sample, **options)
        source = sources[0] if "generator" in options else None
        return result.prev_sample, result.pred_original_sample, torch.randn(2, generator=source)


def restart(one: Any) -> None:
    """Lets a loop begin anew, as set_timesteps does, which a captured graph cannot call."""
    if hasattr(one, "_step_index"):
        one._step_index = None
    if hasattr(one, "lower_order_nums"):
        one.lower_order_nums = 0


def denoise(
    one: Any,
    x: Tensor,
    generator: torch.Generator | None = None,
    learned: bool = False,
    copies: bool = False,
    timesteps: Any = None,
    **options: Any,
) -> Tensor:
    """The loop with a model that is 0.5 sin(2 x); ``copies``: of timesteps that are no views of the scheduler's.

    ``timesteps`` are those of the scheduler, as numbers; its own tensor if None.
    """
    timesteps = one.timesteps if timesteps is None else timesteps
    restart(one)
    for place, t in enumerate(timesteps):
        if "UnCLIP" in type(one).__name__:
            prev = timesteps[place + 1] if place + 1 < len(timesteps) else None
            options["prev_timestep"] = prev.clone() if copies and prev is not None else prev
        if generator is not None:
            options["generator"] = generator
        seen = x if "Euler" not in type(one).__name__ or "Flow" in type(one).__name__ else one.scale_model_input(x, t)
        out = 0.5 * torch.sin(2 * seen)
        out = torch.cat((out, out.abs() + 0.1), dim=1) if learned else out
        x = one.step(out, t.clone() if copies else t, x, **options).prev_sample
    return x
