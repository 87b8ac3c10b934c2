"""Small pipelines of diffusers with random weights, and how the tests run them before and after a swap."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from dd_kernels.integrations import diffusers as ours

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


def text_config() -> Any:
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


def unet(**options: Any) -> Any:
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


def small_vae(**options: Any) -> Any:
    """An autoencoder of latents at half the size."""
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **options,
    )


def small_unet(**options: Any) -> Any:
    """A network of latents and text."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            **options,
        }
    )


def stable_diffusion(kind: str, scheduler: Any, unet_options: dict[str, Any] | None = None, **call: Any) -> Case:
    pipe = getattr(diffusers, kind)(
        vae=small_vae(),
        text_encoder=transformers.CLIPTextModel(text_config()),
        tokenizer=Tokenizer(),
        unet=small_unet(**(unet_options or {})),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    options = {"prompt": "a lion", "negative_prompt": "fog", "guidance_scale": 6.0, "num_inference_steps": 5}
    return pipe, {**options, **call}


def latent_scheduler(name: str, **options: Any) -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, name)(**betas, clip_sample=False, steps_offset=1, **options)


def picture() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def run(pipe: Any, call: dict[str, Any]) -> np.ndarray:
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


def check_that_images_stay(case: Callable[[], Case]) -> None:
    """Checks that a pipeline draws the same images with our schedulers, to a step of 8 bits."""
    torch.manual_seed(0)
    pipe, call = case()
    before = run(pipe, call)
    assert swap(pipe)
    after = run(pipe, call)
    assert before.shape == after.shape
    assert before.std() > 0.01, "an image without content would prove nothing"
    assert np.abs(after - before).max() < 1 / 255
