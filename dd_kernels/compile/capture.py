"""The Dynamo backend: ``torch.compile(model, backend="dd_kernels")``.

Dynamo captures a model as graphs of functional calls and guards what it saw: hooks, adapters, modules swapped and
attributes changed later are its matter, as are dynamic sizes. Each graph is rewritten once, in place, and runs as it
is, with autograd, or is handed on to Inductor. The model itself is not touched.

The name is an entry point of the group ``torch_dynamo_backends``: nothing has to be imported for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ..ops import cuda_graph
from .attention import replace_attention
from .concatenation import replace_concatenations
from .convolution import find_convolutions, replace_convolutions
from .convolution3d import find_convolutions3d, replace_convolutions3d
from .cuda_graph import CudaGraphs, devices_of
from .fused_convolution import FLOAT32, Numbers, numbers_of
from .identity import relax_views, remove_identities
from .joined_linears import join_linears
from .layout import lay_out
from .linear import replace_linears
from .norm import fuse_norms
from .one_head import fold_one_heads
from .recording import Recordings
from .repeated import share_repeated
from .report import GraphReport, Report
from .traced_norm import restore_norms

_log = logging.getLogger(__name__)
_OPTIONS = ("accuracy", "cuda_graphs", "dtype", "inductor", "report")


def rewrite(module: fx.GraphModule, numbers: Numbers = FLOAT32) -> GraphReport:
    """Rewrites a graph that Dynamo captured, and the graphs within it, in place; ``numbers`` are the convolutions'."""
    started, identities, convolutions, copies, norms = time.perf_counter(), 0, 0, 0, []
    linears, attentions, one_heads = 0, 0, 0
    for part in module.modules():  # checkpointed and conditional parts are graphs of their own
        if isinstance(part, fx.GraphModule):
            norms += restore_norms(part)
            identities += remove_identities(part.graph) + share_repeated(part.graph)
            found, found3d = find_convolutions(part.graph), find_convolutions3d(part.graph)
            norms += fuse_norms(part.graph, channels_last=bool(found))
            replace_convolutions(part.graph, found, numbers)
            replace_convolutions3d(part.graph, found3d, numbers)
            convolutions += len(found) + len(found3d)
            one_heads += fold_one_heads(part.graph, numbers)
            linears += join_linears(part.graph, numbers) + replace_linears(part.graph, numbers)
            attentions += replace_attention(part.graph, numbers)
            copies += lay_out(part.graph)
            replace_concatenations(part.graph)
            relax_views(part.graph)
            part.graph.lint()
            part.recompile()
    seconds = time.perf_counter() - started
    return GraphReport(tuple(norms), identities, convolutions, copies, seconds, linears, attentions, one_heads)


def _has_gpu(inputs: Sequence[Any]) -> bool:
    return any(map(cuda_graph.serves, devices_of(inputs)))


def _changes_python_state() -> bool:
    """Returns whether the code that Dynamo is capturing changes objects that outlive the call; True where unknown."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

        effects = InstructionTranslator.current_tx().output.side_effects
        tracked = [v for v in effects.id_to_variable.values() if effects.is_modified(v)]
        return any(isinstance(v.mutation_type, AttributeMutationExisting | ValueMutationExisting) for v in tracked)
    except (AttributeError, ImportError):
        return True


def _counted(call: Callable[..., Any], report: Report) -> Callable[..., Any]:
    """Returns what calls a graph and counts that in the report."""

    def counted(*args: Any) -> Any:
        report.runs += 1
        return call(*args)

    return counted


def dd_kernels(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles a captured graph; what Dynamo calls for ``torch.compile(model, backend="dd_kernels", options=...)``.

    Args:
        module: the graph, which is rewritten in place.
        example_inputs: tensors and sizes of the call that was captured.
        options: ``{"inductor": True}`` hands the rewritten graph on to Inductor; ``{"cuda_graphs": False}`` captures
            no CUDA graph, as is done otherwise on CUDA where no gradient is asked for; ``{"report": Report()}`` takes
            an entry per graph: see :class:`dd_kernels.compile.Report`; ``{"accuracy": "high"}`` makes convolutions on
            a CPU at least as exact as eager's, see :func:`dd_kernels.ops.conv2d`; ``{"dtype": "bfloat16"}`` lets them
            multiply in bfloat16, see :func:`dd_kernels.accelerate`.
        mode: of Inductor alone; there is none here.

    Raises:
        ValueError: an option of another name, another accuracy or dtype, or a mode.
    """
    if mode is not None:
        raise ValueError(f"mode must be left out: CUDA graphs are used by default, see options; got {mode!r}")
    options = options or {}
    numbers = numbers_of(options.get("accuracy", "default"), options.get("dtype"))
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise ValueError(f"options must be among {', '.join(map(repr, _OPTIONS))}; got {', '.join(map(repr, unknown))}")
    report: Report = options.get("report") or Report()
    report.graphs.append(rewrite(module, numbers))
    report.is_pure &= not _changes_python_state()
    _log.info("%s", report)
    call: Any = module.forward
    graphs = CudaGraphs(module, report.notes) if options.get("cuda_graphs", True) and _has_gpu(example_inputs) else None
    if options.get("inductor"):
        from torch._inductor.compile_fx import compile_fx

        call = compile_fx(module, list(example_inputs))
    elif graphs is None:
        call = Recordings(module, report.notes).run
    return _counted(call if graphs is None else graphs.of(call), report)
