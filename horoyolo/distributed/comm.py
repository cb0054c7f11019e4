"""How workers talk: one interface, ``LocalComm`` for a single process and ``HorovodComm`` for many.

Rank and size are methods, not attributes: they change when the job is resized, so nobody should keep them.
"""

from __future__ import annotations

import ipaddress
import os
import pickle
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from horoyolo.config import InputError

Op = Literal["sum", "max"]
REST_S, LONGEST_REST_S = 5e-5, 1e-3  # sleeps between two looks at a collective under way: the first, and when it takes long
LOWEST_NICE = 19  # Linux gives such a thread a 68th of what others get of a core that they want too
REDUCIBLE = (torch.float32, torch.float64, torch.float16, torch.int32, torch.int64)


class CommBroken(RuntimeError):
    """A collective failed: a worker or the way to it is gone. None may follow before communication was closed and begun anew.

    What was handed to collectives must be left alone until it is closed: the network may still write there.
    """


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Return the result when it is there; call it once (CommBroken: it failed)."""


class Done:
    """The handle of a collective that had nothing to wait for."""

    def __init__(self, result: Any):
        self._result = result

    def wait(self) -> Any:
        return self._result


class Comm(ABC):
    """Collectives over the workers of a job; every worker must call the same ones.

    ``name`` pairs up the calls of different workers. Asynchronous calls may leave in a different order on different workers, so each needs
    a name of its own while it is under way. Blocking calls are named after their kind unless told otherwise: workers that fell out of step
    then meet each other's tensor and fail on its shape, instead of waiting for ever. Names that come back every step also let Horovod skip
    their negotiation.
    """

    @abstractmethod
    def rank(self) -> int:
        """Which worker this is, from 0."""

    @abstractmethod
    def size(self) -> int:
        """How many workers there are."""

    @abstractmethod
    def local_rank(self) -> int:
        """Which of this host's workers this is, from 0."""

    @abstractmethod
    def local_size(self) -> int:
        """How many workers this host has."""

    @abstractmethod
    def allreduce_async(self, tensor: Tensor, name: str, op: Op = "sum") -> Handle:
        """Start replacing ``tensor`` by its sum or maximum over workers, in place; it must not be touched before ``wait`` gives it back.

        Raises TypeError for a dtype that has no sum on the wire (bfloat16, bytes): send those with ``allgather`` or ``alltoall``.
        """

    @abstractmethod
    def allgather_async(self, tensor: Tensor, name: str) -> Handle:
        """Start gathering every worker's rows in rank order, any dtype; workers may have different numbers of rows, or none."""

    @abstractmethod
    def alltoall_async(self, tensor: Tensor, splits: Sequence[int], name: str) -> Handle:
        """Start sending the next ``splits[r]`` rows to each rank r; gives the rows received and how many came from each rank."""

    @abstractmethod
    def broadcast_async(self, tensor: Tensor, name: str, root: int = 0) -> Handle:
        """Start replacing ``tensor`` by that of worker ``root``, in place, any dtype."""

    @abstractmethod
    def group(self, ranks: Sequence[int]) -> Comm:
        """A Comm over some of the workers; all workers call it, in the same order, and only members use the result."""

    @abstractmethod
    def give_way(self, wanted: bool, for_good: bool) -> None:
        """Whether what moves bytes in the background is to take only the time that computing leaves; at first it is not.

        A matter of this worker alone. What is not ``for_good`` is left undone where the system would not let this user take it back.
        """

    @abstractmethod
    def gave_way_for_good(self) -> bool:
        """Whether this worker has given way and cannot take it back: what is to move beside computing is starved from now on."""

    @abstractmethod
    def close(self) -> None:
        """End communication; no collective may follow."""

    def allreduce(self, tensor: Tensor, op: Op = "sum", name: str | None = None) -> Tensor:
        """Sum or maximum of ``tensor`` over workers, in place; see ``allreduce_async``."""
        return self.allreduce_async(tensor, name or f"allreduce.{op}", op).wait()

    def allgather(self, tensor: Tensor, name: str | None = None) -> Tensor:
        """Every worker's rows in rank order; see ``allgather_async``."""
        return self.allgather_async(tensor, name or "allgather").wait()

    def alltoall(self, tensor: Tensor, splits: Sequence[int], name: str | None = None) -> tuple[Tensor, list[int]]:
        """Rows exchanged between all pairs of workers; see ``alltoall_async``."""
        return self.alltoall_async(tensor, splits, name or "alltoall").wait()

    def broadcast(self, tensor: Tensor, root: int = 0, name: str | None = None) -> Tensor:
        """``tensor`` of worker ``root``, in place; see ``broadcast_async``."""
        return self.broadcast_async(tensor, name or "broadcast", root).wait()

    def barrier(self) -> None:
        """Return when all workers have come here."""
        self.allreduce(torch.zeros(1), name="barrier")

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """What worker ``root`` gave, pickled; the other workers' ``obj`` is ignored."""
        data = _to_bytes(obj) if self.rank() == root else torch.empty(0, dtype=torch.uint8)
        num_bytes = self.broadcast(torch.tensor([len(data)]), root, "broadcast_object.size")
        if self.rank() != root:
            data = torch.empty(int(num_bytes), dtype=torch.uint8)
        return _from_bytes(self.broadcast(data, root, "broadcast_object.bytes"))

    def allgather_object(self, obj: Any) -> list[Any]:
        """What every worker gave, pickled, in rank order."""
        data = _to_bytes(obj)
        sizes = self.allgather(torch.tensor([len(data)]), "allgather_object.size")
        chunks = self.allgather(data, "allgather_object.bytes").split(sizes.tolist())
        return [_from_bytes(chunk) for chunk in chunks]

    def __deepcopy__(self, memo: dict) -> Comm:
        return self  # modules hold a Comm; a copied model still talks over the same wires


