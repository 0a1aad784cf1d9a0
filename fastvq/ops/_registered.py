"""The one way by which operations are registered with PyTorch and called.

A registered operation can be compiled, exported, counted and differentiated. The dispatcher costs some 30 us a call, so
where nothing watches, `Registered` calls what is registered directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastvq.errors import UnavailableError

# Registered by hand: torch.library.custom_op costs ten times as much per call.
_library = torch.library.Library("fastvq", "FRAGMENT")
ALL_DEVICES = ("CPU", "CUDA", "MPS", "XPU")

Outputs = tuple[Any, ...]


class Gradient(NamedTuple):
    """How an operation is differentiated; of its outputs only the first has a gradient.

    Attributes:
        keep: (ctx, tensors, options, outputs): saves what the backward pass needs.
        backward: (ctx, gradient of the first output): gradients of the tensors, None for those not needed.
    """

    keep: Callable[..., None]
    backward: Callable[[Any, Tensor], Sequence[Tensor | None]]


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be asked for."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class Registered:
    """An operation ``torch.ops.fastvq.NAME``, whose arguments are tensors and then the fields of ``options``.

    Args:
        schema: as torch.library reads it; part of what exported programs hold.
        options: a NamedTuple of everything that is no tensor, in the schema's order.
        run: (tensors..., options): the outputs; those that were not asked for may be None.
        fake: the same without reading or computing values.
        devices: dispatch keys that it is there for.
        gradient: how it is differentiated, or why it is not, or None.
        flops: (shapes..., options): operations, for torch.utils.flop_counter.
        vmap: as torch.library.register_vmap takes it.
    """

    def __init__(
        self,
        schema: str,
        options: Callable[..., Any],
        run: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        devices: Sequence[str] = ("CPU", "CUDA"),
        gradient: Gradient | str | None = None,
        flops: Callable[..., int] | None = None,
        vmap: Callable[..., Any] | None = None,
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.options, self.run = options, run
        _library.define(schema)
        self._op = getattr(torch.ops.fastvq, self.name)
        self._count = len(self._op.default._schema.arguments) - len(options._fields)  # type: ignore[attr-defined]
        for device in devices:
            _library.impl(self.name, self._dispatched, device)
        torch.library.register_fake(f"fastvq::{self.name}", lambda *given: fake(*self._split(given)), lib=_library)
        self._function: Any = None
        if isinstance(gradient, str):
            torch.library.register_autograd(f"fastvq::{self.name}", refusing(gradient), lib=_library)
        elif gradient is not None:
            self._differentiate(gradient)
        if vmap is not None:
            torch.library.register_vmap(f"fastvq::{self.name}", vmap, lib=_library)
        if flops is not None:
            count = flops
            register_flop_formula(self._op)(lambda *given, **_: count(*self._split(given)))

    def __call__(self, *tensors: Tensor | None, options: Any, direct: bool, learns: bool = False) -> Any:
        """The outputs.

        Args:
            direct: nothing watches or rewrites operations, see `fastvq.ops.dispatch.runs_directly`.
            learns: the gradient will be asked for.
        """
        if not direct:
            return self._op(*tensors, *options)
        if learns:
            return self._function.apply(*tensors, options)
        return self.run(*tensors, options)

    def _split(self, given: Sequence[Any]) -> tuple[Any, ...]:
        return *given[: self._count], self.options(*given[self._count :])

    def _dispatched(self, *given: Any) -> Any:
        found = self.run(*self._split(given))
        if not isinstance(found, tuple):
            return found
        # An operation that is registered cannot return None.
        return tuple(given[0].new_empty(0) if output is None else output for output in found)

    def _differentiate(self, gradient: Gradient) -> None:
        count, run = self._count, self.run

        def keep(ctx: Any, tensors: Sequence[Any], options: Any, outputs: Outputs) -> None:
            ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
            gradient.keep(ctx, tensors, options, outputs)

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
            *tensors, options = self._split(inputs)
            keep(ctx, tensors, options, output)

        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            found = (None,) * count if grad is None else gradient.backward(ctx, grad)
            return *found, *(None,) * (len(ctx.needs_input_grad) - count)

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *given: Any) -> Outputs:
                outputs: Outputs = run(*given)
                keep(ctx, given[:-1], given[-1], outputs)
                return outputs

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward(ctx, *grads)

        self._function = Direct
        torch.library.register_autograd(f"fastvq::{self.name}", backward, setup_context=setup, lib=_library)


def refusing(message: str) -> Callable[..., NoReturn]:
    """A backward pass that says why there is none."""

    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise UnavailableError(message)

    return backward
