"""Guidance: how a model's prediction is pushed towards a condition before the step is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.reverse_step.table import StepTable
from ..samplers.rows import PREDICTIONS, check_choice
from ..schedules import Schedule

Model = Callable[..., Any]
Interval = tuple[float, float]


def float_parameter(model: Model) -> Tensor | None:
    """Returns a floating parameter of the model, on its device and in its dtype; None for a function."""
    if not isinstance(model, torch.nn.Module):
        return None
    return next((p for p in model.parameters() if p.is_floating_point()), None)


def device_of(model: Model) -> torch.device:
    """Returns the device that the model runs on; the CPU for a function."""
    parameter = float_parameter(model)
    return torch.device("cpu") if parameter is None else parameter.device


def as_model_takes(model: Model, x: Tensor) -> Tensor:
    """Returns ``x`` in the dtype of the model's parameters; as it is for a function."""
    parameter = float_parameter(model)
    return x if parameter is None else x.to(parameter.dtype)


def is_self_conditioned(model: Model) -> bool:
    """Returns whether the model takes ``x_self``, x_0 of the step before (Chen et al., 2022): its attribute says so."""
    return getattr(model, "self_conditioning", False) is True


def model_output(result: Any) -> Tensor:
    """Returns the tensor in what a model returns: itself, diffusers' ``output.sample``, or the first of a tuple."""
    if isinstance(result, Tensor):
        return result
    result = result[0] if isinstance(result, tuple) else getattr(result, "sample", None)
    if not isinstance(result, Tensor):
        raise TypeError("model must return a tensor, a tuple that starts with one, or an object with .sample")
    return result


def _joined(cond: Mapping[str, Any], uncond: Mapping[str, Any], batch: int) -> dict[str, Any] | None:
    """Joins both sets of arguments to one of twice the batch; returns None where some cannot be joined."""
    if cond.keys() != uncond.keys():
        return None
    joined: dict[str, Any] = {}
    for name, value in cond.items():
        other = uncond[name]
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape:
            if value.ndim == 0 or value.shape[0] != batch:
                return None
            joined[name] = torch.cat((value, other))
        elif type(value) is type(other) and not isinstance(value, Tensor) and value == other:
            joined[name] = value
        else:
            return None
    return joined


