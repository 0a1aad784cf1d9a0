"""How codebooks of vector-quantize-pytorch are searched and moved, one or all levels of a residual quantiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.interop.quantizers.kind import Draw, original_class
from fastvq.interop.quantizers.steps import assign, move
from fastvq.ops.nearest_code import CodeStatistics
from fastvq.ops.residual_codes import residual_codes, residual_codes_statistics

# From 1, of squared lengths that count as 1: a few roundings.
_UNIT = 1e-6
# Attributes of the quantiser and of its codebook that ask for what the search does not give, and the option that sets
# them.
_OPTIONS = {
    "commitment_use_cross_entropy_loss": "commitment_use_cross_entropy_loss",
    "has_codebook_diversity_loss": "codebook_diversity_loss_weight",
    "has_codebook_orthogonal_loss": "orthogonal_reg_weight",
    "directional_reparam": "directional_reparam",
    "in_place_codebook_optimizer": "in_place_codebook_optimizer",
    "sync_update_v": "sync_update_v",
}
_CODEBOOK_OPTIONS = {"affine_param": "affine_param", "vq_bridge": "vq_bridge"}
# Below it lengths count as this.
_LEAST_LENGTH = 1e-6
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def option_in_the_way(module: Any) -> str | None:
    """Of a VectorQuantize: the option that is not supported, or None."""
    book = module._codebook
    for owner, options in ((module, _OPTIONS), (book, _CODEBOOK_OPTIONS)):
        for attribute, option in options.items():
            if getattr(owner, attribute, None):
                return option
    choose = book.gumbel_sample
    if not isinstance(choose, partial) or choose.args or choose.func.__name__ != "gumbel_sample":
        return "a function of your own that chooses codes"
    if choose.keywords.get("stochastic"):
        return "stochastic_sample_codes"
    if choose.keywords.get("straight_through"):
        return "straight_through"
    if original_class(book).__name__ != "Codebook":
        return f"a codebook of class {original_class(book).__name__}, as other versions have"
    return "a hook of its codebook" if has_hooks(book) else None


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches calls of a module that are no longer made."""
    return any(getattr(module, name) for name in _HOOKS)


def routes_gradients(module: Any) -> bool:
    """Whether codes pass their gradient on, as they always did in earlier versions."""
    return bool(getattr(module, "route_gradients_to_input", True))


def make_ready(copy: Any, draw: Draw) -> None:
    """Of a VectorQuantize: see `fastvq.interop.quantizers.kind.Accelerated.ready`."""
    book = copy._codebook
    codes = draw(*book.embed.shape)
    book.embed.copy_(F.normalize(codes, dim=-1) if book.use_cosine_sim else codes)
    book.embed_avg.copy_(book.embed)
    book.cluster_size.fill_(1)
    book.initted.fill_(True)
    if book.use_ddp:
        book.use_ddp = False
        book.all_reduce_fn = lambda value: None
        book.has_dead_code_replacement = False


def assign_by_angle(x: Tensor, codes: Tensor, mask: Tensor | None) -> CodeStatistics:
    """Codes of the largest inner product with vectors [H, N, D].

    Those are the nearest if all codes are of one length. A code that was not used for long has been averaged to less,
    which another coordinate makes up for.
    """
    lengths = codes.square().sum(-1, keepdim=True)
    if not torch.compiler.is_compiling() and bool(((lengths - 1).abs() <= _UNIT).all()):
        return assign(x, codes, mask)
    more = (lengths.amax(1, keepdim=True) - lengths).clamp(min=0).sqrt()
    found = assign(F.pad(x, (0, 1)), torch.cat([codes, more], -1), mask)
    chosen = codes.gather(1, found.indices[..., None].expand(x.shape))
    error = (x - chosen).square().sum((1, 2))
    return found._replace(sums=found.sums[..., :-1].contiguous(), squared_error=error)


@torch.no_grad()
def update_codebook(
    book: Any, counts: Tensor, sums: Tensor, vectors: Callable[[], Tensor], mask: Tensor | None = None
) -> None:
    """Move a codebook by counts [H, K] and sums [H, K, D] of vectors [H, N, D], which are made if codes are dead."""
    if not book.ema_update and not book.has_dead_code_replacement:
        return
    counts = counts.to(sums.dtype)
    if book.use_ddp:
        book.all_reduce_fn(counts)
        book.all_reduce_fn(sums)
    for new, average in ((counts, book.cluster_size), (sums, book.embed_avg)):
        # What earlier passes have put off.
        if average.grad is not None:
            new += average.grad
            average.grad = None
    moves = book.ema_update and not book.manual_ema_update
    if moves and not book.use_cosine_sim:
        move(counts, sums, book.cluster_size, book.embed_avg, book.embed, decay=book.decay, eps=book.eps)
    else:
        book.cluster_size.data.lerp_(counts, 1 - book.decay)
        book.embed_avg.data.lerp_(sums, 1 - book.decay)
        if moves:
            book.update_ema()
    if book.has_dead_code_replacement and bool((book.cluster_size < book.threshold_ema_dead_code).any()):
        book.expire_codes_(vectors(), seq_mask=mask)


