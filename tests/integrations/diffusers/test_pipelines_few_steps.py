"""diffusers' pipelines of few steps on small random components: the same images with this package's schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from pipeline_parts import (  # noqa: E402
    Case,
    check_that_images_stay,
    latent_scheduler,
    picture,
    run,
    small_unet,
    small_vae,
    stable_diffusion,
)

import dd_kernels as dd  # noqa: E402
from dd_kernels.integrations import diffusers as ours  # noqa: E402


def _k_scheduler(name: str, **options: Any) -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, name)(**betas, **options)


def dpm_solver() -> Case:
    options = {"use_karras_sigmas": True, "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}
    scheduler = _k_scheduler("DPMSolverMultistepScheduler", **options)
    return stable_diffusion("StableDiffusionPipeline", scheduler, height=16, width=16)


def euler() -> Case:
    scheduler = _k_scheduler("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1)
    return stable_diffusion("StableDiffusionPipeline", scheduler, height=16, width=16)


def euler_ancestral() -> Case:
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = _k_scheduler("EulerAncestralDiscreteScheduler", **options)
    return stable_diffusion("StableDiffusionPipeline", scheduler, height=16, width=16, guidance_rescale=0.7)


def image_to_image() -> Case:
    scheduler = _k_scheduler("EulerDiscreteScheduler", use_karras_sigmas=True)
    return stable_diffusion("StableDiffusionImg2ImgPipeline", scheduler, image=picture(), strength=0.8)


def inpaint() -> Case:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    call = {"image": picture(), "mask_image": mask, "height": 16, "width": 16, "strength": 0.9}
    return stable_diffusion("StableDiffusionInpaintPipeline", _k_scheduler("DPMSolverMultistepScheduler"), **call)


def latent_consistency() -> Case:
    scheduler = latent_scheduler("LCMScheduler")
    pipe, call = stable_diffusion(
        "LatentConsistencyModelPipeline", scheduler, unet_options={"time_cond_proj_dim": 32}, height=16, width=16
    )
    call.pop("negative_prompt")
    return pipe, call


def xl() -> Case:
    unet = small_unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = _k_scheduler("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1)
    pipe = diffusers.StableDiffusionXLPipeline(vae=small_vae(), unet=unet, scheduler=scheduler, **texts)
    return pipe, {**_embeddings(32, "negative_"), "height": 16, "width": 16, "num_inference_steps": 4}


def _embeddings(pooled: int, *prefixes: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {}
    for prefix in ("", *prefixes):
        found[f"{prefix}prompt_embeds"] = torch.randn(1, 12, 32, generator=generator)
        found[f"{prefix}pooled_prompt_embeds"] = torch.randn(1, pooled, generator=generator)
    return found


def stable_diffusion_3() -> Case:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    texts = dict.fromkeys([f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")])
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        **texts,
    )
    return pipe, {**_embeddings(64, "negative_"), "height": 16, "width": 16, "num_inference_steps": 4}


def flux() -> Case:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=small_vae(shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        **texts,
    )
    return pipe, {**_embeddings(32), "height": 16, "width": 16, "num_inference_steps": 4}


CASES = (
    dpm_solver,
    euler,
    euler_ancestral,
    image_to_image,
    inpaint,
    latent_consistency,
    xl,
    stable_diffusion_3,
    flux,
)


@pytest.mark.parametrize("case", CASES)
def test_the_images_stay(case: Callable[[], Case]) -> None:
    check_that_images_stay(case)


@pytest.mark.parametrize("case", [dpm_solver, euler, euler_ancestral, latent_consistency, flux])
def test_accelerate_swaps_the_scheduler_and_restore_puts_it_back(case: Callable[[], Case]) -> None:
    pipe, _ = case()
    before = pipe.scheduler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model, **_: model)
        accelerated, report = dd.accelerate(pipe)
    assert type(accelerated.scheduler) is getattr(ours, type(before).__name__)
    configs = [dict(one.config) for one in (accelerated.scheduler, before)]
    for config in configs:
        config.pop("_use_default_values", None)
    assert configs[0] == configs[1]
    assert f"dd_kernels' {type(before).__name__}" in str(report)
    dd.restore(pipe)
    assert pipe.scheduler is before


def test_a_saved_pipeline_names_diffusers_scheduler(tmp_path: Any) -> None:
    pipe, call = flux()
    pipe.scheduler = ours.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    before = run(pipe, call)
    pipe.save_pretrained(tmp_path)
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    again = diffusers.FluxPipeline.from_pretrained(tmp_path, **texts)
    assert type(again.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert abs(run(again, call) - before).max() < 1 / 255
