"""What the public functions of the ops check and prepare, each once.

Every check raises before anything is written, and names the argument, what came and what was wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)


def check_float(name: str, x: Tensor) -> None:
    """Raises ``TypeError`` unless ``x`` is a tensor of a floating dtype that the ops know."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {x.dtype}")


def check_like(name: str, y: Tensor, x_name: str, x: Tensor) -> None:
    """Raises unless ``y`` is a floating tensor of ``x``'s shape on ``x``'s device (any dtype)."""
    check_float(name, y)
    if y.shape != x.shape:
        raise ValueError(f"{name} must have the shape of {x_name}, {list(x.shape)}; got {list(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"{name} must be on the device of {x_name}, {x.device}; got {y.device}")


def check_output(name: str, y: Tensor | None, x_name: str, x: Tensor) -> None:
    """Raises unless ``y`` is None or can take a result of ``x``'s shape, dtype and device."""
    if y is None or y is x:
        return
    check_like(name, y, x_name, x)
    if y.dtype is not x.dtype:
        raise TypeError(f"{name} must have the dtype of {x_name}, {x.dtype}; got {y.dtype}")


def room_for_result(y: Tensor | None, x: Tensor) -> Tensor:
    """``y`` where a kernel can write a result of dense ``x``'s layout into it, else a new tensor."""
    return y if y is x or (y is not None and y.stride() == x.stride()) else torch.empty_like(x)


def check_shape(name: str, y: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises unless ``y`` is None or a floating tensor of ``shape`` on ``device``."""
    if y is None:
        return
    check_float(name, y)
    if y.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}; got {list(y.shape)}")
    if y.device != device:
        raise ValueError(f"{name} must be on {device}; got {y.device}")


def timestep_index(name: str, index: int | Tensor, views: Sequence[Tensor], x: Tensor) -> Tensor:
    """``index`` as a dense int64 tensor [1] or [N] on the device of ``x`` [N, ...], its values in [0, len(views)).

    ``views`` holds every index as a tensor [1] on the device, so that an int costs no upload. Values
    already on an accelerator are not read (that would stop the stream): there a kernel writes NaN
    into a sample whose index is out of range.
    """
    if isinstance(index, int) and not isinstance(index, bool):
        if not 0 <= index < len(views):
            raise ValueError(f"{name} must be in [0, {len(views)}); got {index}")
        return views[index]
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name} must be an int or an integer tensor; got {kind}")
    if index.ndim > 1 or index.numel() not in (1, x.shape[0]):
        raise ValueError(f"{name} must have the shape [] or [{x.shape[0]}], one per sample; got {list(index.shape)}")
    if index.is_cpu and index.numel() > 0 and not torch.compiler.is_compiling():
        values = index.tolist() if index.ndim == 1 else [index.item()]
        low, high = min(values), max(values)
        if low < 0 or high >= len(views):
            raise ValueError(f"{name} must be in [0, {len(views)}); got {low if low < 0 else high}")
    if index.ndim == 1 and index.dtype == torch.int64 and index.device == x.device:
        return index.contiguous()
    return index.reshape(-1).to(device=x.device, dtype=torch.int64).contiguous()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would have to see this call."""
    if torch.is_grad_enabled():
        for x in tensors:  # any() of a generator costs half a microsecond more in every call
            if x is not None and x.requires_grad:
                return True
    return False


def kernel_obstacle(*tensors: Tensor | None) -> str | None:
    """Why the kernels, which take 32- and 16-bit floats and no gradient, cannot serve this call."""
    with_gradient = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if x.dtype not in KERNEL_DTYPES:
            return f"the kernels take float32, bfloat16 and float16, and an input is {x.dtype}"
        if with_gradient and x.requires_grad:
            return "a gradient is asked for, which only the reference gives (call under torch.no_grad())"
    return None


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout an op keeps: channels_last where ``x`` is that and nothing else, else contiguous."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """``x`` itself where it is contiguous or channels_last, else a contiguous copy."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def laid_out_like(y: Tensor | None, x: Tensor) -> Tensor | None:
    """``y`` with the strides of ``x`` inside a sample; samples may lie further apart, as after ``chunk``."""
    if y is None or (y.is_contiguous() and x.is_contiguous()) or y.stride()[1:] == x.stride()[1:]:
        return y
    return y.contiguous(memory_format=memory_format(x))
