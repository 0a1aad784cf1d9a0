"""``fastvq.trace`` and ``fastvq.with_plan``: a network of one's own for the cached engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastvq._unwrap import unwrap
from fastvq.errors import ArgumentTypeError
from fastvq.models.prior import PriorConfig
from fastvq.sampling.own.builder import Feature, PlanBuilder
from fastvq.sampling.own.prior import OwnPrior


def trace(
    module: nn.Module | Callable[..., Tensor],
    *,
    shape: tuple[int, int],
    num_codes: int,
    num_classes: int | None = None,
    condition_shapes: Sequence[tuple[int, int]] = (),
    condition_num_codes: Sequence[int] = (),
    level: int = 0,
) -> OwnPrior:
    """A network as a prior that the cached engines sample.

    The network runs once on tensors that hold no numbers, and what is done to them is written down as a plan; then the
    plan's logits are compared with the network's own for random codes. Layers that do not depend on codes run as they
    are, so whatever they are made of is right: masks, norms of weights, features of condition and label.

    Args:
        module: called as ``module(codes)``, ``module(codes, label)``, ``module(codes, condition)`` or
            ``module(codes, condition, label)`` with codes int64 [B, H, W], labels int64 [B], and the levels above int64
            [B, h, w] (a tuple of them if there are several). It returns logits [B, K, H, W]. It is run without dropout.
        shape: grid (H, W).
        num_codes: K.
        num_classes: labels, or None where it takes none.
        condition_shapes, condition_num_codes: grids and codes of the levels above, top first.
        level: of the grid; part of the key of the sampler's randomness.

    Returns:
        A prior for :func:`fastvq.sample`, :func:`fastvq.explain` and pipelines. It holds the module. If weights of a
        module change it is traced again; of a function they are taken as they are now.

    Raises:
        TraceError: an operation stands in the way; the message says which and where.
        CausalityError: logits depend on codes that are not known when they are needed.
        ArgumentError, ArgumentTypeError: arguments that do not fit, or logits that do not fit these.
    """
    config = _config(shape, num_codes, num_classes, condition_shapes, condition_num_codes, level)
    prior = OwnPrior(_callable(module), config)
    prior.traced()
    return prior


def with_plan(
    module: nn.Module | Callable[..., Tensor],
    write: Callable[[PlanBuilder], Feature],
    *,
    shape: tuple[int, int],
    num_codes: int,
    num_classes: int | None = None,
    condition_shapes: Sequence[tuple[int, int]] = (),
    condition_num_codes: Sequence[int] = (),
    level: int = 0,
) -> OwnPrior:
    """A network as a prior with a plan that is written by hand, for one that :func:`trace` cannot follow.

    The plan's logits are compared with the network's own for random codes, as those of a trace are.

    Args:
        module, shape, num_codes, num_classes, condition_shapes, condition_num_codes, level: as :func:`trace` has them.
        write: given a :class:`fastvq.PlanBuilder`, computes the logits out of its operations and returns them. It is
            called again when weights of the module have changed, so it should read them off the module.

    Raises:
        TraceError: the plan gives other logits than the network.
        CausalityError: logits of the network depend on codes that are not known when they are needed.
        ArgumentError, ArgumentTypeError: arguments that do not fit, or operations that read what is not known.
    """
    if not callable(write):
        raise ArgumentTypeError(f"write: expected a function of a builder, got {type(write).__name__}")
    config = _config(shape, num_codes, num_classes, condition_shapes, condition_num_codes, level)
    prior = OwnPrior(_callable(module), config, write=write)
    prior.traced()
    return prior


def _callable(module: object) -> Callable[..., Tensor]:
    module = unwrap(module)
    if not callable(module):
        raise ArgumentTypeError(f"module: expected a module or a function, got {type(module).__name__}")
    return module


def _config(
    shape: tuple[int, int],
    num_codes: int,
    num_classes: int | None,
    condition_shapes: Sequence[tuple[int, int]],
    condition_num_codes: Sequence[int],
    level: int,
) -> PriorConfig:
    return PriorConfig(
        shape=shape,
        num_codes=num_codes,
        num_classes=num_classes,
        level=level,
        condition_shapes=tuple(condition_shapes),
        condition_num_codes=tuple(condition_num_codes),
    )