def quantize_levels(levels: Sequence[Any], x: Tensor, moves: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors [B, N, D] of float32 by Q levels in one pass: the sum of codes, int64 [B, N, Q], and losses [Q]."""
    first, books = levels[0], [level._codebook for level in levels]
    # A copy, which the levels' updates leave as it is.
    codebooks = torch.cat([book.embed.detach() for book in books])
    flat = x.detach().reshape(-1, x.shape[-1])
    if not first.training:
        codes = residual_codes(flat, codebooks)
        return codes.quantized.view(x.shape), codes.indices.view(*x.shape[:-1], -1), flat.new_zeros(len(levels))
    found = residual_codes_statistics(flat, codebooks)
    indices = found.indices.view(*x.shape[:-1], -1)
    weights = [level.commitment_weight if level.has_commitment_loss else 0.0 for level in levels]
    losses = found.squared_errors * found.squared_errors.new_tensor([weight / flat.numel() for weight in weights])
    out = found.quantized.view(x.shape)
    if x.requires_grad and torch.is_grad_enabled():
        routes = routes_gradients(first)
        kind = ("rotation" if first.rotation_trick else "straight_through") if routes else None
        out, losses = _Levels.apply(x, out, losses, indices, codebooks, weights, kind)
    elif torch.is_grad_enabled():
        losses.requires_grad_()
    for q, book in enumerate(books if moves else []):
        residual = partial(_residual, flat, codebooks, found.indices, q)
        update_codebook(book, found.counts[q : q + 1], found.sums[q : q + 1], residual)
    return out, indices, losses


def _residual(x: Tensor, codebooks: Tensor, indices: Tensor, level: int) -> Tensor:
    """[1, N, D], what is left of vectors [N, D] before a level."""
    for q in range(level):
        x = x - F.embedding(indices[:, q], codebooks[q])
    return x[None]


class _Levels(torch.autograd.Function):
    """The gradients of a sum of codes, each of which passes its own on to x, and of commitment losses."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        total: Tensor,
        losses: Tensor,
        indices: Tensor,
        codebooks: Tensor,
        weights: list[float],
        kind: str | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, indices, codebooks)
        ctx.weights, ctx.kind = weights, kind
        # What comes next may change the sum in place; nothing else holds it.
        out = total.detach()
        if kind is None:
            ctx.mark_non_differentiable(out)
        return out, losses.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, indices, codebooks = ctx.saved_tensors
        grad, scales = grads[0], grads[1] * (2 / x.numel())
        residual = x
        straight = ctx.kind == "straight_through"
        total = grad * len(codebooks) if straight else torch.zeros_like(x)
        for q, weight in enumerate(ctx.weights):
            code = F.embedding(indices[..., q], codebooks[q])
            if ctx.kind == "rotation":
                total += _rotate_back(grad, residual, code)
            residual = residual - code
            if weight:
                total.addcmul_(residual, scales[q] * weight)
        return total, None, None, None, None, None, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, code: Tensor) -> Tensor:
        ctx.save_for_backward(x, code)
        return code.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _rotate_back(grads[0], *ctx.saved_tensors), None


def rotated(x: Tensor, code: Tensor) -> Tensor:
    """``code`` whose gradient goes to ``x`` as through the rotation and scaling of x onto it; see `_rotate_back`."""
    out: Tensor = _Rotated.apply(x, code.detach())
    return out


def _rotate_back(grad: Tensor, x: Tensor, code: Tensor) -> Tensor:
    """As `fastvq.models.quantizer.gradient.pass_gradient` has it, but for vectors and codes that are almost 0, where
    the original goes on with a direction shorter than 1 (Fifty et al. 2024, arXiv 2410.06424, section 4.2).
    """
    # Both count as constants.
    x, code = x.detach(), code.detach()
    length, code_length = x.norm(dim=-1, keepdim=True).clamp(min=_LEAST_LENGTH), code.norm(dim=-1, keepdim=True)
    a, b = x / length, code / code_length.clamp(min=_LEAST_LENGTH)
    r = F.normalize(a + b, dim=-1, eps=_LEAST_LENGTH)
    along_r, along_b = (r * grad).sum(-1, keepdim=True), (b * grad).sum(-1, keepdim=True)
    return torch.addcmul(grad - 2 * r * along_r, a, along_b, value=2).mul_(code_length / length)
