"""What fuse leaves alone, and modules that are not quite what it knows."""

import subprocess
import sys
import types

import pytest
import torch
from fuse_cases import build, output, unet2d
from model_checks import randomise
from torch import nn

import dd_kernels
from dd_kernels.nn.fused import FusedGroupNorm

pytest.importorskip("diffusers")


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
