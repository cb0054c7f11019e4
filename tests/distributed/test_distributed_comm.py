from __future__ import annotations

import copy
import os
import sys
import threading
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from horoyolo.config import InputError
from horoyolo.distributed.comm import LOWEST_NICE, HorovodComm, LocalComm, broadcast_tensors, check_own_name, initialise, num_workers, open_comm


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, 1),
        ({"HOROVOD_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "2"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"PMI_SIZE": "3"}, 3),
        ({"SLURM_NTASKS": "8"}, 1),  # a batch script: one process, whatever the job's size
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, 8),
    ],
)
def test_number_of_workers_comes_from_the_launcher(env, expected):
    assert num_workers(env) == expected


def test_a_number_of_workers_that_is_none_is_the_users_error():
    with pytest.raises(InputError, match="HOROVOD_SIZE='two'"):
        num_workers({"HOROVOD_SIZE": "two"})


def test_a_host_whose_own_name_is_unknown_is_told_before_gloo_crashes(monkeypatch):
    check_own_name({"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1"})
    monkeypatch.setattr("socket.gethostname", lambda: "nobody-knows.invalid")
    check_own_name({})  # no Gloo
    with pytest.raises(InputError, match=r"nobody-knows\.invalid, does not resolve.*/etc/hosts"):
        check_own_name({"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1"})


def test_a_host_that_sends_others_to_themselves_is_told_before_they_wait_for_each_other(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "127.0.1.1")  # what Debian's /etc/hosts makes of a name
    alone = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_SIZE": "4"}
    check_own_name(alone)
    with pytest.raises(InputError, match=r"resolves to 127\.0\.1\.1 .*/etc/hosts"):
        check_own_name(alone | {"HOROVOD_LOCAL_SIZE": "2"})
    monkeypatch.setattr("socket.gethostname", lambda: "10.0.0.1")
    check_own_name(alone | {"HOROVOD_LOCAL_SIZE": "2"})


def test_one_worker_needs_no_horovod(monkeypatch):
    for variable in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    assert isinstance(open_comm(), LocalComm)


def test_several_workers_without_horovod_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(InputError, match=r"2 workers.*scripts/setup\.sh"):
        open_comm()


def test_local_comm_obeys_the_contract_with_one_worker():
    comm = LocalComm()
    assert (comm.rank(), comm.size(), comm.local_rank(), comm.local_size()) == (0, 1, 0, 1)
    tensor = torch.arange(6.0).view(3, 2)
    assert comm.allreduce(tensor) is tensor
    assert comm.allreduce(tensor, "max") is tensor
    assert comm.broadcast(tensor) is tensor
    gathered = comm.allgather(tensor)
    assert torch.equal(gathered, tensor)
    assert gathered is not tensor
    rows, splits = comm.alltoall(tensor, [3])
    assert torch.equal(rows, tensor)
    assert splits == [3]
    assert comm.broadcast_object({"a": 1}) == {"a": 1}
    assert comm.allgather_object("x") == ["x"]
    assert comm.group([0]).size() == 1
    comm.barrier()
    comm.close()


def test_wrong_calls_fail_with_one_worker_too():
    comm = LocalComm()
    with pytest.raises(TypeError, match="bfloat16"):
        comm.allreduce(torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="alltoall of 3 rows"):
        comm.alltoall(torch.zeros(3), [2])
    with pytest.raises(ValueError, match=r"only \[0\] exists"):
        comm.group([0, 1])


def test_broadcast_tensors_leaves_values_and_layout_of_the_only_worker_alone():
    tensors = [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.tensor(7), torch.randn(5, requires_grad=True)]
    before = [tensor.detach().clone() for tensor in tensors]
    broadcast_tensors(tensors, LocalComm())
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
    assert tensors[0].is_contiguous(memory_format=torch.channels_last)


class OnGpu(torch.Tensor):
    """In the place of a tensor on a GPU: Horovod is not to be given one."""

    def cpu(self):
        return self.as_subclass(torch.Tensor).clone()


class Doubling:
    """A Horovod of two workers that hold the same, and what tensors it was given."""

    Sum, Max = "sum", "max"

    def __init__(self, knows_gpus):
        self.cuda_built, self.rocm_built = (lambda: knows_gpus), (lambda: False)
        self.global_process_set = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
        self.given, self._outcomes = [], []

    def _done(self, tensor, outcome):
        self.given.append(type(tensor))
        self._outcomes.append(outcome)
        return len(self._outcomes) - 1

    def allreduce_async_(self, tensor, **_):
        return self._done(tensor, tensor.mul_(2))

    def allgather_async(self, rows, **_):
        return self._done(rows, torch.cat((rows, rows)))

    def alltoall_async(self, rows, splits, **_):
        own = rows[: int(splits[0])]
        return self._done(rows, (torch.cat((own, own)), torch.tensor([len(own)] * 2)))

    def broadcast_async_(self, tensor, root, **_):
        return self._done(tensor, tensor)

    def poll(self, handle):
        return True

    def synchronize(self, handle):
        return self._outcomes[handle]


