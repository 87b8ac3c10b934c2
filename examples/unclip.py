"""The design of DALL-E 2 in small (Ramesh et al., 2022): pictures of captions, by way of the embedding of a picture.

    python examples/unclip.py --data fashion-mnist --out unclip.png

Trains, on images and captions made from their classes ("a dark ankle boot"), a contrastive model of both (CLIP, Radford
et al., 2021), a diffusion prior that draws an image's embedding for a caption's, a decoder that draws half the image's
size for an embedding, and a super-resolution diffusion that doubles it, its condition blurred by noise in training (Ho
et al., 2022). Prints how often the judge sees the class that the caption names; writes pictures with their captions.
15 minutes on one core; --steps makes it longer or shorter.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from latent_diffusion import BATCH, NULL_SHARE, fit, judge_of
from torch import Tensor, nn

import dd_kernels as dd
from dd_kernels.apps import data, images, plots
from dd_kernels.apps.files import atomic_write
from dd_kernels.apps.training.objective import target_of
from dd_kernels.losses import simple_loss
from dd_kernels.nn import UNet, timestep_embedding

WIDTH = 32  # of the joint embedding
SHADES = ("dark", "grey", "bright")
SCHEDULE = dd.cosine_schedule(1000)
BLUR = 200  # noise of the super-resolution's condition in training: a timestep below this one


def captions_of(x: Tensor, labels: Tensor, classes: Sequence[str]) -> list[str]:
    """Returns a caption of each image [N, C, H, W]: the third of the greys of its bright pixels' mean, its class."""
    inside = x > -0.9
    mean = (x * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
    shade = ((mean + 1) * len(SHADES) / 2).long().clamp(0, len(SHADES) - 1)
    return [f"a {SHADES[s]} {classes[c]}" for s, c in zip(shade.tolist(), labels.tolist(), strict=True)]


class Contrastive(nn.Module):
    """Embeds images and captions on one sphere, by the symmetric cross-entropy of CLIP (its figure 3)."""

    def __init__(self, channels: int, words: Sequence[str]) -> None:
        super().__init__()
        self.words = {word: i for i, word in enumerate(words)}
        self.text = nn.Sequential(nn.Linear(len(words), 64), nn.SiLU(), nn.Linear(64, WIDTH))
        self.image = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, WIDTH)),
        )
        self.temperature = nn.Parameter(torch.tensor(2.0))  # its logarithm

    def of_captions(self, captions: Sequence[str]) -> Tensor:
        """Returns unit vectors [N, WIDTH] of captions."""
        bags = torch.zeros(len(captions), len(self.words))
        for row, caption in zip(bags, captions, strict=True):
            row[[self.words[word] for word in caption.split()]] = 1
        return F.normalize(self.text(bags))

    def of_images(self, x: Tensor) -> Tensor:
        """Returns unit vectors [N, WIDTH] of images [N, C, H, W]."""
        return F.normalize(self.image(x))

    def loss(self, x: Tensor, captions: Sequence[str]) -> Tensor:
        """Returns the cross-entropy of finding each image's caption, and each caption's image, in the batch.

        Captions that are alike are all right answers, each with the same share.
        """
        logits = self.temperature.exp() * self.of_images(x) @ self.of_captions(captions).T
        same = torch.tensor([[a == b for b in captions] for a in captions], dtype=torch.float32)
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Prior(nn.Module):
    """Predicts an image's embedding from a noisy one, the timestep and the caption's (section 2.2 of Ramesh et al.)."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(2 * WIDTH + 64, 256), *(nn.Linear(256, 256) for _ in range(2)), nn.Linear(256, WIDTH)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        """Returns x_0 [N, WIDTH], of a length that suits noise of variance 1."""
        h = torch.cat((x, caption, timestep_embedding(t, 64)), dim=1)
        for layer in self.layers[:-1]:
            h = F.silu(layer(h))
        return self.layers[-1](h)


class Conditioned(nn.Module):
    """A U-Net that reads its condition [N, K, h, w], enlarged to the image's size, as further channels."""

    def __init__(self, channels: int, size: int, condition: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.unet = UNet(image_size=size, in_channels=channels + condition, out_channels=channels, channels=widths,
                         num_res_blocks=1, num_heads=4, num_groups=8)  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Returns v of x [N, C, H, W], from which x_0 follows without a division by a small signal.

        By the noise instead, samples of the super-resolution kept some of it.
        """
        return self.unet(torch.cat((x, F.interpolate(condition, x.shape[2:])), dim=1), t)


class UnClip:
    """The four models, trained one after another; ``steps`` are those of the decoder."""

    def __init__(self, train: data.ImageData, steps: int) -> None:
        self.train, self.steps = train, steps
        channels, size = train.images.shape[1], train.images.shape[-1]
        words = sorted({word for name in train.classes for word in ("a", *SHADES, *name.split())})
        torch.manual_seed(0)
        self.clip = Contrastive(channels, words)
        self.prior, self.decoder = Prior(), Conditioned(channels, size // 2, WIDTH, (32, 64))
        self.double = Conditioned(channels, size, channels + 1, (16, 32))
        self.shape, self.small = (channels, size, size), (channels, size // 2, size // 2)
        self.clip = fit(self.clip, self._clip_loss, steps // 2, "captions and images")
        self.prior = fit(self.prior, self._prior_loss, steps, "prior")
        self.decoder = fit(self.decoder, self._decoder_loss, steps, "decoder")
        self.double = fit(self.double, self._double_loss, steps // 2, "super-resolution")

    def _batch(self, step: int, seed: int) -> tuple[Tensor, list[str]]:
        x, labels = self.train.batch(data.positions(self.train, step * BATCH, BATCH, seed=seed))
        assert labels is not None
        return x, captions_of(x, labels, self.train.classes)

    def _noisy(self, x: Tensor, step: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns x_t, t and v of a step."""
        t = torch.randint(len(SCHEDULE), (len(x),), generator=torch.Generator().manual_seed(step))
        x_t, noise = dd.q_sample(x, t, SCHEDULE, seed=seed, draw=step, return_noise=True)
        return x_t, t, target_of("v", x, noise, t, SCHEDULE)

    def _clip_loss(self, step: int) -> Tensor:
        return self.clip.loss(*self._batch(step, seed=0))

    @torch.no_grad()
    def _embedded(self, x: Tensor) -> Tensor:
        return self.clip.of_images(x) * WIDTH**0.5  # of variance 1, as the noise

    def _prior_loss(self, step: int) -> Tensor:
        x, captions = self._batch(step, seed=1)
        with torch.no_grad():
            caption = self.clip.of_captions(captions)
        embedding = self._embedded(x)
        x_t, t, _ = self._noisy(embedding, step, seed=1)
        return simple_loss(self.prior(x_t, t, caption), embedding).mean()

    def _decoder_loss(self, step: int) -> Tensor:
        x, _ = self._batch(step, seed=2)
        kept = torch.rand(BATCH, 1, generator=torch.Generator().manual_seed(step)) > NULL_SHARE
        x_t, t, v = self._noisy(F.avg_pool2d(x, 2), step, seed=2)
        return simple_loss(self.decoder(x_t, t, _as_map(self._embedded(x) * kept)), v).mean()

    def _double_loss(self, step: int) -> Tensor:
        x, _ = self._batch(step, seed=3)
        x_t, t, v = self._noisy(x, step, seed=3)
        level = torch.randint(BLUR, (BATCH,), generator=torch.Generator().manual_seed(step))
        blurred = dd.q_sample(F.avg_pool2d(x, 2), level, SCHEDULE, seed=4, draw=step)
        return simple_loss(self.double(x_t, t, _with_level(blurred, level)), v).mean()

    def draw(self, captions: Sequence[str], seed: int = 0, guidance: float = 2.0) -> tuple[Tensor, Tensor]:
        """Returns images of captions at half the size and at the whole size."""
        n = len(captions)
        with torch.no_grad():
            caption = self.clip.of_captions(captions)
        prior = dd.ddim(SCHEDULE, 50, prediction="x_start", clip=None)
        z = dd.sample(self.prior, (n, WIDTH), prior, seed=seed, model_kwargs={"caption": caption})
        z = _as_map(F.normalize(z) * WIDTH**0.5)
        table = dd.dpm_solver(SCHEDULE, 20, prediction="v")
        guided = {"uncond_kwargs": {"condition": torch.zeros_like(z)}, "guidance_scale": guidance}
        small = dd.sample(self.decoder, (n, *self.small), table, seed=seed + 1, model_kwargs={"condition": z}, **guided)
        level = torch.full((n,), BLUR // 4)
        condition = _with_level(dd.q_sample(small, level, SCHEDULE, seed=seed + 2), level)
        return small, dd.sample(
            self.double, (n, *self.shape), table, seed=seed + 3, model_kwargs={"condition": condition}
        )


def _as_map(z: Tensor) -> Tensor:
    return z[:, :, None, None]


def _with_level(x: Tensor, level: Tensor) -> Tensor:
    """Returns x with a channel that says how much noise is in it, from 0 to 1."""
    return torch.cat((x, (level / BLUR)[:, None, None, None].expand(-1, 1, *x.shape[2:])), dim=1)


def picture(captions: Sequence[str], small: Tensor, large: Tensor) -> bytes:
    """Returns a figure with a column for each caption: the decoder's image above, the doubled one below."""
    figure = plots.figure(1.6 * len(captions), 3.4)
    axes = figure.subplots(2, len(captions), squeeze=False)
    for row, batch in zip(axes, (small, large), strict=True):
        for place, image in zip(row, images.to_uint8(batch).numpy(), strict=True):
            place.imshow(image, cmap="grey", vmin=0, vmax=255)
            place.set_axis_off()
    for place, caption in zip(axes[0], captions, strict=True):
        place.set_title(caption, fontsize=8)
    return plots.png(figure)


def main() -> None:
    """Trains the models, draws a picture of captions, and measures the classes of others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="a named source, or IDX files (default: fashion-mnist)")
    parser.add_argument("--steps", type=int, default=2000, help="of the decoder's training (default: 2000)")
    parser.add_argument("-n", type=int, default=200, help="images to measure (default: 200)")
    parser.add_argument("--out", default="unclip.png", help="the picture (default: unclip.png)")
    args = parser.parse_args()
    images.Output(args.out, overwrite=True)  # an error now, if it cannot be written
    train, held_out = data.splits(args.data)
    judge = judge_of(args.data, train, held_out)
    models, classes = UnClip(train, args.steps), train.classes

    shown = [f"a {SHADES[i % len(SHADES)]} {name}" for i, name in enumerate(classes)]
    atomic_write(args.out, picture(shown, *models.draw(shown)))
    labels = judge.labels(args.n)
    captions = [f"a {SHADES[i % len(SHADES)]} {classes[label]}" for i, label in enumerate(labels.tolist())]
    _, large = models.draw(captions, seed=10)
    found = judge.measure(large, labels)
    print(f"{args.out}: {len(shown)} captions; {found.right:.1%} of {args.n} images are of the class that theirs names")
    print(
        f"distance {found.distance:.2f} ± {found.distance_error:.2f}, of real images {judge.real(labels).distance:.2f}"
    )


if __name__ == "__main__":
    main()
