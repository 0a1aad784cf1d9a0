"""All levels of a residual quantiser in one pass over the vectors, where what the levels are asked for allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.models.quantizer.codebook import move_alike, move_together
from fastvq.models.quantizer.vector import VectorQuantizer, perplexity
from fastvq.models.repeated_pass import is_repetition, may_be_repeated
from fastvq.ops.dispatch import is_batched, is_differentiated
from fastvq.ops.residual_codes import ResidualStatistics, residual_codes, residual_codes_statistics


class Levels(NamedTuple):
    """What Q levels found in vectors [..., D].

    Attributes:
        total: [..., D], the sum of the codes, without gradient; zeros where masked.
        codes: int64 [..., Q], -1 where masked or dropped.
        losses: commitment losses [Q].
        codebook_losses: [Q].
        perplexity: [Q].
        dead_codes: int64 [Q].
    """

    total: Tensor
    codes: Tensor
    losses: Tensor
    codebook_losses: Tensor
    perplexity: Tensor
    dead_codes: Tensor


def why_in_turn(levels: Sequence[VectorQuantizer], *, moves: bool, remembers: bool) -> str | None:
    """Why levels must be taken one after the other; None where one pass gives the same.

    Args:
        levels: Q of them, the same for all where they share their codebook.
        moves: the pass moves codebooks.
        remembers: it is one that a checkpoint may repeat, or the repetition.
    """
    first = levels[0]
    for level in levels:
        if type(level) is not VectorQuantizer or level._forward_hooks or level._forward_pre_hooks:
            return "a level has a forward of its own, or hooks"
        if level.metric != "euclidean":
            return f"metric is {level.metric!r}: each level scales its residual"
        if level.check_finite:
            return "check_finite looks at each level's residual"
        if moves and level.revive_below > 0:
            return "revive_below asks for each level's residual"
        if moves and level.may_have_to_start:
            return f"init is {level.init!r}, and codes have not started yet"
        if level.embedding.shape != first.embedding.shape or level.embedding.dtype != first.embedding.dtype:
            return "levels differ in the size or type of their codebooks"
        if (level.mode, level.deterministic) != (first.mode, first.deterministic):
            return "levels differ in mode or deterministic"
    if remembers and (is_repetition() or (first.training and may_be_repeated())):
        return "the pass may be repeated in backward, and each level remembers its own"
    if is_batched() or is_differentiated():
        return "transforms of torch.func and forward mode take levels one at a time"
    return None


def encode_levels(levels: Sequence[VectorQuantizer], vectors: Tensor, depths: Tensor | None) -> Tensor:
    """Codes [..., Q] of vectors [..., D], as `residual_codes` gives them; depths [...] or None."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    found = residual_codes(flat, _codebooks(levels), depths=_flat(depths), mode=levels[0].mode)
    return found.indices.view(*vectors.shape[:-1], len(levels))


def quantize_levels(
    levels: Sequence[VectorQuantizer], vectors: Tensor, depths: Tensor | None, freeze_codebook: bool | None
) -> Levels:
    """One pass over vectors [..., D], whose depths [...] say how many levels each takes part in; None: in all.

    Every level searches in its codes as they are before the pass, and then moves.
    """
    flat = vectors.reshape(-1, vectors.shape[-1])
    moving = [level.moves(freeze_codebook) for level in levels]
    codebooks = _codebooks(levels, any(moving))
    flat_depths = _flat(depths)
    found = residual_codes_statistics(
        flat, codebooks, depths=flat_depths, mode=levels[0].mode, deterministic=levels[0].deterministic
    )
    values: int | Tensor = max(flat.numel(), 1)
    if flat_depths is not None:
        numbers = torch.arange(len(levels), device=flat.device)
        values = (flat_depths[:, None] > numbers).sum(0).clamp(min=1) * flat.shape[1]
    errors = (found.squared_errors / values).unbind()
    used = _move(levels, moving, found, flat)
    learnt = torch.zeros_like(found.squared_errors)
    if any(level.learnable_codebook for level in levels):
        learnt = torch.stack([_codebook_error(level, codebooks, found, q) for q, level in enumerate(levels)]) / values
    return Levels(
        found.quantized.detach().view(vectors.shape),
        found.indices.view(*vectors.shape[:-1], len(levels)),
        torch.stack([level.commitment * error for level, error in zip(levels, errors, strict=True)]),
        learnt,
        perplexity(used),
        (used == 0).sum(-1),
    )


def _flat(depths: Tensor | None) -> Tensor | None:
    return None if depths is None else depths.reshape(-1)


def _codebooks(levels: Sequence[VectorQuantizer], moves: bool = False) -> Tensor:
    """Codes [Q, K, D] of now, copied in training, when they change later."""
    stored = [level.codebook.stored.detach() for level in levels]
    shared = all(level is levels[0] for level in levels)
    codes = stored[0] if shared else torch.cat(stored)
    if levels[0].training:
        codes = torch.ops.fastvq.snapshot(codes, moves)
    return codes.expand(len(levels), -1, -1)


def _codebook_error(level: VectorQuantizer, codebooks: Tensor, found: ResidualStatistics, q: int) -> Tensor:
    error = found.squared_errors[q]
    if not level.learnable_codebook:
        return torch.zeros_like(error)
    return level.codebook.error(codebooks[q : q + 1], found.counts[q : q + 1], found.sums[q : q + 1], error)


def _move(levels: Sequence[VectorQuantizer], moving: list[bool], found: ResidualStatistics, flat: Tensor) -> Tensor:
    """Counts [Q, K] of all processes; codebooks move by them where they are to."""
    counts, sums = found.counts, found.sums
    together = counts.to(torch.promote_types(levels[0].embedding.dtype, torch.float32))
    if len(levels) > 1 and levels[0] is levels[1]:
        return levels[0].codebook.move(counts[:, None], sums.sum(0)[None], flat[None])[:, 0] if moving[0] else together
    books = [level.codebook for level in levels]
    if all(moving) and move_alike(books):
        return move_together(books, counts, sums)
    used = [
        book.move(counts[None, q : q + 1], sums[q : q + 1], flat[None])[0, 0] if moves else together[q]
        for q, (book, moves) in enumerate(zip(books, moving, strict=True))
    ]
    return torch.stack(used)
