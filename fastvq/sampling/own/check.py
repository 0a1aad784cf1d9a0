"""``fastvq.check_causal``: whether logits depend on codes that are not known when they are needed."""

from __future__ import annotations

from typing import Any

from fastvq._check import require_positive_int
from fastvq.sampling.own.causal import ALL, CHOSEN, CausalReport, Place, few_places, find_leaks
from fastvq.sampling.own.kept import as_own_prior
from fastvq.sampling.own.prior import OwnPrior


def check_causal(
    prior: Any,
    *,
    shape: Place | None = None,
    num_codes: int | None = None,
    num_classes: int | None = None,
    positions: int | None = None,
    seed: int = 0,
) -> CausalReport:
    """Look for logits that depend on codes which are not known when they are needed.

    Codes are changed one at a time, and from a position on all of them, in a random grid; logits at and before that
    position may not move. It runs the network on two grids for each position that is looked at.

    Args:
        prior: a prior, or any callable ``codes [B, H, W] -> logits [B, K, H, W]``, with the labels [B] as a second
            argument where there are classes.
        shape, num_codes, num_classes: of a callable: its grid (H, W), codes and classes.
        positions: how many to look at; the default is all of a grid of up to 256 and 64 of a larger one, corners and
            ends of rows among them.
        seed: of the random codes.

    Returns:
        Leaks by position of logits and code. ``report.ok`` says whether there are none, ``print(report)`` shows them
        and ``report.require()`` raises :class:`fastvq.errors.CausalityError` if there are some. A leak that moves
        logits by less than rounding, or for other codes alone, stays unseen.

    Raises:
        ArgumentError, ArgumentTypeError: arguments that do not fit, or logits that do not fit these.
    """
    found = as_own_prior(prior, shape=shape, num_codes=num_codes, num_classes=num_classes)
    if isinstance(found, OwnPrior):
        found.require_call()
    total = found.config.shape[0] * found.config.shape[1]
    whole = total if total <= ALL else CHOSEN
    wanted = whole if positions is None else require_positive_int("positions", positions)
    places = list(range(total)) if wanted >= total else few_places(found.config.shape, wanted, seed)
    return find_leaks(found, places, seed=seed)
