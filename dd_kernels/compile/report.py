"""What was found in a model's graphs, what was fused with what, and why something was not: data that prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from . import derived_weights, kept_filters, memory


@dataclass(frozen=True)
class NormReport:
    """One GroupNorm of a captured graph."""

    name: str  # of its module, as named_modules() has it
    fused: tuple[str, ...]  # what is computed in its pass beside it: "bias", "embedding", "scale-shift", "silu" ...
    kept: str | None  # why PyTorch's own norm runs; None where the fused one does
    left: tuple[str, ...] = ()  # why something beside the norm was not fused


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo captured."""

    norms: tuple[NormReport, ...]
    identities: int  # calls removed that return their input, or repeat another
    convolutions: int  # that run in channels_last
    layout_copies: int  # conversions of layout left between them
    seconds: float  # taken by the rewrites
    linears: int = 0  # linear layers that run by the kernel of 1 x 1 convolutions
    attentions: int = 0  # that run by our kernel, beside those of one head
    one_heads: int = 0  # attentions of one head that run with two linear layers in place of four


@dataclass
class Report:
    """The graphs of one compiled network, in the order of their capture; empty before its first call."""

    name: str = "model"
    graphs: list[GraphReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was found while the graphs ran
    calls: int = 0  # of the network, where it was accelerated
    runs: int = 0  # of its graphs
    is_pure: bool = True  # no call of a graph changes a Python object that outlives it

    @property
    def norms(self) -> list[NormReport]:
        """Returns the norms of all graphs, each once: a graph captured again for other sizes has the same ones."""
        return list({norm.name: norm for graph in self.graphs for norm in graph.norms}.values())

    @property
    def share(self) -> float:
        """Returns the share of the norms that the fused kernel computes; 1.0 where there is none."""
        norms = self.norms
        return sum(norm.kept is None for norm in norms) / len(norms) if norms else 1.0

    def __str__(self) -> str:
        if not self.graphs:
            return f"{self.name}: not captured yet; it is at the first call"
        norms = self.norms
        lines = [
            f"{self.name}: {len(self.graphs)} graph{'s' * (len(self.graphs) != 1)}, {len(norms)} norms,"
            f" {sum(norm.kept is None for norm in norms)} in the fused kernel"
        ]
        fused = Counter(" + ".join(("norm", *norm.fused)) for norm in norms if norm.kept is None)
        lines += [f"  {count} x {what}" for what, count in fused.most_common()]
        kept = Counter(norm.kept for norm in norms if norm.kept is not None)
        lines += [f"  {count} x PyTorch's norm: {why}" for why, count in kept.most_common()]
        left = Counter(why for norm in norms for why in norm.left)
        lines += [f"  {count} x not fused: {why}" for why, count in left.most_common()]
        copies = max(graph.layout_copies for graph in self.graphs)
        convolutions = max(graph.convolutions for graph in self.graphs)
        if convolutions:
            lines.append(f"  {convolutions} convolutions in channels_last, {copies} layout copies left")
        if linears := max(graph.linears for graph in self.graphs):
            lines.append(f"  {linears} linear layers by the convolutions' kernel")
        if attentions := max(graph.attentions for graph in self.graphs):
            lines.append(f"  {attentions} attentions by our kernel")
        if one_heads := max(graph.one_heads for graph in self.graphs):
            lines.append(f"  {one_heads} attentions of one head by our kernel, two linear layers in place of four")
        return "\n".join(lines + [f"  {note}" for note in dict.fromkeys(self.notes)])


@dataclass
class AccelerateReport:
    """What :func:`dd_kernels.accelerate` did: its networks, and what it did beside compiling them."""

    networks: list[Report]
    notes: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Returns the share of the norms of all networks that the fused kernel computes; 1.0 where there is none."""
        norms = [norm for network in self.networks for norm in network.norms]
        return sum(norm.kept is None for norm in norms) / len(norms) if norms else 1.0

    def __str__(self) -> str:
        places = {"packed filters": kept_filters, "derived weights": derived_weights, "results within graphs": memory}
        kept = [
            f"{place.held() >> 20} MiB of {what} kept, of {place.LIMIT >> 20} at most"
            for what, place in places.items()
            if place.held() > 0
        ]
        return "\n".join([*map(str, self.networks), *kept, *self.notes])
