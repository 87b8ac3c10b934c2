"""The rows of the samplers for few steps against their papers' equations, in float64.

A tolerance of 1e-12 is ten thousand of its roundings, which logarithms and differences of levels make of a few; one of
1e-9 is of a sum of terms that are solved for, or magnified by 1 / beta.
"""

import math

import numpy as np
import pytest
import torch
from running_error import running_error

import dd_kernels as dd
from dd_kernels.ops.reverse_step.table import COLUMNS
from dd_kernels.samplers import rows
from dd_kernels.samplers.multistep import multistep_columns, unipc_columns
from dd_kernels.samplers.noise_levels import beta_quantile, distinct_draws, spaced_sigmas, times_of, visits
from dd_kernels.samplers.rows import Level

SCHEDULE = dd.linear_schedule(1000)
VISITED = [40, 130, 270, 480, 700, 900]
STEP = [name for name in COLUMNS if name.startswith("prev_") or name == "sigma"]
# Identities of float64: a hundred of its roundings, of 1e-16, times the 1e4 of 1 / beta where 1 - alpha cancels.
NEAR = {"rtol": 1e-10, "atol": 1e-12}


def assert_same_step(a, b):
    """Checks that two tables move x alike: all columns but those of x_0 are near."""
    for name in STEP:
        np.testing.assert_allclose(a.column(name), b.column(name), **NEAR, err_msg=name)


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
def test_euler_is_ddim_without_noise(prediction):
    options = {"prediction": prediction, "timesteps": VISITED, "clip": 0.7}
    a, b = dd.euler(SCHEDULE, **options), dd.ddim(SCHEDULE, **options)
    np.testing.assert_allclose(a.rows, b.rows, **NEAR)
    assert a.timesteps.equal(b.timesteps)
    assert a.times is None
    assert_same_step(dd.dpm_solver(SCHEDULE, order=1, **options), b)


def test_fresh_noise_is_that_of_ddpm():
    """Between these noise levels Euler's ancestral step and the SDE of first order are the posterior, eq. 7."""
    posterior = dd.ddpm(SCHEDULE, timesteps=VISITED)
    assert_same_step(dd.euler_ancestral(SCHEDULE, timesteps=VISITED), posterior)
    assert_same_step(dd.dpm_solver(SCHEDULE, order=1, stochastic=True, timesteps=VISITED), posterior)
    assert_same_step(dd.euler_ancestral(SCHEDULE, timesteps=VISITED, eta=0.0), dd.euler(SCHEDULE, timesteps=VISITED))
    some = {"timesteps": VISITED, "eta": 0.6}
    assert_same_step(dd.euler_ancestral(SCHEDULE, **some), dd.ddim(SCHEDULE, **some))


def test_second_order_is_algorithm_2():
    table = dd.dpm_solver(SCHEDULE, timesteps=VISITED, lower_order_final=False)
    alpha_bar = SCHEDULE.alpha_bar[VISITED[::-1]]
    alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    lam = np.log(alpha / sigma)
    assert table.column("prev_from_last")[[0, -1]].tolist() == [0, 0]
    for i in range(1, 5):
        h, last = lam[i + 1] - lam[i], lam[i] - lam[i - 1]
        r, whole = last / h, alpha[i + 1] * (1 - math.exp(-h))
        wanted = (whole * (1 + 0.5 / r), sigma[i + 1] / sigma[i], -whole * 0.5 / r)
        found = [table.column(name)[i] for name in ("prev_from_x0", "prev_from_x", "prev_from_last")]
        np.testing.assert_allclose(found, wanted, **NEAR)
    assert table.history == 1


# Levels of a diffusion model, of k-diffusion's variables and of a rectified flow.
SIGMAS = np.array([0.93, 0.8, 0.61, 0.5, 0.32, 0.21])
LEVELS = {
    "diffusion": Level((1 - SIGMAS**2) ** 0.5, SIGMAS),
    "variance exploding": Level(np.ones(6), 10 * SIGMAS),
    "flow": Level.of_flow(SIGMAS),
}


