"""The arguments of set_timesteps and step, brought to the forms that the schedulers work with.

What diffusers takes is taken. An error names the argument; it is of the type that this package raises, and of the
type that diffusers' own code runs into for the same mistake, so that code which catches that goes on working.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Timestep = int | Tensor


class TimestepValueError(ValueError, IndexError):
    """A timestep that the scheduler does not have; diffusers raises IndexError."""


class TimestepTypeError(TypeError, IndexError):
    """A timestep that is no integer; diffusers raises IndexError."""


class StepCountError(ValueError, ZeroDivisionError, IndexError, RuntimeError):
    """A number of steps below 1, which diffusers divides by, or makes an empty or impossible list of."""


class ShapeError(ValueError, RuntimeError, TypeError):
    """Tensors that do not fit one another; torch raises RuntimeError, a missing variance is TypeError in diffusers."""


class StepsNotSetError(ValueError, TypeError):
    """A step before set_timesteps; some of diffusers' classes divide by None."""


def as_step_count(num_inference_steps: Any, least: int = 1) -> Any:
    """Returns the number of steps as an int, if it is a number; diffusers checks the rest.

    Raises:
        StepCountError: it is below ``least``, where some of diffusers' spacings are empty and others divide by 0.
        TypeError: it is not a whole number.
    """
    if not isinstance(num_inference_steps, (int, float, np.number)):
        return num_inference_steps
    if num_inference_steps != int(num_inference_steps):
        raise TypeError(f"num_inference_steps must be an int; got {num_inference_steps!r}")
    if num_inference_steps < least:
        raise StepCountError(f"num_inference_steps must be at least {least}; got {num_inference_steps}")
    return int(num_inference_steps)


def as_timestep(timestep: Any) -> Timestep:
    """Returns a timestep as an int or an integer tensor: of numpy's integers and arrays, and of lists, too."""
    if isinstance(timestep, Tensor):
        dtype = timestep.dtype
        if dtype is not torch.int64 and (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool):
            raise TimestepTypeError(f"timestep must be an integer tensor; got {dtype}")
        return timestep
    if type(timestep) is int or torch.compiler.is_compiling():
        return timestep
    array = np.asarray(timestep)
    if array.dtype.kind not in "iu":
        raise TimestepTypeError(f"timestep must be an int or a tensor of integers; got {timestep!r}")
    return int(array.item()) if array.size == 1 else torch.from_numpy(array.astype(np.int64))


def check_values(timesteps: Tensor, least: int, count: int) -> None:
    """Raises :class:`TimestepValueError` unless the values, which are on the CPU, lie in [least, count)."""
    values = timesteps.tolist()
    wrong = [value for value in values if not least <= value < count]
    if wrong:
        raise TimestepValueError(f"timestep must be in [{least}, {count}); got {wrong[0]}")


def broadcast(
    sample: Tensor, model_output: Tensor, noise: Tensor | None, learned: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (sample, model_output, noise) of one shape, but for the output's channels with a learned variance."""
    shape = sample.shape
    if not learned and model_output.shape == shape and (noise is None or noise.shape == shape):
        return sample, model_output, noise
    predicted = list(model_output.shape)
    if learned:
        predicted[1] //= 2
    others = [predicted] if noise is None else [predicted, noise.shape]
    try:
        shape = torch.broadcast_shapes(sample.shape, *others)
    except RuntimeError as error:
        drawn = "" if noise is None else f" (and noise of {list(noise.shape)})"
        raise ShapeError(
            f"model_output must have the shape of sample, {list(sample.shape)}, or one that broadcasts with it; "
            f"got {list(model_output.shape)}{drawn}"
        ) from error
    out_shape = [*shape[:1], 2 * shape[1], *shape[2:]] if learned else shape
    return sample.expand(shape), model_output.expand(out_shape), None if noise is None else noise.expand(shape)