@pytest.mark.parametrize("knows_gpus", [True, False])
def test_what_a_gpu_holds_goes_through_the_cpu_where_horovod_was_built_without_gpus(knows_gpus):
    pytest.importorskip("horovod.torch", reason="Horovod is not installed (scripts/setup.sh builds it)")
    hvd = Doubling(knows_gpus)
    comm = HorovodComm(hvd)
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tensor = values.clone().as_subclass(OnGpu)
    assert comm.allreduce(tensor) is tensor
    assert tensor.tolist() == (2 * values).tolist()
    assert comm.allgather(tensor).tolist() == [[2.0, 4.0], [6.0, 8.0]] * 2
    rows, counts = comm.alltoall(tensor, [1, 1])
    assert (rows.tolist(), counts) == ([[2.0, 4.0]] * 2, [1, 1])
    assert comm.broadcast(tensor).tolist() == (2 * values).tolist()
    assert set(hvd.given) == {OnGpu if knows_gpus else torch.Tensor}


@pytest.fixture
def horovods_thread():
    """A HorovodComm of a Horovod that does nothing, in one thread; and that thread's number."""
    pytest.importorskip("horovod.torch", reason="Horovod is not installed (scripts/setup.sh builds it)")
    end = threading.Event()
    threads = []

    def init() -> None:
        threads.append(threading.Thread(target=end.wait))
        threads[0].start()

    hvd = SimpleNamespace(init=init, global_process_set=None, cuda_built=lambda: False, rocm_built=lambda: False)
    started = initialise(hvd)
    yield HorovodComm(hvd, threads=started), threads[0].native_id
    end.set()
    threads[0].join()


class Niceness:
    """The system's calls, for one user: ``may_raise`` as root may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, may_raise: bool):
        self.of: dict[int, int] = defaultdict(int)
        self._may_raise = may_raise
        monkeypatch.setattr("os.getpriority", lambda which, thread: self.of[thread])
        monkeypatch.setattr("os.setpriority", self._set)

    def _set(self, which: int, thread: int, nice: int) -> None:
        if nice < self.of[thread] and not self._may_raise:
            raise PermissionError(13, "Permission denied")
        self.of[thread] = nice


def test_threads_that_horovod_started_give_way_and_no_longer(monkeypatch, horovods_thread):
    comm, thread = horovods_thread
    niceness = Niceness(monkeypatch, may_raise=True)
    seen = []
    for wanted, for_good in ((True, False), (True, False), (False, False), (True, True), (False, True)):
        comm.give_way(wanted, for_good)
        seen.append(niceness.of[thread])
    assert seen == [LOWEST_NICE, LOWEST_NICE, 0, LOWEST_NICE, 0]
    assert not comm.gave_way_for_good()
    assert niceness.of.keys() <= {0, thread}, "no other thread of this process"


def test_threads_whose_priority_cannot_come_back_give_way_for_good_only(monkeypatch, horovods_thread):
    comm, thread = horovods_thread
    niceness = Niceness(monkeypatch, may_raise=False)
    comm.give_way(True, for_good=False)
    assert niceness.of[thread] < LOWEST_NICE
    assert not comm.gave_way_for_good()
    comm.give_way(True, for_good=True)
    assert niceness.of[thread] == LOWEST_NICE
    comm.give_way(False, for_good=True)  # refused, and nothing is lost but speed
    assert niceness.of[thread] == LOWEST_NICE
    assert comm.gave_way_for_good()


def test_asking_whether_threads_gave_way_for_good_changes_none(monkeypatch, horovods_thread):
    comm, thread = horovods_thread
    niceness = Niceness(monkeypatch, may_raise=True)
    comm.give_way(True, for_good=True)
    assert not comm.gave_way_for_good()
    assert niceness.of[thread] == LOWEST_NICE


def test_a_thread_that_ended_is_no_obstacle(horovods_thread):
    comm, thread = horovods_thread
    comm._threads.add(2**30)
    comm.give_way(True, for_good=True)
    assert os.getpriority(os.PRIO_PROCESS, thread) == LOWEST_NICE


def test_a_copied_model_keeps_its_comm():
    comm = LocalComm()
    assert copy.deepcopy({"comm": comm})["comm"] is comm
