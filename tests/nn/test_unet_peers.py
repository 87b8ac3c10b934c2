"""The U-Net equals diffusers' UNet2DModel, weights copied."""

import copy
import itertools

import pytest
import torch
from model_checks import assert_within, randomise, relative_error

from dd_kernels.nn import CONFIGS, UNet

diffusers = pytest.importorskip("diffusers")

RESNET = {"norm1": "norm1", "conv1": "conv1", "embedding": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}


def copy_stage(ours, theirs, sampler: str) -> None:
    def load(mine, peer):
        mine.load_state_dict(peer.state_dict())

    def load_resnet(mine, peer):
        for name, peer_name in RESNET.items():
            load(getattr(mine, name), getattr(peer, peer_name))
        if peer.conv_shortcut is not None:
            load(mine.shortcut, peer.conv_shortcut)

    for mine, peer in zip(ours.resnets, theirs.resnets, strict=True):
        load_resnet(mine, peer)
    attentions = [a for a in getattr(theirs, "attentions", []) if a is not None]
    for mine, peer in zip(ours.attentions, attentions, strict=True):
        load(mine.norm, peer.group_norm)
        load(mine.proj, peer.to_out[0])
        for key in ("weight", "bias"):
            rows = torch.cat([getattr(layer, key).data for layer in (peer.to_q, peer.to_k, peer.to_v)])
            getattr(mine.qkv, key).data.copy_(rows)
    samplers = getattr(theirs, sampler, None)
    assert (ours.resample is None) == (samplers is None)
    if samplers is not None:
        is_resnet = hasattr(samplers[0], "conv1")
        load_resnet(ours.resample, samplers[0]) if is_resnet else load(ours.resample.conv, samplers[0].conv)


def copy_weights(ours: UNet, theirs: torch.nn.Module) -> None:
    for mine, peer in ((0, theirs.time_embedding.linear_1), (2, theirs.time_embedding.linear_2)):
        ours.time_embedding[mine].load_state_dict(peer.state_dict())
    for mine, peer in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
        getattr(ours, mine).load_state_dict(getattr(theirs, peer).state_dict())
    if theirs.class_embedding is not None:
        ours.class_embedding.load_state_dict(theirs.class_embedding.state_dict())
    for mine, peer in itertools.chain(
        zip(ours.down, theirs.down_blocks, strict=True), [(ours.middle, theirs.mid_block)]
    ):
        copy_stage(mine, peer, "downsamplers")
    for mine, peer in zip(ours.up, theirs.up_blocks, strict=True):
        copy_stage(mine, peer, "upsamplers")


def assert_same_model(ours: UNet, theirs: torch.nn.Module, *arguments) -> None:
    """Equal to rounding, in float32 and in float64."""
    copy_weights(ours, randomise(theirs).eval())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    ours.eval()
    x, *rest = arguments
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(x.double(), *rest).sample
        assert_within(ours(x, *rest), exact, ours)
        difference = (copy.deepcopy(ours).double()(x.double(), *rest) - exact).abs().max()
    assert difference <= 2.0**-29 * relative_error(ours, torch.float32) * exact.abs().max()


def test_cifar10_is_the_ddpm_of_diffusers():
    theirs = diffusers.UNet2DModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        norm_eps=1e-6,
    )
    ours = UNet.from_config("cifar10")
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307
    assert CONFIGS["cifar10"]["dropout"] == 0.1
    # Half the training size: as convolutional as it is, the model costs a quarter there.
    assert_same_model(ours, theirs, torch.randn(2, 3, 16, 16), torch.tensor([3, 960]))


def test_guided_diffusion_shapes_equal_diffusers():
    """Scale-shift, residual resampling, heads of 8 channels, classes, attention at two levels."""
    theirs = diffusers.UNet2DModel(
        sample_size=16,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32, 48),
        layers_per_block=3,
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=8,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=5,
    )
    ours = UNet(
        image_size=16,
        in_channels=3,
        channels=(16, 32, 48),
        num_res_blocks=3,
        attention_resolutions=(8, 4),
        head_channels=8,
        timestep_embedding="guided",
        scale_shift=True,
        resample="resblock",
        num_groups=8,
        num_classes=5,
        learn_variance=True,
    )
    arguments = torch.randn(3, 3, 16, 8), torch.tensor([0, 501, 999]), torch.tensor([4, 0, 2])
    assert_same_model(ours, theirs, *arguments)


def test_symmetric_padding_and_no_middle_attention_equal_diffusers():
    theirs = diffusers.UNet2DModel(
        in_channels=1,
        out_channels=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        time_embedding_dim=24,
    )
    ours = UNet(
        image_size=8,
        in_channels=1,
        out_channels=2,
        channels=(16, 32),
        num_res_blocks=1,
        middle_attention=False,
        timestep_embedding="guided",
        time_channels=24,
        num_groups=4,
    )
    assert_same_model(ours, theirs, torch.randn(2, 1, 8, 8), torch.tensor([1, 2]))
