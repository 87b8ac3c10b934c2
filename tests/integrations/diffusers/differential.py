"""Random calls of the schedulers, valid and not, on diffusers' classes and on ours.

    python tests/integrations/diffusers/differential.py 1500

runs so many cases of each scheduler and prints those that differ otherwise than the package's docstring says.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import diffusers as theirs
import numpy as np
import torch
from differential_loops import LOOPS, Loop
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_unclip
from step_bounds import Calls, recorded
from torch import Tensor

from dd_kernels.integrations import diffusers as ours

NAMES = ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "UnCLIPScheduler")
# Where theirs draws its noise.
MODULES: dict[str, Any] = {
    "DDPMScheduler": scheduling_ddpm,
    "DDIMScheduler": scheduling_ddim,
    "UnCLIPScheduler": scheduling_unclip,
}
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = ((2, 3, 4, 4), (1, 4, 5, 3), (3, 6, 7), (2, 3, 2, 4, 4), (2, 8))
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", "strange")
# How a timestep may be given, right and wrong; None is a timestep per sample.
FORMS: dict[str, Any] = {
    "tensor": torch.tensor,
    "int": int,
    "[1]": lambda t: torch.tensor([t]),
    "int32": lambda t: torch.tensor(t, dtype=torch.int32),
    "numpy": np.int64,
    "array": lambda t: np.array([t]),
    "list": lambda t: [t],
    "float": float,
    "float tensor": lambda t: torch.tensor(float(t)),
    "bool": lambda t: True,
    "string": str,
    "below": lambda t: -2,
    "above": lambda t: t + 2000,
    "not listed": lambda t: max(t - 1, 0),
    "per sample": None,
}
LIKELY = ("tensor", "int", "[1]")


def _config(name: str, pick: random.Random) -> dict[str, Any]:
    config: dict[str, Any] = {
        "num_train_timesteps": pick.choice([1000, 100, 37]),
        "clip_sample": pick.random() < 0.6,
        "clip_sample_range": pick.choice([1.0, 0.5, 3.0]),
        "prediction_type": pick.choice(["epsilon", "sample", "v_prediction"] * 4 + ["x0"]),
    }
    if name == "UnCLIPScheduler":
        kinds = ["fixed_small_log", "learned_range"] * 4 + ["fixed_small"]
        return config | {"variance_type": pick.choice(kinds)}
    config |= {
        "beta_schedule": pick.choice(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "beta_end": pick.choice([0.02, 0.012]),
        "timestep_spacing": pick.choice(["leading", "trailing", "linspace"]),
        "steps_offset": pick.choice([0, 0, 1]),
    }
    if name != "DDIMInverseScheduler":
        config |= {
            "thresholding": pick.random() < 0.25,
            "dynamic_thresholding_ratio": pick.choice([0.995, 0.8]),
            "sample_max_value": pick.choice([1.0, 1.5, 0.5]),
            "rescale_betas_zero_snr": pick.random() < 0.25,
        }
    if name == "DDPMScheduler":
        return config | {"variance_type": pick.choice(VARIANCES)}
    return config | {"set_alpha_to_one": pick.random() < 0.5}


class Call:
    """One random call of ``set_timesteps`` and ``step``."""

    def __init__(self, name: str, seed: int) -> None:
        pick = random.Random(seed)
        self.name, self.config = name, _config(name, pick)
        count = self.config["num_train_timesteps"]
        unlikely = [0, -3, 5.0, 2.5, count, count + 1, None, np.int64(5), "5"]
        self.steps: Any = pick.choice(unlikely if pick.random() < 0.2 else [1, 2, 3, 5, 7, 10, 20, 30])
        lists = [[30, 20, 5], [5, 20], [30, 30], [count], [20, 3, -1]]
        self.timesteps = pick.choice(lists) if name == "DDPMScheduler" and pick.random() < 0.15 else None
        self.is_set = pick.random() < 0.95
        self.form = pick.choice(list(FORMS)) if pick.random() < 0.4 else pick.choice(LIKELY)
        self.place = pick.random()
        self.eta = pick.choice([0.0, 0.3, 1.0] * 4 + [1.5, -0.5])
        self.rederive, self.variance_noise = pick.random() < 0.4, pick.random() < 0.15
        self.generators = pick.choice(["global", "one", "list"] * 3 + ["too many"])
        self.previous = pick.choice(["none", "next", "any"])
        self.as_tuple = pick.random() < 0.5
        self._tensors(pick, torch.Generator().manual_seed(seed))

    def _tensors(self, pick: random.Random, generator: torch.Generator) -> None:
        shape = list(pick.choice(SHAPES))
        if self.config.get("thresholding") and len(shape) == 2:  # where theirs raises
            shape = [2, 3, 4, 4]
        dtype = pick.choice(DTYPES)
        self.sample = torch.randn(shape, generator=generator).to(dtype)
        learned = self.config.get("variance_type", "").startswith("learned") and pick.random() < 0.93
        fault = pick.random()
        if fault < 0.1:
            shape[0] = 1
        elif fault < 0.15:
            self.sample = self.sample[:1]
        elif fault < 0.18:
            shape[-1] += 1
        out = torch.randn(shape, generator=generator)
        if learned:
            # Away from 0: theirs takes the root of a "learned" variance, where a logarithm has no digits left.
            out = torch.cat((out, torch.rand(shape, generator=generator) * 0.5 + 0.01), dim=1)
        self.out = out.to(dtype if pick.random() < 0.7 else pick.choice(DTYPES))
        self.noise = torch.randn(shape, generator=generator).to(self.out.dtype)
        self.module, self.noise_dtype = MODULES.get(self.name), self.out.dtype

    def run(self, module: Any, exact: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
        """(previous sample, x_0, what the generator gives next), or None where there are no timesteps."""
        one = getattr(module, self.name)(**self.config)
        if self.is_set:
            one.set_timesteps(
                **({"timesteps": list(self.timesteps)} if self.timesteps else {"num_inference_steps": self.steps})
            )
        listed = one.timesteps.tolist()
        if not listed:
            return None
        place = int(self.place * len(listed))
        form = FORMS[self.form]
        t = torch.full((len(self.sample),), listed[place]) if form is None else form(listed[place])
        options = self._options(listed, place, exact)
        torch.manual_seed(7)
        sample, out = (x.double() if exact else x for x in (self.sample, self.out))
        result = one.step(out, t, sample, return_dict=not self.as_tuple, **options)
        prev, x0 = result if self.as_tuple else (result.prev_sample, result.pred_original_sample)
        source = options["generator"] if self.generators == "one" and "generator" in options else None
        return prev, x0, torch.randn(2, generator=source)

    def _options(self, listed: list[int], place: int, exact: bool) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.name != "DDIMInverseScheduler" and self.generators != "global":
            many = len(self.out) + (self.generators == "too many")
            sources = [torch.Generator().manual_seed(n) for n in range(many)]
            options["generator"] = sources[0] if self.generators == "one" else sources
        if self.name == "DDIMScheduler":
            options |= {"eta": self.eta, "use_clipped_model_output": self.rederive}
            noise = self.noise.double() if exact else self.noise  # theirs multiplies it in its own dtype
            options |= {"variance_noise": noise} if self.variance_noise else {}
        if self.name == "UnCLIPScheduler" and self.previous != "none" and place + 1 < len(listed):
            following = listed[place + 1] if self.previous == "next" else max(listed[place] - 5, 0)
            options["prev_timestep"] = torch.tensor(following)
        return options

    def degenerate(self, module: Any) -> bool:
        """Whether no result is defined."""
        return False

    def mistakes(self) -> int:
        """Returns how many arguments are wrong; each class may report any of several mistakes."""
        fits = self.out.shape[-1] == self.sample.shape[-1]
        kinds = ("epsilon", "sample") if self.name == "UnCLIPScheduler" else ("epsilon", "sample", "v_prediction")
        learns = self.config.get("variance_type", "").startswith("learned")
        return sum(
            (
                self.form not in (*LIKELY, "int32", "numpy", "array"),
                not isinstance(self.steps, int) or not 1 <= self.steps <= self.config["num_train_timesteps"],
                not self.is_set,
                self.generators == "too many" or self.variance_noise,
                not fits,
                learns and self.out.shape[1] != 2 * self.sample.shape[1],
                self.config["prediction_type"] not in kinds,
                self.name == "UnCLIPScheduler" and self.config["variance_type"] == "fixed_small",
            )
        )


def _outcome(call: Call | Loop, module: Any, exact: bool = False) -> Any:
    """The result, or the exception."""
    try:
        return call.run(module, exact)
    except Exception as error:
        return error


def _exact(call: Call | Loop) -> Any:
    """Theirs in float64, of the noise that is drawn in the dtype that it is drawn in otherwise."""
    module: Any = call.module
    if not hasattr(module, "randn_tensor"):
        return _outcome(call, theirs, exact=True)
    draw = module.randn_tensor
    module.randn_tensor = lambda *a, dtype=None, **k: draw(*a, dtype=call.noise_dtype, **k).double()
    try:
        return _outcome(call, theirs, exact=True)
    finally:
        module.randn_tensor = draw


def difference(name: str, seed: int) -> str | None:
    """Returns how ours differs from theirs in one case; None if not, or only as the package's docstring says."""
    call = Loop(name, seed) if name in LOOPS else Call(name, seed)
    their = _outcome(call, theirs)
    with recorded() as calls:
        value = _outcome(call, ours)
    if isinstance(value, Exception):
        return _error_difference(call, their, value)
    if isinstance(their, Exception):  # where theirs crashes, ours is right
        fine = value is None or call.degenerate(ours) or not any(x.isnan().any() for x in value)
        return None if fine else "neither a result nor an error"
    if (their is None) != (value is None):
        return "a list of timesteps that is empty in one alone"
    return None if value is None else _value_difference(call, their, value, _exact(call), calls)


