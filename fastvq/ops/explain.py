"""What would run, and why: for all operations that have backends to choose from."""

from __future__ import annotations

from typing import Any

import torch

from fastvq.errors import ArgumentError
from fastvq.ops.causal_attention.backends import BACKENDS as CAUSAL_ATTENTION
from fastvq.ops.causal_conv.backends import BACKENDS as CAUSAL_CONV
from fastvq.ops.dispatch import Candidate, select_backend
from fastvq.ops.draw.backends import BACKENDS as DRAW
from fastvq.ops.ema_update.backends import BACKENDS as EMA_UPDATE
from fastvq.ops.nearest_code.backends import BACKENDS as NEAREST_CODE
from fastvq.ops.residual_codes.backends import BACKENDS as RESIDUAL_CODES

_TABLES = {
    table.operation: table for table in (CAUSAL_ATTENTION, CAUSAL_CONV, DRAW, EMA_UPDATE, NEAREST_CODE, RESIDUAL_CODES)
}


def explain_backend(op: str, *args: Any, backend: str | None = None, **options: Any) -> str:
    """One line per backend of an operation: which would run for these arguments, and why the others would not.

    Args:
        op: name of the operation, such as ``"draw"``.
        args: the tensors that decide, as the operation takes them (``draw``: the logits;
            ``nearest_code``: x and the codebook; ``residual_codes``: x and the codebooks; ``ema_update``: its five
            tensors; ``causal_conv2d``: x and the weight; ``causal_attention``: query, key and value).
        backend: as for the operation itself.
        options: those of the operation that decide too (``causal_conv2d``: mask and form; ``causal_attention``:
            dropout), its defaults where not given.

    Raises:
        ArgumentError: there is no such operation, or no such backend.
        UnavailableError: the backend asked for cannot run here.
    """
    if op not in _TABLES:
        raise ArgumentError(f"op: expected one of {', '.join(map(repr, _TABLES))}, got {op!r}")
    table = _TABLES[op]
    candidates = table.candidates(*args, **options)
    chosen = select_backend(op, candidates, backend)
    preference = table.preference(*args, **options)
    if backend is not None:
        why = "chosen: asked for"
    elif preference is not None and preference[0] == chosen:
        why = f"chosen: {preference[1]}"
    else:
        why = "chosen: the first that can run"
    lines = (f"{name}: {why if name == chosen else reason or 'could run, not chosen'}" for name, reason in candidates)
    return "\n".join(lines)


def usable_backends(device: torch.device) -> dict[str, list[Candidate]]:
    """Of each operation its backends, best first, with the reason against each or None, for float32 on a device.

    That is for small tensors without gradient, which a backend that can run there at all takes.
    """
    vectors, codebook = torch.zeros(1, 2, 4, device=device), torch.zeros(1, 3, 4, device=device)
    counts, row = torch.zeros(1, 3, dtype=torch.int64, device=device), torch.zeros(1, 3, device=device)
    heads = torch.zeros(1, 1, 16, 16, device=device)
    examples: dict[str, tuple[torch.Tensor, ...]] = {
        "causal_attention": (heads, heads, heads),
        "causal_conv2d": (heads, torch.zeros(1, 1, 3, 3, device=device)),
        "draw": (row,),
        "ema_update": (counts, codebook, row, codebook, codebook),
        "nearest_code": (vectors, codebook),
        "residual_codes": (vectors, codebook),
    }
    return {op: table.candidates(*examples[op]) for op, table in _TABLES.items()}
