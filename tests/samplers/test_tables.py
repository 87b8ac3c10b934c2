"""The tables of the samplers against the equations of their papers, in float64.

A tolerance of 1e-9 is a thousand of its roundings, times the 1e4 of 1 / beta where a difference makes it.
"""

import itertools

import numpy as np
import pytest
import torch

import dd_kernels as dd
from dd_kernels.ops.reverse_step.table import COLUMNS, from_columns
from dd_kernels.samplers.timesteps import SPACINGS

SCHEDULE = dd.linear_schedule(1000)


def update(table, i, x, out, z=0.0):
    """Row i applied in float64, in scalar code of its own."""
    c = {name: float(table.column(name)[i]) for name in COLUMNS}
    x0 = np.clip((c["x0_num_x"] * x + c["x0_num_out"] * out) / c["x0_den"], -c["x0_clip"], c["x0_clip"])
    return c["prev_from_x0"] * x0 + c["prev_from_x"] * x + c["prev_from_out"] * out + c["sigma"] * z


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, 1000])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_spacings_visit_exactly_the_steps_asked_for(spacing, steps):
    sequence = dd.timestep_sequence(1000, steps, spacing)
    assert len(sequence) == steps
    assert np.all(np.diff(sequence) > 0)
    assert sequence[0] >= 0
    assert sequence[-1] < 1000
    if spacing != "leading":
        assert sequence[-1] == 999


