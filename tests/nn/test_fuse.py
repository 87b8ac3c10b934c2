"""A fused model equals the original, trains like it, says what it replaced, and can be restored exactly."""

import copy
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from model_checks import assert_all_within_budget, assert_within_budget, double, randomise
from torch import nn

import dd_kernels
from dd_kernels.nn.fuse import FusedGroupNorm, FusedModule

fuse_module = sys.modules["dd_kernels.nn.fuse"]

GROUPS = {"norm_num_groups": 4, "layers_per_block": 1}


def unet2d(**options):
    from diffusers import UNet2DModel

    defaults = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "dropout": 0.2,
    }
    return UNet2DModel(**GROUPS, **{**defaults, **options}), (torch.randn(2, 3, 8, 8), torch.tensor([3, 700]))


def unet2d_scale_shift():
    model, arguments = unet2d(
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        mid_block_scale_factor=2,
        attn_norm_num_groups=4,
        num_class_embeds=3,
    )
    return model, (*arguments, torch.tensor([0, 2]))


def unet2d_condition():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        **GROUPS,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        resnet_skip_time_act=True,
    )
    return model, (torch.randn(2, 4, 8, 8), 5, torch.randn(2, 3, 8))


def autoencoder():
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        **GROUPS,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return model, (torch.randn(2, 3, 8, 8),)


class GroupNorm32(nn.GroupNorm):
    """As in guided-diffusion, but float64 stays: there is an exact answer."""

    def forward(self, x):
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32))).type(x.dtype)


class SiLU(nn.Module):
    """As in improved-diffusion."""

    def forward(self, x):
        return x * torch.sigmoid(x)


class Guided(nn.Module):
    """The calls of guided-diffusion's ResBlock with scale-shift: slices and single layers of a Sequential."""

    def __init__(self, norm=nn.GroupNorm, silu=nn.SiLU):
        super().__init__()
        self.in_layers = nn.Sequential(norm(2, 8), silu(), nn.Conv2d(8, 8, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4, 16))
        self.out_layers = nn.Sequential(norm(4, 8), silu(), nn.Dropout(0.2), nn.Conv2d(8, 8, 1))
        self.last = nn.Sequential(norm(1, 8, affine=False), nn.ReLU(), norm(2, 8))

    def forward(self, x, emb):
        h = self.in_layers[-1](F.avg_pool2d(self.in_layers[:-1](x), 2)) + F.avg_pool2d(self.in_layers(x), 2)
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.last(h + self.out_layers(h))


def guided(norm=nn.GroupNorm, silu=nn.SiLU):
    return Guided(norm, silu), (torch.randn(2, 8, 6, 6), torch.randn(2, 4))


def improved():
    return guided(GroupNorm32, SiLU)


DIFFUSERS = [unet2d, unet2d_scale_shift, unet2d_condition, autoencoder]
MODELS = [*DIFFUSERS, guided, improved]
pytest.importorskip("diffusers")


def build(make):
    model, arguments = make()
    return randomise(model).eval(), arguments


def output(model, arguments):
    out = model(*arguments)
    return out if isinstance(out, torch.Tensor) else out.sample


def run(model, arguments):
    """Output and every gradient, each dropout drawn from the same seed."""
    model.zero_grad()
    x = arguments[0].clone().requires_grad_()
    torch.manual_seed(1)
    out = output(model, (x, *arguments[1:]))
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "x": x.grad, **gradients}


def to_double(arguments):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make", MODELS)
def test_output_and_gradients_equal_within_the_error_budget(make, training):
    model, arguments = build(make)
    model.train(training)
    if training:
        # The mask of a dropout depends on the dtype; drawn once, both dtypes share it.
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                module.forward = lambda x, p=module.p: x * (torch.rand(x.shape) > p) / (1 - p)
    exact = run(double(model), to_double(arguments))
    plain = run(model, arguments)
    dd_kernels.fuse(model)
    assert model.training == training
    assert_all_within_budget(run(model, arguments), plain, exact)


