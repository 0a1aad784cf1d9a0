"""Drawing codes from logits by inverse CDF, at uniform numbers given by the caller."""

from __future__ import annotations

import math
import numbers
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvq import _engine
from fastvq._check import require_dense, require_floating, require_integer, require_range, require_shape, require_tensor
from fastvq._memory import address
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.ops.dispatch import draw_backends, is_batched, select_backend

_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class DrawOptions:
    """Checked options; temperature and top_p are float32 values, top_k and top_p are None where they keep all."""

    temperature: float
    top_k: int | None
    top_p: float | None


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
        temperature: divides the logits; a positive normal float32.
        top_k: keep the top_k codes of the largest logits, 1..K; the lower index first among equals.
        top_p: keep the most probable codes (among those of top_k) up to and including the first at which their summed
            probability reaches top_p, in (0, 1]; the lower index first among equals (Holtzman et al. 2020).
        backend: None for the first that can run, ``"cpp"`` (CPU) or ``"torch"``; see `fastvq.ops.dispatch`.

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
    chosen = select_backend("draw", draw_backends(logits), backend)
    return (_draw_cpp if chosen == "cpp" else _draw_torch)(logits, uniforms, options)


def draw_reference(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """`draw` in plain PyTorch on any device: the definition that other backends are measured against."""
    return _draw_torch(logits, uniforms, _check(logits, uniforms, temperature, top_k, top_p))


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
    _check_rows(logits, uniforms, peak)
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


@torch.no_grad()
def _draw_torch(logits: Tensor, uniforms: Tensor, options: DrawOptions) -> Tensor:
    values = logits.float()
    peak = values.amax(-1, keepdim=True)
    _check_rows(logits, uniforms, peak)
    # The maximum is taken away before the division, so that a small temperature cannot overflow.
    weights = ((values - peak) / options.temperature).exp()
    if options.top_k is not None or options.top_p is not None:
        order = values.argsort(dim=-1, descending=True, stable=True)[..., : options.top_k]
        ranked = weights.gather(-1, order)
        if options.top_p is not None:
            sums = ranked.cumsum(-1)
            # A code is kept while the sum of those before it has not reached top_p; the first always is.
            reached = sums[..., :-1] >= options.top_p * sums[..., -1:]
            ranked[..., 1:].masked_fill_(reached, 0.0)
        weights = torch.zeros_like(weights).scatter(-1, order, ranked)
    # A parallel sum on a GPU may grow where the weight is 0 and end below its own maximum. Neither may lead to a code
    # of probability 0 or to none.
    sums = weights.cumsum(-1).masked_fill(weights == 0, 0.0)
    target = uniforms.unsqueeze(-1) * sums.amax(-1, keepdim=True)
    return (sums > target).to(torch.uint8).argmax(-1)


@torch.no_grad()
def _draw_cpp(logits: Tensor, uniforms: Tensor, options: DrawOptions) -> Tensor:
    extension = _engine.require()
    values, points = logits.float().contiguous(), uniforms.contiguous()
    num_codes = values.shape[-1]
    tokens = torch.empty(uniforms.shape, dtype=torch.int64, device=logits.device)
    rows = tokens.numel()
    bad_row = extension.draw(
        address("logits", values, torch.float32, rows * num_codes),
        address("uniforms", points, torch.float32, rows),
        address("tokens", tokens, torch.int64, rows),
        rows,
        num_codes,
        options.temperature,
        num_codes if options.top_k is None else options.top_k,
        1.0 if options.top_p is None else options.top_p,
    )
    if bad_row >= 0:
        _raise_bad_row(logits, uniforms, bad_row)
    return tokens


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


def check_options(num_codes: int, temperature: object, top_k: object, top_p: object) -> DrawOptions:
    """The options of `draw` over ``num_codes`` codes, checked; errors are those of `draw`."""
    heat = _require_number("temperature", temperature)
    if not _FLOAT32.tiny <= heat <= _FLOAT32.max:
        expected = f"a finite number > 0 (as float32: {_FLOAT32.tiny:.3g} to {_FLOAT32.max:.3g})"
        raise ArgumentError(f"temperature: expected {expected}, got {temperature!r}")
    keep_k, keep_p = None, None
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise ArgumentTypeError(f"top_k: expected an int or None, got {type(top_k).__name__} {top_k!r}")
        if not 1 <= top_k <= num_codes:
            raise ArgumentError(f"top_k: expected 1..{num_codes}, the number of codes, got {top_k}")
        keep_k = None if top_k == num_codes else top_k
    if top_p is not None:
        share = _require_number("top_p", top_p)
        if not 0 < share <= 1:
            raise ArgumentError(f"top_p: expected a number in (0, 1], got {top_p!r}")
        share = max(_round32(share), _FLOAT32.tiny)
        keep_p = share if share < 1 else None
    return DrawOptions(_round32(heat), keep_k, keep_p)


def _require_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _round32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def _check_rows(logits: Tensor, uniforms: Tensor, peak: Tensor) -> None:
    """The maximum of a row tells all: NaN and +inf come through, and it is -inf only if every logit is."""
    bad = ~(peak.squeeze(-1).isfinite() & (uniforms >= 0) & (uniforms < 1))
    if bad.any():
        _raise_bad_row(logits, uniforms, int(bad.flatten().to(torch.uint8).argmax()))


def _raise_bad_row(logits: Tensor, uniforms: Tensor, row: int) -> None:
    index: tuple[int, ...] = ()
    for size in reversed(uniforms.shape):
        row, place = divmod(row, size)
        index = (place, *index)
    where = f" at index {list(index)}" if index else ""
    u, values = float(uniforms[index]), logits[index].float()
    if not 0 <= u < 1:
        raise ArgumentError(f"uniforms: expected values in [0, 1), got {u!r}{where}")
    if values.isnan().any():
        found = "NaN"
    elif (values == math.inf).any():
        found = "+inf"
    else:
        found = "-inf for every code"
    raise ArgumentError(f"logits: expected finite values, or -inf to exclude some of the codes, got {found}{where}")
