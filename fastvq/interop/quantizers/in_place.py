"""Known quantisers inside a model, replaced in place by what computes the same faster, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastvq.errors import AccelerationWarning, ArgumentTypeError
from fastvq.interop.quantizers.autoencoders import MonaiQuantizer, OneHotQuantizer, PortQuantizer, VqganQuantizer
from fastvq.interop.quantizers.codecs import DacQuantizer, EncodecCodebook, TransformersEncodec, TransformersMimi
from fastvq.interop.quantizers.kind import Accelerated, accelerated_class
from fastvq.interop.quantizers.trial import what_differs
from fastvq.interop.quantizers.vector_quantize import ResidualVQ, VectorQuantize

# The first that fits is taken.
KINDS: tuple[type[Accelerated], ...] = (
    VectorQuantize,
    ResidualVQ,
    MonaiQuantizer,
    EncodecCodebook,
    DacQuantizer,
    TransformersEncodec,
    TransformersMimi,
    VqganQuantizer,
    OneHotQuantizer,
    PortQuantizer,
)


@dataclass(frozen=True)
class Known:
    """A quantiser of a known kind in a model.

    Attributes:
        name: of the module, as ``named_modules`` gives it; "" for the model itself.
        kind: whose it is.
        accelerated: whether it is.
        reason: why it cannot be; None if it is or can be.
    """

    name: str
    kind: str
    accelerated: bool
    reason: str | None

    @property
    def state(self) -> str:
        """In words."""
        if self.accelerated:
            return "accelerated"
        return "not accelerated" if self.reason is None else f"left as it is: {self.reason}"


@dataclass(frozen=True)
class Acceleration:
    """The known quantisers of a model; as text, a table of them.

    Attributes:
        quantizers: each of them, in the order of ``named_modules``.
    """

    quantizers: tuple[Known, ...]

    def __str__(self) -> str:
        rows = [("module", "kind", "state")]
        rows += [(known.name or "(the model)", known.kind, known.state) for known in self.quantizers]
        if len(rows) == 1:
            return "no quantiser of a known kind"
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        return "\n".join(f"{name:{first}}  {kind:{second}}  {state}" for name, kind, state in rows)


def accelerate(model: nn.Module) -> nn.Module:
    """Let every known quantiser of a model, at any depth, compute with fastvq's operations.

    Known are vector-quantize-pytorch's ``VectorQuantize`` and ``ResidualVQ``, MONAI's ``EMAQuantizer``, encodec's
    ``EuclideanCodebook``, descript-audio-codec's ``VectorQuantize``, the codebooks of transformers' Mimi, Encodec and
    DAC, taming-transformers' ``VectorQuantizer2`` and the ``Quantize`` of the common VQ-VAE-2 port, also where their
    files were copied. Modules stay the objects they are, with their parameters, buffers, hooks and names in the state
    dict; what changes is their class, to a subclass of its own. Before that, copies of original and replacement are
    compared on a few vectors, in training and evaluation.

    Args:
        model: a module, changed in place; also wrapped by torch.compile or DistributedDataParallel, and it may be a
            quantiser itself.

    Returns:
        ``model``. What was found in it, and why a quantiser was left as it is, :func:`acceleration` tells.

    Raises:
        ArgumentTypeError: ``model`` is not a module.

    Warns:
        AccelerationWarning: a known quantiser was left as it is, or none was found.
    """
    found = [*_known(model)]
    for module, methods, known in found:
        if known.reason is None and not known.accelerated:
            module.__class__ = accelerated_class(methods, type(module))
    left = [known for _, _, known in found if known.reason is not None]
    if not found:
        _warn(f"no quantiser of a known kind was found in {type(model).__name__}")
    elif left:
        names = "; ".join(f"{known.name or 'the model'} ({known.kind}): {known.reason}" for known in left)
        _warn(f"left as they are: {names}")
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: every module has the class it had, with what it has learnt meanwhile.

    Args:
        model: a module, changed in place, or one that is not accelerated.

    Returns:
        ``model``.

    Raises:
        ArgumentTypeError: ``model`` is not a module.
    """
    for module in _require_module(model).modules():
        if isinstance(module, Accelerated):
            module.__class__ = module.original  # type: ignore[assignment]
    return model


def acceleration(model: nn.Module) -> Acceleration:
    """Which quantisers of a model are accelerated, and why others are not or cannot be; changes nothing.

    Args:
        model: a module.

    Raises:
        ArgumentTypeError: ``model`` is not a module.
    """
    return Acceleration(tuple(known for _, _, known in _known(model)))


def _known(model: nn.Module) -> Iterator[tuple[nn.Module, type[Accelerated], Known]]:
    for name, module in _require_module(model).named_modules():
        if isinstance(module, Accelerated):
            yield module, type(module), Known(name, module.kind, True, None)
            continue
        for methods in KINDS:
            original = next((cls for cls in type(module).__mro__ if cls.__name__ in methods.classes), None)
            if original is not None and methods.fits(module):
                try:
                    reason = _why_not(module, methods, original)
                except AttributeError as error:
                    reason = f"it is of another version: {error}"
                yield module, methods, Known(name, methods.kind, False, reason)
                break


def _why_not(module: nn.Module, methods: type[Accelerated], original: type) -> str | None:
    """Why a module cannot be accelerated, or None; ``original`` is the known class among those it derives from."""
    reason = methods.why_not(module)
    if reason is not None:
        return reason
    for cls in type(module).__mro__[: type(module).__mro__.index(original)]:
        changed = [name for name in cls.__dict__ if hasattr(original, name) and not name.startswith("__")]
        if changed:
            return f"its class {cls.__name__} changes {', '.join(changed)}"
    for name in (*methods.replaced, *module._parameters, *module._buffers, *module._modules):
        if name in module.__dict__:
            return f"it has a {name} of its own"
        if name not in methods.replaced and hasattr(methods, name):
            return f"its {name} would be hidden"
    for codes in methods.codebooks_of(module):
        if codes.dtype is not torch.float32:
            return f"its codes are {codes.dtype}, not torch.float32"
        if not (codes.is_cpu or codes.is_cuda):
            return f"its codes are on {codes.device}"
    return what_differs(module, methods)


def _require_module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _warn(message: str) -> None:
    warnings.warn(f"accelerate: {message}", AccelerationWarning, stacklevel=3)
