"""Drawing codes from logits by inverse CDF, at uniform numbers given by the caller."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvq._check import require_dense, require_floating, require_integer, require_range, require_shape, require_tensor
from fastvq._nvtx import annotate
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.ops.dispatch import is_batched
from fastvq.ops.draw.backends import BACKENDS
from fastvq.ops.draw.options import DrawOptions, check_options
from fastvq.ops.draw.reference import check_rows, draw_torch

__all__ = ["check_options", "draw", "draw_margin", "draw_reference"]


@annotate("draw")
def draw(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Codes drawn from logits: the inverse CDF of their tempered and filtered softmax, at the given uniforms.

    Args:
        logits: unnormalised log-probabilities [..., K], floating point. -inf excludes a code.
        uniforms: float32 [...], in [0, 1), on the same device.
        temperature: divides the logits; a positive normal float32, or 0 for the code of the largest logit, the lower
            index first among equals.
        top_k: keep the top_k codes of the largest logits, 1..K; the lower index first among equals.
        top_p: keep the most probable codes (among those of top_k) up to and including the first at which their summed
            probability reaches top_p, in (0, 1]; the lower index first among equals (Holtzman et al. 2020).
        backend: None for the first that can run, ``"cpp"`` (CPU) or ``"torch"``; see `fastvq.ops.explain_backend`.

    Returns:
        int64 [...]. With w = exp((logits - max) / temperature), 0 for codes left out, and c = cumsum(w): the first code
        with c > u * c[-1]. A code of probability 0 is never drawn.

    Raises:
        ArgumentError: shapes, ranges or devices that do not fit; a row with NaN or +inf, or with -inf alone.
        ArgumentTypeError: types or dtypes that do not fit.
        UnavailableError: the backend asked for cannot run here.

    Logits are converted to float32, and every stored value is float32. On a CPU both backends accumulate the running
    sum in double and round it at every code, so they differ by the rounding of exp alone: 2 units in the last place of
    a weight. GPUs add in another order. Tokens of two backends can therefore differ only where u lies within about 1e-6
    of a boundary, which `draw_margin` certifies.
    """
    options = _check(logits, uniforms, temperature, top_k, top_p)
    if is_batched():
        raise UnavailableError("draw: vmap cannot batch it; logits may have any number of leading axes")
    tokens: Tensor = BACKENDS.select(backend, logits).run(logits, uniforms, options)
    return tokens


def draw_reference(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """`draw` in plain PyTorch on any device: the definition that other backends are measured against.

    Args:
        logits, uniforms, temperature, top_k, top_p: as for `draw`.

    Returns:
        int64 [...].

    Raises:
        ArgumentError, ArgumentTypeError: as for `draw`.
    """
    return draw_torch(logits, uniforms, _check(logits, uniforms, temperature, top_k, top_p))


@torch.no_grad()
def draw_margin(
    logits: Tensor,
    uniforms: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """How far, in probability, each uniform lies inside its token's interval of the CDF, computed in float64.

    Args:
        logits, uniforms, temperature, top_k, top_p: as for `draw`.
        tokens: integers [...] in 0..K-1, drawn from the same logits by any engine.

    Returns:
        float64 [...]: distance from u to the nearer end of the token's interval [low, high), negative outside, -inf for
        a code that cannot be drawn. A token is right up to rounding of size eps if its margin is at least -eps.

    top_k and top_p cut off at a rank, and rounding may cut elsewhere. The set with one code more or fewer (top_p) and
    the sets in which the last kept code gives way to the next one or to the token count as well, at the price of the
    change in probability that leads to them: the result is the largest over these sets of min(margin, -price). Two
    roundings at the cut at once are not considered.

    Raises:
        ArgumentError, ArgumentTypeError: as for `draw`.
    """
    options = _check(logits, uniforms, temperature, top_k, top_p)
    tokens = require_integer("tokens", tokens)
    require_shape("tokens", tokens, list(uniforms.shape))
    require_range("tokens", tokens, logits.shape[-1])
    values = logits.float().double()
    peak = values.amax(-1, keepdim=True)
    check_rows(logits, uniforms, peak)
    weights = ((values - peak) / options.temperature).exp()
    u = uniforms.double().unsqueeze(-1)
    token = tokens.unsqueeze(-1)

    def margin(kept: Tensor) -> Tensor:
        p = torch.where(kept, weights, 0.0)
        ends = p.cumsum(-1)
        ends = ends / ends[..., -1:]
        high = ends.gather(-1, token)
        low = torch.where(token > 0, ends.gather(-1, (token - 1).clamp_min(0)), 0.0)
        inside = torch.minimum(u - low, high - u)
        return torch.where(p.gather(-1, token) > 0, inside, -math.inf)

    if options.top_k is None and options.top_p is None:
        return margin(torch.ones_like(weights, dtype=torch.bool)).squeeze(-1)

    num_codes = logits.shape[-1]
    limit = options.top_k or num_codes
    order = values.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    ranked = weights.gather(-1, order)
    ranked = ranked / ranked[..., :limit].sum(-1, keepdim=True)
    sums = ranked[..., :limit].cumsum(-1)
    size = torch.full_like(token, limit)
    if options.top_p is not None:
        size = ((sums < options.top_p).sum(-1, keepdim=True) + 1).clamp_max(limit)
    last, token_rank = size - 1, rank.gather(-1, token)
    best = margin(rank < size)

    def consider(best: Tensor, kept: Tensor, price: Tensor, possible: Tensor) -> Tensor:
        other = torch.minimum(margin(kept), -price)
        return torch.where(possible, torch.maximum(best, other), best)

    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(-1, index.clamp(0, values.shape[-1] - 1))

    if options.top_p is not None:
        best = consider(best, (rank < last) | (rank == 0), (at(sums, last - 1) - options.top_p).abs(), last > 0)
        best = consider(best, rank <= size, (at(sums, last) - options.top_p).abs(), size < limit)
    for replacement in (size, token_rank):
        swapped = (rank < last) | (rank == replacement)
        price = at(ranked, last) - at(ranked, replacement)
        best = consider(best, swapped, price, (replacement >= size) & (replacement < num_codes))
    return best.squeeze(-1)


def _check(logits: object, uniforms: object, temperature: object, top_k: object, top_p: object) -> DrawOptions:
    logits, uniforms = require_tensor("logits", logits), require_tensor("uniforms", uniforms)
    require_floating("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ArgumentError(f"logits: expected shape [..., K] with K >= 1, got {list(logits.shape)}")
    if uniforms.dtype != torch.float32:
        raise ArgumentTypeError(f"uniforms: expected torch.float32, got {uniforms.dtype}")
    require_dense("uniforms", uniforms)
    require_shape("uniforms", uniforms, list(logits.shape[:-1]))
    if uniforms.device != logits.device:
        raise ArgumentError(f"uniforms: expected device {logits.device} as for logits, got {uniforms.device}")
    return check_options(logits.shape[-1], temperature, top_k, top_p)
