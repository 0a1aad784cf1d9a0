"""Whether logits depend on codes that are not known when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvq._evaluation import in_evaluation
from fastvq.errors import ArgumentError, CausalityError
from fastvq.models.prior import Prior

Place = tuple[int, int]

# A grid of this many positions or fewer is gone through whole.
ALL = 256
CHOSEN = 64
# Grids that run together, and of the largest logit what may be rounding.
_TOGETHER = 32
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Leak:
    """Logits at ``logits`` (row, column) move with the code at ``code``, which comes there or later."""

    logits: Place
    code: Place

    def __str__(self) -> str:
        return f"logits at row {self.logits[0]}, column {self.logits[1]} depend on the code {_relation(self)}"


def _relation(leak: Leak) -> str:
    if leak.logits == leak.code:
        return "at that position itself"
    return f"at row {leak.code[0]}, column {leak.code[1]}, which comes later"


@dataclass(frozen=True)
class CausalReport:
    """What :func:`check_causal` found.

    Attributes:
        leaks: some of each code that leaks, first codes first; none where all is well.
        checked, positions: codes that were changed, and codes of a grid.
        moved: whether any logits moved at all.
    """

    leaks: tuple[Leak, ...]
    checked: int
    positions: int
    moved: bool = True

    @property
    def ok(self) -> bool:
        """Whether there are no leaks."""
        return not self.leaks

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        many = f"{self.checked} of {self.positions} codes changed"
        if not self.moved:
            return f"no logits depend on any code, as if its last layer were zero: {many}"
        if self.ok:
            return f"causal: {many}, no logits moved that come before or at them"
        shown = "; ".join(str(leak) for leak in self.leaks[:3])
        more = f"; and {len(self.leaks) - 3} more" if len(self.leaks) > 3 else ""
        return f"not causal: {shown}{more} ({many})"

    def require(self) -> None:
        """There must be no leaks.

        Raises:
            CausalityError: there are some.
        """
        if not self.ok:
            raise CausalityError(f"prior: {self}")


def find_leaks(prior: Prior, places: Sequence[int], *, seed: int = 0) -> CausalReport:
    """Change the code at each of these places, and all codes from there on, and see which logits move.

    Args:
        places: in raster order, 0..H*W-1.
    """
    height, width = prior.config.shape
    count, positions = prior.config.num_codes, height * width
    if count < 2:
        return CausalReport((), len(places), positions)
    logits = _logits_of(prior, seed)
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(count, (positions,), generator=generator)
    other = (base + torch.randint(1, count, (positions,), generator=generator)) % count
    leaks: list[Leak] = []
    any_moved = False
    for first in range(0, len(places), _TOGETHER // 2):
        some = list(places[first : first + _TOGETHER // 2])
        grids = base.repeat(2 * len(some) + 1, 1)
        for entry, at in enumerate(some):
            grids[2 * entry + 1, at] = other[at]
            grids[2 * entry + 2, at:] = other[at:]
        found = logits(grids.view(-1, height, width)).flatten(2)  # [N, K, positions]
        moved = (found[1:] - found[:1]).abs().amax(1) > _ROUNDING * found.abs().max().clamp(min=1e-30)
        any_moved = any_moved or bool(moved.any())
        if not bool(found.isfinite().all()):
            raise ArgumentError("prior: its logits hold NaN or infinite values")
        for entry, at in enumerate(some):
            single, rest = (moved[2 * entry + i, : at + 1].nonzero().flatten().tolist() for i in (0, 1))
            if single:
                leaks.append(Leak(divmod(single[0], width), divmod(at, width)))
            elif rest and not leaks:
                code = _culprit(logits, base, other, rest[0], at, (height, width))
                leaks.append(Leak(divmod(rest[0], width), divmod(code, width)))
    last_alone = list(places) == [positions - 1]
    return CausalReport(tuple(dict.fromkeys(leaks)), len(places), positions, any_moved or last_alone)


def _culprit(logits: Callable[[Tensor], Tensor], base: Tensor, other: Tensor, at: int, first: int, grid: Place) -> int:
    """The first code from a place on with which logits move, with all those before it changed as well."""
    low, high = first, len(base) - 1
    while low < high:
        middle = (low + high) // 2
        changed = base.clone()
        changed[first : middle + 1] = other[first : middle + 1]
        both = logits(torch.stack([base, changed]).view(-1, *grid)).flatten(2)[:, :, at]
        if bool((both[1] - both[0]).abs().max() > _ROUNDING * both.abs().max()):
            high = middle
        else:
            low = middle + 1
    return low


def _logits_of(prior: Prior, seed: int) -> Callable[[Tensor], Tensor]:
    """Logits of grids, all of them for the same condition and label."""
    config, generator = prior.config, torch.Generator().manual_seed(seed + 1)
    first = next(prior.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    shapes = zip(config.condition_num_codes, config.condition_shapes, strict=True)
    condition = [torch.randint(count, (1, *shape), generator=generator).to(device) for count, shape in shapes]
    classes = config.num_classes
    label = None if classes is None else torch.randint(classes, (1,), generator=generator).to(device)
    evaluated = in_evaluation(prior)

    @torch.no_grad()
    def logits(grids: Tensor) -> Tensor:
        n = len(grids)
        told = [codes.expand(n, -1, -1) for codes in condition], None if label is None else label.expand(n)
        return evaluated.logits(grids.to(device), evaluated.context(*told, batch=n)).float().cpu()

    return logits


def few_places(shape: Place, count: int, seed: int = 0) -> list[int]:
    """Corners, ends of rows, and some by chance, in order."""
    height, width = shape
    positions = height * width
    fixed = [0, width - 1, width % positions, positions - 1, positions - width]
    generator = torch.Generator().manual_seed(seed)
    found = dict.fromkeys([*fixed, *torch.randperm(positions, generator=generator).tolist()])
    return sorted(list(found)[:count])


def require_causal(prior: Prior) -> None:
    """A look at a few places, which a mask that is off by one does not survive.

    Raises:
        CausalityError: there is a leak.
    """
    find_leaks(prior, few_places(prior.config.shape, 8)).require()
