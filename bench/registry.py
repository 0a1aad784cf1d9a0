"""Who takes part: operations with what their peers share, and peers. A new peer is a file that calls :func:`peer`."""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from bench.cases import CASES, Case
from bench.harness import Check, Entry, Memory, Peer, Result, Work
from bench.machine import Ceilings

if TYPE_CHECKING:
    import pytest

Made = TypeVar("Made", bound=Callable[..., Any])


class LeftOutError(Exception):
    """Raised by a contender that cannot or should not run a case; the message says why."""


class Contender(ABC):
    """A peer at work on a problem.

    Attributes:
        name: under which it is registered, set before it is asked for anything.
        exact: False for modes that do not promise the reference's result; they are never compared with exact ones.
        whole: False for a part of the operation, timed for orientation.
        remarks: what the table should say about it.
        facts: what the file should hold about it.
    """

    name = ""
    exact = True
    whole = True

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.facts: dict[str, Any] = {}

    @abstractmethod
    def warm(self) -> list[Peer] | Entry:
        """What is to be timed, ready to run, the quickest of which counts; or what can only be extrapolated, at once.

        Raises:
            LeftOutError: it takes no part in this case.
        """

    def finish(self, entry: Entry, chosen: Peer) -> None:  # noqa: B027
        """Add what was seen during the runs of the form that counts."""


class Problem(ABC):
    """A case's data and reference, made once for all peers.

    Attributes:
        tuned: False: contenders take their first form without trying others, and run once.
        ceilings: the rates of this session.
        work: the least that has to be done.
        facts: what the file should hold about the case.
    """

    legend: tuple[str, ...] = ()

    def __init__(self, case: Any, *, tuned: bool = True, ceilings: Ceilings | None = None) -> None:
        self.case, self.tuned = case, tuned
        self.ceilings = ceilings or Ceilings()
        self.threads = torch.get_num_threads()
        self.work: list[Work] = []
        self.facts: dict[str, Any] = {}

    def measure_ceilings(self) -> None:
        """Measure rates that the floor of this case should know."""
        self.ceilings.measure_gemm()

    @abstractmethod
    def check(self, contender: Any, output: Any) -> Check:
        """Whether what the last run of an exact contender has returned is right."""

    def memory(self, contenders: Sequence[Any]) -> list[Memory]:
        """Peak memory of those for which it is to be measured."""
        return []

    def finish(self, result: Result, others: Sequence[Result]) -> None:  # noqa: B027
        """Add to a result what follows from it and from earlier ones."""


@dataclass(frozen=True)
class Registered:
    """A peer that can be made.

    Attributes:
        make: from the problem.
        requires: a module and the package that brings it, without which it is left out.
        optional: whatever it raises while it gets ready leaves it out; there may be no compiler for it.
        takes: whether it takes part in a case at all.
    """

    name: str
    make: Callable[[Any], Contender]
    requires: tuple[str, str] | None = None
    optional: bool = False
    takes: Callable[[Any], bool] = lambda case: True

    def missing(self) -> str | None:
        """Why it cannot take part, or None."""
        if self.requires is None or importlib.util.find_spec(self.requires[0]):
            return None
        return f"{self.requires[1]} is not installed"


PROBLEMS: dict[str, type[Problem]] = {}
PEERS: dict[str, dict[str, Registered]] = {}


def problem(*operations: str) -> Callable[[type[Problem]], type[Problem]]:
    """Register the class of what the peers of operations share."""

    def register(kind: type[Problem]) -> type[Problem]:
        PROBLEMS.update(dict.fromkeys(operations, kind))
        return kind

    return register


def peer(
    *operations: str,
    name: str,
    requires: tuple[str, str] | None = None,
    optional: bool = False,
    takes: Callable[[Any], bool] = lambda case: True,
) -> Callable[[Made], Made]:
    """Register what makes a contender from a problem, under a name; see :class:`Registered`."""

    def register(make: Made) -> Made:
        for operation in operations:
            PEERS.setdefault(operation, {})[name] = Registered(name, make, requires, optional, takes)
        return make

    return register


def peers_of(case: Case) -> list[str]:
    """Names of those who take part in a case, in the order in which they were registered."""
    return [name for name, one in PEERS.get(case.operation, {}).items() if one.takes(case)]


def contender(problem: Problem, name: str) -> Contender:
    """
    Raises:
        LeftOutError: a library that it needs is missing.
    """
    registered = PEERS[problem.case.operation][name]
    reason = registered.missing()
    if reason is not None:
        raise LeftOutError(reason)
    made = registered.make(problem)
    made.name = name
    return made


def test_id(case: Case, name: str) -> str:
    """How the test of a peer in a case is called."""
    return f"{case.id}-{re.sub(r'[^A-Za-z0-9.]+', '-', name)}"


def contest(*operations: str) -> pytest.MarkDecorator:
    """Parametrises a test over all cases of operations that this machine can run, and over their peers."""
    # Reports read the registry too, where tests cannot run.
    import pytest

    pairs = [(case, name) for case in runnable(operations) for name in peers_of(case)]
    return pytest.mark.parametrize(("case", "name"), pairs, ids=[test_id(case, name) for case, name in pairs])


def runnable(operations: Iterable[str]) -> list[Case]:
    """Cases of operations, those of GPUs where there is one."""
    chosen = set(operations)
    return [c for c in CASES if c.operation in chosen and (c.device == "cpu" or torch.cuda.is_available())]
