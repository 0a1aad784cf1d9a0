"""What engines keep from one call to the next: a prior's plan, and what they have made of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from fastvq._watch import Snapshot, contents_of
from fastvq.models.prior import Prior
from fastvq.sampling.engines.state import CompiledPlan
from fastvq.sampling.plan import Plan, compile_plan

T = TypeVar("T")


class Kept:
    """The last thing made of each kind. Threads that ask for one while it is made wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[str, tuple[Hashable, Any]] = {}

    def get(
        self,
        kind: str,
        key: Hashable,
        make: Callable[[], T],
        *,
        instead_of: tuple[str, ...] = (),
        also: tuple[Hashable, ...] = (),
    ) -> T:
        """What there is of a kind, or a new one where it was made for another key.

        Args:
            instead_of: kinds that hold on to what is replaced, and go with it.
            also: keys of what serves as well.
        """
        with self._lock:
            if kind not in self._made or self._made[kind][0] not in (key, *also):
                for outdated in (*instead_of, kind):
                    self._made.pop(outdated, None)  # their memory makes room
                self._made[kind] = (key, make())
            made: T = self._made[kind][1]
            return made


class Prepared(Kept):
    """A prior's plan and what engines have made of it. Everything in it is read-only once made."""

    def __init__(self, prior: Prior, weights: Snapshot) -> None:
        super().__init__()
        self.weights = weights
        self.plan, self.device = compile_plan(prior), next(prior.parameters()).device

    def compiled(self) -> CompiledPlan:
        return self.get("library rows", None, lambda: CompiledPlan(self.plan, self.device))


_LOCK = threading.Lock()
_PREPARED: weakref.WeakKeyDictionary[Prior, Prepared] = weakref.WeakKeyDictionary()


def prepared(prior: Prior) -> Prepared:
    """What is kept of a prior, made again when any of its weights has changed, in whatever way.

    Raises:
        UnavailableError: there is no plan of this prior.
    """
    _, tensors = contents_of(prior)
    found = _PREPARED.get(prior)
    # Reading all weights takes a while, in which other threads need not wait.
    if found is not None and found.weights.matches(tensors):
        return found
    with _LOCK:
        made = _PREPARED.get(prior)
        # Another thread may have been here first.
        if made is None or made is found or not made.weights.matches(tensors):
            # The snapshot is older than the plan: what is changed between the two is noticed the next time.
            with torch.no_grad():
                made = _PREPARED[prior] = Prepared(prior, Snapshot(tensors))
        return made


def plan_of(prior: Prior) -> Plan:
    """The plan of a prior as its weights are now.

    Raises:
        UnavailableError: there is no plan of this prior.
    """
    return prepared(prior).plan
