"""sample and sample_progressive: distributions, noise, batches, peers and errors."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from bounds import assert_within
from float64_runs import FLOAT64
from gaussian import SCHEDULE, gaussian_model, moments
from sample_bounds import assert_samples_are, bounded, bounded_sample

import dd_kernels as dd
from dd_kernels.sampling import requests

SHAPE = (4, 3, 6, 6)


def model(x, t, gain=0.3):
    return gain * torch.tanh(x) + 1e-4 * t.reshape(-1, 1, 1, 1)


SAMPLERS = {
    "ddpm": dd.ddpm(SCHEDULE, clip=None),
    "ddpm-large": dd.ddpm(SCHEDULE, 200, variance="fixed_large", clip=None),
    "ddim": dd.ddim(SCHEDULE, 200, clip=None),
    "ddim-0.5": dd.ddim(SCHEDULE, 200, eta=0.5, clip=None),
    "ddim-1": dd.ddim(SCHEDULE, 200, eta=1.0, clip=None, spacing="linspace"),
}


@pytest.mark.parametrize("table", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_samples_have_the_mean_and_variance_that_the_rows_imply(table):
    mean, std, count = 0.4, 0.5, 16_384
    x = dd.sample(gaussian_model(mean, std), (count // 1024, 1024), table, seed=3)
    expected_mean, expected_std = moments(table, mean, std)
    # Five standard errors of the estimates.
    assert float(x.mean()) == pytest.approx(expected_mean, abs=5 * std / math.sqrt(count))
    assert float(x.std()) == pytest.approx(expected_std, rel=5 / math.sqrt(2 * count))


@pytest.mark.parametrize(
    "sampler",
    [
        dd.ddpm,
        lambda *args, **options: dd.ddpm(*args, variance="fixed_large", **options),
        dd.ddim,
        lambda *args, **options: dd.ddim(*args, eta=0.5, **options),
        lambda *args, **options: dd.ddim(*args, eta=1.0, **options),
    ],
    ids=SAMPLERS.keys(),
)
def test_more_steps_come_closer_to_the_data(sampler):
    errors = [abs(moments(sampler(SCHEDULE, steps, clip=None), 0.4, 0.5)[1] - 0.5) for steps in (20, 100, 1000)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01 * 0.5


@pytest.mark.parametrize("table", [dd.ddim(SCHEDULE, 10), dd.ddim(SCHEDULE, 10, eta=1.0), dd.ddpm(SCHEDULE, 10)])
def test_an_image_does_not_depend_on_its_batch(table):
    whole = dd.sample(model, SHAPE, table, seed=5)
    assert torch.equal(dd.sample(model, SHAPE, table, seed=5, batch_size=3), whole)
    alone = [dd.sample(model, (1, *SHAPE[1:]), table, seed=5, first_sample=n) for n in range(SHAPE[0])]
    assert torch.equal(torch.cat(alone), whole)
    assert not torch.equal(dd.sample(model, SHAPE, table, seed=6), whole)


def test_every_step_of_a_noisy_sampler_has_noise_of_its_own():
    table = dd.ddpm(SCHEDULE, 20)
    still = torch.zeros(1, 3, 16, 16)
    # Where x_t and epsilon are 0, all that a step leaves is its noise.
    noise = [dd.reverse_step(still, still, table, i, seed=0).flatten().numpy() for i in range(19)]
    correlation = np.corrcoef([*noise, dd.randn((1, 3, 16, 16), seed=0).flatten().numpy()])
    assert np.abs(correlation - np.eye(20)).max() < 5 / math.sqrt(768)


def test_noise_may_be_given_by_tensor_sequence_function_or_generator():
    table = dd.ddpm(SCHEDULE, 10)
    x_T = torch.randn(SHAPE)
    noise = torch.randn(10, *SHAPE)
    expected = dd.sample(model, x_T, table, noise=noise)
    assert torch.equal(dd.sample(model, x_T, table, noise=list(noise)), expected)
    assert torch.equal(dd.sample(model, x_T, table, noise=lambda step: noise[step]), expected)
    assert torch.equal(dd.sample(model, x_T, table, noise=noise, batch_size=3), expected)

    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(SHAPE, generator=generator) for _ in range(10)]  # x_T, then nine noisy steps
    expected = dd.sample(model, drawn[0], table, noise=lambda step: drawn[step + 1])
    assert torch.equal(dd.sample(model, SHAPE, table, generator=torch.Generator().manual_seed(0)), expected)


def test_without_a_source_torchs_own_seed_decides():
    table = dd.ddpm(SCHEDULE, 5)
    torch.manual_seed(1)
    first = dd.sample(model, SHAPE, table)
    assert not torch.equal(dd.sample(model, SHAPE, table), first)
    torch.manual_seed(1)
    assert torch.equal(dd.sample(model, SHAPE, table), first)


def _global_draws(call):
    """Returns whether a call moves torch's global generator."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    call()
    return not torch.equal(torch.get_rng_state(), before)


