"""image_to_image, interpolate, slerp, and DDIM's way to the latent and back."""

import math
from itertools import pairwise

import pytest
import torch
from bounds import assert_within
from float64_runs import FLOAT64, UNIT_OF_FLOAT64
from gaussian import SCHEDULE, gaussian_model, moments, rounding
from sample_bounds import assert_samples_are, bounded

import dd_kernels as dd
from dd_kernels.ops.randn import Stream

TABLE = dd.ddpm(SCHEDULE, 20)
IMAGES = torch.linspace(-1, 1, 4 * 3 * 6 * 6).reshape(4, 3, 6, 6)
MODEL = gaussian_model(0.2, 0.5)


def edited(images=IMAGES, table=TABLE, seed=5, **options):
    return dd.image_to_image(MODEL, images, table, SCHEDULE, seed=seed, **options)


@pytest.mark.parametrize(
    "table", [TABLE, dd.ddim(SCHEDULE, 20), dd.dpm_solver(SCHEDULE, timesteps=range(0, 1000, 125))]
)
def test_all_the_strength_is_a_sample_and_none_is_the_image(table):
    assert torch.equal(edited(table=table, strength=1), dd.sample(MODEL, IMAGES.shape, table, seed=5))
    nothing = edited(table=table, strength=0)
    assert torch.equal(nothing, IMAGES)
    assert nothing.data_ptr() != IMAGES.data_ptr()


def test_the_steps_below_the_strength_are_the_samplers_own():
    first = int((TABLE.timesteps >= 300).sum())
    t, tail = int(TABLE.timesteps[first]), TABLE[first:]
    assert tail.timesteps.tolist() == [t for t in TABLE.timesteps.tolist() if t < 300]
    z = dd.randn(IMAGES.shape, seed=5)
    x = dd.q_sample(IMAGES, t, SCHEDULE, z)
    for i in range(first, len(TABLE)):  # rows of the whole table, so that their noise is that of the whole table too
        times = torch.full((4,), int(TABLE.timesteps[i]))
        x = dd.reverse_step(x, MODEL(x, times), TABLE, i, seed=5)
    assert torch.equal(edited(strength=0.3), x)


