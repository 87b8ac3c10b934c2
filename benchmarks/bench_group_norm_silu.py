"""group_norm_silu, forward and backward, beside PyTorch's GroupNorm then SiLU, compiled or not, and apex's."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import dd_kernels as dd
from dd_kernels import backend as backends
from dd_kernels.ops.activation import Activation

from . import machine, variants
from .harness import Case, Plan, Row, Target, dtype_name, rotated
from .timing import Call

# Sizes (batch, channels, side) that are measured in both directions.
MAIN = {
    "cpu": [(8, 128, 32), (8, 256, 16), (8, 512, 8)],
    "cuda": [(256, 128, 32), (256, 256, 16), (256, 256, 8), (16, 320, 64), (2, 320, 64), (1, 512, 256), (8, 128, 512)],
}
EVERY_PEER = {"cpu": [(8, 128, 32), (8, 512, 8)], "cuda": [(256, 128, 32), (16, 320, 64)]}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}
EPS = 1e-6
GROUPS = 32

# The inputs of GroupNorm+SiLU in the models that people run, as (channels, side): from the forward passes of nn.UNet,
# which a test counts again, and of Stable Diffusion 1.5's U-Net (latents of 64 x 64) and VAE decoder (512 x 512).
MODELS: dict[str, list[tuple[int, int]]] = {
    "cifar10": [
        *((128, 32), (256, 32), (384, 32)),
        *((128, 16), (256, 16), (384, 16), (512, 16)),
        *((256, 8), (512, 8)),
        *((256, 4), (512, 4)),
    ],
    "imagenet64": [
        *((192, 64), (384, 64), (576, 64)),
        *((192, 32), (384, 32), (576, 32), (768, 32), (960, 32)),
        *((384, 16), (576, 16), (768, 16), (960, 16), (1152, 16), (1344, 16)),
        *((576, 8), (768, 8), (1344, 8), (1536, 8)),
    ],
    "imagenet256": [
        *((256, 256), (512, 256)),
        *((256, 128), (512, 128), (768, 128)),
        *((256, 64), (512, 64), (768, 64), (1024, 64)),
        *((512, 32), (1024, 32), (1536, 32)),
        *((512, 16), (1024, 16), (1536, 16), (2048, 16)),
        *((1024, 8), (2048, 8)),
    ],
    "stable diffusion": [
        *((320, 64), (640, 64), (960, 64)),
        *((320, 32), (640, 32), (960, 32), (1280, 32), (1920, 32)),
        *((640, 16), (1280, 16), (1920, 16), (2560, 16)),
        *((1280, 8), (2560, 8)),
    ],
    "stable diffusion vae": [(512, 64), (512, 128), (512, 256), (256, 256), (256, 512), (128, 512)],
}

# By device: the model, the batch, and which of its shapes are timed (None: all).
SELECTION: dict[str, list[tuple[str, int, list[tuple[int, int]] | None]]] = {
    "cuda": [
        ("cifar10", 256, None),
        ("stable diffusion", 8, None),
        ("stable diffusion vae", 1, None),
        ("imagenet64", 32, None),
        ("imagenet256", 8, None),
        ("cifar10", 1, [(256, 4), (512, 16)]),
    ],
    "cpu": [
        ("cifar10", 8, None),
        ("cifar10", 1, [(256, 4), (512, 16)]),
        ("imagenet64", 1, [(192, 64), (576, 32), (768, 8)]),
        ("imagenet256", 1, [(256, 256)]),
        ("stable diffusion", 1, [(320, 64), (1280, 16)]),
        ("stable diffusion vae", 1, [(512, 64), (128, 512)]),
    ],
}
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant(variants.Variant):
    """A call of group_norm_silu, or its backward pass; ``model`` names the model that has this shape."""

    backward: bool = variants.option(False, "time the backward pass")
    alone: bool = variants.option(False, "call the op without its public function, into given tensors (CPU)")
    model: str | None = None

    def __str__(self) -> str:
        return f"group_norm_silu {self.name} {super().__str__()}"

    @property
    def name(self) -> str:
        """The name of the case."""
        return f"{'backward' if self.backward else 'forward'}{', op alone' if self.alone else ''}"

    def random(self, device: torch.device | str) -> Tensor:
        """Returns a tensor of the variant's shape, dtype and layout."""
        x = torch.randn(self.shape, device=device).to(self.dtype)
        return x.contiguous(memory_format=variants.LAYOUTS[self.layout])


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Calls GroupNorm and SiLU one after the other, as models do."""
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def _ours(backend: str) -> Function:
    """Returns our forward pass by one backend."""
    return lambda x, weight, bias: dd.group_norm_silu(x, GROUPS, weight, bias, EPS, backend=backend)


def _apex(variant: Variant) -> Function | str:
    """Returns apex.contrib.group_norm, which is channels_last only, called with the parameters of the case."""
    try:
        from apex.contrib.group_norm import GroupNorm  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return "apex is not installed"
    norm = GroupNorm(GROUPS, variant.shape[1], eps=EPS, act="silu", device="cuda", dtype=variant.dtype)
    return lambda x, weight, bias: torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))


def _functions(target: Target, variant: Variant) -> dict[str, Function | str]:
    """Returns the forward pass of ours and of every peer."""
    found: dict[str, Function | str] = {"ours": _ours("auto"), "eager": eager}
    found |= {name: _ours(name) for name in machine.kernels(target.kind)[1:]}
    if variant.every_peer:
        torch._dynamo.reset()
        with contextlib.suppress(AttributeError):  # with donated buffers the backward pass runs only once
            torch._functorch.config.donated_buffer = False
        found |= {"torch.compile": torch.compile(eager, dynamic=False), "reference": _ours("reference")}
    if target.kind == "cuda" and variant.layout == "channels_last":
        found["apex"] = _apex(variant)
    return found


def gradients(forward: Function, arguments: tuple[Tensor, ...], dy: Tensor) -> Callable[[], object]:
    """Runs the forward pass once and returns its backward pass, which can be run any number of times."""
    with torch.enable_grad():
        leaves = tuple(v.detach().requires_grad_() for v in arguments)
        y = forward(*leaves)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _backward(forward: Function, sets: list[tuple[tuple[Tensor, ...], Tensor]]) -> Callable[[int], object]:
    """Returns a function of i that runs the i-th backward pass; its first call runs all forward passes, untimed."""
    prepared: list[Callable[[], object]] = []

    def run(i: int) -> object:
        if not prepared:
            prepared.extend(gradients(forward, *arguments) for arguments in sets)
        return prepared[i]()

    return run


def _case_alone(variant: Variant) -> Case:
    """Returns the CPU op with arguments prepared and outputs given, beside eager on the same tensors."""
    x, dy = variant.random("cpu"), variant.random("cpu")
    weight, bias, dweight, dbias = torch.randn(4, variant.shape[1]).to(variant.dtype)
    y, (mean, rstd) = torch.empty_like(x), torch.empty(2, variant.shape[0], GROUPS)
    options = (GROUPS, weight, bias, EPS, None, None, None, Activation.SILU)
    ops = torch.ops.dd_kernels
    ours: Call = functools.partial(ops.group_norm_silu.default, x, *options, y, mean, rstd)
    ours()
    peer: Call = functools.partial(eager, x, weight, bias)
    if variant.backward:
        inputs, outputs = (dy, x, mean, rstd), (torch.empty_like(x), dweight, dbias)
        ours = functools.partial(ops.group_norm_silu_backward.default, *inputs, *options, *outputs)
        peer = gradients(eager, (x, weight, bias), dy)
    return Case("group_norm_silu", variant.name, variant.shape, ours, [()], 0, {"eager": peer}, hot=True)


def _case_called(target: Target, variant: Variant, size: int) -> Case:
    """Returns the public function and its peers, forward or backward."""
    functions, device = _functions(target, variant), target.device
    weight, bias = (torch.randn(variant.shape[1], device=device, dtype=variant.dtype) for _ in range(2))

    def arguments() -> tuple[Tensor, ...]:
        return variant.random(device), weight, bias

    calls: dict[str, Call | str] = dict(functions)
    if variant.backward:
        sets = rotated(target, lambda: (arguments(), variant.random(device)), size)
        calls = {name: f if isinstance(f, str) else _backward(f, sets) for name, f in functions.items()}
        inputs: list[tuple] = [(i,) for i in range(len(sets))]
    else:
        inputs = rotated(target, arguments, size)
    ours = calls.pop("ours")
    assert not isinstance(ours, str)
    return Case("group_norm_silu", variant.name, variant.shape, ours, inputs, size, calls)


def _case(target: Target, variant: Variant) -> Case:
    """Returns the case of a variant."""
    passes = 3 if variant.backward else 2  # reads x and dy, writes dx; or reads x, writes y
    size = passes * variant.dtype.itemsize * math.prod(variant.shape)
    case = _case_alone(variant) if variant.alone else _case_called(target, variant, size)
    case.bytes_moved, case.device = size, target.device
    case.dtype, case.layout = dtype_name(variant.dtype), variant.layout
    case.extra = {} if variant.model is None else {"model": variant.model}
    return case


def _square(size: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Returns [N, C, H, W] with equal sides."""
    return (*size, size[2])


