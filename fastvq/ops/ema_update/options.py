"""Everything about the update that is no tensor, in the order in which PyTorch's dispatcher passes it."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """As for `fastvq.ops.ema_update`."""

    decay: float
    eps: float
    skip_unusable: bool
    backend: str | None
