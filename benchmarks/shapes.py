"""The inputs of GroupNorm+SiLU in the models that people run, as (channels, side); every norm has 32 groups.

They come from the forward passes of ``nn.UNet``, which a test counts again, and of Stable Diffusion 1.5's U-Net
(latents of 64 x 64) and VAE decoder (512 x 512).
"""

from __future__ import annotations

GROUPS = 32

MODELS: dict[str, list[tuple[int, int]]] = {
    "cifar10": [
        *((128, 32), (256, 32), (384, 32)),
        *((128, 16), (256, 16), (384, 16), (512, 16)),
        *((256, 8), (512, 8)),
        *((256, 4), (512, 4)),
    ],
    "imagenet64": [
        *((192, 64), (384, 64), (576, 64)),
        *((192, 32), (384, 32), (576, 32), (768, 32), (960, 32)),
        *((384, 16), (576, 16), (768, 16), (960, 16), (1152, 16), (1344, 16)),
        *((576, 8), (768, 8), (1344, 8), (1536, 8)),
    ],
    "imagenet256": [
        *((256, 256), (512, 256)),
        *((256, 128), (512, 128), (768, 128)),
        *((256, 64), (512, 64), (768, 64), (1024, 64)),
        *((512, 32), (1024, 32), (1536, 32)),
        *((512, 16), (1024, 16), (1536, 16), (2048, 16)),
        *((1024, 8), (2048, 8)),
    ],
    "stable diffusion": [
        *((320, 64), (640, 64), (960, 64)),
        *((320, 32), (640, 32), (960, 32), (1280, 32), (1920, 32)),
        *((640, 16), (1280, 16), (1920, 16), (2560, 16)),
        *((1280, 8), (2560, 8)),
    ],
    "stable diffusion vae": [(512, 64), (512, 128), (512, 256), (256, 256), (256, 512), (128, 512)],
}

# By device: the model, the batch, and which of its shapes are timed (None: all).
SELECTION: dict[str, list[tuple[str, int, list[tuple[int, int]] | None]]] = {
    "cuda": [
        ("cifar10", 256, None),
        ("stable diffusion", 8, None),
        ("stable diffusion vae", 1, None),
        ("imagenet64", 32, None),
        ("imagenet256", 8, None),
        ("cifar10", 1, [(256, 4), (512, 16)]),
    ],
    "cpu": [
        ("cifar10", 8, None),
        ("cifar10", 1, [(256, 4), (512, 16)]),
        ("imagenet64", 1, [(192, 64), (576, 32), (768, 8)]),
        ("imagenet256", 1, [(256, 256)]),
        ("stable diffusion", 1, [(320, 64), (1280, 16)]),
        ("stable diffusion vae", 1, [(512, 64), (128, 512)]),
    ],
}