@pytest.mark.parametrize("steps", [61, 103, 121])
def test_trailing_is_right_where_floating_ranges_give_one_step_too_many(steps):
    sequence = dd.timestep_sequence(1000, steps, "trailing")
    assert len(sequence) == steps
    assert sequence[0] >= 0


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 20, 50, 100])
def test_spacings_are_those_of_diffusers(spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert dd.ddim(SCHEDULE, steps, spacing=spacing).timesteps.tolist() == scheduler.timesteps.tolist()


def test_quadratic_spacing_is_that_of_the_ddim_code():
    sequence = dd.timestep_sequence(1000, 20, "quadratic")
    np.testing.assert_array_equal(sequence, [int(s) for s in np.linspace(0, np.sqrt(800), 20) ** 2])


def test_ddpm_rows_are_algorithm_2():
    table = dd.ddpm(SCHEDULE, clip=None)
    rng = np.random.default_rng(0)
    for t in (999, 500, 1, 0):
        x, epsilon, z = rng.normal(size=3)
        beta, alpha, alpha_bar = SCHEDULE.beta[t], SCHEDULE.alpha[t], SCHEDULE.alpha_bar[t]
        sigma = np.sqrt(SCHEDULE.posterior_variance[t])
        expected = (x - beta / np.sqrt(1 - alpha_bar) * epsilon) / np.sqrt(alpha) + sigma * z
        assert update(table, 999 - t, x, epsilon, z) == pytest.approx(expected, rel=1e-9)
    assert table.timesteps.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_rows_are_equation_12(eta):
    table = dd.ddim(SCHEDULE, 10, eta=eta, clip=None)
    timesteps = [*table.timesteps.tolist(), None]
    rng = np.random.default_rng(0)
    for i, (t, t_prev) in enumerate(itertools.pairwise(timesteps)):
        a, a_prev = SCHEDULE.alpha_bar[t], 1.0 if t_prev is None else SCHEDULE.alpha_bar[t_prev]
        x, epsilon, z = rng.normal(size=3)
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
        x0 = (x - np.sqrt(1 - a) * epsilon) / np.sqrt(a)
        expected = np.sqrt(a_prev) * x0 + np.sqrt(1 - a_prev - sigma**2) * epsilon + sigma * z
        assert update(table, i, x, epsilon, z) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert table.stochastic == (eta > 0)


def test_ddim_with_eta_1_is_ddpm_on_every_timestep():
    ddim, ddpm = dd.ddim(SCHEDULE, 1000, eta=1.0), dd.ddpm(SCHEDULE)
    # Float64's roundings, times the 1e4 of 1 / beta, which one side takes from a difference.
    torch.testing.assert_close(ddim.rows[:, :8], ddpm.rows[:, :8], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("table", [dd.ddpm, dd.ddim])
def test_predictions_are_one_sampler(table):
    tables = {p: table(SCHEDULE, 20, prediction=p) for p in ("epsilon", "x_start", "v")}
    rng = np.random.default_rng(0)
    for i, t in enumerate(tables["epsilon"].timesteps.tolist()):
        a = SCHEDULE.alpha_bar[t]
        x0, epsilon = rng.uniform(-1, 1), rng.normal()
        x = np.sqrt(a) * x0 + np.sqrt(1 - a) * epsilon
        v = np.sqrt(a) * epsilon - np.sqrt(1 - a) * x0  # Salimans & Ho (2022), appendix D
        results = [update(tables[p], i, x, out) for p, out in (("epsilon", epsilon), ("x_start", x0), ("v", v))]
        assert results == pytest.approx([results[0]] * 3, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_timestep_that_comes_twice_changes_nothing(eta):
    once = dd.ddim(SCHEDULE, timesteps=[0, 3, 500], eta=eta, clip=None)
    twice = dd.ddim(SCHEDULE, timesteps=[0, 0, 3, 500, 500], eta=eta, clip=None)
    x0, epsilon = 0.4, -1.1
    x = y = np.sqrt(SCHEDULE.alpha_bar[500]) * x0 + np.sqrt(1 - SCHEDULE.alpha_bar[500]) * epsilon
    for i in range(3):
        x = update(once, i, x, epsilon)
    for i in range(5):
        y = update(twice, i, y, epsilon)
    assert y == pytest.approx(x, rel=1e-12)
    assert twice.column("sigma")[0] == 0  # the step from timestep 500 to 500 adds no noise


def test_subsequence_has_the_betas_of_its_own_process():
    # Nichol & Dhariwal (2021), eq. 19: fixed_large on 20 steps has the variance 1 - alpha_bar / alpha_bar_prev.
    table = dd.ddpm(SCHEDULE, 20, variance="fixed_large")
    alpha_bar = SCHEDULE.alpha_bar[table.timesteps.numpy()]
    beta = 1 - alpha_bar / np.append(alpha_bar[1:], 1.0)
    np.testing.assert_allclose(table.column("sigma")[:-1] ** 2, beta[:-1], rtol=1e-12)
    small = dd.ddpm(SCHEDULE, 20).column("sigma")
    assert (small[:-1] < table.column("sigma")[:-1]).all()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_the_last_step_adds_no_noise(variance, steps):
    table = dd.ddpm(SCHEDULE, steps, variance=variance)
    assert table.column("sigma")[-1] == 0
    assert (table.column("sigma")[:-1] > 0).all()
    assert torch.isfinite(table.rows[:, [i for i, name in enumerate(COLUMNS) if name != "x0_clip"]]).all()


def test_learned_range_lies_between_the_two_fixed_variances():
    table = dd.ddpm(SCHEDULE, 20, variance="learned_range")
    assert table.learned_variance
    for column, variance in (("log_var_min", "fixed_small"), ("log_var_max", "fixed_large")):
        fixed = dd.ddpm(SCHEDULE, 20, variance=variance).column("sigma")
        torch.testing.assert_close(torch.exp(table.column(column) / 2)[:-1], fixed[:-1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
def test_inversion_is_the_mirror_of_ddim_on_a_straight_line(prediction):
    # Where the model knows x_0 and epsilon exactly, x_t stays on the line between them both ways.
    inversion = dd.ddim_inversion(SCHEDULE, 20, prediction=prediction)
    sampler = dd.ddim(SCHEDULE, 20, prediction=prediction, clip=None)
    assert inversion.timesteps.tolist() == sampler.timesteps.tolist()[::-1]
    x0, epsilon = 0.3, -0.8

    def out(x, t):
        # What a perfect model says at t of the x that it is given, epsilon being known.
        a = SCHEDULE.alpha_bar[t]
        predicted = (x - np.sqrt(1 - a) * epsilon) / np.sqrt(a)
        return {
            "epsilon": epsilon,
            "x_start": predicted,
            "v": (epsilon - np.sqrt(1 - a) * x) / np.sqrt(a),
        }[prediction]

    x = x0
    for i, t in enumerate(inversion.timesteps.tolist()):
        x = update(inversion, i, x, out(x, t))
        assert x == pytest.approx(
            np.sqrt(SCHEDULE.alpha_bar[t]) * x0 + np.sqrt(1 - SCHEDULE.alpha_bar[t]) * epsilon, rel=1e-9
        )
    for i, t in enumerate(sampler.timesteps.tolist()):
        x = update(sampler, i, x, out(x, t))
    assert x == pytest.approx(x0, rel=1e-9)


def test_zero_terminal_snr_is_finite_where_x0_is_clipped():
    schedule = dd.rescale_zero_terminal_snr(SCHEDULE)
    for table in (dd.ddim(schedule, 10, spacing="trailing"), dd.ddpm(schedule, 10)):
        assert table.column("x0_den")[0] == 0
        x = torch.randn(2, 3, 4, 4)
        assert dd.reverse_step(x, torch.randn_like(x), table, 0, seed=0).isfinite().all()


def test_clip_is_a_column_and_a_threshold_an_attribute():
    assert (dd.ddim(SCHEDULE, 5, clip=2.0).column("x0_clip") == 2).all()
    assert (dd.ddim(SCHEDULE, 5, clip=None).column("x0_clip") == float("inf")).all()
    rule = dd.DynamicThreshold(0.9, 3.0)
    assert dd.ddpm(SCHEDULE, 5, clip=rule).threshold == rule


def test_a_slice_of_a_table_is_a_table():
    whole = dd.ddpm(SCHEDULE, 5, variance="learned_range", clip=dd.DynamicThreshold(0.9))
    part = whole[2:4]
    assert torch.equal(part.rows, whole.rows[2:4])
    assert torch.equal(part.timesteps, whole.timesteps[2:4])
    assert (part.learned_variance, part.threshold) == (True, whole.threshold)
    assert part.stochastic
    assert not whole[4:].rows[:, COLUMNS.index("sigma")].any()
    assert len(whole[5:]) == 0
    few = dd.dpm_solver(SCHEDULE, 4)
    assert torch.equal(few[:2].times, few.times[:2])
    with pytest.raises(ValueError, match=r"cannot be cut where x_0 of an earlier step is read.* before step 1"):
        few[1:]
    with pytest.raises(TypeError, match=r"a table is cut by slices, such as table\[10:\]; got int"):
        whole[1]


def test_a_table_is_uploaded_once():
    table = dd.ddim(SCHEDULE, 5)
    first = table.on(torch.device("cpu"))
    assert table.on(torch.device("cpu")) is first
    assert first.rows.dtype == torch.float32
    assert len(first.steps) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dd.ddpm(SCHEDULE, 0), r"steps must be an int in \[1, 1000\]; got 0"),
        (lambda: dd.ddim(SCHEDULE, 1001), r"steps must be an int in \[1, 1000\]; got 1001"),
        (lambda: dd.ddim(SCHEDULE, 2.5), r"steps must be an int in \[1, 1000\]; got 2.5"),
        (lambda: dd.ddim(SCHEDULE, spacing="cubic"), "spacing must be one of linspace.*got 'cubic'"),
        (lambda: dd.ddim(SCHEDULE, 900, spacing="quadratic"), "timesteps must differ.*take fewer steps"),
        (lambda: dd.ddpm(SCHEDULE, timesteps=[3, 3]), "timesteps must differ.* for DDPM; got"),
        (lambda: dd.ddim(SCHEDULE, timesteps=[]), "timesteps must be a sequence of at least one int"),
        (lambda: dd.ddim(SCHEDULE, timesteps=[0.5]), "timesteps must be a sequence of at least one int"),
        (lambda: dd.ddim(SCHEDULE, timesteps=[5, 1000]), r"timesteps must be in \[0, 1000\); got 5 to 1000"),
        (lambda: dd.ddpm(SCHEDULE, 5, timesteps=[5]), "only one of steps and timesteps may be given; got both"),
        (lambda: dd.ddim(SCHEDULE, eta=1.5), r"eta must lie in \[0, 1\]; got 1.5"),
        (lambda: dd.ddim(SCHEDULE, prediction="x0"), "prediction must be one of epsilon, x_start, v; got 'x0'"),
        (lambda: dd.ddim_inversion(SCHEDULE, prediction="x0"), "prediction must be one of"),
        (lambda: dd.ddpm(SCHEDULE, variance="large"), "variance must be one of fixed_small.*got 'large'"),
        (lambda: dd.ddpm(SCHEDULE, clip=-1.0), "clip must be a positive number.*got -1.0"),
        (lambda: dd.DynamicThreshold(ratio=0.0), r"ratio must lie in \(0, 1\]; got 0.0"),
        (lambda: dd.DynamicThreshold(max_value=0.5), "max_value must be at least 1; got 0.5"),
        (lambda: dd.StepTable(torch.zeros(3, 2), torch.zeros(3)), r"rows must have the shape \[S, 12\]; got \[3, 2\]"),
        (lambda: dd.StepTable(torch.zeros(3, 10), torch.zeros(2)), r"timesteps must have the shape \[3\]; got \[2\]"),
    ],
)
def test_bad_input_gets_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("sampler", [dd.ddpm, dd.ddim])
def test_zero_snr_and_epsilon_need_a_clip(sampler):
    """Without a clip x_0 is 0 / 0, a NaN that only a sample would show."""
    schedule = dd.rescale_zero_terminal_snr(dd.linear_schedule(20))
    with pytest.raises(ValueError, match=r"prediction must be 'v' or 'x_start', or x_0 be clipped.*clip=None"):
        sampler(schedule, 10, clip=None, spacing="trailing")
    for options in ({"prediction": "v"}, {"prediction": "x_start"}, {"steps": None, "timesteps": [0, 5, 18]}):
        table = sampler(schedule, **{"steps": 10, "clip": None, "spacing": "trailing", **options})
        assert table.column("x0_den").min() > 0
    clipped = sampler(schedule, 10, spacing="trailing")
    x = torch.randn(1, 2, 2, 2)
    assert dd.reverse_step(x, x + 1, clipped, 0, seed=0).isfinite().all()


def test_rows_of_any_float_layout_and_integers():
    table = dd.ddpm(dd.linear_schedule(20), 10)
    strided = torch.stack((table.rows, table.rows), -1)[..., 0]
    x = torch.randn(1, 2, 2, 2)
    expected = dd.reverse_step(x, x, table, 3, seed=0)
    for rows in (strided, table.rows.float(), table.rows.clone().requires_grad_()):
        for timesteps in (table.timesteps, table.timesteps.int(), torch.stack((table.timesteps,) * 2, -1)[:, 0]):
            again = dd.StepTable(rows, timesteps)
            assert (again.rows.dtype, again.timesteps.dtype) == (torch.float64, torch.int64)
            assert dd.reverse_step(x, x, again, 3, seed=0).equal(expected)


@pytest.mark.parametrize(
    ("rows", "timesteps", "error", "message"),
    [
        ([[0.0] * 10], torch.zeros(1), TypeError, "rows must be a torch.Tensor; got list"),
        (torch.zeros(1, 10), [0], TypeError, "timesteps must be a torch.Tensor; got list"),
        (torch.zeros(1, 10, dtype=torch.int64), torch.zeros(1), TypeError, "rows must be of a floating dtype"),
        (torch.zeros(1, 10), torch.zeros(1), TypeError, "timesteps must be integers; got torch.float32"),
        (torch.zeros(1, 10), torch.tensor([True]), TypeError, "timesteps must be integers; got torch.bool"),
        (torch.zeros(1, 10), torch.tensor([-1]), ValueError, r"timesteps must be in \[0, 2\^32\); got -1 to -1"),
        (torch.zeros(1, 10), torch.tensor([1 << 32]), ValueError, r"timesteps must be in \[0, 2\^32\)"),
    ],
)
def test_a_table_of_wrong_tensors_is_refused(rows, timesteps, error, message):
    with pytest.raises(error, match=message):
        dd.StepTable(rows, timesteps)


def test_unknown_columns_are_refused():
    with pytest.raises(TypeError, match=r"a table has the columns.*got sigm"):
        from_columns(np.arange(3), sigm=1.0)


def test_spacings_are_the_names_the_docstring_gives():
    assert all(f"``{name}``" in dd.timestep_sequence.__doc__ for name in SPACINGS)
