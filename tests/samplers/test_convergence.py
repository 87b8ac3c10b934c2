"""The order at which each solver converges, measured where the exact denoiser is known."""

from functools import partial

import pytest

import dd_kernels as dd
from benchmarks.few_steps import MARKS, PLOT, README, STEPS, draw, measured, table
from benchmarks.gaussian_mixture import SCHEDULE, SOLVERS, errors, slopes
from dd_kernels.samplers import multistep, noise_levels, solver_table
from dd_kernels.samplers.dpm_solver import orders


@pytest.mark.parametrize("name", SOLVERS)
def test_order(name):
    """The error is C n^-p (1 + O(1/n)): from 40 to 80 steps its slope is within a few tenths of p.

    A tenth below p already tells p from p - 1; upwards the next term of the expansion may add what it likes.
    """
    found, order = measured(name), SOLVERS[name][1]
    slope = slopes(found)
    print(f"{name}: errors {', '.join(f'{e:.1e}' for e in found)} at {STEPS} steps; slopes {slope}")
    assert order - 0.15 <= slope[-1] <= order + 0.5


def test_the_readme_has_these_figures():
    """Written by ``python -m benchmarks.few_steps``; the last digit may be another processor's."""
    written = README.read_text().split(MARKS[0])[1].split(MARKS[1])[0].strip().splitlines()
    for a, b in zip(written[2:], table().splitlines()[2:], strict=True):
        first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in (a, b))
        assert first[0] == second[0]
        assert [float(v) for v in first[1:]] == pytest.approx([float(v) for v in second[1:]], rel=0.11)


def test_the_plot_is_drawn_and_the_readme_names_it(tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert str(PLOT.relative_to(README.parent)) in README.read_text()


def test_with_the_weights_of_their_code_third_order_is_second():
    """What diffusers takes for D2's weight is half of what integrates a parabola."""

    def sampler(steps):
        levels = noise_levels.visits(SCHEDULE, steps, "logsnr", None)
        each = orders(steps, 3, False)
        columns = multistep.multistep_columns(levels.level, levels.after, each, as_diffusers=True)
        return solver_table.solver_table(levels, columns, "epsilon", None)

    assert slopes(errors(sampler, (80, 160)))[0] < 2.3


def test_few_steps_are_nearer_than_many_of_ddim():
    def error(sampler, steps):
        return errors(partial(sampler, SCHEDULE, clip=None), (steps,))[0]

    ddim, solver = ([error(f, n) for n in steps] for f, steps in ((dd.ddim, (10, 50)), (dd.dpm_solver, (10, 20))))
    print(f"DDIM at 10 and 50 steps {ddim}, DPM-Solver++ at 10 and 20 {solver}")
    assert solver[0] < ddim[0] / 3
    assert solver[1] < ddim[1]


@pytest.mark.parametrize("spacing", ["karras", "beta", "trailing"])
def test_every_spacing_leads_to_the_same_samples(spacing):
    """All go from the same x_T to the same x_0: with four times the steps the distance falls at least to a half."""
    found = errors(partial(dd.dpm_solver, SCHEDULE, clip=None, spacing=spacing), (80, 320))
    assert found[1] < found[0] / 2
