"""Random calls of the schedulers that count their steps: settings of timesteps, and some steps of a loop."""

from __future__ import annotations

import random
from typing import Any

import torch
from diffusers.schedulers import (
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_lcm,
)
from torch import Tensor

MODULES = {
    "EulerDiscreteScheduler": scheduling_euler_discrete,
    "EulerAncestralDiscreteScheduler": scheduling_euler_ancestral_discrete,
    "FlowMatchEulerDiscreteScheduler": scheduling_flow_match_euler_discrete,
    "LCMScheduler": scheduling_lcm,
    "DPMSolverMultistepScheduler": scheduling_dpmsolver_multistep,
}
LOOPS = tuple(MODULES)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = ((2, 3, 4, 4), (1, 4, 5, 3), (3, 6, 7), (2, 3, 2, 4, 4))
FORMS: dict[str, Any] = {
    "tensor": lambda t: t.clone(),
    "view": lambda t: t,
    "[1]": lambda t: t.reshape(1),
    "number": lambda t: t.item(),
    "float": lambda t: float(t),
    "int": lambda t: int(t),
    "int tensor": lambda t: t.long(),
    "numpy": lambda t: t.numpy(),
    "not listed": lambda t: t + 0.25,
}
LIKELY = ("tensor", "view", "[1]")


