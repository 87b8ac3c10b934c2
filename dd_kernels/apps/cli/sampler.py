"""The options that choose a sampler, and the table that they name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ...ops.reverse_step.table import DynamicThreshold, StepTable
from ...samplers import ddim
from ...samplers.named import FEW_STEP_SAMPLERS
from ...samplers.noise_levels import SIGMA_SPACINGS
from ..evaluate.results import LEARNED
from ..evaluate.table import ancestral_table
from . import common
from .common import LoadedModel

ONE_STEP = ("ddim", "ddpm")  # which read no x_0 of earlier steps, and may begin at any of their timesteps


def add_arguments(parser: argparse.ArgumentParser, samplers: Sequence[str], default: str, steps: str) -> None:
    """Adds --sampler, --steps and what belongs to single samplers; ``steps`` says the default number."""
    parser.add_argument("--sampler", choices=samplers, default=default, help=f"(default: {default})")
    common.add_step_arguments(parser, steps, SIGMA_SPACINGS if set(samplers) > set(ONE_STEP) else ())
    parser.add_argument("--eta", type=common.number, help="ddim: noise of each step, in [0, 1] (default: 0)")
    parser.add_argument(
        "--variance",
        choices=("fixed_small", "fixed_large", LEARNED),
        help="ddpm (default: fixed_small; learned_range for a model that learns it)",
    )
    parser.add_argument("--clip", type=common.clip, default=1.0, help="x0 to this range, none or dynamic (default: 1)")


def table_of(loaded: LoadedModel, args: argparse.Namespace, ddpm_steps: int | None = None) -> StepTable:
    """Returns the sampler that the arguments name; DDPM by default with ``ddpm_steps`` steps, or all."""
    for option, owner in (("variance", "ddpm"), ("eta", "ddim")):
        if args.sampler != owner and getattr(args, option) is not None:
            raise ValueError(f"--{option} must be left out with --sampler {args.sampler}; got {getattr(args, option)}")
    schedule = loaded.info.make_schedule()
    if args.sampler in FEW_STEP_SAMPLERS:
        given = {"steps": args.steps, "spacing": args.spacing}
        options = {name: value for name, value in given.items() if value is not None}
        options |= {"prediction": loaded.info.prediction, "learned_variance": loaded.learns_variance}
        return FEW_STEP_SAMPLERS[args.sampler](schedule, clip=args.clip, **options)
    if args.sampler == "ddim":
        return ddim(schedule, eta=args.eta or 0.0, clip=args.clip, **common.ddim_options(loaded, args))
    few = None if ddpm_steps is None else min(ddpm_steps, loaded.info.num_timesteps)
    return ancestral(loaded, few if args.steps is None else args.steps, args.spacing, args.variance, args.clip)


def ancestral(
    loaded: LoadedModel,
    steps: int | None,
    spacing: str | None,
    variance: str | None = None,
    clip: float | DynamicThreshold | None = 1.0,
) -> StepTable:
    """Returns DDPM of a model: by default all its timesteps, and its learned variance where it has one."""
    return ancestral_table(
        loaded.info.make_schedule(),
        steps,
        variance or (LEARNED if loaded.learns_variance else "fixed_small"),
        learned_variance=loaded.learns_variance,
        prediction=loaded.info.prediction,
        clip=clip,
        spacing=spacing or "linspace",
    )
