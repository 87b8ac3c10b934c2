"""The samplers for few steps beside diffusers' schedulers, stepped side by side with the same model and noise."""

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import dd_kernels as dd  # noqa: E402

SCHEDULE = dd.linear_schedule(1000)
ALPHA_BAR = torch.tensor(SCHEDULE.alpha_bar)
SHAPE = (2, 3, 8, 8)
# Theirs take differences of logarithms up to 5 in float32 over steps of lambda of 0.2 at least: each of ten steps is
# wrong by up to 2 * 5 / 0.2 units, times a few terms; what they give is float32 throughout.
STEPS = 10
NEAR = STEPS * 4 * (2 * 5 / 0.2) * 2.0**-24


def model(x, alpha_bar):
    """An epsilon that bends: of x of unit variance, at a noise level."""
    return (1 - alpha_bar) ** 0.5 * x + 0.3 * torch.sin(2 * x) * alpha_bar**0.5


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ours(table, noise=None, steps=None):
    """Runs our sampler in float64, with its own noise levels."""
    level = np.interp(table.model_times, np.arange(1000), _log_sigma())
    alpha_bars = 1 / (1 + np.exp(2 * level))
    x, history = start(), table.history_like(start())
    for i, alpha_bar in enumerate(alpha_bars[:steps]):
        given = {"noise": noise[i]} if noise is not None else {}
        x = dd.reverse_step(x, model(x, alpha_bar), table, i, history=history, **given)
    return x


def _log_sigma():
    return 0.5 * (np.log1p(-SCHEDULE.alpha_bar) - np.log(SCHEDULE.alpha_bar))


def theirs(scheduler, noise=None, steps=None):
    """Runs the loop of diffusers, whose x is x / sqrt(alpha_bar) where they scale the model's input."""
    x = start().float() * float(scheduler.init_noise_sigma)
    for i, t in enumerate(scheduler.timesteps[:steps]):
        scaled = scheduler.scale_model_input(x, t)
        sigma = np.exp(np.interp(float(t), np.arange(1000), _log_sigma()))
        out = model(scaled.double(), 1 / (1 + sigma**2)).float()
        options = {} if noise is None else {"generator": torch.Generator().manual_seed(i)}
        x = scheduler.step(out, t, x, **options).prev_sample
    return x.double()


def assert_near(found, wanted):
    """Compares to the roundings of float32, which are relative."""
    error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    print(f"apart by {error:.1e} of {NEAR:.1e}")
    assert error < NEAR


def given_noise():
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).double() for i in range(STEPS)]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_dpm_solver(order, solver, stochastic):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order,
        solver_type=solver,
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(STEPS)
    options = {"order": order, "solver": solver, "stochastic": stochastic, "clip": None}
    table = dd.dpm_solver(SCHEDULE, timesteps=scheduler.timesteps.tolist(), **options)
    noise = given_noise() if stochastic else None
    assert_near(ours(table, noise), theirs(scheduler, noise))


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc(variant):
    """Their last step of bh1, whose B is infinite, is NaN; ours is compared up to there."""
    scheduler = diffusers.UniPCMultistepScheduler(solver_type=variant, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    table = dd.unipc(SCHEDULE, timesteps=scheduler.timesteps.tolist(), variant=variant, clip=None)
    steps = STEPS - 1 if variant == "bh1" else STEPS
    assert_near(ours(table, steps=steps), theirs(scheduler, steps=steps))
    assert ours(table).isfinite().all()


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta", "trailing"])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_euler_and_heun(name, spacing):
    kinds = {"euler": diffusers.EulerDiscreteScheduler, "heun": diffusers.HeunDiscreteScheduler}
    own = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    by_noise = {f"use_{spacing}_sigmas": True} if spacing != "trailing" else {"timestep_spacing": spacing}
    scheduler = kinds[name](**{**own, **by_noise})
    scheduler.set_timesteps(STEPS)
    table = getattr(dd, name)(SCHEDULE, STEPS, spacing=spacing, clip=None)
    times = table.model_times
    np.testing.assert_allclose(times, scheduler.timesteps, rtol=1e-4, atol=1e-2)  # theirs of logarithms in float32
    assert_near(ours(table), theirs(scheduler))


def test_euler_ancestral():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    table = dd.euler_ancestral(SCHEDULE, STEPS, spacing="trailing", clip=None)
    noise = given_noise()
    assert_near(ours(table, noise), theirs(scheduler, noise))


def test_lcm():
    scheduler = diffusers.LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", set_alpha_to_one=True)
    scheduler.set_timesteps(STEPS)
    table = dd.lcm(SCHEDULE, STEPS)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    noise = given_noise()
    assert_near(ours(table, noise), theirs(scheduler, noise))


@pytest.mark.parametrize(("options", "shift"), [({"shift": 3.0}, 3.0), ({"use_dynamic_shifting": True}, None)])
def test_flow(options, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    given = {} if shift else {"mu": 0.825}
    sigmas = np.linspace(1, 1 / STEPS, STEPS)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), **given)
    table = dd.flow_euler(sigmas=sigmas, shift=shift or dd.dynamic_shift(2176))
    np.testing.assert_allclose(table.times, scheduler.timesteps, rtol=1e-5)
    x = start()
    by_theirs = x.float()
    for i, t in enumerate(scheduler.timesteps):
        x = dd.reverse_step(x, torch.cos(3 * x), table, i)
        by_theirs = scheduler.step(torch.cos(3 * by_theirs), t, by_theirs).prev_sample
    assert_near(x, by_theirs.double())
