"""The classifier of noisy images: its parts, its probabilities, their gradient, and what it refuses."""

import pytest
import torch

import dd_kernels as dd
from dd_kernels.nn import NoisyClassifier, UNet

OPTIONS = {"image_size": 8, "in_channels": 1, "channels": (8, 16), "num_groups": 4, "attention_resolutions": (4,)}
X, T, LABELS = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5, 9]), [2, 0, 4]


def built(**options):
    torch.manual_seed(0)
    model = NoisyClassifier(**{**OPTIONS, "num_classes": 5, **options})
    for parameter in model.parameters():  # layers that start as 0 would hide x and t
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_it_is_the_reading_half_of_a_unet():
    classifier, unet = built(), UNet(**OPTIONS, num_classes=5, null_class=True)
    shared = {
        name: v.shape for name, v in unet.state_dict().items() if name.startswith(("time", "conv_in", "down", "mid"))
    }
    own = {name: v.shape for name, v in classifier.state_dict().items()}
    assert shared.items() <= own.items()
    assert {name.split(".")[0] for name in own.keys() - shared.keys()} == {"norm_out", "head"}
    assert NoisyClassifier(**classifier.config).config == classifier.config
    assert classifier(X, T).shape == (3, 5)


def test_probabilities_sum_to_1_and_depend_on_image_and_timestep():
    classifier = built()
    log_p = torch.stack([classifier.log_probability(X, T, torch.full((3,), c)) for c in range(5)])
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(3))
    torch.testing.assert_close(log_p.T, classifier(X, T).log_softmax(1))
    assert not torch.allclose(classifier(X, T), classifier(X, 7), atol=1e-3)
    assert not torch.allclose(classifier(X, T), classifier(-X, T), atol=1e-3)
    torch.testing.assert_close(classifier(X, 5)[1], classifier(X, T)[1])


@pytest.mark.parametrize("options", [{}, {"resample": "resblock", "scale_shift": True}])
def test_the_gradient_of_the_kernels_is_that_of_float64(options):
    """Of the reference in float64, to float32's rounding through some 20 layers."""
    classifier = built(**options).requires_grad_(False)

    def gradient(classifier, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(classifier.log_probability(x, T, torch.tensor(LABELS)).sum(), x)[0]

    found = gradient(classifier, X)
    with dd.use_backend("reference"):
        wanted = gradient(classifier.double(), X.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_classes": None}, ValueError, "num_classes must be given for a classifier; got None"),
        ({"self_conditioning": True}, ValueError, "self_conditioning must be false for a classifier"),
        ({"flavour": 1}, TypeError, "flavour"),
        ({"channels": (8, 9)}, ValueError, "channels must be positive multiples of num_groups=4"),
    ],
)
def test_bad_options(change, error, message):
    with pytest.raises(error, match=message):
        built(**change)


def test_bad_images_and_timesteps():
    with pytest.raises(ValueError, match=r"x must be \[N, 1, H, W\]; got \[3, 2, 8, 8\]"):
        built()(torch.zeros(3, 2, 8, 8), T)
    with pytest.raises(ValueError, match=r"t must have the shape \[\] or \[3\]"):
        built()(X, torch.zeros(2))
