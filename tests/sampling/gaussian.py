"""Gaussian data, of which the model is known exactly, and what a sampler's rows make of them in closed form."""

import math

import torch
from bounds import gamma, reverse_step_error, rounded

import dd_kernels as dd
from dd_kernels.ops.reverse_step.table import COLUMNS

SCHEDULE = dd.linear_schedule(1000)


def gaussian_model(mean, std):
    """The exact epsilon for data N(mean, std^2): the score of the marginal is known in closed form."""

    def epsilon(x, t):
        alpha_bar = SCHEDULE.alpha_bar[int(t[0])]
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar) * mean) / variance

    return epsilon


def linear_steps(table):
    """Each step of a table with a model that is linear in x: (timestep, factor of x, factor of the output, sigma)."""
    for t, row in zip(table.timesteps.tolist(), table.rows.tolist(), strict=True):
        c = dict(zip(COLUMNS, row, strict=True))
        out = c["prev_from_x0"] * c["x0_num_out"] / c["x0_den"] + c["prev_from_out"]
        yield t, c["prev_from_x0"] * c["x0_num_x"] / c["x0_den"] + c["prev_from_x"], out, c["sigma"]


def rounding(table, std, x, error):
    """Returns what a sampler without noise makes of x, float64, for data N(0, std^2), and how far float32 may be off.

    A step multiplies the ``error`` of x by its gain, since it is linear, and rounds by the op's own bound. The model
    rounds six times: three factors, and three operations.
    """
    model = gaussian_model(0.0, std)
    for i, (t, from_x, from_out, _) in enumerate(linear_steps(table)):
        out, alpha_bar = model(x, [t]), SCHEDULE.alpha_bar[t]
        gain = from_x + from_out * math.sqrt(1 - alpha_bar) / (alpha_bar * std**2 + 1 - alpha_bar)
        size = x.abs() + error
        step = torch.full((len(x),), i)
        own, _ = reverse_step_error(table, step, size, model(size, [t]), e_out=gamma(6) * model(size, [t]))
        x = dd.reverse_step(x, out, table, i)
        error = rounded(x, abs(gain) * error + own, torch.float32, False)
    return x, error


def moments(table, mean, std, start=(0.0, 1.0)):
    """Mean and standard deviation that a sampler must reach with ``gaussian_model`` from those at its start."""
    m, variance = start[0], start[1] ** 2
    for t, from_x, from_out, sigma in linear_steps(table):
        alpha_bar = SCHEDULE.alpha_bar[t]
        slope = math.sqrt(1 - alpha_bar) / (alpha_bar * std**2 + 1 - alpha_bar)  # epsilon = slope x + offset
        offset = -slope * math.sqrt(alpha_bar) * mean
        gain = from_x + from_out * slope
        m, variance = gain * m + from_out * offset, gain**2 * variance + sigma**2
    return m, math.sqrt(variance)
