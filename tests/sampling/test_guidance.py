"""Classifier-free and classifier guidance against closed forms."""

import math

import pytest
import torch
from bounds import assert_within, gamma
from float64_runs import FLOAT64
from sample_bounds import assert_samples_are, bounded, bounded_sample

import dd_kernels as dd
from dd_kernels.sampling.guidance import classifier_guided, predict, rescaled

SCHEDULE = dd.linear_schedule(1000)
SHAPE = (3, 2, 4, 4)


def model(x, t, y):
    return x * y.reshape(-1, 1, 1, 1)


def test_classifier_free_guidance_is_one_call_of_twice_the_batch():
    sizes = []

    def counted(x, t, y, mode="a"):
        sizes.append(len(x))
        return model(x, t, y)

    x, t, y = torch.randn(SHAPE), torch.full((3,), 5), torch.tensor([1.0, 2.0, 3.0])
    out, uncond = predict(counted, x, t, {"y": y, "mode": "a"}, {"y": torch.zeros(3), "mode": "a"})
    assert sizes == [6]
    assert torch.equal(out, model(x, t, y))
    assert torch.equal(uncond, torch.zeros(SHAPE))


@pytest.mark.parametrize(
    "uncond_kwargs", [{"y": torch.zeros(1)}, {"y": torch.zeros(3), "extra": 1}, {"y": torch.tensor(0.0)}]
)
def test_arguments_that_cannot_be_joined_take_two_calls(uncond_kwargs):
    sizes = []

    def counted(x, t, y, extra=None):
        sizes.append(len(x))
        return x * y.reshape(-1, 1, 1, 1)

    x, y = torch.randn(SHAPE), torch.ones(3)
    out, uncond = predict(counted, x, torch.zeros(3), {"y": y}, uncond_kwargs)
    assert sizes == [3, 3]
    assert torch.equal(out, x)
    assert not uncond.any()


def test_guided_sampling_extrapolates_from_the_unconditional():
    table = dd.ddim(SCHEDULE, 5)
    y = torch.tensor([0.1, 0.2, 0.3])
    kwargs = {"model_kwargs": {"y": y}, "uncond_kwargs": {"y": torch.zeros(3)}, "seed": 0}
    # The model is linear in y, so that guidance from y = 0 is the model at scale * y.
    for scale in (2.5, 1.0):
        wanted = bounded_sample(model, SHAPE, table, model_kwargs={"y": scale * y.double()})
        assert_samples_are(wanted, dd.sample(model, SHAPE, table, guidance_scale=scale, **kwargs))


def gaussian_epsilon(x, t):
    """The exact epsilon for data N(0, 1): x_t is N(0, 1) too, and epsilon its share of the noise."""
    return math.sqrt(1 - SCHEDULE.alpha_bar[int(t[0])]) * x


def log_probability(x, t):
    """Returns log p(y = 1 | x_t), up to a constant, where y = x_0 + N(0, 1)."""
    alpha_bar = SCHEDULE.alpha_bar[int(t[0])]
    variance = 1 + (1 - alpha_bar)  # of y given x_t, where x_0 given x_t is N(sqrt(alpha_bar) x_t, 1 - alpha_bar)
    return (-((1.0 - math.sqrt(alpha_bar) * x) ** 2) / (2 * variance)).flatten(1).sum(1)


def test_classifier_guidance_samples_the_posterior():
    guided = classifier_guided(gaussian_epsilon, log_probability, SCHEDULE)
    x = dd.sample(guided, (20, 1024), dd.ddim(SCHEDULE, 200, clip=None), seed=0)
    # N(0, 1) given y = 1 with noise 1 is N(1/2, 1/2): to five standard errors.
    assert float(x.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(0.5 / x.numel()))
    assert float(x.var()) == pytest.approx(0.5, abs=5 * 0.5 * math.sqrt(2 / x.numel()))


def test_classifier_guidance_keeps_the_learned_variance_and_scale_0_the_model():
    def learned(x, t):
        return torch.cat((gaussian_epsilon(x, t), torch.full_like(x, 0.25)), dim=1)

    x, t = torch.randn(SHAPE), torch.full((3,), 400)
    out = classifier_guided(learned, log_probability, SCHEDULE, scale=2.0)(x, t)
    assert torch.equal(out[:, 2:], learned(x, t)[:, 2:])
    assert not torch.equal(out[:, :2], learned(x, t)[:, :2])
    assert torch.equal(classifier_guided(learned, log_probability, SCHEDULE, scale=0.0)(x, t), learned(x, t))


