"""Calls the ops as torch.ops has them, with tensors that are often wrong.

    python tests/csrc/fuzz_raw_ops.py CALLS SEED [LIBRARY]

LIBRARY holds the CUDA kernels built for the host; without it the CPU library is called. A call either raises or gives
what a call on copies of its tensors gives. What is read or written outside of a tensor, sanitizers see: see
test_sanitized_raw_ops.py.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import host_library
import torch
from torch import Tensor

import dd_kernels.ops.attention
import dd_kernels.ops.conv2d
import dd_kernels.ops.group_norm_silu
import dd_kernels.ops.q_sample
import dd_kernels.ops.randn
import dd_kernels.ops.reverse_step  # noqa: F401

OPS = ("randn", "q_sample", "reverse_step", "group_norm_silu", "group_norm_silu_backward")
OPS_OF_A_CPU = ("group_norm_affine", "conv2d", "conv2d_weight_gradient", "attention")
NORM_GRADIENTS = ("dx", "dweight", "dbias", "dpre_shift", "dscale", "dshift", "dskip")
WRITTEN = ("z", "x_t", "noise_out", "x_prev", "x0", "y", "mean", "rstd", "sum", "factor", "term", *NORM_GRADIENTS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_DTYPES = (torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64)
Arguments = dict[str, Any]


def tensor(shape: list[int], channels_last: bool, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def norm_arguments(op: str) -> Arguments:
    """Arguments of the norm's forward or backward op; half of the time with a residual and a skip."""
    samples, groups, x_channels = random.choice([0, 1, 2, 3]), random.choice([1, 2]), random.choice([2, 4, 8])
    of_two = op != "group_norm_affine" and random.random() < 0.5
    skips = random.choice([2, 8]) if of_two else 0
    pixels = random.choice([[], [7], [4, 5], [8, 8], [2, 3, 4]])
    channels, last, dtype = x_channels + skips, len(pixels) == 2 and random.random() < 0.5, random.choice(DTYPES)

    def image(channels: int) -> Tensor:
        return tensor([samples, channels, *pixels], last, dtype)

    def maybe(*shape: int) -> Tensor | None:
        return torch.randn(shape) if random.random() < 0.5 else None

    small = [maybe(channels), maybe(channels), *(maybe(samples, channels) for _ in range(3))]
    weight, bias, pre_shift, scale, shift = small
    options = {"num_groups": groups, "weight": weight, "bias": bias, "eps": 1e-5, "pre_shift": pre_shift}
    options |= {"scale": scale, "shift": shift, "activation": random.randrange(5)}
    statistics = {"mean": torch.randn(samples, groups), "rstd": torch.rand(samples, groups) + 0.5}
    x, partials = image(x_channels), torch.zeros(1 << 12)
    skip, second = image(skips) if of_two else None, image(x_channels) if of_two else None
    if op == "group_norm_affine":
        last_one = options.popitem()
        assert last_one[0] == "activation"
        return {"x": x, **options, "factor": torch.zeros(samples, x_channels), "term": torch.zeros(samples, x_channels)}
    if op == "group_norm_silu":
        written = {"y": image(channels), **statistics, "partials": partials}
        return {"x": x, **options, **written, "residual": second, "skip": skip, "sum": x.clone() if of_two else None}
    gradients = [x.clone(), *(None if v is None else v.clone() for v in small)]
    written = dict(zip(NORM_GRADIENTS, gradients, strict=False))
    last_ones = {"skip": skip, "dsum": second, "dskip": None if skip is None else skip.clone()}
    return {"dy": image(channels), "x": x, **statistics, **options, **written, "partials": partials, **last_ones}