def predict(
    model: Model, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the (conditional, unconditional) output for classifier-free guidance (Ho & Salimans, 2022).

    Calls the model once with twice the batch where the arguments are tensors of one shape, twice otherwise.
    Without ``uncond_kwargs`` the second output is None.
    """
    if uncond_kwargs is None:
        return model_output(model(x, t, **model_kwargs)), None
    joined = _joined(model_kwargs, uncond_kwargs, x.shape[0])
    if joined is None:
        return model_output(model(x, t, **model_kwargs)), model_output(model(x, t, **uncond_kwargs))
    out, uncond = model_output(model(torch.cat((x, x)), torch.cat((t, t)), **joined)).chunk(2)
    return out, uncond


def check_guidance(rescale: float, interval: Interval | None) -> None:
    """Raises ``ValueError`` unless the rescale lies in [0, 1] and the interval is None or two timesteps in order."""
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must lie in [0, 1]; got {rescale}")
    if interval is not None and not (len(interval) == 2 and interval[0] <= interval[1]):
        raise ValueError(f"guidance_interval must be two timesteps, the lower one first; got {interval}")


def guided_steps(table: StepTable, interval: Interval | None) -> list[bool]:
    """Returns whether each step is guided: all without an interval, else those whose timestep lies in it.

    Both ends belong to it (Kynkäänniemi et al., 2024). Outside the model is called with its condition alone.
    """
    low, high = interval or (-math.inf, math.inf)
    return [low <= time <= high for time in table.model_times.tolist()]


def rescaled(out: Tensor, uncond: Tensor, scale: float | Tensor, amount: float | Tensor, channels: int) -> Tensor:
    r"""Returns the guided output with a standard deviation nearer to the conditional one's, [N, C or 2 C, ...].

    Lin et al. (2023), section 3.4, eq. 15 and 16, against the overexposure that strong guidance gives:

    .. math:: g = uncond + scale\, (out - uncond), \qquad amount \cdot \frac{std(out)}{std(g)} g + (1 - amount)\, g

    with ``scale`` and ``amount`` numbers or [N, 1, ...], and the standard deviation over each sample, of the first
    ``channels`` channels; what follows them, a learned variance, is the conditional output's.
    """
    prediction, uncond = out[:, :channels].float(), uncond[:, :channels].float()
    guided = uncond + scale * (prediction - uncond)
    axes = tuple(range(1, out.ndim))
    ratio = prediction.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    guided = (guided * (amount * ratio + (1 - amount))).to(out.dtype)
    return guided if out.shape[1] == channels else torch.cat((guided, out[:, channels:]), dim=1)


def _marginal_at(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""\sqrt{\bar\alpha} and \sqrt{1 - \bar\alpha} at t [N]; between timesteps the log of their ratio is linear."""
    signal, noise = schedule.on(t.device).rows.unbind(1)
    if not t.is_floating_point():
        return signal[t], noise[t]
    log_ratio, below = (noise / signal).log(), t.floor().long()
    between = 2 * torch.lerp(log_ratio[below], log_ratio[t.ceil().long()], t - below)
    return torch.sigmoid(-between) ** 0.5, torch.sigmoid(between) ** 0.5


def _share_of_gradient(prediction: str, signal: Tensor, noise: Tensor) -> Tensor:
    """Returns what the gradient of log p(y | x_t) is multiplied by, [N]; 0 where x_t holds nothing of x_0, nor of y."""
    if prediction == "epsilon":
        return -noise
    ratio = torch.where(signal == 0, 0.0, noise / signal)
    return -ratio if prediction == "v" else ratio * noise


def classifier_guided(
    model: Model,
    log_probability: Callable[..., Tensor],
    schedule: Schedule,
    scale: float = 1.0,
    prediction: str = "epsilon",
) -> Model:
    r"""Returns a model guided by a classifier, algorithm 2 of Dhariwal & Nichol (2021).

    .. math:: \hat\epsilon = \epsilon(x_t, t) - scale\, \sqrt{1 - \bar\alpha_t}\, \nabla_{x_t} \log p(y | x_t)

    The same change of a prediction of x_0 or v, with \alpha = \bar\alpha_t and the gradient g, is

    .. math:: \hat x_0 = x_0 + scale\, (1 - \alpha) / \sqrt\alpha\, g, \qquad
        \hat v = v - scale\, \sqrt{1 - \alpha} / \sqrt\alpha\, g

    Args:
        model: model(x, t, **kwargs) -> prediction [N, C, ...], or [N, 2 C, ...] with learned variance.
        log_probability: log_probability(x, t, **kwargs) -> log p(y | x_t), [N], differentiable in x.
        schedule: where alpha_bar comes from.
        scale: strength; 0 is the model itself.
        prediction: what the model predicts, "epsilon", "x_start" or "v".

    Returns:
        A model to be passed to :func:`dd_kernels.sample`; called with the same ``kwargs``, of which ``x_self`` is for
        a model with self-conditioning alone.

    Raises:
        ValueError: an unknown ``prediction``.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    reads_estimate = is_self_conditioned(model)

    def guided(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        out = model_output(model(x, t, **kwargs))
        if reads_estimate:
            kwargs.pop("x_self", None)
        with torch.enable_grad():
            x_in = x.detach().requires_grad_()
            gradient = torch.autograd.grad(log_probability(x_in, t, **kwargs).sum(), x_in)[0]
        channels = x.shape[1]
        share = _share_of_gradient(prediction, *_marginal_at(schedule, t.to(x.device)))
        change = scale * share.reshape(-1, *[1] * (x.ndim - 1)) * gradient
        predicted = out[:, :channels] + change.to(out.dtype)
        return predicted if out.shape[1] == channels else torch.cat((predicted, out[:, channels:]), dim=1)

    guided.self_conditioning = reads_estimate  # type: ignore[attr-defined]
    return guided