@pytest.mark.parametrize("make", MODELS)
def test_dropout_draws_the_same_masks(make):
    model, arguments = build(make)
    model.train()
    before = run(model, arguments)["output"]
    dd_kernels.fuse(model)
    torch.testing.assert_close(run(model, arguments)["output"], before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", MODELS)
def test_keys_stay_and_unfuse_restores_exactly(make):
    model, arguments = build(make)
    before = run(model, arguments)
    modules = {name: (module, type(module), dict(vars(module))) for name, module in model.named_modules()}
    state = model.state_dict()
    replaced = dd_kernels.fuse(model)
    assert model.state_dict().keys() == state.keys()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    fused = {name for name, module in model.named_modules() if isinstance(module, FusedModule)}
    assert set(replaced) <= fused
    assert dd_kernels.fuse(model) == {}  # a second call finds nothing left, and does not complain

    assert set(dd_kernels.unfuse(model)) == fused
    for name, module in model.named_modules():
        same, kind, attributes = modules[name]
        assert module is same
        assert type(module) is kind
        assert vars(module).keys() == attributes.keys()
    assert all(value.equal(before[name]) for name, value in run(model, arguments).items())
    assert dd_kernels.unfuse(model) == []


@pytest.fixture
def calls(monkeypatch):
    """The options of every call of the op made by a fused norm."""
    made = []

    def record(*arguments, **options):
        made.append(options)
        return dd_kernels.group_norm_silu(*arguments, **options)

    monkeypatch.setattr(fuse_module, "group_norm_silu", record)
    return made


def kinds(calls):
    """How many calls did what."""
    words = [
        ("add " if c["pre_shift"] is not None else "")
        + ("scale " if c["scale"] is not None and c["shift"] is not None else "")
        + c["activation"]
        for c in calls
    ]
    return {word: words.count(word) for word in sorted(set(words))}


NORM, SILU = "GroupNorm", "GroupNorm, SiLU"
EMBED, SCALE = "time embedding, GroupNorm, SiLU", "GroupNorm, scale-shift, SiLU"


@pytest.mark.parametrize(
    ("make", "report", "made"),
    [
        (unet2d, {NORM: 4, SILU: 9, EMBED: 8}, {"none": 4, "silu": 9, "add silu": 8}),
        (unet2d_scale_shift, {NORM: 4, SILU: 10, SCALE: 9}, {"none": 4, "silu": 10, "add scale silu": 9}),
        (unet2d_condition, {NORM: 4, SILU: 10, EMBED: 9}, {"none": 4, "silu": 10, "add silu": 9}),
        (autoencoder, {NORM: 2, SILU: 22}, {"none": 2, "silu": 12, "add silu": 10}),
        (guided, {NORM: 2, SILU: 2}, {"none": 3, "silu": 3}),
        (improved, {NORM: 2, SILU: 2}, {"none": 3, "silu": 3}),
    ],
)
def test_it_says_what_it_replaced_and_does_that(make, report, made, calls):
    model, arguments = build(make)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    replaced = dd_kernels.fuse(model)
    assert set(replaced) == norms
    assert {what: list(replaced.values()).count(what) for what in replaced.values()} == report
    output(model, arguments)
    assert kinds(calls) == made


def test_a_copy_of_a_fused_model_is_fused(calls):
    model, arguments = build(unet2d)
    dd_kernels.fuse(model)
    twin = copy.deepcopy(model)
    dd_kernels.unfuse(model)
    output(twin, arguments)
    assert len(calls) == 21


def test_channels_last_is_kept_by_norms_of_images_and_of_tokens():
    norm = nn.GroupNorm(2, 8)
    dd_kernels.fuse(norm)
    x = torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last)
    assert norm(x).stride() == x.stride()
    tokens = torch.randn(2, 24, 8).transpose(1, 2)
    assert norm(tokens).stride() == tokens.stride()
    torch.testing.assert_close(norm(tokens), F.group_norm(tokens, 2, norm.weight, norm.bias))
    torch.testing.assert_close(norm(tokens[:, :, 0]), F.group_norm(tokens[:, :, 0], 2, norm.weight, norm.bias))


@pytest.mark.parametrize("make", [unet2d, guided])
def test_under_autocast(make):
    model, arguments = build(make)
    with torch.no_grad():
        exact = output(double(model), to_double(arguments))
        with torch.autocast("cpu", torch.bfloat16):
            plain = output(model, arguments)
            dd_kernels.fuse(model)
            ours = output(model, arguments)
    # A norm under autocast gives float32 in PyTorch, which costs the fused model one rounding where it ends in one.
    assert_within_budget(ours.float(), plain.to(ours.dtype).float(), exact)


def test_hooks_on_norms_and_convolutions_are_called():
    model, arguments = build(unet2d)
    block = model.down_blocks[0].resnets[0]
    seen = []
    for layer in (block.norm1, block.conv1, block.norm2, model.conv_norm_out):
        layer.register_forward_hook(lambda layer, _, out: seen.append(layer))
    expected = output(model, arguments)
    dd_kernels.fuse(model)
    seen.clear()
    torch.testing.assert_close(output(model, arguments), expected, rtol=1e-4, atol=1e-4)
    assert seen == [block.norm1, block.conv1, block.norm2, model.conv_norm_out]