class LocalComm(Comm):
    """One process that is all the workers there are: every collective returns at once and Horovod is not needed."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1

    def local_rank(self) -> int:
        return 0

    def local_size(self) -> int:
        return 1

    def allreduce_async(self, tensor: Tensor, name: str, op: Op = "sum") -> Handle:
        _check_reducible(tensor)
        return Done(tensor)

    def allgather_async(self, tensor: Tensor, name: str) -> Handle:
        return Done(tensor.clone())

    def alltoall_async(self, tensor: Tensor, splits: Sequence[int], name: str) -> Handle:
        _check_splits(tensor, splits, 1)
        return Done((tensor.clone(), list(splits)))

    def broadcast_async(self, tensor: Tensor, name: str, root: int = 0) -> Handle:
        return Done(tensor)

    def group(self, ranks: Sequence[int]) -> Comm:
        if list(ranks) != [0]:
            raise ValueError(f"a group of ranks {list(ranks)} among one worker: only [0] exists")
        return self

    def give_way(self, wanted: bool, for_good: bool) -> None:
        pass

    def gave_way_for_good(self) -> bool:
        return False

    def close(self) -> None:
        pass


class HorovodComm(Comm):
    """The workers of an initialised Horovod, or some of them (a process set).

    ``threads`` are those that ``initialise`` started; ``waiting`` gives the context that a wait for other workers runs in; ``is_stuck`` tells
    when to wait no longer. What GPUs hold goes through the CPU where Horovod was built without them: it takes such tensors all the same, and fails
    in its own thread, where nobody hears of it.
    """

    def __init__(
        self,
        hvd: Any,
        process_set: Any = None,
        threads: Set[int] = frozenset(),
        waiting: Callable[[], AbstractContextManager] = nullcontext,
        is_stuck: Callable[[], bool] = lambda: False,
    ):
        from horovod.common.exceptions import HorovodInternalError

        self._hvd = hvd
        self._failure = HorovodInternalError
        self._threads, self._gives_way = threads, False
        self._waiting, self._is_stuck = waiting, is_stuck
        self._knows_gpus = bool(hvd.cuda_built() or hvd.rocm_built())
        self._set = process_set or hvd.global_process_set
        self._prefix = f"set{process_set.process_set_id}." if process_set else ""

    def rank(self) -> int:
        return self._set.rank()

    def size(self) -> int:
        return self._set.size()

    def local_rank(self) -> int:
        return self._hvd.local_rank()

    def local_size(self) -> int:
        return self._hvd.local_size()

    def allreduce_async(self, tensor: Tensor, name: str, op: Op = "sum") -> Handle:
        _check_reducible(tensor)
        wire = self._on_wire(tensor)
        reduction = {"sum": self._hvd.Sum, "max": self._hvd.Max}[op]
        return self._started(lambda _: _stored(wire, tensor), self._hvd.allreduce_async_, wire, name=name, op=reduction)

    def allgather_async(self, tensor: Tensor, name: str) -> Handle:
        row_shape = tensor.shape[1:]
        rows = _rows_as_bytes(self._on_wire(tensor))
        return self._started(lambda rows: _rows_from_bytes(rows, tensor, row_shape), self._hvd.allgather_async, rows, name=name)

    def alltoall_async(self, tensor: Tensor, splits: Sequence[int], name: str) -> Handle:
        _check_splits(tensor, splits, self.size())
        row_shape = tensor.shape[1:]
        splits_tensor = torch.tensor(splits, dtype=torch.int32)
        rows = _rows_as_bytes(self._on_wire(tensor))

        def finish(received: tuple[Tensor, Tensor]) -> tuple[Tensor, list[int]]:
            return _rows_from_bytes(received[0], tensor, row_shape), received[1].tolist()

        return self._started(finish, self._hvd.alltoall_async, rows, splits_tensor, name=name)

    def broadcast_async(self, tensor: Tensor, name: str, root: int = 0) -> Handle:
        wire = self._on_wire(tensor)
        global_root = self._set.ranks[root] if self._prefix else root  # Horovod numbers roots over the whole job
        return self._started(lambda _: _stored(wire, tensor), self._hvd.broadcast_async_, _as_bytes(wire), global_root, name=name)

    def group(self, ranks: Sequence[int]) -> Comm:
        return HorovodComm(self._hvd, self._hvd.add_process_set(list(ranks)), self._threads, self._waiting, self._is_stuck)

    def give_way(self, wanted: bool, for_good: bool) -> None:
        if wanted == self._gives_way or (wanted and not self._can_raise and not for_good):
            return
        if _set_nice(self._threads, LOWEST_NICE if wanted else os.getpriority(os.PRIO_PROCESS, 0)):
            self._gives_way = wanted

    def gave_way_for_good(self) -> bool:
        return self._gives_way and not self._can_raise

    @cached_property
    def _can_raise(self) -> bool:
        """Whether this user may give a thread its priority back. Asked by trying, before any gave way: limits and namespaces have a say in it."""
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        return _set_nice(self._threads, nice + 1) and _set_nice(self._threads, nice)

    def close(self) -> None:
        self._hvd.shutdown()

    def _on_wire(self, tensor: Tensor) -> Tensor:
        """``tensor``, or its contiguous copy, where Horovod can take it from."""
        return tensor.contiguous() if self._knows_gpus else tensor.contiguous().cpu()

    def _started(self, finish: Callable[[Any], Any], start: Callable[..., int], *args: Any, name: str, **options: Any) -> Handle:
        """The handle of a collective, begun by ``start``, whose outcome goes through ``finish``."""
        try:
            handle = start(*args, name=self._prefix + name, process_set=self._set, **options)
        except self._failure as error:
            raise CommBroken(f"{name}: {error}") from error

        def wait() -> Any:
            with self._waiting():
                # Horovod's own wait yields its core in a loop. Where every core has a worker, that takes it from the threads that move the bytes:
                # an exchange took twice as long. Sleeping a twentieth of what has passed ends it hardly later.
                started_s = time.perf_counter()
                while not self._hvd.poll(handle):
                    if self._is_stuck():
                        raise CommBroken(f"{name}: it does not end, though its connections have")
                    passed_s = time.perf_counter() - started_s
                    time.sleep(min(max(REST_S, passed_s / 20), LONGEST_REST_S))
                try:
                    outcome = self._hvd.synchronize(handle)
                except self._failure as error:
                    raise CommBroken(f"{name}: {error}") from error
            return finish(outcome)

        return _HorovodHandle(wait)


class _HorovodHandle:
    def __init__(self, wait: Callable[[], Any]):
        self.wait = wait


def open_comm(cycle_time_ms: float = 1.0) -> Comm:
    """The Comm of this process: over Horovod when the environment says that there are several workers (horovodrun, mpirun, srun), else
    local.

    Horovod's background thread looks for work every ``cycle_time_ms``: a wait for each collective, and a disturbance when there is none. The
    environment's HOROVOD_CYCLE_TIME goes before it.

    Raises InputError when several workers were started and Horovod is missing, can't start here, or sees a different number of them.
    """
    size = num_workers(os.environ)
    if size == 1:
        return LocalComm()
    hvd = import_horovod(size)
    os.environ.setdefault("HOROVOD_CYCLE_TIME", str(cycle_time_ms))
    threads = initialise(hvd)
    if hvd.size() != size:
        seen = hvd.size()
        hvd.shutdown()
        raise InputError(f"the launcher started {size} workers but Horovod sees {seen}: start them by horovodrun, or by Horovod's own MPI")
    return HorovodComm(hvd, threads=threads)


def initialise(hvd: Any) -> set[int]:
    """Initialises Horovod; gives the system's numbers of the threads it started, none where the system does not tell."""
    before = _own_threads()
    hvd.init()
    return _own_threads() - before


