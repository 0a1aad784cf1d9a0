"""What an engine is: something that fills grids of codes for a prior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from fastvq._evaluation import in_evaluation
from fastvq.errors import ArgumentError
from fastvq.models.prior import Prior
from fastvq.sampling.engines.phases import OnPhase
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.plan.form import Plan
from fastvq.sampling.plan.front import Front
from fastvq.sampling.request import SampleRequest

P = TypeVar("P")
RowDone = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Schedule:
    """In which order a micro-batch is filled, and what that keeps in memory.

    Attributes:
        front: the order, with the width of tiles.
        reason: why tiles of that width.
        weight_bytes: of the plan and its packed copies.
        cache_bytes: of the micro-batch.
    """

    front: Front
    reason: str
    weight_bytes: int
    cache_bytes: int

    @property
    def memory(self) -> int:
        """Bytes that sampling takes beyond the prior itself."""
        return self.weight_bytes + self.cache_bytes


class Engine(ABC, Generic[P]):
    """One way of filling grids. An object of it in :data:`fastvq.sampling.engines.ENGINES` makes it known.

    Attributes:
        name: what callers ask for it by.
        precisions: of the weights in its step phase.
        plans: whether it runs a plan of the prior, with a row phase before the steps of each row, instead of the
            prior's modules. Priors of which there is no plan are refused before it is asked.
        cuda_graphs: whether it can record a grid as a CUDA graph.
        row_kernels: whether there is a choice of what computes its row phase.
        tiles: whether it samples along a front, so that there is a choice of its tiles.
        micro_batch: most samples that it computes together unless told otherwise.
        exact: whether the bits of a sample do not depend on what is computed with it, where it is not :meth:`padded`.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    plans: ClassVar[bool] = False
    cuda_graphs: ClassVar[bool] = False
    row_kernels: ClassVar[bool] = False
    tiles: ClassVar[bool] = False
    micro_batch: ClassVar[int] = 64
    exact: ClassVar[bool] = False

    def why_not(self, prior: Prior, device: torch.device) -> str | None:
        """Why it cannot run a prior that is on a device, or None."""
        return None

    def padded(self, plan: Plan, options: EngineOptions) -> bool:
        """Whether bits depend on how many samples are computed together, so that a plan has to have the same number."""
        return False

    def schedule(self, plan: Plan, batch: int, options: EngineOptions) -> Schedule:
        """How grids of a plan are filled, of engines that run plans.

        Raises:
            ArgumentError: options that do not fit the plan.
        """
        raise NotImplementedError

    def check(self, options: EngineOptions, device: torch.device | None = None) -> None:
        """Refuse options, other than the precision, that it does not have and would pass over in silence.

        Args:
            device: of the prior; with it, what is not available there is refused as well.

        Raises:
            ArgumentError: there is such an option.
        """
        if options.row_kernel is not None and not self.row_kernels:
            raise ArgumentError(f"row_kernel: only the cuda engine has a choice, the engine here is {self.name!r}")
        if options.tile is not None and not self.tiles:
            raise ArgumentError(f"tile: the {self.name} engine does not sample along a front, got {options.tile}")
        if options.cuda_graph and not self.cuda_graphs:
            raise ArgumentError(f"cuda_graph: only the cuda engine has one, the engine here is {self.name!r}")

    def evaluated(self, prior: Prior) -> Prior:
        """The prior in evaluation mode, as far as the engine runs its modules: a plan has all but the context in it."""
        return in_evaluation(prior, only="context_encoder" if self.plans else None)

    @abstractmethod
    def prepare(self, prior: Prior, batch: int, options: EngineOptions) -> P:
        """What does not depend on the request, for this many samples: kept by the engine where it can be used again.

        Raises:
            ArgumentError: weights that are not finite.
        """

    @abstractmethod
    def fill(
        self, prepared: P, prior: Prior, request: SampleRequest, row_done: RowDone, on_phase: OnPhase | None
    ) -> Tensor:
        """Fill the grids of a request: int64 [n, H, W].

        Args:
            prior: in evaluation mode, see :meth:`evaluated`.
            row_done: to call with the number of rows, from the top, that have become complete in all samples since
                the last call, and the grids [n, H, W] that these rows can be read from. What it raises ends the grid.
            on_phase: see :func:`fastvq.sampling.engines.fill`.
        """
