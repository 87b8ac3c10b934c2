"""The algebra of rows: the same over numpy and torch, and each formula against the equation that defines it.

Both sides are float64. Tolerances are ten of its roundings, of 1e-16, times what a difference magnifies them by: 1e2
for 1 / sqrt(alpha_bar), and another 1e2 for 1 / sqrt(1 - alpha_bar).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dd_kernels as dd
from dd_kernels.samplers import rows

SCHEDULE = dd.linear_schedule(1000)
LEVELS = SCHEDULE.alpha_bar[[999, 700, 300, 20]]
BEFORE = SCHEDULE.alpha_bar[[900, 500, 299, 0]]


def _functions(a, b):
    """Every function of the algebra, of alpha_bar and alpha_bar_prev."""
    step = rows.Transition.between(a, b)
    draws = b < 0.9
    variance = dd.schedules.posterior_variance(*step)
    columns = [rows.posterior_columns(step), rows.x0_of_mean(step), rows.ode_columns(b, a)]
    columns += [rows.variance_columns(kind, variance, step.beta, draws) for kind in rows.VARIANCES]
    columns += [rows.x0_columns(p, a) for p in rows.PREDICTIONS]
    for eta in (0.0, 0.7, 1.0):
        sigma = rows.ddim_sigma(a, b, eta)
        for epsilon in (rows.epsilon_of_x0(a), *(rows.epsilon_of_output(p, a) for p in rows.PREDICTIONS)):
            columns += [rows.ddim_columns(b, epsilon, sigma), rows.x0_of_epsilon(a, epsilon)]
    return columns


def test_numpy_and_torch_give_the_same_columns() -> None:
    ours = _functions(LEVELS, BEFORE)
    theirs = _functions(torch.from_numpy(LEVELS), torch.from_numpy(BEFORE))
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            # Elementary functions of the two libraries may differ in the last digit.
            np.testing.assert_allclose(np.asarray(one[name]), np.asarray(other[name]), rtol=1e-15, err_msg=name)


@pytest.mark.parametrize("prediction", rows.PREDICTIONS)
def test_x0_and_epsilon_of_an_output_lie_on_the_line_through_x_t(prediction: str) -> None:
    x, out = np.random.default_rng(0).normal(size=(2, 4))
    columns = {"x0_num_x": 0.0, "x0_den": 1.0} | rows.x0_columns(prediction, LEVELS)
    x0 = (columns["x0_num_x"] * x + columns["x0_num_out"] * out) / columns["x0_den"]
    epsilon = rows.epsilon_of_output(prediction, LEVELS)
    noise = epsilon.from_x * x + epsilon.from_out * out
    np.testing.assert_allclose(np.sqrt(LEVELS) * x0 + np.sqrt(1 - LEVELS) * noise, x, rtol=1e-13)
    again = rows.epsilon_of_x0(LEVELS)
    np.testing.assert_allclose(again.from_x0 * x0 + again.from_x * x, noise, rtol=1e-11)
    other = rows.x0_of_epsilon(LEVELS, epsilon)
    np.testing.assert_allclose((other["x0_num_x"] * x + other["x0_num_out"] * out) / other["x0_den"], x0, rtol=1e-11)


def test_x0_of_the_posterior_mean_is_x0() -> None:
    step = rows.Transition.between(LEVELS, BEFORE)
    mean = rows.posterior_columns(step)
    x, x0 = np.random.default_rng(1).normal(size=(2, 4))
    columns = rows.x0_of_mean(step)
    out = mean["prev_from_x0"] * x0 + mean["prev_from_x"] * x
    back = (columns["x0_num_x"] * x + columns["x0_num_out"] * out) / columns["x0_den"]
    np.testing.assert_allclose(back, x0, rtol=1e-12)


def test_the_odes_step_is_the_inversions() -> None:
    """One step of DDIM's ODE (eq. 13) towards more noise equals eq. 12 by way of x_0."""
    x, epsilon = np.random.default_rng(2).normal(size=(2, 4))
    one = rows.ode_columns(BEFORE, LEVELS)
    to = rows.ddim_columns(LEVELS, rows.GIVEN_EPSILON)
    x0 = (x - np.sqrt(1 - BEFORE) * epsilon) / np.sqrt(BEFORE)
    wanted = to["prev_from_x0"] * x0 + to["prev_from_x"] * x + to["prev_from_out"] * epsilon
    np.testing.assert_allclose(one["prev_from_x"] * x + one["prev_from_out"] * epsilon, wanted, rtol=1e-12)


def test_sigma_and_direction_of_a_step_to_more_noise_are_not_nan() -> None:
    sigma = rows.ddim_sigma(BEFORE, LEVELS, 1.0)
    assert (sigma == 0).all()
    columns = rows.ddim_columns(BEFORE, rows.GIVEN_EPSILON, sigma=2.0)
    assert (columns["prev_from_out"] == 0).all()


def test_learned_values_are_the_log_variance_itself() -> None:
    columns = rows.variance_columns("learned", LEVELS, LEVELS, draws=np.array([True, True, True, False]))
    assert columns["sigma"].tolist() == [1, 1, 1, 0]
    low, high = columns["log_var_min"], columns["log_var_max"]
    value = np.linspace(-9, 3, 7)
    np.testing.assert_array_equal(low + (value + 1) / 2 * (high - low), value)
