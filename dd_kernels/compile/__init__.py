"""Any model, faster, by rewriting the graph that Dynamo captures: ``torch.compile(model, backend="dd_kernels")``."""

from .accelerate import accelerate, restore
from .capture import dd_kernels, rewrite
from .report import AccelerateReport, GraphReport, NormReport, Report

__all__ = [
    "AccelerateReport",
    "GraphReport",
    "NormReport",
    "Report",
    "accelerate",
    "dd_kernels",
    "restore",
    "rewrite",
]