def error_of_levels(ratio):
    """Returns the relative error of signal and noise in float32, which between timesteps are sigmoids of a logarithm.

    log(noise / signal) is off by 3 roundings of the ratio, 4 of the logarithm and 4 of what lies between, of its size;
    the root of the sigmoid halves twice of that, and adds 6.
    """
    return gamma(9) + gamma(8) * abs(math.log(ratio))


@pytest.mark.parametrize("prediction", ["x_start", "v"])
@pytest.mark.parametrize("timestep", [0, 400, 998.5])
def test_classifier_guidance_of_other_predictions_is_that_of_epsilon(prediction, timestep):
    """x_0 and v of the guided epsilon are the guided x_0 and v, whose definitions are algebra of x_t and epsilon."""
    x, t = torch.randn(SHAPE, dtype=torch.float64), torch.full((3,), timestep)
    log_alpha = SCHEDULE.snr[[math.floor(timestep), math.ceil(timestep)]]
    alpha = 1 / (1 + 1 / math.sqrt(log_alpha[0] * log_alpha[1]))  # between timesteps log-SNR is linear; here the middle
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)

    def of_epsilon(epsilon):
        x0 = (x - noise * epsilon) / signal
        return x0 if prediction == "x_start" else signal * epsilon - noise * x0

    log_p = lambda x, t: (x**2).flatten(1).sum(1)  # noqa: E731
    epsilon = classifier_guided(lambda x, t: torch.sin(x), log_p, SCHEDULE, 0.5)(x, t)
    model = lambda x, t: of_epsilon(torch.sin(x))  # noqa: E731
    found = classifier_guided(model, log_p, SCHEDULE, 0.5, prediction)(x, t)
    # The change is a product and quotient of at most three of the levels, and epsilon's is of one.
    wanted, change = of_epsilon(epsilon), (of_epsilon(epsilon) - model(x, t)).abs()
    assert ((found - wanted).abs() <= 4 * error_of_levels(noise / signal) * change).all()


@pytest.mark.parametrize("prediction", ["x_start", "v"])
def test_where_x_t_holds_nothing_of_x_0_a_classifier_changes_nothing(prediction):
    schedule = dd.rescale_zero_terminal_snr(SCHEDULE)
    x, model = torch.randn(SHAPE), lambda x, t: 0.5 * x
    guided = classifier_guided(model, lambda x, t: x.flatten(1).sum(1), schedule, 2.0, prediction)
    assert guided(x, torch.full((3,), 999)).equal(0.5 * x)
    assert not guided(x, torch.full((3,), 998)).equal(0.5 * x)
    with pytest.raises(ValueError, match="prediction must be one of epsilon, x_start, v; got 'score'"):
        classifier_guided(model, model, schedule, prediction="score")


def test_classifier_guidance_between_timesteps():
    """A float timestep that equals a whole one gives the same guidance and the same posterior."""
    x, t = torch.randn(SHAPE), torch.full((3,), 400)
    epsilon = lambda x, t: x  # noqa: E731
    guided = classifier_guided(epsilon, lambda x, t: x.flatten(1).sum(1), SCHEDULE)
    exact = guided(x.double(), t)  # but for the level of noise, which is rounded once
    relative = gamma(2) + error_of_levels(SCHEDULE.snr[400] ** -0.5)
    for result in (guided(x, t.float()), guided(x, t)):
        assert_within(result, exact, relative * (exact - x).abs())
    low, between, high = (float((x - guided(x, t + d))[0].flatten()[0]) for d in (0, 0.5, 1))
    assert low < between < high


@pytest.mark.parametrize("channels", [2, 4])
def test_guidance_is_rescaled_to_the_conditional_deviation(channels):
    """Eq. 15 and 16 of Lin et al. (2023); a learned variance behind the prediction stays."""
    out, uncond = torch.randn(2, 3, channels, 4, 5).unbind(0)
    full = rescaled(out, uncond, 3.0, 1.0, 2)
    exact, u = (uncond.double() + 3.0 * (out.double() - uncond.double()))[:, :2], uncond.double()
    ratio = (out.double()[:, :2].std((1, 2, 3)) / exact.std((1, 2, 3))).reshape(-1, 1, 1, 1)
    for amount in (0.0, 0.25, 1.0):
        ((_, error),) = bounded(lambda amount=amount: rescaled(out.double(), u, 3.0, amount, 2)[:, :2])
        assert_within(rescaled(out, uncond, 3.0, amount, 2)[:, :2], (amount * ratio + 1 - amount) * exact, error)
    assert full[:, 2:].equal(out[:, 2:])
    assert rescaled(out.half(), uncond.half(), 3.0, 1.0, 2).dtype is torch.float16


