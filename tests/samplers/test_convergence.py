"""The order at which each solver converges, measured where the exact denoiser is known."""

from functools import cache, partial

import pytest
from gaussian_mixture import SCHEDULE, errors, slopes, solve, start

import dd_kernels as dd
from dd_kernels.samplers import multistep, noise_levels, solver_table
from dd_kernels.samplers.dpm_solver import orders

FREE = {"clip": None, "spacing": "logsnr"}
HIGH = {**FREE, "lower_order_final": False}
# The sampler and the order of its global error: the last step, to x_0 itself, is the same for all.
SOLVERS = {
    "euler": (partial(dd.euler, SCHEDULE, **FREE), 1),
    "dpm++ of first order": (partial(dd.dpm_solver, SCHEDULE, order=1, **HIGH), 1),
    "dpm++ midpoint": (partial(dd.dpm_solver, SCHEDULE, **HIGH), 2),
    "dpm++ heun": (partial(dd.dpm_solver, SCHEDULE, solver="heun", **HIGH), 2),
    "dpm++ of third order": (partial(dd.dpm_solver, SCHEDULE, order=3, **HIGH), 3),
    "heun": (partial(dd.heun, SCHEDULE, **FREE), 2),
    "unipc of first order": (partial(dd.unipc, SCHEDULE, order=1, **HIGH), 2),
    "unipc, bh2": (partial(dd.unipc, SCHEDULE, **HIGH), 3),
    "unipc, bh1": (partial(dd.unipc, SCHEDULE, variant="bh1", **HIGH), 3),
}
STEPS = (40, 80, 160)


@cache
def exact():
    """A hundred times below the error of every solver at 160 steps: third order, at 2,000."""
    return solve(dd.dpm_solver(SCHEDULE, 2000, order=3, **HIGH), start())


@pytest.mark.parametrize("name", SOLVERS)
def test_order(name):
    """The error is C n^-p (1 + O(1/n)): from 80 to 160 steps its slope is within a few tenths of p.

    A tenth below p already tells p from p - 1; upwards the next term of the expansion may add what it likes.
    """
    sampler, order = SOLVERS[name]
    found = errors(sampler, STEPS, exact())
    measured = slopes(found)
    print(f"{name}: errors {', '.join(f'{e:.1e}' for e in found)} at {STEPS} steps; slopes {measured}")
    assert order - 0.15 <= measured[-1] <= order + 0.5


def test_with_the_weights_of_their_code_third_order_is_second():
    """What diffusers takes for D2's weight is half of what integrates a parabola."""

    def sampler(steps):
        levels = noise_levels.visits(SCHEDULE, steps, "logsnr", None)
        each = orders(steps, 3, False)
        columns = multistep.multistep_columns(levels.level, levels.after, each, as_diffusers=True)
        return solver_table.solver_table(levels, columns, "epsilon", None)

    assert slopes(errors(sampler, (160, 320), exact()))[0] < 2.3


def test_few_steps_are_nearer_than_many_of_ddim():
    def error(sampler, steps):
        return errors(partial(sampler, SCHEDULE, clip=None), (steps,), exact())[0]

    ddim, solver = ([error(f, n) for n in steps] for f, steps in ((dd.ddim, (10, 50)), (dd.dpm_solver, (10, 20))))
    print(f"DDIM at 10 and 50 steps {ddim}, DPM-Solver++ at 10 and 20 {solver}")
    assert solver[0] < ddim[0] / 3
    assert solver[1] < ddim[1]


@pytest.mark.parametrize("spacing", ["karras", "beta", "trailing"])
def test_every_spacing_leads_to_the_same_samples(spacing):
    """All go from the same x_T to the same x_0: with four times the steps the distance falls at least to a half."""
    found = errors(partial(dd.dpm_solver, SCHEDULE, clip=None, spacing=spacing), (160, 640), exact())
    assert found[1] < found[0] / 2
