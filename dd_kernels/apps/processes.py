"""The processes that torchrun started to do one job together; one alone where it was not torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

ResultT = TypeVar("ResultT")
# What gloo and NCCL say where another process has gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@dataclass(frozen=True)
class Processes:
    """This process's number among all, and how many there are."""

    rank: int = 0
    count: int = 1

    @staticmethod
    @contextlib.contextmanager
    def joined(device: torch.device | None = None) -> Iterator[Processes]:
        """Yields the processes, connected by gloo where there are several; tensors of a GPU ``device`` by NCCL.

        Raises:
            ConnectionError: another process has ended meanwhile.
        """
        if not distributed.is_torchelastic_launched():
            yield Processes()
            return
        backend = "gloo"
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        _connect(backend)
        try:
            yield Processes(distributed.get_rank(), distributed.get_world_size())
        except RuntimeError as error:
            if not any(words in str(error) for words in _GONE):
                raise
            raise ConnectionError("another process of the job has ended, and this one with it") from error
        finally:
            distributed.destroy_process_group()

    def together(self, action: Callable[[], ResultT]) -> ResultT:
        """Runs ``action``, which does not talk to the other processes, in all of them; returns its result.

        Raises:
            Exception: what the action raised, in the first of the processes where it failed.
            SystemExit: it failed in another process, which says why; this one says nothing.
        """
        failure: BaseException | None = None
        try:
            result = action()
        except BaseException as error:
            failure = error
        first = -self.largest(-(self.count if failure is None else self.rank))
        if failure is not None and first == self.rank:
            raise failure
        if first < self.count:
            raise SystemExit(2)
        return result

    def first_alone(self, action: Callable[[], object]) -> None:
        """Runs ``action`` in the first process while the others wait; see :meth:`together` for what is raised."""
        self.together(action if self.rank == 0 else lambda: None)

    def largest(self, number: int) -> int:
        """Returns the largest of the numbers of all processes."""
        if self.count == 1:
            return number
        found = torch.tensor(number)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def summed(self, values: Tensor) -> Tensor:
        """Returns the sum over all processes of a tensor of the CPU."""
        if self.count > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values


def _connect(backend: str) -> None:
    """Connects the processes through keys of this start alone.

    PyTorch 2.13's torchrun keeps one store over its restarts, where processes would find the addresses of dead ones.
    """
    store, rank, count = next(rendezvous("env://"))
    store = distributed.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count)


def local_device() -> torch.device:
    """Returns the GPU of this process among those of its machine, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not distributed.is_torchelastic_launched():
        return torch.device("cuda")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
