"""Training with a model that is shared out: each process keeps a part of every weight, average and moment.

Its import takes seconds, so that only who asks for it waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ...nn import UNet
from ...nn.blocks import Attention, ResBlock
from .parallel import Parallel


@dataclass(frozen=True)
class Sharded(Parallel):
    """How a step is shared out where the weights are too (FSDP2, ``torch.distributed.fsdp.fully_shard``).

    Raises:
        ValueError: torchrun has not started this process.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not distributed.is_initialized():
            raise ValueError("shard_model needs the processes that torchrun starts; got none")

    def placed(self, model: UNet, device: torch.device, by_block: bool = True) -> UNet:
        """Keeps this process's part of a model; a call collects the weights ``by_block``, or all at once."""
        mesh = init_device_mesh(device.type, (self.processes.count,))
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 knows no other
        for block in model.modules() if by_block else ():
            if isinstance(block, ResBlock | Attention):
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=by_block)
        # Features are channels_last all the same, since a convolution follows its input.
        model.register_forward_pre_hook(lambda _, args: (_channels_last(args[0]), *args[1:]))
        return model.to(device)

    def connected(self, model: UNet) -> nn.Module:
        """Returns the model itself, which exchanges weights and gradients."""
        return model

    @contextlib.contextmanager
    def collected(self, model: nn.Module) -> Iterator[None]:
        """Holds all of a model's weights in every process inside the block."""
        assert isinstance(model, FSDPModule)
        model.unshard()
        try:
            yield
        finally:
            model.reshard()

    def whole(self, tensor: Tensor) -> Tensor:
        """Returns all of a tensor that was shared out."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def fill(self, slot: Tensor, value: Tensor) -> None:
        """Copies this process's part of a whole tensor, which every process has."""
        if isinstance(slot, DTensor):
            value = distribute_tensor(value, slot.device_mesh, slot.placements, src_data_rank=None)
        slot.copy_(value)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
