"""The U-Net against itself on plain PyTorch in float64, and everything it promises about its inputs."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from model_checks import assert_all_within, assert_within, double, randomise

import dd_kernels
from dd_kernels.nn import GroupNormSiLU, UNet, timestep_embedding
from dd_kernels.nn.blocks import Downsample, Upsample
from dd_kernels.nn.configs import UNetConfig

SMALL = {"image_size": 8, "in_channels": 3, "channels": (16, 32), "num_res_blocks": 1, "num_groups": 8}

# Together these reach every option.
VARIANTS = {
    "ddpm": {"attention_resolutions": (4,), "downsample_padding": "bottom_right", "eps": 1e-6},
    "guided": {
        "attention_resolutions": (8, 4),
        "head_channels": 8,
        "timestep_embedding": "guided",
        "scale_shift": True,
        "resample": "resblock",
        "num_classes": 5,
        "learn_variance": True,
    },
    "plain": {"resample": "plain", "middle_attention": False, "num_res_blocks": 2, "embedding_channels": 10},
    "guidance": {"num_heads": 2, "num_classes": 5, "null_class": True, "out_channels": 2, "time_channels": 24},
    "one level": {"in_channels": 1, "channels": (16,), "num_res_blocks": 2, "dropout": 0.5, "embedding_channels": 7},
}


def build(name: str) -> UNet:
    return randomise(UNet(**{**SMALL, **VARIANTS[name]})).eval()


def inputs(model: UNet, batch: int = 3, size: tuple[int, int] = (8, 8)) -> tuple:
    x = torch.randn(batch, model.config["in_channels"], *size)
    t = torch.randint(0, 1000, (batch,))
    classes = model.config["num_classes"]
    return x, t, None if classes is None else torch.randint(0, classes, (batch,))


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_gradients(name):
    model = build(name)
    x, t, y = inputs(model)
    direction = torch.randn(x.shape[0], model.conv_out.out_channels, 8, 8)

    def run(model, x, backend):
        x = x.clone().requires_grad_()
        model.zero_grad()
        with dd_kernels.use_backend(backend):
            out = model(x, t, y)
            (out * direction).sum().backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
        return {"output": out.detach(), "x": x.grad, **gradients}

    exact = run(double(model), x.double(), "reference")
    for key, value in exact.items():
        assert value.abs().max() > 0, f"{key} takes no part"
    for backend in ("auto", "reference"):
        assert_all_within(run(model, x, backend), exact, model)


@pytest.mark.parametrize("name", VARIANTS)
def test_shape_dtype_and_layout(name):
    model = build(name)
    config = model.config
    channels = (config["out_channels"] or config["in_channels"]) * (2 if config["learn_variance"] else 1)
    x, t, y = inputs(model, 2, (8, 16))
    out = model(x, t, y)
    assert out.shape == (2, channels, 8, 16)
    assert out.dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert model.double()(x, t, y).dtype == torch.float64
    assert model(x[:0], t[:0], None if y is None else y[:0]).shape == (0, channels, 8, 16)


@pytest.mark.parametrize("name", VARIANTS)
def test_everything_stays_channels_last(name):
    model = build(name)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)
    seen = []

    def check(module, _, out):
        seen.append(module)
        assert out.is_contiguous(memory_format=torch.channels_last), type(module).__name__

    for module in model.modules():
        if not list(module.children()) and isinstance(module, (torch.nn.Conv2d, GroupNormSiLU)):
            module.register_forward_hook(check)
    model(*inputs(model))
    assert len(seen) > 8


def test_a_model_starts_at_zero_and_its_branches_as_the_identity():
    model = UNet(**SMALL, **VARIANTS["guided"])
    x, t, y = inputs(model)
    assert not model(x, t, y).any()
    h = torch.randn(2, 32, 4, 4)
    assert model.middle.attentions[0](h).equal(h)
    assert model.middle.resnets[0](h, torch.randn(2, 64)).equal(h)


def test_an_image_alone_and_in_a_batch():
    model = build("guided")
    x, t, y = inputs(model, 5)
    with torch.no_grad():
        together = model(x, t, y)
        exact = double(model)(x.double(), t, y)
        for i in range(5):
            one = slice(i, i + 1)
            for out in (model(x[one], t[one], y[one]), together[one]):
                assert_within(out, exact[one], model)


def test_timestep_forms_agree():
    model = build("ddpm")
    x, _, _ = inputs(model)
    with torch.no_grad():
        expected = model(x, torch.full((3,), 7))
        for t in (7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.full((3,), 7.0, dtype=torch.float64)):
            torch.testing.assert_close(model(x, t), expected)
        assert (model(x, 7.5) - expected).abs().max() > 1e-3


def test_labels_and_the_null_class():
    model = build("guidance")
    x, t, y = inputs(model)
    assert model.null_label == 5
    with torch.no_grad():
        assert model(x, t).equal(model(x, t, torch.full((3,), 5)))
        assert not model(x, t, torch.full((3,), 4)).equal(model(x, t))
        assert model(x, t, y.int()).equal(model(x, t, y))


def test_dropout_only_in_training():
    model = build("one level")
    arguments = inputs(model)
    with torch.no_grad():
        assert model(*arguments).equal(model(*arguments))
        model.train()
        assert not model(*arguments).equal(model(*arguments))


def test_heads_by_number_and_by_channels_agree():
    options = {**SMALL, "attention_resolutions": (4,)}
    model = randomise(UNet(**options, num_heads=4)).eval()
    same, other = (UNet(**options, head_channels=c).eval() for c in (8, 16))
    for twin in (same, other):
        twin.load_state_dict(model.state_dict())
    arguments = inputs(model)
    with torch.no_grad():
        assert same(*arguments).equal(model(*arguments))
        assert not other(*arguments).equal(model(*arguments))


def test_plain_resampling_is_mean_and_repetition():
    config = UNetConfig(**SMALL, resample="plain")
    x = torch.randn(2, 16, 6, 4)
    pixels = [x[:, :, i::2, j::2] for i, j in itertools.product(range(2), repeat=2)]
    torch.testing.assert_close(Downsample(16, config)(x), sum(pixels) / 4)
    assert Upsample(16, config)(x).equal(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_attention_norm_has_no_activation():
    model = build("ddpm")
    attention = model.middle.attentions[0]
    h = torch.randn(2, 32, 4, 4)
    expected = F.group_norm(h, 8, attention.norm.weight, attention.norm.bias, 1e-6)
    torch.testing.assert_close(attention.norm(h), expected)


@pytest.mark.parametrize(("convention", "order"), [("ddpm", ("sin", "cos")), ("guided", ("cos", "sin"))])
@pytest.mark.parametrize("channels", [8, 9])
def test_timestep_embedding_is_the_formula(convention, order, channels):
    t = torch.tensor([0, 1, 10, 999])
    i = torch.arange(4, dtype=torch.float64)
    angles = t[:, None] * 10000.0 ** (-i / (3 if convention == "ddpm" else 4))
    expected = torch.cat([getattr(angles, wave)() for wave in order], dim=1)
    e = timestep_embedding(t, channels, convention)
    assert e.dtype == torch.float32
    assert e.shape == (4, channels)
    # float32 angles: up to 999 rad, so half an ulp of 1024 and of the frequency's exponential.
    torch.testing.assert_close(e[:, :8].double(), expected, rtol=0, atol=999 * 2**-23)
    assert not e[:, 8:].any()


def test_autocast():
    model = build("guided")
    x, t, y = inputs(model)
    with torch.no_grad():
        exact = double(model)(x.double(), t, y)
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(x, t, y)
    assert ours.dtype == torch.bfloat16
    assert_within(ours, exact, model)


def test_half_weights_take_float32_images():
    model = build("ddpm")
    x, t, _ = inputs(model)
    with torch.no_grad():
        exact = double(model)(x.double(), t)
        low = model.to(torch.bfloat16)
        out = low(x, t)
    assert_within(out, exact, low)
    assert out.dtype == torch.bfloat16


@pytest.mark.slow
def test_compiles_to_one_graph():
    model = randomise(UNet(**{**SMALL, "channels": (16,)}, num_classes=5, null_class=True, scale_shift=True))
    arguments = inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), model(*arguments))
    compiled(*arguments).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(*arguments).sum().backward()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad)


@pytest.mark.slow
def test_compiles_with_inductor():
    model = build("guided")
    arguments = inputs(model)
    with torch.no_grad():
        exact = double(model)(arguments[0].double(), *arguments[1:])
        compiled = torch.compile(model, fullgraph=True)(*arguments)
    assert_within(compiled, exact, model)


LABELLED = {"t": torch.zeros(2), "y": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [
        ("guided", {"x": [1.0]}, TypeError, "x must be a torch.Tensor; got list"),
        ("guided", {"x": torch.zeros(2, 3, 8, 8, dtype=torch.int32)}, TypeError, "x must be float32"),
        ("guided", {"x": torch.zeros(2, 1, 8, 8)}, ValueError, r"x must be \[N, 3, H, W\]; got \[2, 1, 8, 8\]"),
        ("guided", {"x": torch.zeros(2, 3, 8)}, ValueError, r"x must be \[N, 3, H, W\]"),
        ("guided", {"x": torch.zeros(2, 3, 9, 8)}, ValueError, r"divisible by 2, .* 2 levels; got \[2, 3, 9, 8\]"),
        ("guided", {"x": torch.zeros(2, 3, 8, 7)}, ValueError, "divisible by 2"),
        ("guided", {"x": torch.zeros(2, 3, 0, 8)}, ValueError, "divisible by 2"),
        ("guided", {"t": torch.zeros(3)}, ValueError, r"t must have the shape \[\] or \[2\].*; got \[3\]"),
        ("guided", {"t": torch.zeros(2, 1)}, ValueError, "t must have the shape"),
        ("guided", {"t": torch.zeros(2, dtype=torch.bool)}, TypeError, "t must be an int or float tensor"),
        ("guided", {"y": None}, ValueError, "y must hold the labels of the 5 classes; got None"),
        ("guided", {"y": torch.tensor([0, 5])}, ValueError, r"y must be in \[0, 4\]; got 5"),
        ("guided", {"y": torch.tensor([-1, 0])}, ValueError, r"y must be in \[0, 4\]; got -1"),
        ("guidance", {"y": torch.tensor([0, 6])}, ValueError, r"y must be in \[0, 5\]; got 6"),
        ("guided", {"y": torch.zeros(2)}, TypeError, "y must be an integer tensor; got torch.float32"),
        ("guided", {"y": 3}, TypeError, "y must be an integer tensor; got int"),
        ("guided", {"y": torch.zeros(1, dtype=torch.int64)}, ValueError, r"y must have the shape \[2\].*; got \[1\]"),
        ("ddpm", {}, ValueError, "y must be None: the model has no classes"),
    ],
)
def test_bad_inputs_are_named(name, changed, error, message):
    model = UNet(**SMALL, **VARIANTS[name])
    with pytest.raises(error, match=message):
        model(**{"x": torch.zeros(2, 3, 8, 8), **LABELLED, **changed})