def steps_of(name):
    level = LEVELS[name]
    return Level(level.signal[:-1], level.noise[:-1]), Level(level.signal[1:], level.noise[1:])


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_polynomials_are_integrated_exactly(name, stochastic, degree):
    """x_0 a polynomial in lambda: eq. 8 of Lu et al. by quadrature of 40 nodes, exact to rounding here."""
    level, after = steps_of(name)
    order = np.minimum(degree + 1, np.arange(5) + 1)
    columns = multistep_columns(level, after, order, solver="heun", stochastic=stochastic)
    lam, lam_after = (np.log(v.signal / v.noise) for v in (level, after))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    k = 2 if stochastic else 1
    for i in range(degree, 5):
        h = lam_after[i] - lam[i]
        u = lam[i] + h * (nodes + 1) / 2
        integral = (weights * k * np.exp(k * (u - lam_after[i])) * u**degree).sum() * h / 2
        earlier = [lam[i - j] ** degree if i >= j else 0.0 for j in range(3)]
        names = ("prev_from_x0", "prev_from_last", "prev_from_older")
        assert sum(columns[n][i] * m for n, m in zip(names, earlier, strict=True)) == pytest.approx(
            after.signal[i] * integral, rel=1e-9
        )
        ratio = after.noise[i] / level.noise[i]
        assert columns["prev_from_x"][i] == pytest.approx(ratio * math.exp(-h * (k - 1)), rel=1e-12)
    if stochastic:
        variance = after.noise**2 * (1 - np.exp(-2 * (lam_after - lam)))
        np.testing.assert_allclose(columns["sigma"] ** 2, variance, rtol=1e-12)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_is_the_paper_s_corrector_and_predictor(name, variant):
    """The updates as the paper has them, which keep x of before the step, on any x_0."""
    level, after = steps_of(name)
    order = np.array([1, 2, 2, 2, 1])
    columns = unipc_columns(level, after, order, variant=variant)
    lam, lam_after = (np.log(v.signal / v.noise) for v in (level, after))
    m = np.random.default_rng(0).normal(size=5)
    row_x = paper_x = 1.3
    before = None

    def update(i, x, weights, differences):
        h = lam_after[i] - lam[i]
        b = math.expm1(-h) if variant == "bh2" else -h
        base = after.noise[i] / level.noise[i] * x - after.signal[i] * math.expm1(-h) * m[i]
        return base - after.signal[i] * b * sum(w * d for w, d in zip(weights, differences, strict=True))

    for i in range(5):
        if i > 0:
            j, h = i - 1, lam_after[i - 1] - lam[i - 1]
            weights, differences = [0.5], [m[i] - m[j]]
            if order[j] == 2:
                r = (lam[j - 1] - lam[j]) / h
                b = math.expm1(-h) if variant == "bh2" else -h
                phi2 = math.expm1(-h) / -h - 1
                phi3 = phi2 / -h - 0.5
                weights = np.linalg.solve([[1, 1], [r, 1]], [phi2 / b, 2 * phi3 / b])
                differences = [(m[j - 1] - m[j]) / r, m[i] - m[j]]
            paper_x = update(j, before, weights, differences)
        before = paper_x
        r = (lam[i - 1] - lam[i]) / (lam_after[i] - lam[i])
        paper_x = update(i, before, *(([0.5], [(m[i - 1] - m[i]) / r]) if order[i] == 2 else ([], [])))
        names = ("prev_from_x0", "prev_from_last", "prev_from_older")
        row_x = columns["prev_from_x"][i] * row_x
        row_x += sum(columns[n][i] * m[i - k] for k, n in enumerate(names) if i >= k)
        assert row_x == pytest.approx(paper_x, rel=1e-9)


