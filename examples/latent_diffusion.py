"""Latent diffusion in small (Rombach et al., 2022): an autoencoder, diffusion of its latents, and both beside pixels.

    python examples/latent_diffusion.py --data fashion-mnist --out latent.png

Trains a KL autoencoder on the images, then a U-Net on its latents, which are 7 x 7 x 4 for images of 28 x 28. Prints
the autoencoder's error on held-out images, and the Fréchet distance and images/s of the samples beside those of the
bundled model of pixels. The picture has held-out images, what the autoencoder makes of them, and samples. 20 minutes
on one core; --steps and --autoencoder-steps make it longer or shorter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import trange

import dd_kernels as dd
from dd_kernels.apps import checkpoint, data, images
from dd_kernels.apps.evaluate import Judge, load_judge, packaged_judge
from dd_kernels.losses import simple_loss
from dd_kernels.nn import AutoencoderKL, UNet, kl_to_normal

BATCH, SAMPLES, SAMPLING_STEPS = 64, 500, 50
KL_WEIGHT = 1e-4  # of the KL beside the square error, both per image; the latents must be regular, not small
NULL_SHARE = 0.1


def fit(module: nn.Module, loss: Callable[[int], Tensor], steps: int, what: str, lr: float = 1e-3) -> nn.Module:
    """Trains ``module`` by AdamW with a cosine on ``loss(step)``; returns the average of its weights."""
    average = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=min(0.1, 100 / steps))
    with trange(steps, desc=what) as bar:
        for step in bar:
            optimizer.zero_grad()
            value = loss(step)
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            rate.step()
            average.update_parameters(module)
            if step % 50 == 0:
                bar.set_postfix_str(f"loss {value.item():.4f}", refresh=False)
    return average.module.eval().requires_grad_(False)


def trained_autoencoder(train: data.ImageData, steps: int) -> AutoencoderKL:
    """Returns an autoencoder of the images, its latents scaled to a standard deviation of 1."""
    torch.manual_seed(0)
    model = AutoencoderKL(train.images.shape[1], channels=(16, 32, 64))

    def loss(step: int) -> Tensor:
        x, _ = train.batch(data.positions(train, step * BATCH, BATCH, seed=0))
        mean, log_variance = model.moments(x)
        z = dd.randn(mean.shape, seed=0, draw=step)
        decoded = model.decoder(mean + (0.5 * log_variance).exp() * z)
        return ((decoded - x).square().flatten(1).sum(1) + KL_WEIGHT * kl_to_normal(mean, log_variance)).mean() / x[
            0
        ].numel()

    found = fit(model, loss, steps, "autoencoder")
    assert isinstance(found, AutoencoderKL)
    found.fit_scale(train.batch(torch.arange(1000) % len(train))[0].split(BATCH))
    return found


def trained_unet(train: data.ImageData, autoencoder: AutoencoderKL, schedule: dd.Schedule, steps: int) -> UNet:
    """Returns a U-Net that predicts the noise in latents, by class or (label ``null_label``) without one."""
    torch.manual_seed(1)
    side = train.images.shape[-1] // autoencoder.factor
    model = UNet(
        image_size=side,
        in_channels=autoencoder.latent_channels,
        channels=(96,),
        num_res_blocks=1,
        num_heads=4,
        num_groups=8,
        num_classes=len(train.classes),
        null_class=True,
    )

    def loss(step: int) -> Tensor:
        x, labels = train.batch(data.positions(train, step * BATCH, BATCH, seed=1))
        assert labels is not None
        with torch.no_grad():
            latent = autoencoder.encode(x)
        generator = torch.Generator().manual_seed(step)
        t = torch.randint(len(schedule), (BATCH,), generator=generator)
        labels = labels.where(torch.rand(BATCH, generator=generator) > NULL_SHARE, model.null_label)
        x_t, noise = dd.q_sample(latent, t, schedule, seed=1, draw=step, return_noise=True)
        return simple_loss(model(x_t, t, labels), noise).mean()

    found = fit(model, loss, steps, "diffusion of latents")
    assert isinstance(found, UNet)
    return found


def judge_of(source: str, train: data.ImageData, held_out: data.ImageData) -> Judge:
    """Returns the judge that is bundled for a source, or one trained on its images."""
    packaged = packaged_judge(source)
    return Judge.trained(train, held_out) if packaged is None else load_judge(packaged)


def drawn(draw: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Returns images and how many were drawn in a second."""
    started = time.perf_counter()
    x = draw()
    return x, len(x) / (time.perf_counter() - started)