def _process(pick: random.Random) -> dict[str, Any]:
    return {
        "num_train_timesteps": pick.choice([1000, 1000, 100]),
        "beta_schedule": pick.choice(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "beta_end": pick.choice([0.02, 0.012]),
        "timestep_spacing": pick.choice(["leading", "trailing", "linspace"]),
        "steps_offset": pick.choice([0, 0, 1]),
        "rescale_betas_zero_snr": pick.random() < 0.2,
        "prediction_type": pick.choice(["epsilon", "v_prediction", "sample"] * 8 + ["x0"]),
    }


def _spacing(pick: random.Random, *more: str) -> dict[str, Any]:
    kinds = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", *more]
    return {pick.choice(kinds): True} if pick.random() < 0.5 else {}


def _thresholds(pick: random.Random) -> dict[str, Any]:
    return {
        "thresholding": pick.random() < 0.2,
        "dynamic_thresholding_ratio": pick.choice([0.995, 0.8]),
        "sample_max_value": pick.choice([1.0, 1.5]),
    }


def _euler(pick: random.Random) -> dict[str, Any]:
    kinds = ["epsilon", "v_prediction", "sample", "original_sample"]
    own = {
        "prediction_type": pick.choice(kinds * 4 + ["x0"]),
        "interpolation_type": pick.choice(["linear"] * 5 + ["log_linear"]),
        "timestep_type": pick.choice(["discrete", "discrete", "continuous"]),
        "final_sigmas_type": pick.choice(["zero", "zero", "sigma_min"]),
        "sigma_min": pick.choice([None, None, 0.05]),
        "sigma_max": pick.choice([None, None, 20.0]),
    }
    return _process(pick) | own | _spacing(pick)


def _flow(pick: random.Random) -> dict[str, Any]:
    return {
        "num_train_timesteps": pick.choice([1000, 1000, 100]),
        "shift": pick.choice([1.0, 3.0, 0.5]),
        "use_dynamic_shifting": pick.random() < 0.4,
        "invert_sigmas": pick.random() < 0.2,
        "shift_terminal": pick.choice([None, None, 0.1]),
        "time_shift_type": pick.choice(["exponential", "linear"]),
        "stochastic_sampling": pick.random() < 0.3,
    } | _spacing(pick)


def _lcm(pick: random.Random) -> dict[str, Any]:
    own = {
        "clip_sample": pick.random() < 0.4,
        "clip_sample_range": pick.choice([1.0, 0.5]),
        "set_alpha_to_one": pick.random() < 0.5,
        "original_inference_steps": pick.choice([50] * 6 + [20, 20, 2000]),
        "timestep_scaling": pick.choice([10.0, 1.0]),
    }
    return _process(pick) | own | _thresholds(pick)


def _dpm_solver(pick: random.Random) -> dict[str, Any]:
    own = {
        "prediction_type": pick.choice(["epsilon", "v_prediction", "sample", "flow_prediction"] * 4 + ["x0"]),
        "solver_order": pick.choice([1, 2, 2, 3, 3]),
        "algorithm_type": pick.choice(["dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]),
        "solver_type": pick.choice(["midpoint", "heun"]),
        "lower_order_final": pick.random() < 0.7,
        "euler_at_final": pick.random() < 0.2,
        "final_sigmas_type": pick.choice(["zero", "sigma_min"]),
        "lambda_min_clipped": pick.choice([-float("inf"), -5.1]),
        "variance_type": pick.choice([None, None, None, "learned_range"]),
    }
    if own["algorithm_type"] in ("dpmsolver", "sde-dpmsolver") and pick.random() < 0.9:
        own["final_sigmas_type"] = "sigma_min"
    flow = {"use_flow_sigmas": True, "flow_shift": pick.choice([1.0, 3.0])} if pick.random() < 0.2 else {}
    if flow and pick.random() < 0.3:
        flow["use_dynamic_shifting"] = True
    return _process(pick) | own | _thresholds(pick) | (flow or _spacing(pick, "use_lu_lambdas"))


CONFIGS = {
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _process,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "LCMScheduler": _lcm,
    "DPMSolverMultistepScheduler": _dpm_solver,
}


def _setting(name: str, config: dict[str, Any], pick: random.Random) -> dict[str, Any]:
    """Random arguments of ``set_timesteps``."""
    steps = pick.choice([1, 0, -3, "5"] if pick.random() < 0.1 else [2, 3, 5, 7, 10, 20, 30])
    setting: dict[str, Any] = {"num_inference_steps": steps}
    kind, scale = pick.random(), config["num_train_timesteps"] / 1000
    if kind < 0.15 and name != "EulerAncestralDiscreteScheduler":
        listed = pick.choice([[900, 700, 300, 20], [999, 500], [800, 800, 300], [100, 500], [700]])
        setting = {"timesteps": [int(t * scale) for t in listed]}
    elif kind < 0.3 and name in ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"):
        karras = name == "EulerDiscreteScheduler"
        setting = {"sigmas": pick.choice([[14.0, 5.0, 1.0, 0.0], [80.0, 2.0, 0.1]] if karras else [[1.0, 0.7, 0.2]])}
    if name == "FlowMatchEulerDiscreteScheduler" and (config["use_dynamic_shifting"] or pick.random() < 0.1):
        setting |= {"mu": pick.choice([0.5, 1.15])} if pick.random() < 0.95 else {}
    if config.get("use_dynamic_shifting") and name == "DPMSolverMultistepScheduler":
        setting |= {"mu": 0.8}
    if name == "LCMScheduler" and pick.random() < 0.3:
        setting |= {"strength": pick.choice([0.5, 0.8])}
    return setting


class Loop:
    """One random call of ``set_timesteps``, and of some steps from anywhere, each of samples of its own."""

    def __init__(self, name: str, seed: int) -> None:
        pick = random.Random(seed)
        self.name, self.config = name, CONFIGS[name](pick)
        self.setting = _setting(name, self.config, pick)
        self.is_set = pick.random() < 0.93
        self.form = pick.choice(list(FORMS)) if pick.random() < 0.25 else pick.choice(LIKELY)
        self.begin = pick.choice(["listed", "listed", "index"])
        self.place, self.count = pick.choice([0.0, 0.0, pick.random()]), pick.choice([1, 2, 4, 6])
        self.as_tuple, self.generators = pick.random() < 0.5, pick.choice(["global", "one", "list"])
        self.options: dict[str, Any] = {}
        if name == "EulerDiscreteScheduler" and pick.random() < 0.3:
            self.options = {"s_churn": pick.choice([0.5, 40.0]), "s_noise": pick.choice([1.0, 1.01])}
            self.options |= {"s_tmin": pick.choice([0.0, 0.5]), "s_tmax": pick.choice([float("inf"), 5.0])}
        self._tensors(pick, torch.Generator().manual_seed(seed))

    def _tensors(self, pick: random.Random, generator: torch.Generator) -> None:
        shape = list(pick.choice(SHAPES))
        dtype = pick.choice(DTYPES)
        out_dtype = dtype if pick.random() < 0.7 else pick.choice(DTYPES)
        samples = torch.randn([6, *shape], generator=generator).to(dtype)
        learns = self.config.get("variance_type") is not None
        if learns:  # theirs takes the first three channels
            shape[1] = 3
            samples = samples[:, :, :3]
            self.config["prediction_type"] = "epsilon"
        outs = torch.randn([6, *shape], generator=generator).to(out_dtype)
        self.per_step = list(zip(samples, torch.cat((outs, outs), 2) if learns else outs, strict=True))
        self.sample, self.out = self.per_step[0]
        if self.name == "LCMScheduler" and self.form == "[1]" and self.noise_width() < 4:  # theirs is of float32 then
            self.form = "tensor"
        drawn = {"LCMScheduler": torch.promote_types(dtype, out_dtype)}
        kept = out_dtype if "Euler" in self.name and "Flow" not in self.name else torch.float32
        self.noise_dtype = drawn.get(self.name, kept)
        if self.name == "DPMSolverMultistepScheduler" and pick.random() < 0.2:
            self.options = {"variance_noise": torch.randn(shape, generator=generator)}

    def noise_width(self) -> int:
        """Returns the bytes of a number of LCM's noise."""
        return torch.promote_types(self.sample.dtype, self.out.dtype).itemsize

    def _scheduler(self, module: Any, exact: bool) -> Any:
        one = getattr(module, self.name)(**self.config)
        if self.is_set:
            one.set_timesteps(**self.setting)
        if exact:
            for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
                if hasattr(one, name):
                    setattr(one, name, getattr(one, name).double())
        return one

    def run(self, module: Any, exact: bool = False) -> tuple[Tensor, ...] | None:
        """The results of all steps, what add_noise then gives, and what the generator gives next."""
        one = self._scheduler(module, exact)
        steps = len(one.timesteps)
        if steps == 0:
            return None
        start = min(int(self.place * steps), steps - 1)
        if self.begin == "index":
            one.set_begin_index(start)
        torch.manual_seed(7)
        results: list[Tensor] = []
        sources = [torch.Generator().manual_seed(n) for n in range(len(self.out))]
        options = dict(self.options)
        if self.generators != "global":
            options["generator"] = sources[0] if self.generators == "one" else sources
        for place in range(start, min(start + self.count, steps)):
            sample, out = (x.double() if exact else x for x in self.per_step[place - start])
            t = FORMS[self.form](one.timesteps[place])
            if hasattr(one, "scale_model_input"):
                results.append(one.scale_model_input(sample, t))
            result = one.step(out, t, sample, return_dict=not self.as_tuple, **options)
            results += result if self.as_tuple else list(result.values())
        results += self._noisy(one, exact)
        return *results, torch.randn(2, generator=sources[0] if self.generators == "one" else None)

    def _noisy(self, one: Any, exact: bool) -> list[Tensor]:
        sample, noise = (x.double() if exact else x for x in (self.sample, self.per_step[1][0]))
        method = one.add_noise if hasattr(one, "add_noise") else one.scale_noise
        names = {"add_noise": "timesteps", "scale_noise": "timestep"}[method.__name__]
        return [method(sample, noise=noise, **{names: one.timesteps[-1:].repeat(len(sample))})]

    @property
    def module(self) -> Any:
        """Where theirs draws its noise."""
        return MODULES[self.name]

    @property
    def steps(self) -> Any:
        """The number of steps, if one is given."""
        return self.setting.get("num_inference_steps")

    def degenerate(self, module: Any) -> bool:
        """Whether no result is defined: a step of higher order between equal noise levels."""
        sigmas = getattr(self._scheduler(module, exact=False), "sigmas", torch.arange(1)).tolist()
        return len(set(sigmas)) < len(sigmas)

    def mistakes(self) -> int:
        """Returns how many arguments are wrong."""
        steps = 5 if self.steps is None else self.steps
        return sum(
            (
                self.form not in (*LIKELY, "number", "numpy", "float"),
                not isinstance(steps, int) or steps < 1,
                not self.is_set,
                self.config.get("prediction_type") == "x0",
                len(self.setting) > 1,
            )
        )
