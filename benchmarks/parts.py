"""The parts of a report: what each runs, and its share of the time."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

from .harness import Plan, Target


@dataclass(frozen=True)
class Part:
    """A name, seconds by device (None: only where asked for by name), and what runs.

    Attributes:
        files: benchmark files whose plans run, one after another; none for a check.
        slow: the plans that take minutes to prepare, instead of the others.
        patience: how many times its share it may take; the parts after it have that much less.
    """

    name: str
    seconds: dict[str, int | None]
    files: tuple[str, ...] = ()
    slow: bool = False
    patience: float = 1.0

    def plans(self, target: Target) -> list[Plan]:
        """What the part measures on the target."""
        modules = [importlib.import_module(f"benchmarks.{file}") for file in self.files]
        return [plan for module in modules for plan in module.plans(target) if plan.slow == self.slow]


@dataclass
class Share:
    """Hands the time out: what a part leaves or overdraws is shared by those after it."""

    remaining: float
    weights: dict[str, int] = field(default_factory=dict)

    def take(self, name: str) -> float:
        """Seconds for the part ``name``."""
        share = PARTS[name].patience * self.weights[name] / sum(self.weights.values())
        return max(self.remaining, 0.0) * min(share, 1.0)

    def used(self, name: str, seconds: float) -> None:
        """The part is over."""
        self.remaining -= seconds
        del self.weights[name]


OPS = ("bench_reverse_step", "bench_randn", "bench_q_sample", "bench_group_norm_silu", "bench_ops_alone")
PARTS = {
    part.name: part
    for part in (
        Part("build", {"cuda": 75, "cpu": None}, patience=2.5),
        Part("checks", {"cuda": 115, "cpu": None}),
        Part("ops", {"cuda": 85, "cpu": 240}, OPS),
        Part("end_to_end", {"cuda": 60, "cpu": 260}, ("bench_throughput",)),
        Part("training", {"cuda": 25, "cpu": 40}, ("bench_training",)),
        Part("growth", {"cuda": 30, "cpu": 60}, ("bench_growth",)),
        Part("shapes", {"cuda": 45, "cpu": 160}, ("bench_model_norms",)),
        Part("compiled", {"cuda": 45, "cpu": None}, ("bench_throughput", "bench_training"), slow=True),
    )
}
TOTAL = {device: sum(part.seconds[device] or 0 for part in PARTS.values()) for device in ("cpu", "cuda")}