def test_the_distribution_around_an_image_is_the_one_that_the_rows_imply():
    image, count = 0.7, 16_384
    table = dd.ddim(SCHEDULE, 50, eta=1.0, clip=None)
    tail = table[40:]
    alpha_bar = SCHEDULE.alpha_bar[int(tail.timesteps[0])]
    start = math.sqrt(alpha_bar) * image, math.sqrt(1 - alpha_bar)
    mean, std = moments(tail, 0.2, 0.5, start)
    x = edited(torch.full((count // 1024, 1024), image), table, strength=0.2)
    # Five standard errors of the estimates.
    assert float(x.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(count))
    assert float(x.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * count))
    assert mean > 0.35  # some of the image is left


def test_an_edited_image_does_not_depend_on_its_batch():
    whole = edited()
    assert torch.equal(edited(batch_size=3), whole)
    assert torch.equal(edited(IMAGES[2:3], first_sample=2), whole[2:3])
    assert not torch.equal(edited(seed=6), whole)
    torch.manual_seed(1)
    drawn = edited(seed=None)
    assert not torch.equal(edited(seed=None), drawn)
    torch.manual_seed(1)
    assert torch.equal(edited(seed=None), drawn)


@pytest.mark.parametrize("table", [TABLE, dd.ddim(SCHEDULE, 20)])
def test_a_walk_ends_at_what_becomes_of_each_image(table):
    weights, options = [0.0, 0.25, 1.0], {"strength": 0.5, "first_sample": 3}
    walk = dd.interpolate(MODEL, IMAGES, IMAGES.flip(3), weights, table, SCHEDULE, seed=5, **options)
    assert walk.shape == (4, 3, 3, 6, 6)
    for i, weight in enumerate(weights):

        def alone(weight=weight):
            first, second = IMAGES.double(), IMAGES.flip(3).double()
            return edited((1 - weight) * first + weight * second, table, **options)

        (bound,) = bounded(alone)
        assert_samples_are(bound, walk[:, i])


def test_a_mixture_is_that_of_both_diffused_images():
    """The x_t that a walk starts from is the mixture of x_t and x_t' with one noise: DDPM's section 4.3."""
    seen = []

    def model(x, t):
        seen.append(x)
        return 0 * x

    def start(dtype):
        first, second = IMAGES.to(dtype), IMAGES.flip(3).to(dtype)
        dd.interpolate(model, first, second, torch.tensor([0.3]), TABLE, SCHEDULE, strength=0.5, seed=5)
        return seen[0]

    (bound,) = bounded(lambda: start(torch.float64))
    seen.clear()
    assert_samples_are(bound, start(torch.float32))
    t = int(TABLE.timesteps[TABLE.timesteps < 500][0])
    z = dd.randn(IMAGES.shape, seed=5, stream=Stream.X_T).double()
    share = float(torch.tensor(0.3))
    x_t, x_t_other = (dd.q_sample(x.double(), t, SCHEDULE, z) for x in (IMAGES, IMAGES.flip(3)))
    assert (((1 - share) * x_t + share * x_t_other - bound[0]).abs() <= FLOAT64 * bound[1]).all()


def test_slerp_is_the_shortest_way_on_the_sphere():
    a, b = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    walk = dd.slerp(a, b, torch.linspace(0, 1, 3))
    assert walk.shape == (2, 3, 2)
    root = 3 * 0.5**0.5
    # It is computed in float64 and rounded once; sines of multiples of pi are 0 to float64's rounding.
    exact = torch.tensor([[3, 0], [root, root], [0, 3]], dtype=torch.float64)
    assert_within(walk[0], exact, torch.full_like(exact, 64 * UNIT_OF_FLOAT64))
    assert torch.equal(walk[1], a[1].expand(3, 2))  # from a point to itself every step is that point
    opposite = dd.slerp(a[:1], -a[:1], torch.tensor([0.25]))
    assert torch.isfinite(opposite).all()
    noise = dd.randn((4, 3, 16, 16), seed=0), dd.randn((4, 3, 16, 16), seed=1)
    middle = dd.slerp(*noise, torch.tensor([0.5]))
    # Half way on a straight line the deviation is 0.7; five standard errors of the estimate.
    assert float(middle.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * middle.numel()))


def test_the_error_of_encoding_and_decoding_is_of_first_order():
    """Both ways are linear for Gaussian data, so the error is known; with twice the steps it is half as large."""
    errors = []
    for steps in (25, 50, 100, 200):
        there, back = dd.ddim_inversion(SCHEDULE, steps), dd.ddim(SCHEDULE, steps, clip=None)
        gain = math.prod(moments(way, 0.0, 0.5)[1] for way in (there, back))
        exact, error = rounding(back, 0.5, *rounding(there, 0.5, IMAGES.double(), 0 * IMAGES.double()))
        assert ((exact - gain * IMAGES.double()).abs() <= FLOAT64 * error).all()
        model = gaussian_model(0.0, 0.5)
        assert_samples_are((exact, error), dd.sample(model, dd.sample(model, IMAGES, there), back))
        errors.append(abs(gain - 1))
    ratios = [a / b for a, b in pairwise(errors)]
    # The next term of the error's expansion is 1 / steps of the first, some percents at 25 steps.
    assert ratios == pytest.approx([2, 2, 2], rel=0.15)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\]; got 1.5"):
        edited(strength=1.5)
    with pytest.raises(TypeError, match=r"images must be a floating torch.Tensor .* got torch.uint8"):
        edited(IMAGES.to(torch.uint8))
    with pytest.raises(ValueError, match=r"cannot be cut where x_0 of an earlier step is read.*step 4"):
        edited(table=dd.dpm_solver(SCHEDULE, timesteps=range(0, 1000, 125)), strength=0.5)
    for table in (dd.ddim_inversion(SCHEDULE, 4), dd.flow_euler(4), dd.ddim(dd.linear_schedule(2000), 4), TABLE[:0]):
        with pytest.raises(ValueError, match="table must go down integer timesteps of the schedule, below 1000"):
            edited(table=table)
    with pytest.raises(ValueError, match=r"second must have the shape of first, \[4, 3, 6, 6\]; got \[2, 3, 6, 6\]"):
        dd.interpolate(MODEL, IMAGES, IMAGES[:2], [0.5], TABLE, SCHEDULE)
    with pytest.raises(TypeError, match=r"second must be a floating torch.Tensor"):
        dd.interpolate(MODEL, IMAGES, IMAGES.long(), [0.5], TABLE, SCHEDULE)
