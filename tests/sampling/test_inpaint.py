"""inpaint: what is known stays, what is painted has the distribution its steps imply, and RePaint is the closer one."""

import math

import numpy as np
import pytest
import torch
from gaussian import SCHEDULE, gaussian_model, linear_steps

import dd_kernels as dd
from dd_kernels.sampling.inpaint import _path

TABLE = dd.ddpm(SCHEDULE, 12)
IMAGES = torch.linspace(-1, 1, 3 * 2 * 4 * 4).reshape(3, 2, 4, 4)
MASK = torch.zeros(4, 4, dtype=torch.bool)
MASK[1:3, 2:] = True
RHO, KNOWN = 0.9, 1.5


def painted(images=IMAGES, mask=MASK, table=TABLE, seed=5, model=None, **options):
    return dd.inpaint(model or gaussian_model(0.2, 0.5), images, mask, table, SCHEDULE, seed=seed, **options)


@pytest.mark.parametrize("options", [{}, {"resample": 3, "jump": 2}])
@pytest.mark.parametrize("table", [TABLE, dd.ddim(SCHEDULE, 12)])
def test_known_pixels_are_kept_to_the_bit_and_the_others_painted(table, options):
    x = painted(table=table, **options)
    assert torch.equal(x[..., ~MASK], IMAGES[..., ~MASK])
    assert (x[..., MASK] != IMAGES[..., MASK]).all()
    # What a masked pixel held before plays no part.
    assert torch.equal(painted(torch.where(MASK, 7.0, IMAGES), table=table, **options), x)


@pytest.mark.parametrize("options", [{}, {"resample": 3, "jump": 2}])
def test_a_painted_image_does_not_depend_on_its_batch(options):
    whole = painted(**options)
    assert torch.equal(painted(batch_size=2, **options), whole)
    assert torch.equal(painted(IMAGES[2:], first_sample=2, **options), whole[2:])
    assert not torch.equal(painted(seed=6, **options), whole)
    each = torch.stack([MASK, ~MASK, MASK])[:, None]
    assert torch.equal(painted(mask=each, **options)[[0, 2]], whole[[0, 2]])


def test_with_nothing_known_it_is_a_sample():
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    expected = dd.sample(gaussian_model(0.2, 0.5), IMAGES.shape, TABLE, seed=5)
    assert torch.equal(painted(mask=everything), expected)
    assert torch.equal(painted(mask=~everything, resample=2, jump=3), IMAGES)


def test_the_path_is_that_of_repaint():
    """``get_schedule_jump`` of RePaint's own code, in its timesteps, with single steps back."""

    def theirs(steps, length, times):
        jumps = dict.fromkeys(range(0, steps - length, length), times - 1)
        t, path = steps, []
        while t >= 1:
            t -= 1
            path.append(t)
            if jumps.get(t, 0) > 0:
                jumps[t] -= 1
                path += range(t + 1, t + length + 1)
                t += length
        return [*path, -1]

    for steps, times, length in ((10, 1, 3), (10, 3, 3), (10, 2, 1), (12, 4, 5), (5, 2, 4)):
        ours = [steps - 1 - position for position in (0, *_path(steps, times, length))]
        single, at = [ours[0]], ours[0]
        for t in ours[1:]:
            single += [t] if t < at else range(at + 1, t + 1)
            at = t
        assert single == theirs(steps, length, times)


def correlated_model(x, t):
    """The exact epsilon of pairs of pixels of mean 0 and variance 1, correlated by RHO: sqrt(1 - a) C^-1 x."""
    a = SCHEDULE.alpha_bar[int(t[0])]
    inverse = np.linalg.inv(covariance(a)) * math.sqrt(1 - a)
    return torch.einsum("ij,njhw->nihw", torch.tensor(inverse, dtype=x.dtype), x)


def covariance(a):
    return np.array([[1, a * RHO], [a * RHO, 1]])


def implied(table, resample, jump):
    """Mean and standard deviation of the painted pixel beside KNOWN: every move is linear in (known, painted, 1)."""
    steps, timesteps = list(linear_steps(table)), table.timesteps.tolist()
    mean, cov, before = np.zeros(2), np.eye(2), 0
    for after in _path(len(table), resample, jump):
        if after < before:
            ratio = SCHEDULE.alpha_bar[timesteps[after]] / SCHEDULE.alpha_bar[timesteps[before]]
            mean, cov = ratio**0.5 * mean, ratio * cov + (1 - ratio) * np.eye(2)
        else:
            t, from_x, from_out, sigma = steps[before]
            a = SCHEDULE.alpha_bar[t]
            gain = from_x * np.eye(2) + from_out * math.sqrt(1 - a) * np.linalg.inv(covariance(a))
            mean, cov = gain @ mean, gain @ cov @ gain.T + sigma**2 * np.eye(2)
            a = SCHEDULE.alpha_bar[timesteps[after]] if after < len(table) else 1.0
            mean, cov = np.array([a**0.5 * KNOWN, mean[1]]), np.diag([1 - a, cov[1, 1]])
        before = after
    return mean[1], math.sqrt(cov[1, 1])


def test_the_painted_pixel_has_the_distribution_that_its_steps_imply():
    """And with RePaint's resampling that is close to the conditional one, from which plain replacement is far."""
    table, count = dd.ddpm(SCHEDULE, 50, clip=None), 8192
    images = torch.full((1024, 2, 1, count // 1024), KNOWN)
    mask = torch.tensor([False, True]).reshape(2, 1, 1)
    target = np.array([RHO * KNOWN, math.sqrt(1 - RHO**2)])  # mean and deviation of the one pixel given the other
    distance = []
    for resample, jump in ((1, 1), (10, 5)):
        x = painted(images, mask, table, seed=3, model=correlated_model, resample=resample, jump=jump)[:, 1]
        mean, std = implied(table, resample, jump)
        # Five standard errors of the estimates.
        assert float(x.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(count))
        assert float(x.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * count))
        distance.append(np.abs(target - (mean, std)))
    assert (distance[1] < distance[0] / 3).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": MASK.float()}, TypeError, "mask must be a torch.Tensor of bools; got torch.float32"),
        ({"mask": MASK[:3]}, ValueError, r"mask must broadcast to the shape of images, \[3, 2, 4, 4\]; got \[3, 4\]"),
        ({"mask": MASK.expand(2, 1, 1, 4, 4)}, ValueError, "mask must broadcast"),
        ({"images": IMAGES.long()}, TypeError, "images must be a floating torch.Tensor"),
        ({"resample": 0}, ValueError, "resample must be an int at least 1; got 0"),
        ({"jump": 0}, ValueError, "jump must be an int at least 1; got 0"),
        ({"jump": 12, "resample": 2}, ValueError, r"jump must be an int in \[1, 11\], with 12 steps; got 12"),
        ({"table": dd.dpm_solver(SCHEDULE, timesteps=[0, 300, 600])}, ValueError, "must read no x_0 of earlier steps"),
        ({"table": dd.ddim_inversion(SCHEDULE, 5)}, ValueError, "table must go down integer timesteps"),
    ],
)
def test_bad_input_gets_one_clear_error(options, error, message):
    with pytest.raises(error, match=message):
        painted(**options)