def test_convolutions_that_are_not_plain_are_called_whole():
    model, arguments = build(unet2d)
    first, second = model.down_blocks[0].resnets[0], model.mid_block.resnets[0]
    first.conv1 = nn.Sequential(first.conv1, nn.Tanh())  # an adapter in the convolution's place
    second.conv1.forward = types.MethodType(
        lambda conv, x: 2 * conv._conv_forward(x, conv.weight, conv.bias), second.conv1
    )
    model.up_blocks[0].resnets[0].conv1.padding_mode = "circular"
    model.up_blocks[0].resnets[0].conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]
    expected = output(model, arguments)
    dd_kernels.fuse(model)
    torch.testing.assert_close(output(model, arguments), expected, rtol=1e-4, atol=1e-4)


def test_blocks_that_cannot_be_fused_keep_their_forward():
    from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D

    x, temb = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    options = {"in_channels": 8, "temb_channels": 6, "groups": 2}
    mish = randomise(ResnetBlock2D(**options, non_linearity="mish"))
    expected = mish(x, temb)
    assert set(dd_kernels.fuse(mish).values()) == {"GroupNorm"}
    torch.testing.assert_close(mish(x, temb), expected, rtol=1e-4, atol=1e-4)

    unconditional = ResnetBlock2D(**{**options, "temb_channels": None}, time_embedding_norm="scale_shift")
    dd_kernels.fuse(unconditional)
    with pytest.raises(ValueError, match="temb"):
        unconditional(x, None)

    with pytest.warns(UserWarning, match="ResnetBlockCondNorm2D has no GroupNorm that can be replaced"):
        assert dd_kernels.fuse(ResnetBlockCondNorm2D(**options)) == {}


def test_resnet_block_takes_its_peers_arguments():
    from diffusers.models.resnet import ResnetBlock2D

    x, temb = torch.randn(2, 8, 4, 4), torch.randn(1, 6)
    block = randomise(ResnetBlock2D(in_channels=8, temb_channels=6, groups=2, output_scale_factor=1.5))
    without = randomise(ResnetBlock2D(in_channels=8, temb_channels=None, groups=2))
    shift = torch.randn(2, 8, 1, 1)
    expected, shifted = block(x, temb), without(x, shift)
    dd_kernels.fuse(block)
    dd_kernels.fuse(without)
    torch.testing.assert_close(block(x, temb), expected, rtol=1e-4, atol=1e-4)  # one embedding for all
    torch.testing.assert_close(without(x, shift), shifted, rtol=1e-4, atol=1e-4)  # added as it is
    with pytest.warns(FutureWarning, match="scale"):
        torch.testing.assert_close(block(x, temb, scale=2.0), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError):
        block(x, None)


def test_a_fused_block_compiles_to_one_graph():
    from diffusers.models.resnet import ResnetBlock2D

    block = randomise(ResnetBlock2D(in_channels=8, temb_channels=6, groups=2))
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    dd_kernels.fuse(block)
    dd_kernels.fuse(model)
    x, temb = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    compiled = torch.compile(lambda x, temb: block(model(x), temb), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, temb), block(model(x), temb))


def test_what_is_not_a_module_or_has_no_norm():
    with pytest.warns(UserWarning, match="Linear has no GroupNorm that can be replaced"):
        assert dd_kernels.fuse(nn.Linear(2, 2)) == {}
    for function in (dd_kernels.fuse, dd_kernels.unfuse):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got dict"):
            function({})


def test_a_subclass_with_its_own_forward_is_left_alone():
    class Odd(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) + 1

    class Reversed(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).flip(1))

    model = nn.Sequential(Odd(2, 8), nn.SiLU(), Reversed(nn.GroupNorm(2, 8), nn.SiLU()), nn.GroupNorm(4, 8), nn.SiLU())
    x = torch.randn(2, 8, 4, 4)
    expected = model(x)
    assert dd_kernels.fuse(model) == {"2.0": "GroupNorm", "3": "GroupNorm, SiLU"}
    assert isinstance(model[2][0], FusedGroupNorm)
    torch.testing.assert_close(model(x), expected)


def test_diffusers_is_imported_by_nobody_here():
    code = (
        "import sys, torch, dd_kernels as dd; m = torch.nn.Sequential(torch.nn.GroupNorm(1, 2), torch.nn.SiLU());"
        "assert dd.fuse(m) == {'0': 'GroupNorm, SiLU'}; dd.unfuse(m); assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
