"""attention beside PyTorch's scaled_dot_product_attention on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dd_kernels.ops.attention import attention

from . import variants
from .harness import Case, Plan, Row, Target, dtype_name, rms_error

# [N, heads, tokens, D]: the cifar10 U-Net at batch 1 and 16, the levels of Stable Diffusion's and its text, a VAE's.
SHAPES = [(1, 1, 256, 256), (16, 1, 256, 256), (2, 8, 4096, 40), (2, 8, 1024, 80), (1, 1, 1024, 512)]
TEXT = 77


@dataclass(frozen=True)
class Variant(variants.Variant):
    """Self-attention of a shape [N, heads, tokens, D], or attention to other keys."""

    keys: str = variants.option("", "keys, as many as tokens unless given")
    products: str = variants.option("float32", "what is multiplied", ("float32", "bfloat16"))

    def __str__(self) -> str:
        return f"attention to {self.keys or self.shape[2]} keys by {self.products} {super().__str__()}"


def _case(target: Target, variant: Variant) -> Case:
    n, heads, tokens, depth = variant.shape
    keys = int(variant.keys or tokens)

    def drawn(count: int) -> Tensor:
        return torch.randn(n, count, heads, depth).to(variant.dtype).transpose(1, 2)  # as projections of tokens lie

    q, k, v = drawn(tokens), drawn(keys), drawn(keys)

    def ours(q: Tensor) -> Tensor:
        return attention(q, k, v, products=variant.products)

    def eager(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def inspect() -> Row:
        one = [x[:1, :1].double() for x in (q, k, v)]
        exact = F.scaled_dot_product_attention(one[0], one[1], one[2])
        errors = {name: rms_error(f(q)[:1, :1], exact) for name, f in (("", ours), ("eager_", eager))}
        products = 2 * n * heads * tokens * keys * depth
        return {"products": products, **{f"{name}rms_error": error for name, error in errors.items()}}

    return Case(
        "attention",
        f"{'of its tokens' if keys == tokens else f'to {keys} tokens'}, products of {variant.products}",
        variant.shape,
        ours,
        [(q,)],
        2 * (q.numel() + k.numel()) * variant.dtype.itemsize,
        {"eager": eager},
        dtype_name(variant.dtype),
        variant.layout,
        target.device,
        hot=True,
        inspect=inspect,
    )


def plans(target: Target) -> list[Plan]:
    """Returns plans for the layers of U-Nets on a CPU, and none elsewhere: attention has no other kernels."""
    if target.kind != "cpu":
        return []
    layers = [Variant(shape) for shape in SHAPES]
    layers += [Variant(shape, keys=str(TEXT)) for shape in SHAPES if shape[1] == 8]
    layers += [replace(layers[i], products="bfloat16") for i in (1, 2)]
    return variants.plans_of(target, layers, _case)


def test_attention(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)


if __name__ == "__main__":
    variants.main(Variant, _case, __doc__)
