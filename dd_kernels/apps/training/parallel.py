"""Training on several processes: which images of a step each takes, and how their gradients meet.

A step's images, timesteps, labels and noise are functions of their position in the whole batch. A process takes some
positions, and the mean of all gradients is that of one process on the whole batch, but for the order of its sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...nn import UNet
from ..processes import Processes


@dataclass(frozen=True)
class Parallel:
    """How a step is shared out; every process holds the whole model (``DistributedDataParallel``).

    Args:
        processes: those that train together, as :meth:`Processes.joined` gives them.
        accumulate: micro-batches that each process goes through, one after another, before it updates the weights.

    Raises:
        ValueError: ``accumulate`` is below 1.
    """

    processes: Processes = field(default_factory=Processes)
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1; got {self.accumulate}")

    @property
    def is_first(self) -> bool:
        """Whether this is the process that saves, draws and speaks."""
        return self.processes.rank == 0

    def parts(self, batch_size: int) -> list[range]:
        """Returns the positions in the batch of each micro-batch of this process; all lengths differ by 1 at most.

        Raises:
            ValueError: there are fewer images than micro-batches of all processes.
        """
        pieces = self.processes.count * self.accumulate
        if batch_size < pieces:
            raise ValueError(
                f"batch_size must be at least {pieces}: accumulate is {self.accumulate} in each of "
                f"{self.processes.count} processes; got {batch_size}"
            )
        bounds = [batch_size * piece // pieces for piece in range(pieces + 1)]
        first = self.processes.rank * self.accumulate
        return [range(bounds[i], bounds[i + 1]) for i in range(first, first + self.accumulate)]

    def placed(self, model: UNet, device: torch.device, by_block: bool = True) -> UNet:
        """Returns the model, on its device; see :class:`~.sharded.Sharded` for ``by_block``."""
        return model.to(device)

    def connected(self, model: UNet) -> nn.Module:
        """Returns the module to call in place of ``model``, whose gradients are means over the processes."""
        return model if self.processes.count == 1 else DistributedDataParallel(model)

    def of_part(self, module: nn.Module, part: range, parts: Sequence[range]) -> AbstractContextManager[None]:
        """Returns a context for the passes of a micro-batch: processes exchange gradients in the last one alone."""
        if isinstance(module, DistributedDataParallel) and part is not parts[-1]:
            return module.no_sync()
        return contextlib.nullcontext()

    def of_batch(self, values: Tensor, first: int, batch_size: int) -> Tensor:
        """Returns the values [batch_size] of all images, on the CPU; this process has those from ``first`` on."""
        every = torch.zeros(batch_size, dtype=values.dtype)
        every[first : first + len(values)] = values.to("cpu")
        return self.processes.summed(every)

    def collected(self, model: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which a process may call a model alone."""
        return contextlib.nullcontext()

    def whole(self, tensor: Tensor) -> Tensor:
        """Returns all of a tensor; every process must call it."""
        return tensor

    def fill(self, slot: Tensor, value: Tensor) -> None:
        """Copies a whole tensor to where it is kept."""
        slot.copy_(value)
