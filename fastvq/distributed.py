"""The processes that train one model together, if there are any.

Whatever starts them says so in the environment: torchrun, accelerate and Ray Train set RANK, WORLD_SIZE and LOCAL_RANK,
``srun`` sets its own variables. A program that has called ``torch.distributed.init_process_group`` keeps its group.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastvq._files import first_line
from fastvq._shards import Shard
from fastvq.errors import ArgumentError, PeerError, UnavailableError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

# For one process to wait for another, which may be writing a picture or a checkpoint.
_PATIENCE = timedelta(minutes=30)
_UNTIL_IDLE = 0.2
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# SLURM_NTASKS is set in a batch script too, which is one process.
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_by_itself = contextvars.ContextVar("_by_itself", default=False)


@dataclass(frozen=True)
class Group:
    """Processes that do the same, each with its share of the data; by default this process alone.

    Every method is called by all of them, in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        local_rank: number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    # Carries tensors of the CPU; None for the default group.
    _control: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of ``count`` items; the parts of all processes, in order, are all items."""
        part = Shard(self.rank, self.size).range(count)
        return slice(part.start, part.stop)

    def turns(self, items: Sequence[T]) -> Sequence[T]:
        """Those of some ``items``, dealt one by one, that are this process's."""
        return items[self.rank :: self.size]

    def sum(self, values: Iterable[float]) -> list[float]:
        """``values`` added over processes, in float64; the same on each of them.

        Raises:
            PeerError: another process has ended.
        """
        if self.size == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64)
        with _peers_alive():
            dist.all_reduce(total, group=self._control)
        found: list[float] = total.tolist()
        return found

    def from_first(self, value: T) -> T:
        """The ``value`` that the first process passed.

        Raises:
            PeerError: another process has ended.
        """
        if self.size == 1:
            return value
        box = [value]
        with _peers_alive():
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Give ``tensors`` on all processes the values that they have on the first one, in place.

        Raises:
            PeerError: another process has ended.
        """
        if self.size > 1:
            with _peers_alive():
                for tensor in tensors:
                    dense = tensor.detach().contiguous()
                    dist.broadcast(dense, src=0)
                    tensor.detach().copy_(dense)

    def agree(self, error: Exception | None = None, *, flag: int = 0) -> int:
        """Wait for all processes; returns the largest flag.

        Args:
            error: with which this process has come, to be raised on all of them.
            flag: an integer that is compared.

        Raises:
            PeerError: another process has come with an error; says which and what.
            Exception: the error that this process has come with.
        """
        if self.size > 1:
            state = torch.tensor([error is not None, flag], dtype=torch.int64)
            with _peers_alive():
                dist.all_reduce(state, dist.ReduceOp.MAX, group=self._control)
                failed, flag = state.tolist()
                if failed:
                    words: list[str | None] = [None] * self.size
                    dist.all_gather_object(words, None if error is None else _words(error), group=self._control)
                    error = error or _of_peer(words)
                    # The first process says it for all of them.
                    error.__dict__["said"] = not self.first
        if error is not None:
            raise error
        return flag

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work that each process does by itself: if it fails on one of them, it ends with an error on all.

        Raises:
            PeerError: another process has failed.
            Exception: the error of this one.
        """
        try:
            yield
        except Exception as error:
            self.agree(error)
        else:
            self.agree()


@contextlib.contextmanager
def join() -> Iterator[Group]:
    """The group that this process belongs to; one that is made here, from the environment, ends with the block.

    Raises:
        ArgumentError: the environment says half of it, or what is no number.
        UnavailableError: the others cannot be reached.
    """
    if _by_itself.get():
        yield Group()
        return
    if dist.is_available() and dist.is_initialized():
        yield _of_torch()
        return
    place = _described()
    if place is None:
        yield Group()
        return
    from torch.distributed.distributed_c10d import PrefixStore

    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=PrefixStore(f"fastvq{next(_made)}", _meeting(place)),
            rank=place.rank,
            world_size=place.size,
            timeout=_PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        raise UnavailableError(
            f"process {place.rank} of {place.size} cannot reach the others at {place.address}: {first_line(error)}"
        ) from error
    try:
        yield _of_torch(place.local_rank)
    finally:
        # Threads of gloo let go of a collective's tensors after it has returned, for which they need Python's lock, and
        # who destroys the group waits for the threads with that lock in hand.
        time.sleep(_UNTIL_IDLE)
        dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process belongs to no group, whatever it belongs to outside."""
    token = _by_itself.set(True)
    try:
        yield
    finally:
        _by_itself.reset(token)


class _Place(NamedTuple):
    rank: int
    size: int
    local_rank: int
    address: str


# Groups made by this process. All processes of a group make the same ones, and each is told from those before it.
_made = itertools.count()


@functools.cache
def _meeting(place: _Place) -> Store:
    """Where processes find each other: kept for all groups, as some may meet for the next one while others still leave
    the last.
    """
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous(place.address, place.rank, place.size, timeout=_PATIENCE))[0]
    return store


def _described() -> _Place | None:
    """What the environment says of the group; None if there is one process."""
    for names in (_TORCHRUN, _SLURM):
        if names[0] in os.environ and names[1] in os.environ:
            rank, size, local_rank = (_number(name) for name in names)
            if size < 2:
                return None
            if not 0 <= rank < size:
                raise ArgumentError(f"{names[0]}: expected 0..{size - 1}, as {names[1]} is {size}, got {rank}")
            return _Place(rank, size, local_rank, _address(names is _SLURM))
    return None


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdecimal():
        raise ArgumentError(f"{name}: expected a number in this variable of the environment, got {text!r}")
    return int(text)


def _address(slurm: bool) -> str:
    """Where the processes meet."""
    missing = [name for name in _ADDRESS if name not in os.environ]
    if not missing:
        return "env://"
    if not slurm:
        raise ArgumentError(
            f"{' and '.join(missing)}: expected in the environment beside RANK and WORLD_SIZE; torchrun sets all four"
        )
    nodes = os.environ.get("SLURM_STEP_NODELIST", "localhost")
    host = os.environ.get("MASTER_ADDR", first_host(nodes))
    # All processes of a job step compute the same one; steps of other jobs on a machine get others.
    port = 20000 + (_number("SLURM_JOB_ID") * 64 + _number("SLURM_STEP_ID")) % 20000
    return f"tcp://{host}:{os.environ.get('MASTER_PORT', port)}"


def first_host(nodes: str) -> str:
    """The first of the machines ``nodes`` in SLURM's notation: ``gpu[003-005,9],login`` begins with gpu003."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    return nodes if found is None else "".join(part or "" for part in found.groups())


def _of_torch(local_rank: int | None = None) -> Group:
    """torch.distributed's group, with one beside it where that carries no tensors of the CPU."""
    local_rank = _number("LOCAL_RANK") if local_rank is None else local_rank
    control = None if "gloo" in dist.get_backend_config() else dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Group(dist.get_rank(), dist.get_world_size(), local_rank, control)


@contextlib.contextmanager
def _peers_alive() -> Iterator[None]:
    """What torch.distributed raises where another process has ended, as an error without a traceback."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"another process of the group has ended or cannot be reached: {first_line(error)}") from error


def _of_peer(words: Sequence[str | None]) -> PeerError:
    rank, text = next((rank, text) for rank, text in enumerate(words) if text is not None)
    return PeerError(text, rank)


def _words(error: Exception) -> str:
    name = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return "\n".join([f"{name}{error}", *getattr(error, "__notes__", ())])
