"""The autoencoder: shapes, the KL in closed form, the latents' scale, and a fit that falls."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dd_kernels.nn import AutoencoderKL, kl_to_normal

SMALL = {"channels": (8, 16, 16), "latent_channels": 3, "num_groups": 4}


def test_shapes_and_the_scale_of_latents():
    model = AutoencoderKL(1, **SMALL)
    x = torch.rand(6, 1, 12, 20) * 2 - 1
    before = model.encode(x)
    assert before.shape == (6, 3, 3, 5)
    model.fit_scale(x.split(4))
    assert model.encode(x).std().item() == pytest.approx(1, rel=1e-5)
    assert model.decode(model.encode(x)).shape == x.shape
    torch.testing.assert_close(model.decode(model.encode(x)), model.decoder(before))
    again = AutoencoderKL(1, **SMALL)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.encode(x), model.encode(x))


def test_the_kl_is_that_of_the_distributions():
    mean, log_variance = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(torch.zeros_like(mean), 1.0))
    torch.testing.assert_close(kl_to_normal(mean, log_variance), expected.flatten(1).sum(1))
    assert kl_to_normal(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


def test_it_learns_to_copy():
    """Eighty steps on one batch bring the square error below a quarter of that of the batch's mean."""
    torch.manual_seed(0)
    model = AutoencoderKL(1, channels=(8, 8), num_groups=4)
    x = torch.randn(16, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        error = (model.decode(model.encode(x)) - x).square().mean()
        error.backward()
        optimizer.step()
    assert error < 0.25 * x.var()


@pytest.mark.parametrize("shape", [(1, 1, 6, 8), (1, 1, 8, 6), (1, 8, 8)])
def test_sizes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], H and W divisible by 4"):
        AutoencoderKL(1, **SMALL).encode(torch.zeros(shape))


@pytest.mark.parametrize("channels", [(), (6,), (8, 0)])
def test_channels_that_do_not_fit(channels):
    with pytest.raises(ValueError, match="channels must be positive multiples of num_groups=4"):
        AutoencoderKL(1, channels=channels, num_groups=4)
