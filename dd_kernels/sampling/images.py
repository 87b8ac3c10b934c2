"""From images to images: a sampler started half way, and walks between two images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import q_sample, randn
from ..ops.randn import Stream
from ..ops.reverse_step.table import StepTable
from ..schedules import Schedule
from .guidance import Model
from .loop import sample
from .requests import drawn_seed


def check_images(name: str, images: Tensor) -> None:
    """Raises ``TypeError`` unless ``images`` is a floating tensor."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name} must be a floating torch.Tensor [N, C, H, W]; got {kind}")


def check_downward(table: StepTable, schedule: Schedule) -> None:
    """Raises ``ValueError`` unless a table goes down a schedule's timesteps, so that each x_t has their noise level."""
    t = table.timesteps
    if table.times is not None or len(t) == 0 or (t.diff() > 0).any() or int(t.max()) >= len(schedule):
        raise ValueError(
            f"table must go down integer timesteps of the schedule, below {len(schedule)}, as ddpm() and ddim() of it "
            f"do; got {t.tolist() if table.times is None else table.times.tolist()}"
        )


def _begun(
    images: Tensor, z: Tensor, table: StepTable, schedule: Schedule, strength: float
) -> tuple[Tensor, StepTable]:
    """Returns the images with the noise z at the first timestep below strength T, and the steps from there on."""
    check_downward(table, schedule)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1]; got {strength}")
    first = int((table.timesteps >= round(strength * len(schedule))).sum())
    if strength == 1:
        return z.to(images.dtype), table
    tail = table[first:]
    return (q_sample(images, int(tail.timesteps[0]), schedule, z) if len(tail) else images.clone()), tail


@torch.no_grad()
def image_to_image(
    model: Model,
    images: Tensor,
    table: StepTable,
    schedule: Schedule,
    *,
    strength: float = 0.5,
    seed: int | None = None,
    first_sample: int = 0,
    **options: Any,
) -> Tensor:
    r"""Returns images that keep the coarse form of those given: SDEdit, algorithm 1 of Meng et al. (2022).

    .. math:: x_{t_0} = \sqrt{\bar\alpha_{t_0}}\, x_0 + \sqrt{1 - \bar\alpha_{t_0}}\, z, \qquad z \sim N(0, I)

    and from x_{t_0} the sampler's own steps, t_0 being its first timestep below ``strength`` T.

    Args:
        model: as in :func:`dd_kernels.sample`.
        images: x_0, [N, C, H, W] in [-1, 1], float.
        table: a sampler over timesteps of ``schedule``, such as :func:`dd_kernels.ddim` or :func:`dd_kernels.ddpm`.
        schedule: the forward process.
        strength: in [0, 1]; 0 gives the images back, 1 is :func:`dd_kernels.sample` from noise alone.
        seed, first_sample: of z and of every step's noise, those of ``sample``; an image does not depend on its batch.
        options: model_kwargs, uncond_kwargs, guidance_scale, batch_size, progress ... as in ``sample``.

    Returns:
        The images, of the shape and dtype of ``images``.

    Raises:
        ValueError, TypeError: an argument that does not fit; a multistep solver's table where x_0 of earlier steps
            would be missing.
    """
    check_images("images", images)
    seed = drawn_seed() if seed is None else seed
    z = randn(images.shape, seed=seed, first_sample=first_sample, device=images.device)
    x, tail = _begun(images, z, table, schedule, strength)
    return sample(model, x, tail, seed=seed, first_sample=first_sample, **options)


@torch.no_grad()
def interpolate(
    model: Model,
    first: Tensor,
    second: Tensor,
    weights: Sequence[float] | Tensor,
    table: StepTable,
    schedule: Schedule,
    *,
    strength: float = 0.5,
    seed: int | None = None,
    first_sample: int = 0,
    **options: Any,
) -> Tensor:
    r"""Returns walks between images, as DDPM takes them (Ho et al., 2020, section 4.3 and figure 8).

    .. math:: x_t = \sqrt{\bar\alpha_t} \big((1 - \lambda)\, x_0 + \lambda\, x_0'\big) + \sqrt{1 - \bar\alpha_t}\, z

    is the mixture of x_t and x_t', both diffused with one z, so that it has the noise that the model expects at t; the
    sampler's steps follow. The frames of a walk share z and the noise of every step, so that they differ by \lambda
    alone: a walk's end is what :func:`image_to_image` makes of that image.

    Args:
        model, table, schedule, strength: as in :func:`image_to_image`.
        first, second: the ends x_0 and x_0' of N walks, [N, C, H, W] in [-1, 1], float.
        weights: the F values of \lambda, 0 for ``first``.
        seed, first_sample: of the noise of walk n, that of sample first_sample + n.
        options: as in :func:`dd_kernels.sample`; model_kwargs hold a row for each frame of each walk, N F rows.

    Returns:
        [N, F, C, H, W]. Raises as :func:`image_to_image`.
    """
    check_images("first", first)
    check_images("second", second)
    if first.shape != second.shape:
        raise ValueError(f"second must have the shape of first, {list(first.shape)}; got {list(second.shape)}")
    seed = drawn_seed() if seed is None else seed
    share = torch.as_tensor(weights, dtype=first.dtype, device=first.device)
    frames = len(share)
    share = share.reshape(1, frames, *[1] * (first.ndim - 1))
    mixed = ((1 - share) * first[:, None] + share * second[:, None]).flatten(0, 1)

    def noise(draw: int, stream: Stream) -> Tensor:
        z = randn(first.shape, seed=seed, first_sample=first_sample, draw=draw, stream=stream, device=first.device)
        return z.repeat_interleave(frames, dim=0)

    x, tail = _begun(mixed, noise(0, Stream.X_T), table, schedule, strength)
    timesteps = tail.timesteps.tolist()
    x = sample(model, x, tail, noise=lambda step: noise(timesteps[step], Stream.REVERSE_STEP), **options)
    return x.unflatten(0, (len(first), frames))


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    r"""Spherical interpolation of latents, eq. 67 of DDIM (Song et al., 2021).

    .. math:: \frac{\sin((1 - w)\theta)}{\sin\theta} a + \frac{\sin(w\theta)}{\sin\theta} b, \qquad
        \cos\theta = \frac{a \cdot b}{\|a\| \|b\|}

    Args:
        a, b: [N, ...], one latent per sample; float.
        weight: [F] in [0, 1], 0 is ``a``.

    Returns:
        [N, F, ...]; on a straight line where a and b are parallel.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    norms = (flat_a.norm(dim=1) * flat_b.norm(dim=1)).clamp(min=1e-300)
    theta = torch.acos(((flat_a * flat_b).sum(1) / norms).clamp(-1, 1))[:, None]  # [N, 1]
    w, sine = weight.double().to(a.device)[None], theta.sin()
    straight = sine < 1e-6
    safe = torch.where(straight, 1.0, sine)
    share_a = torch.where(straight, 1 - w, ((1 - w) * theta).sin() / safe)  # [N, F]
    share_b = torch.where(straight, w, (w * theta).sin() / safe)
    mixed = share_a[..., None] * flat_a[:, None] + share_b[..., None] * flat_b[:, None]
    return mixed.reshape(a.shape[0], -1, *a.shape[1:]).to(a.dtype)
