"""What the public functions of the ops check and prepare, each once.

Every check raises before anything is written, and names the argument, what came and what was wanted.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .. import backend as backends

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)

_FLOAT64 = torch.float64
_WIDE = "the kernels take float32, bfloat16 and float16, and an input is torch.float64"
_GRADIENT = "a gradient is asked for, which only the reference gives (call under torch.no_grad())"
TRANSFORM = "a torch.func transform is active, and only the reference is made of PyTorch's own operations"
_TANGENT = "forward-mode derivatives are on, which only the reference gives"


def transform_reason() -> str | None:
    """Returns why an active transform of PyTorch leaves the call to the reference, or None."""
    if transforms_active():
        return TRANSFORM
    return _TANGENT if forward_ad._current_level >= 0 else None


def check_float(name: str, x: Tensor) -> None:
    """Raises ``TypeError`` unless ``x`` is a tensor of a floating dtype that the ops know."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {x.dtype}")


def check_shape(name: str, y: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises unless ``y`` is None or a floating tensor of ``shape`` on ``device``."""
    if y is None:
        return
    check_float(name, y)
    if y.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}; got {list(y.shape)}")
    if y.device != device:
        raise ValueError(f"{name} must be on {device}; got {y.device}")


def _like(name: str, y: Tensor, x_name: str, x: Tensor) -> Tensor:
    """Returns ``y``, a batch of one repeated; raises unless it then has ``x``'s shape, on ``x``'s device."""
    check_float(name, y)
    if y.device != x.device:
        raise ValueError(f"{name} must be on the device of {x_name}, {x.device}; got {y.device}")
    if y.shape == x.shape:
        return y
    if y.ndim == x.ndim and y.shape[0] == 1 and y.shape[1:] == x.shape[1:]:
        return y.expand(x.shape)
    raise ValueError(f"{name} must have the shape of {x_name}, {list(x.shape)}; got {list(y.shape)}")


def visit(
    op: str, backend: str, names: tuple[str, ...], tensors: list[Any], output: Tensor | None
) -> tuple[str, Tensor | None, bool]:
    """Checks the tensors [N, ...] of a call, chooses the backend and lays them out for it, in place of ``tensors``.

    The tensors after the first, each of which may be None, must have its shape and device, and ``output`` its dtype
    too. ``names`` are those of the tensors and of the output.

    Returns:
        The backend; what a kernel writes, the caller's output or a new tensor, or None for the reference; and whether
        all are ordinary tensors, whose memory can be looked at.
    """
    x = tensors[0]
    ordinary, wide = type(x) is Tensor, False
    if not ordinary or x.dtype not in KERNEL_DTYPES:
        check_float(names[0], x)
        wide = x.dtype is _FLOAT64
    shape, device, on_cpu, contiguous = x.shape, x.device, x.is_cpu, x.is_contiguous()
    if not shape:
        raise ValueError(f"{names[0]} must be [N, ...], N samples; got a tensor of shape []")
    with_gradient = x.requires_grad
    for i, y in enumerate(tensors):
        if y is None or i == 0:
            continue
        if type(y) is not Tensor:
            check_float(names[i], y)
            ordinary = False
        if (not y.is_cpu if on_cpu else y.device != device) or y.shape != shape or y.dtype not in KERNEL_DTYPES:
            y = tensors[i] = _like(names[i], y, names[0], x)
            wide = wide or y.dtype is _FLOAT64
        contiguous = contiguous and y.is_contiguous()
        with_gradient = with_gradient or y.requires_grad
    if output is not None:
        if output is not x:
            _check_output(names[-1], output, names[0], x)
            ordinary = ordinary and type(output) is Tensor
        if output.requires_grad and torch.is_grad_enabled():
            check_not_leaf(names[-1], output)
            with_gradient = True
    with_gradient = with_gradient and torch.is_grad_enabled()

    reason = None
    if wide or with_gradient:
        reason = _WIDE if wide else _GRADIENT
    elif transforms_active() or forward_ad._current_level >= 0:
        reason = transform_reason()
    chosen = backends.choose(op, backend, device, reason)
    if chosen == "reference":
        return chosen, None, ordinary and reason is not TRANSFORM
    if not contiguous:
        x = tensors[0] = dense(x)
        tensors[1:] = [laid_out_like(y, x) for y in tensors[1:]]
    if output is None:
        return chosen, torch.empty_like(x), ordinary
    if output is not x:
        if output.stride() != x.stride():
            return chosen, torch.empty_like(x), ordinary
        if ordinary and not is_compiling():
            _check_overlap(names[-1], output, names[0], tensors)
    return chosen, output, ordinary


def _check_output(name: str, output: Tensor, x_name: str, x: Tensor) -> None:
    """Raises unless a result of ``x``'s shape and dtype can be written to ``output``, each element to its own place."""
    check_float(name, output)
    if output.shape != x.shape:
        raise ValueError(f"{name} must have the shape of {x_name}, {list(x.shape)}; got {list(output.shape)}")
    if output.device != x.device:
        raise ValueError(f"{name} must be on the device of {x_name}, {x.device}; got {output.device}")
    if output.dtype is not x.dtype:
        raise TypeError(f"{name} must have the dtype of {x_name}, {x.dtype}; got {output.dtype}")
    check_each_element_apart(name, output)


def check_each_element_apart(name: str, output: Tensor) -> None:
    """Raises unless every element of ``output`` has a place of its own."""
    if not output.is_contiguous() and output.numel() > 0:
        span = 0
        for stride, size in sorted(zip(output.stride(), output.shape, strict=True)):
            if size > 1 and stride <= span:
                raise ValueError(f"{name} must not overlap itself; got the strides {list(output.stride())}")
            span += stride * (size - 1)


def check_not_leaf(name: str, output: Tensor) -> None:
    if output.is_leaf:
        raise ValueError(f"{name} must not be a leaf that requires grad, unless under torch.no_grad(); got one")


def bytes_spanned(x: Tensor) -> int:
    """Returns how many bytes lie from the first element of ``x`` to the end of its last."""
    if x.is_contiguous():
        return x.nbytes
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return (last + 1) * x.element_size()


def _check_overlap(name: str, output: Tensor, x_name: str, inputs: Sequence[Tensor | None]) -> None:
    """Raises if ``output``, which is written while ``inputs`` are read, shares memory with one of them.

    The first input may be the output, element for element.
    """
    begin = output.data_ptr()
    end = begin + output.nbytes
    for i, y in enumerate(inputs):
        if y is not None:
            first = y.data_ptr()
            if first < end and begin < first + bytes_spanned(y) and not (i == 0 and first == begin):
                raise ValueError(
                    f"{name} must be {x_name} itself, or share no memory with the inputs; got a part of one"
                )


def deliver(result: Tensor, output: Tensor) -> Tensor:
    """Returns ``output`` with the result in it; its version counter tells autograd of the change."""
    if result is output:
        torch.autograd.graph.increment_version(output)
        return output
    return output.copy_(result)


def timestep_index(name: str, index: Any, views: Sequence[Tensor], x: Tensor) -> Tensor:
    """Returns ``index`` as a dense int64 tensor [1] or [N] on the device of ``x`` [N, ...], in [0, len(views)).

    ``views`` holds every index as a tensor [1] on the device, so that an int costs no upload. Values
    already on an accelerator are not read (that would stop the stream): there a kernel writes NaN
    into a sample whose index is out of range.
    """
    if type(index) is not int and not isinstance(index, Tensor):
        index = _integers(name, index)
    if type(index) is int:
        if not 0 <= index < len(views):
            raise ValueError(f"{name} must be in [0, {len(views)}); got {index}")
        return views[index]
    batch, device, dtype = x.shape[0], x.device, index.dtype
    if dtype is not torch.int64 and (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool):
        raise TypeError(f"{name} must be an int or an integer tensor; got {dtype}")
    if index.ndim > 1 or index.numel() not in (1, batch):
        raise ValueError(f"{name} must have the shape [] or [{batch}], one per sample; got {list(index.shape)}")
    if index.is_cpu and _can_be_read(index) and index.numel() > 0:
        values = index.tolist() if index.ndim == 1 else [index.item()]
        low, high = min(values), max(values)
        if low < 0 or high >= len(views):
            raise ValueError(f"{name} must be in [0, {len(views)}); got {low if low < 0 else high}")
    if index.ndim == 1 and dtype is torch.int64 and index.device == device:
        return index.contiguous()
    return index.reshape(-1).to(device=device, dtype=torch.int64).contiguous()


def _integers(name: str, index: Any) -> int | Tensor:
    """Returns an int for whatever counts as one, or a tensor of a list, a tuple or an array."""
    if isinstance(index, SupportsIndex) and not isinstance(index, bool) and getattr(index, "ndim", 0) == 0:
        return operator.index(index)
    if isinstance(index, (list, tuple)) or hasattr(index, "__array__"):
        return torch.as_tensor(index)
    raise TypeError(f"{name} must be an int or an integer tensor; got {type(index).__name__}")


def _can_be_read(index: Tensor) -> bool:
    """Returns whether the values of a CPU tensor are there, and not traced or transformed."""
    traced = type(index) is not Tensor or is_compiling()
    return not traced and not transforms_active()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Returns whether autograd would have to see this call."""
    if torch.is_grad_enabled():
        for x in tensors:  # any() of a generator costs half a microsecond more in every call
            if x is not None and x.requires_grad:
                return True
    return False


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout an op keeps: channels_last where ``x`` is that and nothing else, else contiguous."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def is_dense(x: Tensor) -> bool:
    """Returns whether ``x`` is contiguous or channels_last, as kernels read it."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def image_of(x: Tensor) -> Tensor | None:
    """Returns a video [N, C, D, H, W] or tokens [N, C, L] as an image, where that is a view in channels_last.

    None of an image, and of what is contiguous or has other strides.
    """
    if x.ndim not in (3, 5) or x.is_contiguous():
        return None
    if x.ndim == 5 and not x.is_contiguous(memory_format=torch.channels_last_3d):
        return None
    image = x.unsqueeze(2) if x.ndim == 3 else x.flatten(2, 3)
    return image if image.is_contiguous(memory_format=torch.channels_last) else None


def dense(x: Tensor) -> Tensor:
    """``x`` itself where it is contiguous or channels_last, else a contiguous copy."""
    return x if is_dense(x) else x.contiguous()


def laid_out_like(y: Tensor | None, x: Tensor) -> Tensor | None:
    """``y`` with the strides of ``x`` inside a sample; samples may lie further apart, as after ``chunk``."""
    if y is None or (y.is_contiguous() and x.is_contiguous()) or y.stride()[1:] == x.stride()[1:]:
        return y
    return y.contiguous(memory_format=memory_format(x))