def test_nothing_is_drawn_that_is_not_used():
    noisy, still = dd.ddpm(SCHEDULE, 5), dd.ddim(SCHEDULE, 5)
    x_T, noise = torch.zeros(SHAPE), torch.zeros(5, *SHAPE)
    assert not _global_draws(lambda: dd.sample(model, x_T, noisy, noise=noise))
    assert not _global_draws(lambda: dd.sample(model, x_T, still))
    assert not _global_draws(lambda: dd.sample(model, SHAPE, noisy, seed=0))
    assert not _global_draws(lambda: dd.sample(model, SHAPE, noisy, generator=torch.Generator()))
    assert not _global_draws(lambda: list(dd.sample_progressive(model, x_T, still)))
    assert _global_draws(lambda: dd.sample(model, SHAPE, noisy, noise=noise))  # a seed for x_T is drawn
    assert _global_draws(lambda: dd.sample(model, x_T, noisy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table", [dd.ddpm(SCHEDULE, 5), dd.ddim(SCHEDULE, 5)])
def test_what_the_model_the_callback_and_the_caller_keep_is_never_written(table, dtype):
    kept = []

    def keep(x):
        kept.append((x, x.clone()))

    def keeping_model(x, t):
        keep(x)
        keep(x[1:].detach())  # a view of the storage of x
        return model(x, t).to(x.dtype)

    x_T = torch.randn(SHAPE).to(dtype)
    keep(x_T)
    for options in ({}, {"callback": lambda step: [keep(step.x), keep(step.x0)]}, {"batch_size": 3}):
        keep(dd.sample(keeping_model, x_T, table, seed=0, **options))
    keep(dd.sample(keeping_model, SHAPE, table, seed=0, dtype=dtype))
    for step in dd.sample_progressive(keeping_model, x_T, table, seed=0):
        keep(step.x)
    assert all(torch.equal(x, as_it_was) for x, as_it_was in kept)


def test_progressive_yields_every_step_and_ends_at_the_sample():
    table = dd.ddim(SCHEDULE, 7)
    steps = list(dd.sample_progressive(model, SHAPE, table, seed=2))
    assert [s.timestep for s in steps] == table.timesteps.tolist()
    assert [s.index for s in steps] == list(range(7))
    assert torch.equal(steps[-1].x, dd.sample(model, SHAPE, table, seed=2))
    assert torch.equal(steps[-1].x, steps[-1].x0)  # the last step of DDIM goes to x_0
    assert len({s.x.data_ptr() for s in steps}) == 7
    called = []
    dd.sample(model, SHAPE, table, seed=2, callback=called.append)
    assert all(torch.equal(a.x, b.x) and torch.equal(a.x0, b.x0) for a, b in zip(called, steps, strict=True))


def test_model_arguments_are_cut_with_the_batch():
    gains = torch.linspace(0, 1, 4).reshape(-1, 1, 1, 1)
    table = dd.ddim(SCHEDULE, 5)
    whole = dd.sample(model, SHAPE, table, seed=0, model_kwargs={"gain": gains})
    cut = dd.sample(model, SHAPE, table, seed=0, model_kwargs={"gain": gains}, batch_size=3)
    assert torch.equal(whole, cut)


def test_a_model_may_return_what_diffusers_returns():
    class Output:
        def __init__(self, sample):
            self.sample = sample

    table = dd.ddim(SCHEDULE, 5)
    expected = dd.sample(model, SHAPE, table, seed=0)
    assert torch.equal(dd.sample(lambda x, t: Output(model(x, t)), SHAPE, table, seed=0), expected)
    assert torch.equal(dd.sample(lambda x, t: (model(x, t), None), SHAPE, table, seed=0), expected)
    with pytest.raises(TypeError, match="model must return a tensor"):
        dd.sample(lambda x, t: None, SHAPE, table, seed=0)


def test_a_16_bit_model_gets_x_in_its_dtype_and_the_state_stays_float32():
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))

        def forward(self, x, t):
            assert x.dtype == torch.bfloat16
            return self.gain * x

    x = dd.sample(Half(), SHAPE, dd.ddim(SCHEDULE, 5), seed=0)
    assert x.dtype == torch.float32
    assert x.isfinite().all()


