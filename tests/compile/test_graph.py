"""What a node of a captured graph tells."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from dd_kernels.compile.graph import mutates


@pytest.mark.parametrize(
    ("function", "arguments", "options", "writes"),
    [
        (F.dropout, (0.5, True), {}, False),  # training=True
        (F.dropout, (0.5, True, False), {}, False),
        (F.dropout, (0.5, False, True), {}, True),
        (F.dropout, (0.5,), {"inplace": True}, True),
        (F.silu, (), {}, False),
        (F.silu, (True,), {}, True),
        (F.hardtanh, (-1.0, 1.0, True), {}, True),
        (F.interpolate, (None, 2.0, "bilinear", True), {}, False),
        (torch._C._nn.gelu, (), {}, False),  # a function without a signature
        (torch.relu_, (), {}, True),
        (torch.sin, (), {"out": torch.empty(())}, True),
        (operator.iadd, (1,), {}, True),
        (operator.add, (1,), {}, False),
    ],
)
def test_which_functions_write_to_their_input(function, arguments, options, writes):
    graph = fx.Graph()
    node = graph.call_function(function, (graph.placeholder("x"), *arguments), options)
    assert mutates(node) is writes
