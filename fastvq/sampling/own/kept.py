"""Which prior a module or function of one's own is, made once for as long as the module lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastvq._unwrap import unwrap
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models.prior import Prior, PriorConfig
from fastvq.sampling.own.prior import OwnPrior

_NAME = "_fastvq_prior"


class _Holder:
    """Lies beside a module's other attributes. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self.made: tuple[PriorConfig, OwnPrior] | None = None

    def __reduce__(self) -> tuple[type[_Holder], tuple[()]]:
        return _Holder, ()


def own_prior(module: Callable[..., Tensor], config: PriorConfig) -> OwnPrior:
    """The prior of a module or function, the same one again for the same module."""
    if not isinstance(module, nn.Module):
        return OwnPrior(module, config, untraced=_FUNCTION)
    holder = module.__dict__.setdefault(_NAME, _Holder())
    if holder.made is None or holder.made[0] != config or holder.made[1].network is not module:
        holder.made = (config, OwnPrior(module, config))
    found: OwnPrior = holder.made[1]
    return found


_FUNCTION = (
    "a function is not traced unasked, for changes of its weights would not be noticed; "
    "give a torch.nn.Module, or what fastvq.trace makes of the function as it is now"
)


def as_own_prior(prior: Any, *, shape: tuple[int, int] | None, num_codes: int | None, num_classes: int | None) -> Prior:
    """A prior as it is, whose configuration has to agree with what is given; of anything that can be called, our form.

    Raises:
        ArgumentError, ArgumentTypeError: something else, or grid and codes of a callable are missing.
    """
    prior = unwrap(prior)
    given = {"shape": shape, "num_codes": num_codes, "num_classes": num_classes}
    if isinstance(prior, Prior):
        for name, value in given.items():
            own = getattr(prior.config, name)
            if value is not None and (tuple(value) if name == "shape" else value) != own:  # type: ignore[arg-type]
                raise ArgumentError(f"{name}: this prior has {own}, got {value}; leave it out")
        return prior
    if not callable(prior):
        raise ArgumentTypeError(f"prior: expected a prior, a module or a function, got {type(prior).__name__}")
    if shape is None or num_codes is None:
        missing = " and ".join(name for name in ("shape", "num_codes") if given[name] is None)
        raise ArgumentError(
            f"{missing}: a {type(prior).__name__} that fastvq does not know needs its grid and codes: "
            "shape=(H, W), num_codes=K"
        )
    return own_prior(prior, PriorConfig(shape=shape, num_codes=num_codes, num_classes=num_classes))