def test_inversion_then_sampling_returns_to_the_image():
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    latent = dd.sample(model, image, dd.ddim_inversion(SCHEDULE, 500))
    back = dd.sample(model, latent, dd.ddim(SCHEDULE, 500, clip=None))
    coarse_latent = dd.sample(model, image, dd.ddim_inversion(SCHEDULE, 50))
    coarse = dd.sample(model, coarse_latent, dd.ddim(SCHEDULE, 50, clip=None))
    error, coarse_error = (float((y - image).abs().max()) for y in (back, coarse))
    assert error < 0.03
    assert error < coarse_error / 5  # first order: ten times the steps, about a tenth of the error


def test_learned_variance_at_its_ends_is_the_fixed_variance():
    def learned(end):
        return lambda x, t: torch.cat((model(x, t), torch.full_like(x, end)), dim=1)

    table = dd.ddpm(SCHEDULE, 10, variance="learned_range")
    for end, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        fixed, _ = bounded_sample(model, SHAPE, dd.ddpm(SCHEDULE, 10, variance=variance))
        exact, error = bounded_sample(learned(end), SHAPE, table)
        assert ((exact - fixed).abs() <= FLOAT64 * error).all()
        assert_samples_are((exact, error), dd.sample(learned(end), SHAPE, table, seed=0))
    ddim = dd.ddim(SCHEDULE, 10, eta=0.5, learned_variance=True)
    wanted = bounded_sample(model, SHAPE, dd.ddim(SCHEDULE, 10, eta=0.5))
    assert_samples_are(wanted, dd.sample(learned(0.3), SHAPE, ddim, seed=0))


def in_float64(scheduler):
    """Returns a scheduler of diffusers whose coefficients are float64 numbers."""
    scheduler.alphas_cumprod = torch.tensor(SCHEDULE.alpha_bar)
    return scheduler


def test_dynamic_thresholding_is_imagens():
    diffusers = pytest.importorskip("diffusers")
    rule = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
    scheduler = in_float64(diffusers.DDPMScheduler(**rule))
    x, out, noise = torch.randn(3, *SHAPE)
    with patch.object(diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *_, **__: noise.double()):
        theirs = scheduler.step(out.double(), 999, x.double())
    table = dd.ddpm(SCHEDULE, clip=dd.DynamicThreshold(0.9, 2.0))

    def step(dtype=torch.float32):
        given = (v.to(dtype) for v in (x, out))
        return requests.reverse_step(*given, table, 0, noise=noise, return_x0=True)

    wanted = bounded(lambda: step(torch.float64))
    expected = (theirs.prev_sample, theirs.pred_original_sample)
    for (exact, error), value, their in zip(wanted, step(), expected, strict=True):
        assert_within(value, exact, error)
        assert ((their - exact).abs() <= FLOAT64 * error).all()


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_is_that_of_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = in_float64(diffusers.DDIMScheduler())
    scheduler.set_timesteps(steps)
    x_T = torch.randn(SHAPE)
    x = x_T.double()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t[None]), t, x, use_clipped_model_output=True).prev_sample
    table = dd.ddim(SCHEDULE, steps)
    exact, error = bounded_sample(model, x_T, table)
    assert_samples_are((exact, error), dd.sample(model, x_T, table))
    assert ((x - exact).abs() <= FLOAT64 * error).all()


