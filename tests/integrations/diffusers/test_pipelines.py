"""diffusers' pipelines on small random components: the same images before and after the schedulers are swapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from pipeline_parts import (  # noqa: E402
    Case,
    Tokenizer,
    check_that_images_stay,
    latent_scheduler,
    picture,
    run,
    stable_diffusion,
    text_config,
    unet,
)

from dd_kernels.integrations import diffusers as ours  # noqa: E402


def ddpm() -> Case:
    pipe = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(variance_type="fixed_large"))
    return pipe, {"batch_size": 2, "num_inference_steps": 5}


def ddim() -> Case:
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler())
    return pipe, {"batch_size": 2, "num_inference_steps": 5, "eta": 0.5, "use_clipped_model_output": True}


def text_to_image() -> Case:
    scheduler = latent_scheduler("DDIMScheduler", set_alpha_to_one=False)
    return stable_diffusion("StableDiffusionPipeline", scheduler, height=16, width=16, guidance_rescale=0.7, eta=0.5)


def text_to_image_zero_snr() -> Case:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    scheduler = latent_scheduler("DDPMScheduler", **options)
    return stable_diffusion("StableDiffusionPipeline", scheduler, height=16, width=16)


def image_to_image() -> Case:
    scheduler = latent_scheduler("DDIMScheduler", set_alpha_to_one=False)
    return stable_diffusion("StableDiffusionImg2ImgPipeline", scheduler, image=picture(), strength=0.8)


def inpaint() -> Case:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    scheduler = latent_scheduler("DDPMScheduler")
    call = {"image": picture(), "mask_image": mask, "height": 16, "width": 16, "strength": 0.9}
    return stable_diffusion("StableDiffusionInpaintPipeline", scheduler, **call)


def unclip() -> Case:
    """The design of DALL-E 2: prior, decoder, and an upsampler with another for its last step."""
    from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline, UnCLIPTextProjModel

    resnets = {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }
    upsamplers = [unet(in_channels=6, sample_size=32, **resnets) for _ in range(2)]
    decoder = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1)
    proj = UnCLIPTextProjModel(clip_embeddings_dim=32, time_embed_dim=128, cross_attention_dim=16)
    fixed = {"variance_type": "fixed_small_log"}
    pipe = UnCLIPPipeline(
        prior=prior,
        decoder=decoder,
        text_encoder=transformers.CLIPTextModelWithProjection(text_config()),
        tokenizer=Tokenizer(),
        text_proj=proj,
        super_res_first=upsamplers[0],
        super_res_last=upsamplers[1],
        prior_scheduler=diffusers.UnCLIPScheduler(**fixed, prediction_type="sample", clip_sample_range=5.0),
        decoder_scheduler=diffusers.UnCLIPScheduler(variance_type="learned_range"),
        super_res_scheduler=diffusers.UnCLIPScheduler(**fixed),
    )
    steps = {f"{part}_num_inference_steps": 3 for part in ("prior", "decoder", "super_res")}
    return pipe, {"prompt": "a horse", **steps}


CASES = (ddpm, ddim, text_to_image, text_to_image_zero_snr, image_to_image, inpaint, unclip)


@pytest.mark.parametrize("case", CASES)
def test_the_images_stay(case: Callable[[], Case]) -> None:
    check_that_images_stay(case)


def test_a_saved_pipeline_names_diffusers_scheduler(tmp_path: Any) -> None:
    """It loads where this package is not installed; ours is put in again with the options that were saved."""
    pipe, call = ddpm()
    pipe.scheduler = ours.DDPMScheduler.from_config(pipe.scheduler.config, noise="philox")
    before = run(pipe, call)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.DDPMScheduler
    again.scheduler = ours.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert again.scheduler.config.noise == "philox"
    # Another set of weights at other addresses: a convolution may round otherwise.
    np.testing.assert_allclose(run(again, call), before, atol=1e-5)
