"""group_norm_silu forward at the shapes of whole models, against eager PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from . import machine
from .bench_group_norm_silu import DTYPES, LAYOUTS, Variant, main_variants, plans_of
from .harness import Plan, Row, Target
from .shapes import MODELS, SELECTION


def variants(kind: str) -> list[Variant]:
    """The shapes that the main benchmark does not have."""
    done = {(v.size, v.dtype, v.layout) for v in main_variants(kind) if not v.backward}
    found = []
    # Every model in one dtype and layout, then in the next: where time runs out, it is not a model that is missing.
    for dtype, layout in itertools.product(DTYPES[kind], LAYOUTS):
        for model, batch, chosen in SELECTION[kind]:
            sizes = [(batch, *shape) for shape in (MODELS[model] if chosen is None else chosen)]
            found += [Variant(size, dtype, layout, model) for size in sizes]
    return [v for v in found if (v.size, v.dtype, v.layout) not in done]


def plans(target: Target) -> list[Plan]:
    """Every shape, in every dtype of the device and both layouts; on one thread only cifar10's."""
    found = variants(target.kind)
    small = [v for v in found if v.model == "cifar10"]
    large = plans_of(target, [v for v in found if v.model != "cifar10"])
    return plans_of(target, small) + [plan for plan in large if plan.threads in (None, machine.THREADS[-1])]


def test_model_norms(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)
