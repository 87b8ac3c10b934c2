"""Schedules against published values, diffusers and the equations of DDPM."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import dd_kernels as dd
from dd_kernels.schedules import SCHEDULES, from_alpha_bar_function


def test_linear_schedule_has_the_published_values():
    schedule = dd.linear_schedule(1000)
    assert schedule.alpha_bar[999] == pytest.approx(4.0358298e-5, rel=1e-7)
    assert schedule.alpha_bar[500] == pytest.approx(0.0777966584, rel=1e-8)
    assert schedule.posterior_variance[[1, 999]] == pytest.approx([5.4531877e-5, 0.0199999835], rel=1e-7)
    assert schedule.posterior_log_variance_clipped[:2] == pytest.approx([-9.8167251, -9.8167251], rel=1e-7)
    assert schedule.posterior_mean_coef_x_start[1] == pytest.approx(0.5452914995, rel=1e-9)
    assert schedule.posterior_mean_coef_x_t[1] == pytest.approx(0.4547084990, rel=1e-9)


def test_cosine_schedule_has_the_published_values():
    beta = dd.cosine_schedule(1000).beta
    assert beta[[0, 500, 999]] == pytest.approx([4.1284225e-5, 0.0031556914, 0.999], rel=1e-7)
    assert dd.cosine_schedule(1000, max_beta=0.5).beta.max() == 0.5


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("linear", {}),
        ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        ("squaredcos_cap_v2", {}),
        ("sigmoid", {}),
    ],
)
def test_betas_are_those_of_diffusers(name, peer):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_schedule=name, **peer).betas.double().numpy()
    # They compute in float32: a few roundings apart, and not one for the squared cosine.
    tolerance = 0 if name == "squaredcos_cap_v2" else 8 * np.finfo(np.float32).eps
    np.testing.assert_allclose(dd.named_schedule(name).beta, theirs, rtol=tolerance)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 1000])
def test_every_schedule_destroys_the_signal_step_by_step(name, num_timesteps):
    schedule = dd.named_schedule(name, num_timesteps)
    assert len(schedule) == num_timesteps
    assert np.all(schedule.alpha_bar < schedule.alpha_bar_prev)
    assert np.all(schedule.posterior_variance <= schedule.beta)
    assert np.all(np.isfinite(schedule.posterior_log_variance_clipped))
    np.testing.assert_allclose(schedule.snr, schedule.alpha_bar / (1 - schedule.alpha_bar))


@given(st.lists(st.floats(1e-6, 0.9), min_size=1, max_size=30))
def test_alpha_bars_and_betas_are_two_views_of_one_schedule(betas):
    schedule = dd.from_betas(betas)
    if schedule.alpha_bar[-1] > 1e-12:
        np.testing.assert_allclose(dd.from_alpha_bars(schedule.alpha_bar).beta, betas, rtol=1e-6)


def test_zero_terminal_snr_keeps_the_first_and_zeroes_the_last():
    schedule = dd.linear_schedule(1000)
    rescaled = dd.rescale_zero_terminal_snr(schedule)
    assert rescaled.alpha_bar[-1] == 0
    assert rescaled.snr[-1] == 0
    assert rescaled.alpha_bar[0] == pytest.approx(schedule.alpha_bar[0], rel=1e-12)
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(rescaled.alpha_bar, theirs, rtol=2e-4, atol=2e-8)


def test_marginal_is_the_composition_of_single_steps():
    schedule = dd.linear_schedule(50)
    x = torch.tensor([[0.7]], dtype=torch.float64)
    mean, variance = x, torch.zeros_like(x)
    for t in range(50):
        step = schedule.q_step(mean, torch.tensor([t]))
        mean, variance = step.mean, (1 - step.variance) * variance + step.variance
        marginal = schedule.q_mean_variance(x, torch.tensor([t]))
        torch.testing.assert_close(mean, marginal.mean)
        torch.testing.assert_close(variance, marginal.variance)
        torch.testing.assert_close(marginal.log_variance, marginal.variance.log())


def test_posterior_is_bayes_rule():
    # q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), both Gaussian in x_{t-1}.
    schedule = dd.linear_schedule(100, 1e-3, 0.2)
    x_start, x_t = torch.randn(2, 3, 4, dtype=torch.float64)
    for t in (1, 7, 99):
        alpha, beta, prior_variance = schedule.alpha[t], schedule.beta[t], 1 - schedule.alpha_bar_prev[t]
        precision = alpha / beta + 1 / prior_variance
        mean = (alpha**0.5 / beta * x_t + schedule.alpha_bar_prev[t] ** 0.5 / prior_variance * x_start) / precision
        posterior = schedule.q_posterior(x_start, x_t, torch.full((3,), t))
        torch.testing.assert_close(posterior.mean, mean)
        torch.testing.assert_close(posterior.variance, torch.full((3, 1), 1 / precision, dtype=torch.float64))
        torch.testing.assert_close(posterior.log_variance, posterior.variance.log())


def test_tables_are_read_only_and_repr_is_short():
    schedule = dd.linear_schedule(10)
    with pytest.raises(ValueError, match="read-only"):
        schedule.beta[0] = 0.5
    assert repr(schedule).startswith("Schedule(T=10, beta=0.0001..0.02")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: dd.from_betas([]),
            ValueError,
            r"betas must be a sequence of at least one number; got the shape \[0\]",
        ),
        (lambda: dd.from_betas([[0.1]]), ValueError, r"got the shape \[1, 1\]"),
        (lambda: dd.from_betas([0.1, 1.5]), ValueError, r"betas must lie in \(0, 1\]; got values from 0.1 to 1.5"),
        (lambda: dd.from_betas([0.1, float("nan")]), ValueError, "betas must lie in"),
        (lambda: dd.from_betas([0.0, 0.1]), ValueError, "betas must lie in"),
        (lambda: dd.from_betas([1.0, 0.1]), ValueError, "betas may be 1 only at the last step; got 1 at step 0"),
        (lambda: dd.from_betas([0.1, 1e-17]), ValueError, r"betas must make alpha_bar smaller .* got 1e-17 at step 1"),
        (lambda: dd.from_betas([0.9999] * 100), ValueError, "betas must make alpha_bar smaller at every step"),
        (lambda: dd.from_alpha_bars([0.5, float("nan")]), ValueError, "alpha_bars must decrease strictly"),
        (lambda: dd.from_alpha_bars([float("nan"), 0.5]), ValueError, "alpha_bars must decrease strictly"),
        (lambda: dd.from_alpha_bars([1.0, 0.5]), ValueError, "alpha_bars must decrease strictly"),
        (lambda: dd.from_alpha_bars([]), ValueError, "alpha_bars must be a sequence"),
        (lambda: dd.from_alpha_bars([0.5, 0.6]), ValueError, "alpha_bars must decrease strictly"),
        (lambda: dd.from_alpha_bars([0.5, -0.1]), ValueError, "alpha_bars must decrease strictly"),
        (lambda: dd.linear_schedule(0), ValueError, "num_timesteps must be at least 1; got 0"),
        (lambda: dd.linear_schedule(1.5), TypeError, "num_timesteps must be an int; got float"),
        (lambda: dd.linear_schedule(10, 0.3, 0.2), ValueError, "beta_start and beta_end must satisfy"),
        (lambda: dd.sigmoid_schedule(10, 0.0, 0.2), ValueError, "beta_start and beta_end must satisfy"),
        (lambda: dd.scaled_linear_schedule(10, 0.1, 1.0), ValueError, "beta_start and beta_end must satisfy"),
        (lambda: from_alpha_bar_function(5, lambda u: 1 - u / 2, 2.0), ValueError, "max_beta must lie in"),
        (lambda: dd.named_schedule("cubic"), ValueError, "name must be one of linear, .*; got 'cubic'"),
        (lambda: dd.rescale_zero_terminal_snr(dd.linear_schedule(1)), ValueError, "at least 2 timesteps"),
        (lambda: _mean(torch.tensor([0.5])), TypeError, "t must be an integer tensor; got torch.float32"),
        (lambda: _mean(3), TypeError, "t must be an integer tensor; got int"),
        (lambda: _mean(torch.tensor([1, 2, 3])), ValueError, r"t must have the shape \[2\].*got \[3\]"),
        (lambda: _mean(torch.tensor([0, 10])), ValueError, r"t must be in \[0, 10\); got 0 to 10"),
        (lambda: _mean(torch.tensor([-1, 3])), ValueError, r"t must be in \[0, 10\); got -1 to 3"),
    ],
)
def test_bad_input_gets_one_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


def _mean(t):
    return dd.linear_schedule(10).q_mean_variance(torch.zeros(2, 3), t)


def test_tables_first_met_in_a_compiled_function():
    """The function is one graph, compiled once, and reads what was uploaded while it was traced."""
    schedule = dd.linear_schedule(20)
    table = dd.ddim(schedule, 5)
    compiles = CompileCounter()

    def body(x, t, step):
        x_t = dd.q_sample(x, t, schedule, seed=1)
        return dd.reverse_step(x_t, x, table, step) + dd.q_sample(x, 3, schedule, seed=2)

    arguments = torch.randn(2, 3, 4, 4), torch.tensor([4, 19]), torch.tensor(2)
    torch.compiler.reset()
    compiled = torch.compile(body, fullgraph=True, backend=compiles)
    for _ in range(3):
        assert compiled(*arguments).equal(body(*arguments))
    assert compiles.frame_count == 1
    assert len(schedule.on(torch.device("cpu")).steps) == 20


@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.3), (-3.0, 3.0, 0.1)])
def test_sigmoid_alpha_bar_is_algorithm_1_of_jabri(start, end, tau):
    schedule = dd.sigmoid_alpha_bar_schedule(50, start, end, tau)
    u = np.arange(51) / 50
    level = 1 / (1 + np.exp(-(start + u * (end - start)) / tau))
    alpha_bar = (level[-1] - level) / (level[-1] - level[0])
    beta = np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)
    np.testing.assert_allclose(schedule.beta, beta, rtol=1e-9)
    assert schedule.beta[-1] == 0.999
    assert np.array_equal(dd.named_schedule("sigmoid_alpha_bar", 50).beta, dd.sigmoid_alpha_bar_schedule(50).beta)


def test_sigmoid_alpha_bar_refuses_a_range_that_is_none():
    for options in ({"start": 3.0}, {"tau": 0.0}):
        with pytest.raises(ValueError, match="start, end and tau must satisfy start < end and tau > 0"):
            dd.sigmoid_alpha_bar_schedule(10, **options)