def sums_by_nccl() -> bool:
    """Whether the Horovod of this process moves what GPUs hold by NCCL, which wants one for each worker."""
    try:
        import horovod.torch as hvd
    except ImportError:
        return False
    return bool(hvd.nccl_built())


def _set_nice(threads: Set[int], nice: int) -> bool:
    """Sets the priority of those threads that still run; gives whether that was allowed."""
    for thread in threads & _own_threads():
        try:
            os.setpriority(os.PRIO_PROCESS, thread, nice)
        except ProcessLookupError:
            continue  # it ended just now
        except PermissionError:  # without CAP_SYS_NICE users can lower a priority only
            return False
    return True


def _own_threads() -> set[int]:
    tasks = Path("/proc/self/task")
    return {int(task.name) for task in tasks.iterdir()} if tasks.exists() else set()


def import_horovod(size: int) -> Any:
    """Horovod, not initialised yet, with an environment that suits it (InputError: it is missing, or can't start here)."""
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise InputError(f"{size} workers were started without Horovod ({error}): run scripts/setup.sh, or start one worker") from error
    check_own_name(os.environ)
    # Buckets are large and fixed already: fusing them by arrival would cost a copy and make the order of sums depend on timing.
    os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    return hvd


def check_own_name(env: Mapping[str, str]) -> None:
    """Raises InputError when Gloo can't use what this host's name means on it, be it among workers of this host or of several."""
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in env:
        size = env.get("HOROVOD_SIZE", "1")
        look_up_own_name(several_hosts=int(size) > int(env.get("HOROVOD_LOCAL_SIZE", size)))