def main() -> None:
    """Trains both models, measures them, writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="a named source, or IDX files (default: fashion-mnist)")
    parser.add_argument("--autoencoder-steps", type=int, default=1500, help="(default: 1500)")
    parser.add_argument("--steps", type=int, default=3000, help="of the diffusion of latents (default: 3000)")
    parser.add_argument("-n", type=int, default=SAMPLES, help=f"samples to measure (default: {SAMPLES})")
    parser.add_argument("--out", default="latent_diffusion.png", help="the picture (default: latent_diffusion.png)")
    args = parser.parse_args()
    images.Output(args.out, overwrite=True)  # an error now, if it cannot be written
    train, held_out = data.splits(args.data)
    judge = judge_of(args.data, train, held_out)
    schedule = dd.linear_schedule(1000)

    autoencoder = trained_autoencoder(train, args.autoencoder_steps)
    unet = trained_unet(train, autoencoder, schedule, args.steps)
    real, _ = held_out.batch(torch.arange(min(args.n, len(held_out))))
    with torch.no_grad():
        decoded = autoencoder.decode(autoencoder.encode(real))
    error = (decoded - real).square().mean().sqrt().item()

    y = judge.labels(args.n)
    shape = (args.n, autoencoder.latent_channels, *(side // autoencoder.factor for side in real.shape[2:]))
    table = dd.ddim(schedule, SAMPLING_STEPS, clip=None)  # latents have no range

    @torch.no_grad()
    def of_latents() -> Tensor:
        latents = dd.sample(unet, shape, table, seed=0, batch_size=256, model_kwargs={"y": y})
        return torch.cat([autoencoder.decode(part) for part in latents.split(256)])

    rows = [("latents", *drawn(of_latents))]
    pixels, info = checkpoint.load_model("digits" if args.data == "digits" else None)
    if info.sample_shape == tuple(real.shape[1:]):
        of_pixels = dd.ddim(info.make_schedule(), SAMPLING_STEPS, prediction=info.prediction)
        line = {"seed": 0, "batch_size": 256, "model_kwargs": {"y": y}}
        rows.append(("pixels", *drawn(lambda: dd.sample(pixels, (args.n, *info.sample_shape), of_pixels, **line))))

    sizes = f"{list(real.shape[1:])} to {list(shape[1:])}"
    print(f"autoencoder: {sizes}, RMS error {error:.4f} on {len(real)} held-out images")
    print(
        f"distance of real images {judge.real(y).distance:.2f}, of decoded ones {judge.measure(decoded).distance:.2f}"
    )
    for name, x, speed in rows:
        found = judge.measure(x, y)
        distance = f"{found.distance:.2f} ± {found.distance_error:.2f}"
        speed_of = f"{speed:.1f} images/s (DDIM, {SAMPLING_STEPS} steps)"
        print(f"diffusion of {name}: distance {distance}, {found.right:.1%} of the class asked for, {speed_of}")
    shown = torch.cat((real[:10], decoded[:10], rows[0][1][:30]))
    images.save_png(images.grid(images.to_uint8(shown), 10), args.out)
    print(f"{args.out}: held-out images, what the autoencoder makes of them, and 30 samples")


if __name__ == "__main__":
    main()
