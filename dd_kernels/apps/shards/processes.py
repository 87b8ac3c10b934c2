"""The processes that torchrun started to do one job together; one alone where it was not torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Processes:
    """This process's number among all, and how many there are."""

    rank: int = 0
    count: int = 1

    @staticmethod
    @contextlib.contextmanager
    def joined() -> Iterator[Processes]:
        """Yields the processes, connected by gloo where there are several."""
        if not distributed.is_torchelastic_launched():
            yield Processes()
            return
        distributed.init_process_group("gloo")
        try:
            yield Processes(distributed.get_rank(), distributed.get_world_size())
        finally:
            distributed.destroy_process_group()

    def first_alone(self, action: Callable[[], object]) -> None:
        """Runs ``action`` in the first process while the others wait.

        Raises:
            ValueError, OSError: what the action raised, in the first process.
            SystemExit: the action failed, in another process, which says nothing.
        """
        failed = torch.zeros(1)
        try:
            if self.rank == 0:
                action()
        except BaseException:
            failed += 1
            raise
        finally:
            if self.count > 1:
                distributed.broadcast(failed, 0)
        if failed.item():
            raise SystemExit(2)


def local_device() -> torch.device:
    """Returns the GPU of this process among those of its machine, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not distributed.is_torchelastic_launched():
        return torch.device("cuda")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
