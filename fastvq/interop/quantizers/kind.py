"""What a known quantiser is: how it is told, what of it is replaced, and what a trial of it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

Draw = Callable[..., Tensor]


class Accelerated(nn.Module):
    """Base of the methods that replace those of a known class, a subclass for each.

    An accelerated module keeps all it has and is: its class alone becomes one made of such a subclass and of the class
    it had, see `accelerated_class`. What a method does not compute itself it leaves to ``super()``, the original.

    Attributes:
        kind: name for reports.
        classes: names that the original class goes by, also where its file was copied.
        has: attributes, parameters and buffers that tell it from others of the name.
        replaced: the methods that compute otherwise; each is tried before it is trusted.
        meets: training waits for other processes whatever is done about it, so that it cannot be tried among several.
        original: the class that the module had; of a class that `accelerated_class` made.
    """

    kind: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    has: ClassVar[tuple[str, ...]]
    replaced: ClassVar[tuple[str, ...]] = ("forward",)
    meets: ClassVar[bool] = False
    original: ClassVar[type[nn.Module]]

    if TYPE_CHECKING:
        # What originals have.
        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether it is a module of this kind, which may have options that are not supported."""
        return all(hasattr(module, name) for name in cls.has)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """The option that stands in the way, or None."""
        return None

    @classmethod
    def codebooks_of(cls, module: Any) -> list[Tensor]:
        """The tensors that have to be float32."""
        raise NotImplementedError

    @classmethod
    def ready(cls, copy: Any, draw: Draw) -> None:
        """Prepare a copy for a trial: its codes are random, and it waits neither for data nor for other processes."""
        for codes in cls.codebooks_of(copy):
            codes.copy_(draw(*codes.shape))

    @classmethod
    def example(cls, module: Any, method: str, draw: Draw) -> tuple[Any, ...]:
        """Arguments for a replaced method; ``draw(*shape)`` gives normal random numbers."""
        raise NotImplementedError

    @classmethod
    def keywords(cls, module: Any) -> list[dict[str, Any]]:
        """What ``forward`` is given by name, a call for each."""
        return [{}]

    def _get_name(self) -> str:
        return f"Accelerated{super()._get_name()}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when it is needed, so that pickle cannot find it by name.
        reduced: Any = super().__reduce_ex__(protocol)
        return _made_anew, (_methods(type(self)), self.original), *reduced[2:]


_made: dict[tuple[type[Accelerated], type[nn.Module]], type[Accelerated]] = {}


def accelerated_class(methods: type[Accelerated], original: type[nn.Module]) -> type[Accelerated]:
    """A subclass of the original with these methods, always the same one."""
    key = methods, original
    if key not in _made:
        about = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
        _made[key] = type(original.__name__, (methods, original), {**about, "original": original})
    return _made[key]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was accelerated."""
    return module.original if isinstance(module, Accelerated) else type(module)


def processes_meet() -> bool:
    """Whether modules may wait for other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _methods(cls: type[Accelerated]) -> type[Accelerated]:
    found: type[Accelerated] = cls.__mro__[1]
    return found


def _made_anew(methods: type[Accelerated], original: type[nn.Module]) -> nn.Module:
    cls = accelerated_class(methods, original)
    return cls.__new__(cls)
