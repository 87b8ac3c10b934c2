"""Paints a part of an image anew, the rest being known: RePaint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import q_sample, randn
from ..ops.randn import Stream
from ..ops.reverse_step.table import StepTable
from ..schedules import Schedule
from .guidance import Model, is_self_conditioned
from .images import check_downward, check_images
from .loop import progress_bar, sample
from .requests import Step, drawn_seed


def _path(steps: int, resample: int, jump: int) -> Iterator[int]:
    """Yields where each move ends, as the number of steps behind it: one more, or ``jump`` fewer.

    It is the schedule of appendix B of RePaint: every ``jump`` steps, counted from the least noise upwards, the last
    ``jump`` are taken ``resample`` times. The step to x_0 is taken once.
    """
    left = {steps - 1 - t: resample - 1 for t in range(0, steps - jump, jump)}
    at = 0
    while at < steps:
        at += 1
        yield at
        if left.get(at, 0) > 0:
            left[at] -= 1
            at -= jump
            yield at


@torch.no_grad()
def inpaint(
    model: Model,
    images: Tensor,
    mask: Tensor,
    table: StepTable,
    schedule: Schedule,
    *,
    resample: int = 1,
    jump: int = 10,
    seed: int | None = None,
    first_sample: int = 0,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    r"""Paints the masked pixels of images anew, to fit the others: algorithm 1 of RePaint (Lugmayr et al., 2022).

    After each of the sampler's steps the known pixels are replaced by a draw of q(x_{t-1} | x_0), eq. 8 of RePaint:

    .. math:: x_{t-1} = m \odot \hat x_{t-1} + (1 - m) \odot
        \big(\sqrt{\bar\alpha_{t-1}}\, x_0 + \sqrt{1 - \bar\alpha_{t-1}}\, z\big)

    A step knows nothing of the noise that the known pixels get after it, and what it paints fits them badly. So RePaint
    goes back by ``jump`` steps, to x_s of q(x_s | x_{t-1}), and takes them again, ``resample`` times in all:

    .. math:: x_s = \sqrt{\bar\alpha_s / \bar\alpha_{t-1}}\, x_{t-1} + \sqrt{1 - \bar\alpha_s / \bar\alpha_{t-1}}\, z

    Args:
        model: as in :func:`dd_kernels.sample`.
        images: x_0, [N, C, H, W] in [-1, 1], float; masked pixels may hold anything finite.
        mask: bool, [H, W] or of any shape that broadcasts to that of ``images``; True is painted, False is kept.
        table: a sampler over timesteps of ``schedule``, such as :func:`dd_kernels.ddpm` or :func:`dd_kernels.ddim`,
            that reads no x_0 of earlier steps.
        schedule: the forward process.
        resample: how often steps are taken; 1 is plain replacement.
        jump: how many steps are taken again at a time.
        seed, first_sample: of all noise; an image does not depend on its batch. With nothing known and ``resample`` 1
            it is the one that ``sample`` draws.
        progress: show a tqdm bar.
        options: model_kwargs, uncond_kwargs, guidance_scale, batch_size, backend ... as in ``sample``.

    Returns:
        The images, of the shape and dtype of ``images``; the known pixels are theirs to the bit.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.
    """
    mask = _checked(images, mask, table, resample, jump)
    check_downward(table, schedule)
    seed = drawn_seed() if seed is None else seed
    at: dict[str, Any] = {"seed": seed, "first_sample": first_sample}
    timesteps, rows = table.timesteps.tolist(), [table[i : i + 1] for i in range(len(table))]

    estimate = _Estimate(model, options)

    def noise(move: int, stream: Stream = Stream.RESAMPLE) -> Tensor:
        return randn(images.shape, draw=move, stream=stream, device=images.device, dtype=images.dtype, **at)

    x, before, furthest = noise(0, Stream.X_T), 0, 0
    path = list(_path(len(table), resample, jump))
    with progress_bar(len(path), progress) as bar:
        for move, after in enumerate(path):
            if after < before:
                ratio = float(schedule.alpha_bar[timesteps[after]] / schedule.alpha_bar[timesteps[before]])
                x = ratio**0.5 * x + (1 - ratio) ** 0.5 * noise(move)
            else:
                again = None if after > furthest else (noise(move),)
                x = sample(model, x, rows[before], noise=again, **at, **estimate.options())
                last = after == len(table)
                known = images if last else q_sample(images, timesteps[after], schedule, draw=move, **at)
                x = torch.where(mask, x, known)
            before, furthest = after, max(after, furthest)
            bar.update()
    return x


class _Estimate:
    """Hands x_0 of each call of ``sample`` to the next one, for a model with self-conditioning.

    Args:
        model, options: of ``sample``.
    """

    def __init__(self, model: Model, options: Mapping[str, Any]) -> None:
        self._options, self._keeps_x0 = dict(options), is_self_conditioned(model)
        self._of_batches: list[Tensor] = []

    def options(self) -> dict[str, Any]:
        """Returns the options of the next call."""
        if not self._keeps_x0:
            return self._options
        kwargs = dict(self._options.get("model_kwargs") or {})
        if self._of_batches:
            kwargs["x_self"] = torch.cat(self._of_batches)
        self._of_batches = []
        return {**self._options, "model_kwargs": kwargs, "callback": self._keep}

    def _keep(self, step: Step) -> None:
        assert step.x0 is not None
        self._of_batches.append(step.x0)
        if "callback" in self._options:
            self._options["callback"](step)


def _checked(images: Tensor, mask: Tensor, table: StepTable, resample: int, jump: int) -> Tensor:
    """Returns the mask on the images' device; raises for arguments that do not fit."""
    check_images("images", images)
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a torch.Tensor of bools; got {kind}")
    try:
        fits = torch.broadcast_shapes(mask.shape, images.shape) == images.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"mask must broadcast to the shape of images, {list(images.shape)}; got {list(mask.shape)}")
    if table.history:
        raise ValueError(f"table must read no x_0 of earlier steps; got one that keeps {table.history}")
    for name, value, most in (("resample", resample, None), ("jump", jump, len(table) - 1 if resample > 1 else None)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
            wanted = "at least 1" if most is None else f"in [1, {most}], with {len(table)} steps"
            raise ValueError(f"{name} must be an int {wanted}; got {value!r}")
    return mask.to(images.device)