def main_variants(kind: str) -> list[Variant]:
    """Lists the main sizes in both directions; the device's first dtype in all of them, others in fewer."""
    first = DTYPES[kind][0]
    found = []
    for dtype, backward in itertools.product(DTYPES[kind], (False, True)):
        for size in MAIN[kind] if dtype == first else MAIN[kind][:2]:
            every_peer = dtype == first and size in EVERY_PEER[kind]
            found += [Variant(_square(size), dtype, layout, every_peer, backward) for layout in variants.LAYOUTS]
    if kind == "cpu" and not backends.unavailable("cpu"):
        for backward, layout in itertools.product((False, True), variants.LAYOUTS):
            found += [Variant(_square(size), first, layout, False, backward, True) for size in MAIN[kind]]
    return found


def model_variants(kind: str) -> list[Variant]:
    """Lists the shapes of whole models that are not among the main sizes.

    All models come in one dtype and layout, then in the next, so that no model is missing where time runs out.
    """
    done = {(v.shape, v.dtype, v.layout) for v in main_variants(kind) if not v.backward}
    found = [
        Variant(_square((batch, *size)), dtype, layout, model=model)
        for dtype, layout in itertools.product(DTYPES[kind], variants.LAYOUTS)
        for model, batch, chosen in SELECTION[kind]
        for size in (MODELS[model] if chosen is None else chosen)
    ]
    return [v for v in found if (v.shape, v.dtype, v.layout) not in done]


def plans(target: Target) -> list[Plan]:
    """Returns plans for the main sizes, then for the shapes of models: on one thread only cifar10's."""
    models = model_variants(target.kind)
    small = variants.plans_of(target, [v for v in models if v.model == "cifar10"], _case, "shapes")
    large = variants.plans_of(target, [v for v in models if v.model != "cifar10"], _case, "shapes")
    large = [plan for plan in large if plan.threads in (None, machine.THREADS[-1])]
    return variants.plans_of(target, main_variants(target.kind), _case) + small + large


def test_group_norm_silu(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)


if __name__ == "__main__":
    variants.main(Variant, _case, __doc__)
