"""What a pass that runs again in backward needs of its first run.

`torch.utils.checkpoint` and reversible networks keep no activations and run a region again when its gradients are
wanted. By then the codebook has moved. The repetition has to use the codes of the first run, must not move them again,
and has to leave the random numbers for what comes after it as the first run left them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastvq.errors import UnavailableError

_SAMPLE = 4096
# Of the sample's largest element. Kernels with and without gradients may round differently; other data lie far beyond.
_TOLERANCE = 0.01
_LEAST_PASSES = 16
_BUDGET_BYTES = 1 << 26


def is_repetition() -> bool:
    """Whether the pass that runs now is inside a backward pass, where only repetitions run."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_repeated() -> bool:
    """Whether the pass that runs now may run again: regions without activations run with gradients switched off
    (reentrant), or with hooks for what is saved.
    """
    return (
        not torch.compiler.is_compiling()
        and (not torch.is_grad_enabled() or _saving_hook() is not None)
        and not torch.is_inference_mode_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not is_repetition()
    )


def refuse_repetition(reason: str) -> NoReturn:
    """Raise the error for a repetition that would move the codebook, or use one that has moved."""
    raise UnavailableError(
        "torch.utils.checkpoint: a quantiser's pass that moves the codebook runs again in backward, and "
        f"{reason}; keep the quantiser outside of the checkpointed region, or freeze its codebook"
    )


@dataclasses.dataclass(slots=True, eq=False)
class Pass:
    """The first run of a pass over vectors of ``shape``.

    Attributes:
        sample: some of its input's elements.
        codes: [G, K, D], what was searched in, before it moved.
        used: [L, G, K], the counts of all processes.
        draws: states of the random numbers before and after each time that it drew some.
        region: what lives as long as there is a graph that may ask for a repetition; None where nothing tells.
        order: the later region first, in it the earlier pass.
        repeated: how often it was.
    """

    shape: torch.Size
    sample: Tensor
    codes: Tensor
    used: Tensor
    draws: list[tuple[Tensor, Tensor]]
    region: weakref.ref[Any] | None
    order: tuple[int, int]
    repeated: int = 0

    def is_done(self) -> bool:
        return self.repeated > 0 if self.region is None else self.region() is None

    def skip_draws(self) -> None:
        """Go on with the random numbers where the first run left them, if it began with those that come now."""
        device = self.codes.device
        for before, after in self.draws:
            if torch.equal(_random_state(device), before):
                _set_random_state(after, device)


class PassMemory:
    """The passes of a module that may still be repeated.

    Holds at most 16 passes, or more if their codes fit into 64 MiB. Belongs to the run: copies and pickles of it are
    empty.
    """

    def __init__(self) -> None:
        self._passes: list[Pass] = []
        self._draws: list[tuple[Tensor, Tensor]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[PassMemory], tuple[()]]:
        return PassMemory, ()

    @contextlib.contextmanager
    def drawing(self, device: torch.device) -> Iterator[None]:
        """Around what a first run draws before `remember`."""
        before = _random_state(device)
        yield
        after = _random_state(device)
        if not torch.equal(before, after):
            self._draws.append((before, after))

    def remember(self, vectors: Tensor, codes: Tensor, used: Tensor) -> None:
        """Keep a first run; its repetition is known by its input. Nothing waits for a GPU."""
        # Without gradients nothing is saved, whatever the hooks.
        hook = _saving_hook() if torch.is_grad_enabled() else None
        region = None if hook is None else weakref.ref(hook)
        with self._lock, _unseen():
            draws, self._draws = self._draws, []
            last = self._passes[-1] if self._passes else None
            number, place = (0, 0) if last is None else last.order
            together = last is not None and region is not None and last.region == region
            order = (number, place + 1) if together else (number - 1, 0)
            kept = [one for one in self._passes if not one.is_done()]
            kept.append(Pass(vectors.shape, _sample(vectors), codes, used, draws, region, order))
            limit = max(_LEAST_PASSES, _BUDGET_BYTES // max(1, codes.nbytes))
            self._passes = kept[-limit:]

    def recall(self, vectors: Tensor) -> Pass | None:
        """The first run whose repetition this is; None if none fits."""
        with self._lock, _unseen():
            fitting = [
                one
                for one in self._passes
                if one.shape == vectors.shape
                and one.sample.dtype == vectors.dtype
                and one.sample.device == vectors.device
            ]
            if not fitting:
                return None
            distances = _distances(_sample(vectors), [one.sample for one in fitting])
            distance, best = min(
                zip(distances, fitting, strict=True), key=lambda pair: (pair[0], pair[1].repeated, pair[1].order)
            )
            if distance > _TOLERANCE:
                return None
            best.repeated += 1
            return best


def _saving_hook() -> object | None:
    """The function that brings back what is saved now, shared by everything saved in a region."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[1]


def _sample(vectors: Tensor) -> Tensor:
    elements = vectors.detach().reshape(-1)
    # Odd, so that it goes through the channels.
    return elements[:: elements.numel() // _SAMPLE | 1].clone()


def _distances(sample: Tensor, others: list[Tensor]) -> list[float]:
    """Largest difference to each of the others over the largest element, of finite values."""
    if sample.numel() == 0:
        return [0.0] * len(others)
    here, there = (torch.nan_to_num(value.double(), posinf=0.0, neginf=0.0) for value in (sample, torch.stack(others)))
    scale = here.abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    return ((there - here).abs().amax(1) / scale).tolist()


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """Keeps operations from modes: a selective checkpoint counts those of the first run and of its repetition."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()