def look_up_own_name(several_hosts: bool) -> None:
    """Raises InputError when this host's name is unknown on it or, among ``several_hosts``, means itself alone.

    Horovod 0.28.1 tells Gloo the interface for its own talk alone. For tensors Gloo looks up the host's name: it crashes where nobody knows that, and
    gives the workers of other hosts the first address, which Debian has as 127.0.1.1.
    """
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        raise InputError(f"the name of this host, {name}, does not resolve on it: add `ADDRESS {name}` to its /etc/hosts") from None
    if several_hosts and ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise InputError(
            f"the name of this host, {name}, resolves to {address} on it, where no worker of another host reaches it: its /etc/hosts must have "
            f"`ADDRESS {name}`, and {name} on no line of 127.0.0.1, 127.0.1.1 or ::1"
        )


def num_workers(env: Mapping[str, str]) -> int:
    """How many workers the launcher of this process says it started; 1 when there was none.

    The innermost launcher is asked first: horovodrun may itself run in a step of mpirun or Slurm. Slurm's count of the step is set by srun
    alone, where that of the job is set in a batch script too, which is one process.
    """
    for variable in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if variable in env:
            try:
                return max(1, int(env[variable]))
            except ValueError as error:
                raise InputError(f"{variable}={env[variable]!r} in the environment: a number of workers would be right") from error
    return 1


def broadcast_tensors(tensors: Iterable[Tensor], comm: Comm, root: int = 0) -> None:
    """Replace all ``tensors`` (a model's parameters and buffers, say) by those of worker ``root``, in place, in one broadcast a dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    for group in by_dtype.values():
        flat = comm.broadcast(torch.cat([tensor.reshape(-1) for tensor in group]), root)
        for tensor, values in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(values.view(tensor.shape))


def _check_reducible(tensor: Tensor) -> None:
    if tensor.dtype not in REDUCIBLE:
        raise TypeError(f"allreduce of {tensor.dtype}: Horovod sums {', '.join(map(str, REDUCIBLE))} only")


def _check_splits(tensor: Tensor, splits: Sequence[int], size: int) -> None:
    if len(splits) != size or sum(splits) != len(tensor):
        raise ValueError(f"alltoall of {len(tensor)} rows in parts {list(splits)}: {size} parts that add up to the rows are needed")


def _stored(wire: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` with the values of what was sent in its place; nothing to do where no copy was needed."""
    return tensor if wire is tensor else tensor.copy_(wire)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as uint8, which Horovod carries for every dtype."""
    return tensor.detach().view(-1).view(torch.uint8)


def _rows_as_bytes(tensor: Tensor) -> Tensor:
    """(rows, ...) of any dtype, contiguous, as (rows, bytes of a row): Horovod refuses some dtypes but carries bytes."""
    row_bytes = tensor.shape[1:].numel() * tensor.element_size()
    return _as_bytes(tensor).view(len(tensor), row_bytes)


def _rows_from_bytes(rows: Tensor, like: Tensor, row_shape: torch.Size) -> Tensor:
    """Rows of the dtype, and on the device, of a tensor."""
    return rows.reshape(-1).view(like.dtype).view(len(rows), *row_shape).to(like.device)


def _to_bytes(obj: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())
