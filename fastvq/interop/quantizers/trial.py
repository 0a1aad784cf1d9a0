"""A trial of an accelerated quantiser beside the original, on copies: what differs is not trusted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvq.interop.quantizers.kind import Accelerated, accelerated_class, processes_meet

# Relative to the largest value: what float32 sums in another order differ by, and much less than another formula does.
_TOLERANCE = 1e-4
# Two vectors can be so near to the middle between two codes that rounding decides; not time and again.
_TRIALS = 3
# Where hooks come from that make a weight from its parts.
_OF_WEIGHTS = "torch.nn.utils."


def what_differs(module: nn.Module, methods: type[Accelerated]) -> str | None:
    """Run a few random vectors through both, in training and evaluation; None if outputs, gradients and state agree.

    Neither the module nor a random number generator changes, and no other process is waited for.
    """
    device = methods.codebooks_of(module)[0].device
    difference: str | None = None
    with _undisturbed(device):
        for seed in range(_TRIALS):
            try:
                difference = _trial(module, methods, seed)
            except Exception as error:
                return f"it cannot be tried: {type(error).__name__}: {error}"
            if difference is None:
                return None
    return difference


def _trial(module: nn.Module, methods: type[Accelerated], seed: int) -> str | None:
    first = _copied(module)
    with torch.no_grad():
        methods.ready(first, _Draw(module, methods, seed))
    second = _copied(first)
    second.__class__ = accelerated_class(methods, type(first))
    alone = not (methods.meets and processes_meet())
    calls = [
        (method, named)
        for method in methods.replaced
        for named in (methods.keywords(first) if method == "forward" else [{}])
    ]
    for training in (True, True, False) if alone else (False,):
        for method, named in calls:
            draw = _Draw(module, methods, seed + 7)
            seed += 1
            given = methods.example(first, method, draw)
            state = _random_state(given[0].device)
            theirs = _run(first.train(training), method, given, named)
            _set_random_state(given[0].device, state)
            ours = _run(second.train(training), method, given, named)
            for (name, expected), (_, actual) in zip(theirs.items(), ours.items(), strict=True):
                if not _agree(expected, actual):
                    return f"its {name} would differ in {'training' if training else 'evaluation'}"
    return None


def _run(module: nn.Module, method: str, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Everything that a call gives and does, by name."""
    given = tuple(value.clone().requires_grad_() for value in given)
    module.zero_grad(set_to_none=True)
    output = getattr(module, method)(*given, **named)
    leaves, structure = pytree.tree_flatten(output)
    learnt = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if learnt:
        # Each element counts differently, and none is lost in the sum.
        weights = [_ramp(leaf) for leaf in learnt]
        torch.autograd.backward(learnt, weights)
    found: dict[str, Any] = {"kind of output": str(structure)}
    found.update((f"output {number}", leaf) for number, leaf in enumerate(leaves))
    found.update((f"gradient of input {number}", value.grad) for number, value in enumerate(given))
    found.update((f"gradient of {name}", value.grad) for name, value in module.named_parameters())
    found.update((f"{name} after a step", value) for name, value in module.named_buffers())
    found.update((f"{name} after a step", value) for name, value in module.named_parameters())
    return found


def _ramp(value: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, value.numel(), device=value.device, dtype=value.dtype).view(value.shape)


def _agree(expected: Any, actual: Any) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return type(expected) is type(actual) and bool(expected == actual)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, actual)
    scale = expected.detach().abs().max().item() if expected.numel() else 0.0
    return torch.allclose(expected, actual, rtol=0, atol=_TOLERANCE * max(scale, 1e-6), equal_nan=True)


class _Draw:
    """Normal random numbers of a shape, on the device of a module's codes."""

    def __init__(self, module: nn.Module, methods: type[Accelerated], seed: int) -> None:
        self._device = methods.codebooks_of(module)[0].device
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return drawn.to(self._device)


def _copied(module: nn.Module) -> nn.Module:
    """A copy without the hooks of whoever watches it; those that make a weight from its parts stay."""
    known: dict[int, Any] = {}
    for one in module.modules():
        for value in vars(one).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                # Such a weight, or a result kept for later, whose graph cannot be copied.
                known[id(value)] = value.detach().clone()
    made = copy.deepcopy(module, known)
    for one in made.modules():
        for name, hooks in vars(one).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                kept = {key: hook for key, hook in hooks.items() if type(hook).__module__.startswith(_OF_WEIGHTS)}
                hooks.clear()
                hooks.update(kept)
    return made


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    state = _random_state(device)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        _set_random_state(device, state)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