def test_heun_is_the_trapezoidal_rule():
    """Algorithm 1 of Karras et al. in x / signal, on any x_0."""
    table = dd.heun(SCHEDULE, timesteps=VISITED[:4])
    assert table.timesteps.tolist() == [480, 270, 270, 130, 130, 40, 40]
    alpha_bar = SCHEDULE.alpha_bar[VISITED[3::-1]]
    s, alpha = ((1 - alpha_bar) / alpha_bar) ** 0.5, np.append(alpha_bar**0.5, 1.0)
    m = np.random.default_rng(0).normal(size=7)
    x = row_x = 0.7
    for step in range(4):
        scaled, end = x / alpha[step], np.append(s, 0.0)[step + 1]
        slope = (scaled - m[2 * step]) / s[step]
        moved = scaled + (end - s[step]) * slope
        if step < 3:
            second = (moved - m[2 * step + 1]) / end
            moved = scaled + (end - s[step]) * (slope + second) / 2
        x = moved * alpha[step + 1]
        for row in (2 * step, 2 * step + 1)[: 1 + (step < 3)]:
            c = {name: float(table.column(name)[row]) for name in STEP}
            row_x = c["prev_from_x0"] * m[row] + c["prev_from_x"] * row_x + c["prev_from_last"] * m[row - 1]
        assert row_x == pytest.approx(x, rel=1e-9)


def test_lcm():
    schedule = dd.scaled_linear_schedule(1000)
    table = dd.lcm(schedule, steps=4)
    assert table.timesteps.tolist() == [999, 759, 499, 259]
    assert dd.lcm(schedule, steps=2, original_steps=10).timesteps.tolist() == [999, 499]
    for i, t in enumerate([999, 759, 499, 259]):
        after = schedule.alpha_bar[[759, 499, 259][i]] if i < 3 else 1.0
        skip, out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
        wanted = {"prev_from_x0": after**0.5 * out, "prev_from_x": after**0.5 * skip, "sigma": (1 - after) ** 0.5}
        for name, value in wanted.items():
            assert float(table.column(name)[i]) == pytest.approx(value, rel=1e-12, abs=1e-15)


