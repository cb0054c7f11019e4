"""Collectives among workers that change: one Comm through all generations of an elastic job."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence

from torch import Tensor

from horoyolo.distributed.comm import Comm, Handle, HorovodComm, LocalComm, Op, import_horovod, initialise
from horoyolo.elastic.member import Member, Place

DEFAULT_CYCLE_MS = 1.0  # Horovod's


def set_one_of_two(env: MutableMapping[str, str], cycle_time_ms: float) -> None:
    """Leaves Horovod either its cycle time or its fusion threshold; nothing is fused with either.

    Horovod 0.28.1 crashes when it is initialised again with both given: it writes to a vector of what is left to tune, which is empty then
    (ParameterManager::BayesianParameter::SetValue). With the cycle time alone its fusion threshold is 128 MB in a process's first generation
    and 1 MB in later ones (the default cycle time lands in its place), so that newcomers and survivors would not fuse the same, which ends the
    generation, and among three workers sums would depend on what is on its way at the same time. HOROVOD_DISABLE_GROUP_FUSION keeps groups
    apart, and makes a group of each single allreduce and allgather (EnqueueTensorAllreduces); Horovod fuses no others.
    """
    if cycle_time_ms != DEFAULT_CYCLE_MS:
        env.setdefault("HOROVOD_CYCLE_TIME", str(cycle_time_ms))
    if "HOROVOD_CYCLE_TIME" in env:
        env.pop("HOROVOD_FUSION_THRESHOLD", None)
        env["HOROVOD_DISABLE_GROUP_FUSION"] = "1"


class ElasticComm(Comm):
    """The workers of the present generation; between generations there is nobody to talk to.

    Horovod reads its environment anew each time it is initialised. A generation of one needs no Horovod. ``cycle_time_ms`` as in ``open_comm``.
    """

    def __init__(self, member: Member, cycle_time_ms: float = DEFAULT_CYCLE_MS) -> None:
        self._member = member
        self._cycle_time_ms = cycle_time_ms
        self._now: Comm | None = None

    def join(self, place: Place) -> None:
        """Takes this worker's place in a generation; all its workers do so together.

        Where one of them dies meanwhile, Horovod aborts this process: save first what must not be lost.
        """
        os.environ.update(place.env)
        with self._member.phase("start"), self._member.joining():  # among hundreds of workers that takes longer than a step
            if place.size == 1:
                self._now = LocalComm()
            else:
                hvd = import_horovod(place.size)
                set_one_of_two(os.environ, self._cycle_time_ms)
                threads = initialise(hvd)
                self._now = HorovodComm(hvd, threads=threads, waiting=lambda: self._member.phase("wait"), is_stuck=self._member.is_stuck)

    def leave(self) -> None:
        """Ends the generation for this worker. When it returns nothing of it reads or writes this worker's memory any more.

        Where the generation is broken it may not return but abort this process: save first what must not be lost.
        """
        if self._now is not None:
            with self._member.leaving_generation():
                self._now.close()
            self._now = None
        self._member.left()

    @property
    def _comm(self) -> Comm:
        if self._now is None:
            raise RuntimeError("a collective between two generations")
        return self._now

    def rank(self) -> int:
        return self._comm.rank()

    def size(self) -> int:
        return self._comm.size()

    def local_rank(self) -> int:
        return self._comm.local_rank()

    def local_size(self) -> int:
        return self._comm.local_size()

    def allreduce_async(self, tensor: Tensor, name: str, op: Op = "sum") -> Handle:
        return self._comm.allreduce_async(tensor, name, op)

    def allgather_async(self, tensor: Tensor, name: str) -> Handle:
        return self._comm.allgather_async(tensor, name)

    def alltoall_async(self, tensor: Tensor, splits: Sequence[int], name: str) -> Handle:
        return self._comm.alltoall_async(tensor, splits, name)

    def broadcast_async(self, tensor: Tensor, name: str, root: int = 0) -> Handle:
        return self._comm.broadcast_async(tensor, name, root)

    def group(self, ranks: Sequence[int]) -> Comm:
        return self._comm.group(ranks)

    def give_way(self, wanted: bool, for_good: bool) -> None:
        self._comm.give_way(wanted, for_good)

    def gave_way_for_good(self) -> bool:
        return self._comm.gave_way_for_good()

    def close(self) -> None:
        self.leave()