def _error_difference(call: Call | Loop, their: Any, value: Exception) -> str | None:
    if isinstance(their, Exception):
        known = isinstance(value, type(their)) or call.form in ("string", "bool") or call.steps == 2.5
        return None if known or call.mistakes() > 1 else f"{type(their).__name__} is {type(value).__name__}: {value}"
    # diffusers counts from the end, takes True as a mask, and makes no steps at all.
    wrong = call.form in ("below", "bool") or (isinstance(call.steps, (int, float)) and call.steps < 1)
    return None if wrong or call.steps == 2.5 else f"an error, {value}"


def _value_difference(call: Call | Loop, their: tuple, value: tuple, exact: Any, calls: Calls) -> str | None:
    if not torch.equal(their[-1], value[-1]):
        return "the generator is left elsewhere"
    if call.config.get("variance_type") == "fixed_large_log":  # theirs is NaN, and 0 at zero SNR
        return "a result is NaN" if any(x.isnan().any() for x in value) else None
    wide = torch.promote_types(call.sample.dtype, call.out.dtype)
    for place, (x, y, truth) in enumerate(zip(value[:-1], their[:-1], exact[:-1], strict=True)):
        if not y.isfinite().all() or not truth.isfinite().all():
            if x.isnan().any() and isinstance(call, Call):
                return f"result {place} is NaN"
            continue
        if x.dtype not in (wide, y.dtype):
            return f"result {place} is {x.dtype}"
        y, truth = torch.broadcast_tensors(y, x)[0], torch.broadcast_tensors(truth, x)[0]
        if not torch.equal(x, y) and (text := calls.beyond(x, truth)) is not None:
            return f"result {place} is {text}"
    return None


def main(count: int) -> None:
    for name in NAMES + LOOPS:
        found = {seed: text for seed in range(count) if (text := difference(name, seed)) is not None}
        print(f"{name}: {len(found)} of {count} differ")
        for seed, text in found.items():
            print(f"  {seed}: {text}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
