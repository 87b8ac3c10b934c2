"""What processes of one job agree on, and who speaks where one of them fails."""

import os
import signal

import pytest
import torch
from several import can_fork, in_processes
from torch import distributed

from dd_kernels.apps import processes
from dd_kernels.apps.processes import Processes, local_device


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    assert local_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert local_device() == torch.device("cuda")
    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert local_device() == torch.device("cuda", 2)


def test_tensors_of_a_gpu_meet_by_nccl(monkeypatch):
    begun = []
    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    store = distributed.HashStore()
    monkeypatch.setattr(processes, "rendezvous", lambda _: iter([(store, 1, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **where: begun.append(backend))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: begun.append("end"))
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", begun.append)
    for device in (None, torch.device("cpu"), torch.device("cuda", 1)):
        with Processes.joined(device) as found:
            assert found == Processes(1, 2)
    assert begun == ["gloo", "end", "gloo", "end", torch.device("cuda", 1), "cpu:gloo,cuda:nccl", "end"]


def fail(error):
    raise error


def test_one_process_is_first_and_alone():
    with Processes.joined() as found:
        assert found == Processes(0, 1)
        with pytest.raises(ValueError, match="x"):
            found.first_alone(lambda: fail(ValueError("x")))
        assert found.together(lambda: 3) == found.largest(3) == 3
        assert found.summed(torch.ones(2)).tolist() == [1, 1]


@can_fork
def test_processes_add_and_compare():
    def work():
        with Processes.joined() as found:
            mine = torch.tensor([1.0, found.rank])
            assert found.summed(mine).tolist() == [3, 3]
            assert mine.tolist() == [1, found.rank]
            assert found.largest(-5 * found.rank) == 0
            return found.together(lambda: 7 + found.rank)

    assert in_processes(3, work) == [7, 8, 9]


@can_fork
@pytest.mark.parametrize(("failing", "says"), [((0, 1, 2), 0), ((1, 2), 1), ((2,), 2), ((0,), 0)])
def test_of_those_that_fail_the_first_says_why(failing, says):
    def work():
        with Processes.joined() as found:
            try:
                found.together(lambda: fail(ValueError("x")) if found.rank in failing else None)
            except ValueError:
                return 50
            return 51

    assert in_processes(3, work) == [50 if rank == says else 2 for rank in range(3)]


@can_fork
def test_the_others_wait_for_the_first(tmp_path):
    def work():
        with Processes.joined() as found:
            found.first_alone((tmp_path / "here").touch)
            return (tmp_path / "here").exists() + found.rank

    assert in_processes(2, work) == [1, 2]


@can_fork
def test_a_process_that_is_gone_is_one_error():
    def work():
        try:
            with Processes.joined() as found:
                if found.rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                found.largest(0)
        except ConnectionError as error:
            return 5 * ("another process of the job has ended" in str(error))

    assert in_processes(2, work) == [5, -signal.SIGKILL]


@can_fork
def test_other_errors_stay_what_they_are():
    def work():
        with pytest.raises(RuntimeError, match="y"), Processes.joined():
            fail(RuntimeError("y"))
        return 5

    assert in_processes(1, work) == [5]
