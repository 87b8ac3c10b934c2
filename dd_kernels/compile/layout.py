"""The layout of a graph: channels_last all the way, in 2-D and 3-D, and a conversion only where something needs it.

    conv(x)         ->  conv(x in channels_last)   where x is not in channels_last already
    what is given   ->  contiguous                 where it leaves the graph, and was contiguous without the rewrite

On a CPU the convolutions that are ours read and write channels_last themselves; those of PyTorch are as fast in either
layout (in 3-D 0.98 to 1.02) and keep theirs. On CUDA cuDNN's kernels for tensor cores work in channels_last and would
convert what comes in another layout, each time: there all are put in it, in 16 bits and, where TF32 is allowed, in
float32.

What follows a convolution keeps its layout: sums, norms, activations, resampling, concatenations. The tokens of an
attention block are views of it, and so are the maps made of them. Weights are converted once, by
:func:`dd_kernels.accelerate`, in place; a parameter stays itself, with the same values and names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

from .convolution3d import frames_conv3d
from .fused_convolution import channels_last_conv2d, norm_conv2d
from .fused_norm import checked_norm
from .graph import ADD, CASTS, MUL, Calls, argument, is_custom, known, tensor
from .identity import is_eval_dropout, root, written_roots

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_OURS = Calls(channels_last_conv2d, frames_conv3d, norm_conv2d)
_THEIRS = Calls(torch.conv2d, F.conv2d, torch.conv3d, F.conv3d)
# Calls whose result has the layout of the tensors that they read, all of one layout.
_KEEPING = (
    *(ADD, MUL, CASTS),
    Calls(checked_norm, F.group_norm, F.silu, F.mish, F.gelu, torch._C._nn.gelu, F.relu, torch.sigmoid, torch.tanh),
    Calls(torch.cat, F.pad, torch._C._nn.pad, F.interpolate, F.avg_pool2d, F.avg_pool3d, torch._C._nn.avg_pool2d),
)
# Calls that go over a tensor in the order of its memory: the numbers that they draw, or what they read.
_IN_MEMORY_ORDER = Calls(
    *(F.dropout, torch.dropout, torch.rand_like, torch.randn_like, torch.randint_like, torch.bernoulli, "bernoulli"),
    *(torch.as_strided, "as_strided"),
)


def in_channels_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether convolutions that PyTorch computes are faster in channels_last."""
    if device.type != "cuda":
        return False
    return dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and torch.backends.cudnn.allow_tf32)


def _maps(node: fx.Node) -> list[fx.Node]:
    """Returns the images or videos among what a call reads."""
    value = tensor(node)
    read = [(v, tensor(v)) for v in node.all_input_nodes]
    return [v for v, t in read if t is not None and value is not None and t.ndim == value.ndim]


def _is_put_in_channels_last(node: fx.Node) -> bool:
    """Returns whether a convolution of PyTorch is to read channels_last."""
    x = tensor(argument(node, 0, "input")) if node in _THEIRS else None
    return x is not None and x.ndim in _FORMATS and in_channels_last(x.device, x.dtype)


def _convert(graph: fx.Graph, node: fx.Node, x: fx.Node) -> fx.Node:
    """Returns x in channels_last, made before the call ``node``."""
    with graph.inserting_before(node):
        converted = graph.call_method("contiguous", (x,), {"memory_format": _FORMATS[known(x).ndim]})
    converted.meta = dict(x.meta)
    return converted


def _keeps(node: fx.Node) -> bool:
    return any(node in calls for calls in _KEEPING) or is_eval_dropout(node)


def _put_in_channels_last(graph: fx.Graph) -> int:
    """Converts what convolutions read that is not in channels_last, once each; returns how many conversions."""
    last: set[fx.Node] = set()
    converted: dict[fx.Node, fx.Node] = {}
    written, count = written_roots(graph), 0
    for node in list(graph.nodes):
        convolves = _is_put_in_channels_last(node)
        read = [argument(node, 0, "input")] if convolves else _maps(node) if _keeps(node) else []
        for x in read:
            if convolves and x not in last and x not in converted:
                converted[x] = _convert(graph, node, x)
                last.add(converted[x])
                count += 1
            if x in converted:
                node.replace_input_with(x, converted[x])
            if root(x) in written:  # what is read later may have changed
                converted.pop(x, None)
        if node in _OURS or convolves or (read and all(x in last for x in _maps(node))):
            last.add(node)
    return count


def _keep_contiguous(graph: fx.Graph) -> int:
    """Makes contiguous, where it was without the rewrite, what the graph returns or reads in the order of memory.

    Returns how many copies that takes.
    """
    copies = 0
    for reader in [node for node in graph.nodes if node.op == "output" or node in _IN_MEMORY_ORDER or is_custom(node)]:
        for node in reader.all_input_nodes:
            value = tensor(node)
            if node.op == "placeholder" or value is None or value.ndim not in _FORMATS or not value.is_contiguous():
                continue
            with graph.inserting_before(reader):
                dense = graph.call_method("contiguous", (node,))
            dense.meta = dict(node.meta)
            reader.replace_input_with(node, dense)
            copies += 1
    return copies


def _given_to_ours(graph: fx.Graph) -> int:
    """Returns how many inputs of the graph our convolutions convert themselves."""
    ours = [node for node in graph.nodes if node in _OURS]
    images = {
        v
        for node in ours
        for v in node.all_input_nodes
        if v.op == "placeholder" and not isinstance(tensor(v), nn.Parameter)
    }
    return sum((value := tensor(v)) is not None and value.ndim in _FORMATS for v in images)


def lay_out(graph: fx.Graph) -> int:
    """Puts a graph in channels_last where its convolutions run so; returns how many conversions are left."""
    if not any(node in _OURS or _is_put_in_channels_last(node) for node in graph.nodes):
        return 0
    return _given_to_ours(graph) + _put_in_channels_last(graph) + _keep_contiguous(graph)


def convert_weights(module: nn.Module) -> Callable[[], None]:
    """Puts the weights of convolutions in channels_last, in place, where these run so; returns what undoes it.

    A parameter stays the same object; its values, and the files made of it, do not change.
    """
    before: list[tuple[weakref.ref[nn.Parameter], tuple[int, ...]]] = []
    for parameter in module.parameters():
        memory_format = _FORMATS.get(parameter.ndim)
        if memory_format is not None and in_channels_last(parameter.device, parameter.dtype):
            before.append((weakref.ref(parameter), parameter.stride()))
            parameter.data = parameter.data.contiguous(memory_format=memory_format)

    def undo() -> None:
        for weakly, strides in before:
            if (parameter := weakly()) is not None:
                data = torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)
                parameter.data = data.copy_(parameter.data)

    return undo
