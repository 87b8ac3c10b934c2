"""diffusers' pipelines on small random components: the same images before and after the schedulers are swapped."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from dd_kernels.integrations import diffusers as ours  # noqa: E402

LENGTH = 77
Case = tuple[Any, dict[str, Any]]


class Tokenizer:
    """Letters as token ids: what the pipelines need of a tokenizer, without a vocabulary file."""

    model_max_length = LENGTH
    added_tokens_encoder = MappingProxyType({})

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def __call__(self, prompt: str | list[str], **_: Any) -> SimpleNamespace:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        ids = torch.full((len(prompts), LENGTH), 2)
        for row, text in zip(ids, prompts, strict=True):
            row[1 : len(text) + 1] = torch.tensor([3 + ord(letter) % 90 for letter in text], dtype=torch.int64)
        ids[:, 0] = 0
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


def _text_config() -> Any:
    return transformers.CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        pad_token_id=1,
        vocab_size=100,
        max_position_embeddings=LENGTH,
    )


def _unet(**options: Any) -> Any:
    return diffusers.UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **options,
        }
    )


def ddpm() -> Case:
    pipe = diffusers.DDPMPipeline(_unet(), diffusers.DDPMScheduler(variance_type="fixed_large"))
    return pipe, {"batch_size": 2, "num_inference_steps": 5}


def ddim() -> Case:
    pipe = diffusers.DDIMPipeline(_unet(), diffusers.DDIMScheduler())
    return pipe, {"batch_size": 2, "num_inference_steps": 5, "eta": 0.5, "use_clipped_model_output": True}


def _stable_diffusion(kind: str, scheduler: Any, **call: Any) -> Case:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipe = getattr(diffusers, kind)(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(_text_config()),
        tokenizer=Tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    options = {"prompt": "a lion", "negative_prompt": "fog", "guidance_scale": 6.0, "num_inference_steps": 5}
    return pipe, {**options, **call}


def _latent_scheduler(name: str, **options: Any) -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, name)(**betas, clip_sample=False, steps_offset=1, **options)


def text_to_image() -> Case:
    scheduler = _latent_scheduler("DDIMScheduler", set_alpha_to_one=False)
    return _stable_diffusion("StableDiffusionPipeline", scheduler, height=16, width=16, guidance_rescale=0.7, eta=0.5)


def text_to_image_zero_snr() -> Case:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    scheduler = _latent_scheduler("DDPMScheduler", **options)
    return _stable_diffusion("StableDiffusionPipeline", scheduler, height=16, width=16)


def _picture() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def image_to_image() -> Case:
    scheduler = _latent_scheduler("DDIMScheduler", set_alpha_to_one=False)
    return _stable_diffusion("StableDiffusionImg2ImgPipeline", scheduler, image=_picture(), strength=0.8)


def inpaint() -> Case:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    scheduler = _latent_scheduler("DDPMScheduler")
    call = {"image": _picture(), "mask_image": mask, "height": 16, "width": 16, "strength": 0.9}
    return _stable_diffusion("StableDiffusionInpaintPipeline", scheduler, **call)


def unclip() -> Case:
    """The design of DALL-E 2: prior, decoder, and an upsampler with another for its last step."""
    from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline, UnCLIPTextProjModel

    resnets = {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }
    upsamplers = [_unet(in_channels=6, sample_size=32, **resnets) for _ in range(2)]
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
        text_encoder=transformers.CLIPTextModelWithProjection(_text_config()),
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


def _run(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call, generator=torch.Generator().manual_seed(3), output_type="np").images


def swap(pipe: Any) -> list[str]:
    """Puts this package's schedulers into a pipeline; the names of those that it replaced."""
    swapped = []
    for name, component in pipe.components.items():
        if isinstance(component, diffusers.SchedulerMixin):
            ours_of_it = getattr(ours, type(component).__name__).from_config(component.config)
            pipe.register_modules(**{name: ours_of_it})
            swapped.append(name)
    return swapped


@pytest.mark.parametrize("case", CASES)
def test_the_images_stay(case: Callable[[], Case]) -> None:
    torch.manual_seed(0)
    pipe, call = case()
    before = _run(pipe, call)
    assert swap(pipe)
    after = _run(pipe, call)
    assert before.shape == after.shape
    assert before.std() > 0.01, "an image without content would prove nothing"
    assert np.abs(after - before).max() < 1 / 255


def test_a_saved_pipeline_names_diffusers_scheduler(tmp_path: Any) -> None:
    """It loads where this package is not installed; ours is put in again with the options that were saved."""
    pipe, call = ddpm()
    pipe.scheduler = ours.DDPMScheduler.from_config(pipe.scheduler.config, noise="philox")
    before = _run(pipe, call)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.DDPMScheduler
    again.scheduler = ours.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert again.scheduler.config.noise == "philox"
    # Another set of weights at other addresses: a convolution may round otherwise.
    np.testing.assert_allclose(_run(again, call), before, atol=1e-5)
