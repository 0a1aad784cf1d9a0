"""Tensors that know where they come from while a network runs on them, and who is told of what is done to them."""

from __future__ import annotations

import linecache
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

_PACKAGES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))


@dataclass(eq=False)
class Given:
    """What a tensor made of condition and label is, with real numbers.

    Attributes:
        number: which of the tensors that met codes it was, in the order in which they did.
    """

    real: Tensor
    number: int = -1


class Traced(Tensor):
    """A tensor of the network that depends on codes, condition or label; it holds no numbers."""

    tracer: Tracer
    value: Any

    @staticmethod
    def __new__(cls, tracer: Tracer, value: Any, shape: Sequence[int], dtype: torch.dtype) -> Traced:
        device = tracer.device
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        made.tracer, made.value = tracer, value
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Traced({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            whole = WHOLE.get(func)
            if whole is not None:
                tracer, on_codes = _who(args, kwargs)
                if on_codes:
                    return tracer.whole(whole, args, kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tracer, on_codes = _who(args, kwargs)
        if on_codes and func.overloadpacket.__name__ in _FRESH:
            like = torch.empty((), dtype=args[0].dtype, device=args[0].device).expand(args[0].shape)
            return func(like, *args[1:], **kwargs)
        if not on_codes:
            return tracer.run(func, args, kwargs)
        return tracer.call(func, args, kwargs)


# What is made of no more than a shape.
_FRESH = {f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn")} | {
    f"new_{kind}" for kind in ("zeros", "ones", "empty", "full")
}
# Functions that are looked at before PyTorch takes them apart.
WHOLE: dict[Any, str] = {
    nn.functional.one_hot: "one_hot",
    nn.functional.scaled_dot_product_attention: "scaled_dot_product_attention",
}


def _who(args: Any, kwargs: Any) -> tuple[Tracer, bool]:
    """Who is told, and whether any of the arguments depends on codes."""
    found = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Traced)]
    return found[0].tracer, any(not isinstance(x.value, Given) for x in found)


def is_given(x: Any) -> bool:
    return isinstance(x, Traced) and isinstance(x.value, Given)


class Tracer(ABC):
    """What follows a network that runs on :class:`Traced` tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._count = 0

    def given(self, real: Tensor) -> Traced:
        """A tensor of condition or label."""
        return Traced(self, Given(real), real.shape, real.dtype)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What does not depend on codes is computed."""
        real = tree_map(lambda x: x.value.real if isinstance(x, Traced) else x, (args, kwargs))
        out = func(*real[0], **real[1])
        if func._schema.name.endswith("_") and isinstance(args[0], Traced):
            return args[0]
        return tree_map(lambda x: self.given(x) if isinstance(x, Tensor) else x, out)

    def number(self, args: Any, kwargs: Any) -> list[Given]:
        """Count what is given among the arguments of an operation on codes."""
        found = []
        for x in tree_flatten((args, kwargs))[0]:
            if is_given(x):
                x.value.number = self._count
                found.append(x.value)
                self._count += 1
        return found

    @abstractmethod
    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation on something that depends on codes."""

    @abstractmethod
    def whole(self, name: str, args: Any, kwargs: Any) -> Any:
        """One of `WHOLE` on something that depends on codes."""


class Replayer(Tracer):
    """Runs a network again for other conditions and labels, without codes: what meets codes is all that is wanted.

    Attributes:
        met: what is given to operations on codes, in order.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.met: list[Tensor] = []

    def codes(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Traced:
        return Traced(self, None, shape, dtype)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.met += [given.real for given in self.number(args, kwargs)]
        plain = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) and not isinstance(x, Traced) else x, args)
        meta = tree_map(
            lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Traced) else x, plain
        )
        kwargs = tree_map(lambda x: torch.device("meta") if isinstance(x, torch.device) else x, kwargs)
        out = func(*meta, **kwargs)
        if func._schema.name.endswith("_") and isinstance(args[0], Traced):
            return args[0]
        return tree_map(lambda x: self.codes(x.shape, x.dtype) if isinstance(x, Tensor) else x, out)

    def whole(self, name: str, args: Any, kwargs: Any) -> Any:
        self.met += [given.real for given in self.number(args, kwargs)]
        if name == "one_hot":
            count = args[1] if len(args) > 1 else kwargs["num_classes"]
            return self.codes((*args[0].shape, count))
        query, value = args[0], args[2]
        return self.codes((*query.shape[:-1], value.shape[-1]), query.dtype)


def place(names: dict[int, str]) -> str:
    """Where the network is: its innermost module, file and line.

    Args:
        names: of modules, by identity.
    """
    line, module = "", ""
    frame = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if not module and isinstance(owner, nn.Module) and id(owner) in names:
            name = names[id(owner)]
            module = f"{name} ({type(owner).__name__})" if name else f"the {type(owner).__name__}"
        file = frame.f_code.co_filename
        if not line and not file.startswith(_PACKAGES) and not file.startswith("<"):
            text = linecache.getline(file, frame.f_lineno).strip()
            line = f"{Path(file).name}:{frame.f_lineno}" + (f" `{text}`" if text else "")
        frame = frame.f_back  # type: ignore[assignment]
    return ", ".join(part for part in (module, line) if part)
