"""Forked processes in place of those that torchrun starts: the same environment, without its seconds of imports."""

import os
import signal
import socket
import sys
import traceback

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

can_fork = pytest.mark.skipif(
    sys.platform == "win32" or torch.cuda.is_available(), reason="CUDA does not outlive a fork"
)


def in_processes(count, work):
    """Calls ``work`` in processes of one job; returns what each ended with: its result, if a number, or its status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(count)}
    children = []
    for rank in range(count):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.environ.update(job | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            os._exit(_status(work))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _status(work):
    signal.alarm(100)  # processes that wait for one another end
    kept, init = [], DistributedDataParallel.__init__

    def kept_for_ever(self, *arguments, **options):  # its destructor hangs in a forked process, and in no other
        kept.append(self)
        init(self, *arguments, **options)

    DistributedDataParallel.__init__ = kept_for_ever
    try:
        return work() or 0
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
