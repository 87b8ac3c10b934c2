"""Any model, faster, by rewriting the graph that Dynamo captures: ``torch.compile(model, backend="dd_kernels")``."""

from .capture import dd_kernels, rewrite
from .report import GraphReport, NormReport, Report

__all__ = ["GraphReport", "NormReport", "Report", "dd_kernels", "rewrite"]