def test_ddpm_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = in_float64(diffusers.DDPMScheduler())
    x_T, noise = torch.randn(SHAPE), torch.randn(1000, *SHAPE)
    x = x_T.double()
    for t, z in zip(scheduler.timesteps, noise, strict=True):
        with patch.object(diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *_, z=z, **__: z.double()):
            x = scheduler.step(model(x, t[None]), t, x).prev_sample
    table = dd.ddpm(SCHEDULE)
    exact, error = bounded_sample(model, x_T, table, noise=noise)
    assert_samples_are((exact, error), dd.sample(model, x_T, table, noise=noise))
    assert ((x - exact).abs() <= FLOAT64 * error).all()


def test_named_steps_are_rows_of_the_tables():
    x, out = torch.randn(2, *SHAPE)
    mean = dd.posterior_mean(out, x, 500, SCHEDULE)
    exact, wide = SCHEDULE.q_posterior(out.double(), x.double(), torch.full((4,), 500)).mean, (out.double(), x.double())
    ((_, error),) = bounded(lambda: dd.sampling.steps.posterior_mean(*wide, 500, SCHEDULE))
    assert_within(mean, exact, error)
    per_sample = torch.tensor([0, 3, 500, 999])
    stepped = dd.ddpm_step(x, out, per_sample, SCHEDULE, seed=4)
    for n, t in enumerate(per_sample.tolist()):
        row = dd.reverse_step(x[n : n + 1], out[n : n + 1], dd.ddpm(SCHEDULE), 999 - t, seed=4, first_sample=n)
        assert torch.equal(stepped[n : n + 1], row)
    table = dd.ddim(SCHEDULE, 50, eta=0.3)
    for i, (t, t_prev) in enumerate(((980, 960), (960, 940))):
        expected = dd.reverse_step(x, out, table, i, seed=4)
        assert torch.equal(dd.ddim_step(x, out, t, t_prev, SCHEDULE, eta=0.3, seed=4), expected)
    expected = dd.reverse_step(x, out, table, 49, seed=4)
    assert torch.equal(dd.ddim_step(x, out, 0, -1, SCHEDULE, eta=0.3, seed=4), expected)


def test_empty_batch_gives_an_empty_sample():
    assert dd.sample(model, (0, 3, 4, 4), dd.ddim(SCHEDULE, 3), seed=0).shape == (0, 3, 4, 4)


def test_progress_is_shown_when_asked_for(capsys):
    dd.sample(model, SHAPE, dd.ddim(SCHEDULE, 3), seed=0, progress=True)
    assert "3/3" in capsys.readouterr().err
    dd.sample(model, SHAPE, dd.ddim(SCHEDULE, 3), seed=0)
    assert capsys.readouterr().err == ""


GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": 1, "generator": GENERATOR}, ValueError, "only one of seed and generator"),
        ({"noise": [], "generator": GENERATOR}, ValueError, "only one of noise and generator"),
        ({"noise": torch.zeros(2, *SHAPE)}, ValueError, "noise must hold one tensor per step, 5; got 2"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator; got int"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^64\); got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an int; got float"),
        ({"seed": 0, "first_sample": -2}, ValueError, "first_sample must be in"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1; got 0"),
        ({"backend": "metal"}, ValueError, "backend must be one of auto.*got 'metal'"),
    ],
)
def test_bad_input_gets_one_clear_error(options, error, message):
    with pytest.raises(error, match=message):
        dd.sample(model, SHAPE, dd.ddpm(SCHEDULE, 5), **options)


def test_bad_model_table_and_shape_are_named():
    table = dd.ddim(SCHEDULE, 5)
    with pytest.raises(TypeError, match="model must be callable"):
        dd.sample(None, SHAPE, table)
    with pytest.raises(TypeError, match=r"table must be a StepTable.*got Schedule"):
        dd.sample(model, SHAPE, SCHEDULE)
    with pytest.raises(ValueError, match="shape_or_x must be a tensor or the shape"):
        dd.sample(model, (), table)
    with pytest.raises(ValueError, match=r"out must have the shape of x, \[4, 3, 6, 6\].*got \[4, 1, 6, 6\]"):
        dd.sample(lambda x, t: x[:, :1], SHAPE, table, seed=0)
    with pytest.raises(ValueError, match="t and t_prev must satisfy"):
        dd.ddim_step(torch.zeros(SHAPE), torch.zeros(SHAPE), 10, 10, SCHEDULE)