def test_sample_rescales_guidance():
    scale = {"model_kwargs": {"y": torch.ones(2)}, "uncond_kwargs": {"y": torch.zeros(2)}, "guidance_scale": 4.0}

    def model(x, t, y):
        return torch.tanh(x + y.reshape(-1, 1, 1, 1))

    def run(amount):
        return dd.sample(model, (2, 1, 4, 4), dd.ddim(SCHEDULE, 3), seed=0, guidance_rescale=amount, **scale)

    def by_hand(x, t):
        return rescaled(model(x, t, torch.ones(2)), model(x, t, torch.zeros(2)), 4.0, 0.7, 1)

    assert_samples_are(bounded_sample(by_hand, (2, 1, 4, 4), dd.ddim(SCHEDULE, 3)), run(0.7))
    assert not run(0.7).equal(run(0.0))
    with pytest.raises(ValueError, match=r"guidance_rescale must lie in \[0, 1\]; got 1.5"):
        run(1.5)


def bent(x, t, y):
    """A model that is not linear in its condition, in the dtype of x."""
    return torch.tanh(x + y.reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000)


BENT = {"model_kwargs": {"y": torch.full((3,), 0.5)}, "uncond_kwargs": {"y": torch.zeros(3)}, "seed": 0}


@pytest.mark.parametrize("interval", [None, (100, 500), (250.0, 250.0), (-1, 99.5), (1000, 2000)])
def test_an_interval_of_guidance_is_the_loop_by_hand(interval):
    """DDIM's eq. 12 in float64, with Ho & Salimans's (1 + w) cond - w uncond within the interval alone."""
    table, w, sizes = dd.ddim(SCHEDULE, 20, clip=None), 1.5, []

    def counted(x, t, y):
        sizes.append(len(x))
        return bent(x, t, y)

    start = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"guidance_scale": 1 + w, "guidance_interval": interval, **BENT}
    found = dd.sample(counted, start, table, **options)

    x, low, high = start, *(interval or (0, 999))
    times = table.timesteps.tolist()
    for t, after in zip(times, [*times[1:], None], strict=True):
        now = torch.full((3,), t)
        out, uncond = bent(x, now, BENT["model_kwargs"]["y"]), bent(x, now, BENT["uncond_kwargs"]["y"])
        epsilon = (1 + w) * out - w * uncond if low <= t <= high else out
        alpha_bar, later = SCHEDULE.alpha_bar[t], 1.0 if after is None else SCHEDULE.alpha_bar[after]
        x0 = (x - math.sqrt(1 - alpha_bar) * epsilon) / math.sqrt(alpha_bar)
        x = math.sqrt(later) * x0 + math.sqrt(1 - later) * epsilon
    _, error = bounded_sample(bent, start, table, **options)
    assert ((found - x).abs() <= FLOAT64 * error).all()
    assert sizes == [6 if low <= t <= high else 3 for t in times]


def test_an_interval_lies_between_timesteps_too():
    """Euler's times are floats; progressive sampling, and a rescale, follow the same interval."""
    table = dd.euler(SCHEDULE, 6, spacing="karras")
    options = {"guidance_scale": 3.0, "guidance_rescale": 0.5, **BENT}
    times = sorted(table.model_times.tolist())
    guided = [times[2], times[3]]
    assert times[2] != round(times[2])

    def by_hand(x, t):
        out, uncond = bent(x, t, options["model_kwargs"]["y"]), bent(x, t, options["uncond_kwargs"]["y"])
        return rescaled(out, uncond, 3.0, 0.5, 2) if guided[0] <= float(t[0]) + 1e-3 <= guided[1] + 2e-3 else out

    *_, last = dd.sample_progressive(bent, SHAPE, table, guidance_interval=guided, **options)
    assert_samples_are(bounded_sample(by_hand, SHAPE, table), last.x)
    assert not last.x.equal(dd.sample(bent, SHAPE, table, **options))


@pytest.mark.parametrize("interval", [(2, 1), (math.nan, 3), (1,), (1, 2, 3)])
def test_bad_intervals(interval):
    with pytest.raises(ValueError, match="guidance_interval must be two timesteps, the lower one first; got"):
        dd.sample(bent, SHAPE, dd.ddim(SCHEDULE, 2), guidance_interval=interval, **BENT)