def convolution_arguments(op: str) -> Arguments:
    """Arguments of a convolution or of its weights' gradient."""
    samples, channels, outputs = (random.choice([1, 2, 5, 17]) for _ in range(3))
    size, top, left = random.choice([1, 3]), random.choice([0, 1]), random.choice([0, 1])
    height, width, dtype = random.choice([3, 4, 9]), random.choice([3, 7, 8]), random.choice(DTYPES)
    plain = op == "conv2d_weight_gradient"
    stride, turned = (1, False) if plain else (random.choice([1, 2]), random.random() < 0.3)
    size, turned = (3, False) if plain else (size, turned)
    doubled = not plain and random.random() < 0.3
    sides = ((1 + doubled) * height + 2 * top, (1 + doubled) * width + 2 * left)
    out = [samples, outputs, *((side - size) // stride + 1 for side in sides)]
    x, y = tensor([samples, channels, height, width], True, dtype), tensor(out, True, dtype)
    filters = [channels, outputs, size, size] if turned else [outputs, channels, size, size]
    weight = tensor(filters, True, torch.float32 if plain else random.choice(DTYPES))
    if plain:
        return {"dy": y, "x": x, "top": top, "left": left, "method": random.randrange(5), "dweight": weight}
    affine = random.random() < 0.5
    before = {name: torch.randn(samples, channels) if affine else None for name in ("scale", "shift")}
    after = {"activation": random.randrange(5), "residual": y.clone() if random.random() < 0.5 else None}
    bias = torch.randn(outputs) if random.random() < 0.5 else None
    how = {"stride": stride, "top": top, "left": left, "turned": turned, "method": random.randrange(5)}
    served = how["method"] < 3 or (size, stride) == (3, 1)
    kept_size = torch.ops.dd_kernels.conv2d_kept_size(x, weight, *how.values(), False, y) if served else 0
    kept = torch.zeros(kept_size) if kept_size > 0 and random.random() < 0.5 else None
    written = {"y": y, "kept": kept, "doubled": doubled}
    return {"x": x, "weight": weight, "bias": bias, **before, **after, **how, "bfloat16": False, **written}


def attention_arguments() -> Arguments:
    """Arguments of attention, whose queries, keys and values are slices or products of their own."""
    samples, heads, queries, keys = (random.choice(sizes) for sizes in ((0, 1, 2), (1, 3), (0, 1, 9, 40), (1, 7, 300)))
    depth, outputs, dtype = random.choice([1, 8, 20]), random.choice([1, 8, 17]), random.choice(DTYPES)

    def tokens(count: int, size: int) -> Tensor:
        wide = torch.randn(samples, count, heads, random.choice([1, 2]) * size).to(dtype)
        return wide[..., :size].transpose(1, 2)

    given = {"q": tokens(queries, depth), "k": tokens(keys, depth), "v": tokens(keys, outputs)}
    y = torch.zeros(samples, queries, heads, outputs, dtype=dtype)
    return {**given, "scale": random.random(), "bfloat16": random.random() < 0.5, "y": y}


def right_arguments(op: str) -> Arguments:
    """Arguments that the op takes, by name and in the order of its schema."""
    if op.startswith("group_norm"):
        return norm_arguments(op)
    if op.startswith("conv2d"):
        return convolution_arguments(op)
    if op == "attention":
        return attention_arguments()
    shape = [random.choice([0, 1, 2, 3, 5])]
    shape += random.choice([[], [7], [3, 4, 5], [4, 8, 8], [8, 4, 4], [1, 5, 3], [16, 9, 9]])
    channels_last = len(shape) == 4 and random.random() < 0.5
    state, samples, rows = random.choice(DTYPES), shape[0], random.choice([1, 7])

    def like(dtype: torch.dtype | None = None) -> Tensor:
        return tensor(shape, channels_last, dtype or random.choice(DTYPES))

    def maybe(value: Any) -> Any:
        return value if random.random() < 0.5 else None

    key = torch.tensor([random.getrandbits(63), random.getrandbits(32), random.getrandbits(32)])
    index = torch.randint(rows, (random.choice([1, samples]),))
    if op == "randn":
        return {"z": like(), "key": key, "stream": random.getrandbits(32)}
    if op == "q_sample":
        noise = maybe(like())
        table = {"rows": torch.rand(rows, 2), "t": index, "key": key if noise is None else maybe(key)}
        return {"x_start": like(state), "noise": noise, **table, "x_t": like(), "noise_out": maybe(like())}
    inputs = {"x": like(state), "out": like(), "variance": maybe(like()), "uncond": maybe(like())}
    given = {"guidance_scale": random.random(), "noise": maybe(like()), "threshold": maybe(torch.rand(samples) + 1)}
    table = {"rows": torch.rand(rows, 10), "timesteps": torch.arange(rows), "step": index, "key": maybe(key)}
    return {**inputs, **given, **table, "x_prev": like(), "x0": maybe(like())}


def other_shape(v: Tensor) -> Tensor:
    shape = list(v.shape)
    if shape and random.random() < 0.7:
        d = random.randrange(len(shape))
        shape[d] = max(0, shape[d] + random.choice([-1, 1, 2]))
    else:
        shape = random.choice([[], [*shape, 1], [1, *shape], shape[1:], shape[:-1], [v.numel()]])
    return torch.ones(shape).to(v.dtype)


def other_strides(v: Tensor) -> Tensor:
    kind = random.randrange(5)
    if v.ndim == 0 or kind == 0:
        return v[..., None].expand(*v.shape, 2)[..., 0]
    if kind == 1:
        return v[:1].expand(v.shape) if v.shape[0] > 0 else v
    if kind == 2:
        d = random.randrange(v.ndim)
        return torch.stack([v, v], d + 1).flatten(d, d + 1).unflatten(d, (v.shape[d], 2)).select(d + 1, 0)
    if kind == 3:
        order = random.sample(range(v.ndim), v.ndim)
        moved = v.permute(order).contiguous()
        return moved.permute([order.index(d) for d in range(v.ndim)])
    size = max(v.numel(), 1)
    return torch.ones(2 * size).to(v.dtype).as_strided(v.shape, [random.choice([0, 1, 2, s]) for s in v.stride()])


def at_the_end_of_another(v: Tensor, given: Arguments) -> Tensor:
    """A tensor of v's shape in the memory of another argument, somewhat shifted where there is room."""
    others = [o for o in given.values() if isinstance(o, Tensor) and o.dtype == v.dtype and o.numel() >= v.numel() > 0]
    if not others:
        return v
    memory = random.choice(others)
    storage = torch.empty(0, dtype=v.dtype).set_(memory.untyped_storage())
    room = storage.numel() - memory.storage_offset() - v.numel()
    offset = memory.storage_offset() + (random.randint(0, room) if room > 0 else 0)
    return storage[offset : offset + v.numel()].view(v.shape)


def between_elements(v: Tensor) -> Tensor:
    size = v.numel() * v.element_size()
    memory = torch.zeros(size + 1, dtype=torch.uint8).numpy()[1:]
    return torch.frombuffer(memory, dtype=v.dtype).view(v.shape) if size > 0 else v


def spoil(given: Arguments) -> None:
    """Changes one argument to what may be wrong."""
    name = random.choice(list(given))
    v = given[name]
    if not isinstance(v, Tensor):
        given[name] = random.choice([-1, 0, 1 << 32, 2.5]) if v is not None else torch.ones(random.choice([0, 1, 3]))
        return
    kind = random.randrange(7)
    if kind == 0:
        given[name] = other_shape(v)
    elif kind == 1:
        given[name] = v.to(random.choice(OTHER_DTYPES + DTYPES))
    elif kind in (2, 3):
        given[name] = other_strides(v)
    elif kind == 4:
        given[name] = at_the_end_of_another(v, given)
    elif kind == 5:
        given[name] = between_elements(v)
    elif v.dtype == torch.int64:
        given[name] = v + random.choice([-8, -1, 1, 1 << 40])


def copies(op: str, given: Arguments) -> Arguments:
    """Returns the same values, each in memory of its own; a tensor of a call's shape in the layout of the first one.

    Those of attention, whose strides are free, are contiguous.
    """
    first = next(iter(given.values()))

    def copy(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        if op == "attention":
            return v.clone(memory_format=torch.contiguous_format)
        return torch.empty_like(first, dtype=v.dtype).copy_(v) if v.shape == first.shape else v.clone()

    return {name: copy(v) for name, v in given.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) and torch.equal(a.isnan(), b.isnan())


def alike(op: str, a: Tensor, b: Tensor) -> bool:
    """The same bits; of the norm's sums, whose order on a GPU follows from alignment, the same but for rounding."""
    if not op.startswith("group_norm") or a.numel() == 0:
        return same_bits(a, b)
    a, b = (v.double().nan_to_num(posinf=7.0, neginf=7.0) for v in (a, b))
    return bool((a - b).abs().max() <= b.abs().max() * 2.0**-7)


def call(ops: Any, op: str, given: Arguments) -> bool:
    """Returns whether the op took the call; if so it must give what it gives for copies."""
    apart = copies(op, given)
    try:
        getattr(ops, op)(*given.values())
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    getattr(ops, op)(*apart.values())
    for name in WRITTEN:
        if isinstance(given.get(name), Tensor):
            assert alike(op, given[name], apart[name]), (op, name, given)
    return True


def main(calls: int, seed: int, library: str | None = None) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    ops = torch.ops.dd_kernels
    if library is not None:
        host_library.define_ops()
        torch.ops.load_library(library)
        ops = torch.ops.dd_kernels_host
    taken, names = 0, OPS if library is not None else OPS + OPS_OF_A_CPU
    for _ in range(calls):
        op = random.choice(names)
        given = right_arguments(op)
        for _ in range(random.choice([0, 1, 1, 1, 2])):
            spoil(given)
        taken += call(ops, op, given)
    print(f"{calls} calls, {taken} taken")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