def test_flow():
    table = dd.flow_euler(5, shift=3.0)
    before = np.linspace(1, 0.001, 5)
    sigma = 3 * before / (1 + 2 * before)
    np.testing.assert_allclose(table.times, 1000 * sigma, rtol=1e-12)
    np.testing.assert_allclose(table.column("prev_from_out"), np.append(sigma[1:], 0) - sigma, rtol=1e-12)
    assert not table.stochastic
    # On one straight line every number of steps is exact.
    x0, z = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    for sampler in (dd.flow_euler(3, shift=0.5), dd.flow_euler(sigmas=[1.0, 0.2]), dd.flow_euler(1)):
        found = dd.sample(lambda x, t: z - x0, z, sampler)
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-12)
    noisy = dd.flow_euler(4, stochastic=True)
    noise = torch.randn(4, 1, 3, 4, 4, dtype=torch.float64)
    x, predicted = dd.reverse_step(z, z - x0, noisy, 0, noise=noise[0], return_x0=True)
    after = 0.667
    torch.testing.assert_close(predicted, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(x, (1 - after) * x0 + after * noise[0], rtol=0, atol=1e-12)
    assert float(noisy.column("sigma")[-1]) == 0


def test_dynamic_shift_is_flux_s():
    """exp(mu), mu linear from 0.5 at 256 tokens to 1.15 at 4096."""
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        assert dd.dynamic_shift(tokens) == pytest.approx(math.exp(mu), rel=1e-14)  # a hundred roundings


def test_spacings():
    karras = spaced_sigmas(80.0, 0.002, 5, "karras")
    np.testing.assert_allclose(np.diff(karras ** (1 / 7)), np.diff(karras ** (1 / 7))[0], rtol=1e-9)
    exponential = spaced_sigmas(80.0, 0.002, 5, "exponential")
    np.testing.assert_allclose(np.diff(np.log(exponential)), np.log(0.002 / 80) / 4, rtol=1e-9)
    assert np.array_equal(exponential, spaced_sigmas(80.0, 0.002, 5, "logsnr"))
    beta = spaced_sigmas(1.0, 0.5, 5, "beta")
    assert beta[0] - beta[1] == pytest.approx(beta[3] - beta[4], rel=1e-10)
    assert beta[0] - beta[1] < beta[1] - beta[2]
    for sigmas in (karras, exponential):
        np.testing.assert_allclose(sigmas[[0, -1]], [80, 0.002], rtol=1e-12)


def test_quantiles_of_beta():
    """Quantiles are right where the distribution function has a closed form."""
    p = np.linspace(0, 1, 21)
    for a, b, exact in (
        (1.0, 1.0, p),
        (2.0, 1.0, p**0.5),
        (1.0, 3.0, 1 - (1 - p) ** (1 / 3)),
        (0.5, 0.5, np.sin(np.pi * p / 2) ** 2),
    ):
        np.testing.assert_allclose(beta_quantile(p, a, b), exact, rtol=0, atol=1e-12)


def test_times_between_timesteps():
    sigma = ((1 - SCHEDULE.alpha_bar) / SCHEDULE.alpha_bar) ** 0.5
    np.testing.assert_allclose(times_of(SCHEDULE, sigma[[3, 700]]), [3, 700], rtol=1e-12)
    assert times_of(SCHEDULE, np.array([(sigma[7] * sigma[8]) ** 0.5]))[0] == pytest.approx(7.5, rel=1e-10)
    table = dd.euler(SCHEDULE, 10)
    assert table.times[[0, -1]].tolist() == [999, 0]
    assert (table.times != table.timesteps).any()
    asked = []
    dd.sample(lambda x, t: asked.append(t) or x, (2, 1, 2, 2), table, seed=0)
    assert all(t.dtype is torch.float32 and t.shape == (2,) for t in asked)
    assert [float(t[0]) for t in asked] == table.times.float().tolist()


def test_every_step_draws_noise_of_its_own():
    assert distinct_draws(np.array([9.0, 4.2, 1.3, 1.2, 0.6, 0.0])).tolist() == [9, 4, 3, 2, 1, 0]
    assert distinct_draws(np.array([9.4, 4.0, 0.0])).tolist() == [9, 4, 0]
    table = dd.euler_ancestral(SCHEDULE, 400)
    assert len(set(table.timesteps.tolist())) == 400


def test_orders_rise_and_fall():
    def of(steps, order, final):
        table = dd.dpm_solver(SCHEDULE, steps, order=order, lower_order_final=final)
        last, older = (table.column(name) != 0 for name in ("prev_from_last", "prev_from_older"))
        return (1 + last.int() + older.int()).tolist()

    assert of(6, 3, True) == of(6, 3, None) == [1, 2, 3, 3, 2, 1]
    assert of(6, 3, False) == [1, 2, 3, 3, 3, 1]
    assert of(15, 3, None) == [1, 2, *[3] * 12, 1]
    assert of(2, 3, False) == [1, 1]
    assert of(1, 2, None) == [1]


@pytest.mark.parametrize("sampler", [dd.dpm_solver, dd.unipc, dd.euler, dd.euler_ancestral, dd.heun])
def test_options_reach_the_table(sampler):
    threshold = dd.DynamicThreshold(0.9, 2.0)
    table = sampler(SCHEDULE, 4, clip=threshold, learned_variance=True, spacing="trailing", prediction="v")
    assert (table.threshold, table.learned_variance, table.times) == (threshold, True, None)
    assert table.timesteps.unique().tolist() == [249, 499, 749, 999]
    x = torch.randn(2, 3, 4, 4)
    steps = torch.tensor([0, 1])
    out = torch.randn(2, 6, 4, 4)
    history = table.history_like(x)
    noise = {"seed": 0} if table.stochastic else {}
    for h in history:
        h.zero_()
    assert dd.reverse_step(x, out, table, steps, history=history, **noise).isfinite().all()


@pytest.mark.parametrize("sampler", [dd.dpm_solver, dd.unipc, dd.euler, dd.euler_ancestral])
def test_no_signal_at_the_start(sampler):
    schedule = dd.rescale_zero_terminal_snr(SCHEDULE)
    table = sampler(schedule, 5, prediction="v", spacing="trailing")
    finite = [i for i, name in enumerate(COLUMNS) if name != "x0_clip"]
    assert table.rows[:, finite].isfinite().all()
    assert dd.sample(lambda x, t: x, (2, 1, 4, 4), table, seed=0).isfinite().all()
    with pytest.raises(ValueError, match=r"spacing must be one of linspace.*alpha_bar 0"):
        sampler(schedule, 5, prediction="v", spacing="karras")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dd.dpm_solver(SCHEDULE, order=4), "order must be 1, 2 or 3; got 4"),
        (lambda: dd.dpm_solver(SCHEDULE, solver="euler"), "solver must be one of midpoint, heun; got 'euler'"),
        (lambda: dd.dpm_solver(SCHEDULE, spacing="ays"), "spacing must be one of linspace.*karras.*; got 'ays'"),
        (lambda: dd.dpm_solver(SCHEDULE, 0), "steps must be an int of at least 1; got 0"),
        (lambda: dd.dpm_solver(SCHEDULE, timesteps=[5, 5]), r"timesteps must differ from one another; got \[5, 5\]"),
        (lambda: dd.dpm_solver(SCHEDULE, prediction="flow"), "prediction must be one of epsilon, x_start, v"),
        (lambda: dd.unipc(SCHEDULE, order=3), "order must be 1 or 2; got 3"),
        (lambda: dd.unipc(SCHEDULE, variant="bh3"), "variant must be one of bh1, bh2"),
        (
            lambda: dd.heun(dd.rescale_zero_terminal_snr(SCHEDULE), timesteps=[5, 999], prediction="v"),
            "schedule must leave some signal .*; got alpha_bar 0",
        ),
        (lambda: dd.euler_ancestral(SCHEDULE, eta=1.5), r"eta must lie in \[0, 1\]; got 1.5"),
        (lambda: dd.lcm(SCHEDULE, 60), r"steps must be an int in \[1, 50\], the original steps; got 60"),
        (lambda: dd.lcm(SCHEDULE, original_steps=2000), r"original_steps must be in \[1, 1000\]; got 2000"),
        (lambda: dd.lcm(SCHEDULE, timesteps=[3, 3]), "timesteps must differ from one another"),
        (lambda: dd.flow_euler(0), "steps must be an int of at least 1; got 0"),
        (lambda: dd.flow_euler(shift=0.0), "shift must be above 0; got 0.0"),
        (lambda: dd.flow_euler(sigmas=[0.5, 0.7]), "sigmas must be a sequence of at least one number, decreasing"),
        (lambda: dd.flow_euler(sigmas=[1.5, 0.7]), r"sigmas must be in \(0, 1\]; got 1.5 to 0.7"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rows_of_torch_are_those_of_numpy():
    """In float64 the same numbers; in float32 to their rounding."""
    level, after = steps_of("diffusion")

    def in_torch(dtype):
        return (Level(*(torch.from_numpy(v).to(dtype) for v in end)) for end in (level, after))

    order = np.array([1, 2, 3, 2, 1])
    calls = (
        lambda a, b, o: multistep_columns(a, b, o),
        lambda a, b, o: multistep_columns(a, b, o, solver="heun", stochastic=True, as_diffusers=True),
        lambda a, b, o: unipc_columns(a, b, o.clip(max=2) if hasattr(o, "clip") else o),
        lambda a, b, o: rows.ancestral_columns(a, b),
        lambda a, b, o: rows.line_columns(a, b),
        lambda a, b, o: rows.correction_columns(a, b),
        lambda a, b, o: rows.consistency_columns(a.noise, b, 0.5, 10.0, o < 3),
        lambda a, b, o: rows.flow_columns(a.noise, b.noise),
    )
    for call in calls:
        expected = call(level, after, order)
        with running_error() as running:
            exact = call(*in_torch(torch.float64), torch.tensor(order))
            errors = {name: running.error(v) for name, v in exact.items() if isinstance(v, torch.Tensor)}
        found = call(*in_torch(torch.float32), torch.tensor(order))
        for name, value in expected.items():
            np.testing.assert_allclose(exact[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
            if name not in errors:
                assert found[name] == exact[name]
                continue
            assert (exact[name].dtype, found[name].dtype) == (torch.float64, torch.float32)
            assert ((found[name] - exact[name]).abs() <= errors[name]).all(), name


def test_a_level_is_its_alpha_bar():
    visited = visits(SCHEDULE, 7, "logsnr", None)
    np.testing.assert_allclose(visited.level.signal**2, visited.alpha_bar, rtol=1e-12)
    assert visited.after.noise[-1] == 0
    np.testing.assert_allclose(
        np.diff(np.log(visited.level.signal / visited.level.noise)),
        np.diff(np.log(visited.level.signal / visited.level.noise))[0],
        rtol=1e-9,
    )
