"""What a step minimises: the loss of each image, of any prediction, with a learned variance or without."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...losses import VLB_WEIGHT, min_snr_weight, simple_loss, variance_bound
from ...schedules import Schedule
from .options import TrainOptions


def target_of(prediction: str, x_start: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    r"""Returns the target of the prediction: noise, x_0, or v = \sqrt{\bar\alpha} noise - \sqrt{1 - \bar\alpha} x_0.

    v is from Salimans & Ho (2022), appendix D.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "x_start":
        return x_start
    signal, sigma = (schedule.gather(column.numpy(), t, x_start) for column in schedule.marginal.unbind(1))
    return signal * noise - sigma * x_start


class Diffused(NamedTuple):
    """What a model is asked about: x_0 and x_t [N, C, H, W], the noise in x_t, and t [N]."""

    x_start: Tensor
    x_t: Tensor
    noise: Tensor
    t: Tensor


class Losses(NamedTuple):
    """L_simple (eq. 14 of DDPM), and what is minimised, of each image, [N]."""

    simple: Tensor
    minimised: Tensor


def losses_of(out: Tensor, asked: Diffused, schedule: Schedule, options: TrainOptions, levels: int) -> Losses:
    """Returns the losses of a model's output: L_simple alone, or L_hybrid where the model learns its variance.

    L_hybrid is eq. 16 of Nichol & Dhariwal (2021): the bound teaches the variance alone. A weight of the options is
    that of L_simple.

    Args:
        out: [N, C, H, W], or [N, 2 C, H, W] of a model that learns its variance.
        levels: grey levels of x_0, for the bound's decoder.
    """
    x_start, x_t, noise, t = asked
    channels, prediction = x_start.shape[1], options.prediction
    simple = simple_loss(out[:, :channels], target_of(prediction, x_start, noise, t, schedule))
    weighted = simple
    if options.loss_weight == "min-snr":
        weighted = min_snr_weight(t, schedule, options.snr_gamma, prediction) * simple
    if out.shape[1] == channels:
        return Losses(simple, weighted)
    bound = variance_bound(out, x_start, x_t, t, schedule, prediction=prediction, levels=levels)
    return Losses(simple, weighted + VLB_WEIGHT * len(schedule) * bound)
