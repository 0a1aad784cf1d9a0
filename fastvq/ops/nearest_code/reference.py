"""Nearest code and its statistics in plain PyTorch: the definition, and what runs where no kernel does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._precision import full_float32
from fastvq.ops.nearest_code.options import Options, Statistics, StatisticsOptions

# Scores that exist at a time.
_CHUNK_SCORES = 1 << 22


@torch.no_grad()
def indices_reference(x: Tensor, codebook: Tensor) -> Tensor:
    """x [H, N, D], codebook [H, K, D] to int64 [H, N]; -1 where no code has a finite score.

    The score is |c|^2 / 2 - x.c: |x|^2 is the same for every code and would only add rounding error. Both sides are
    shifted by a centre of the codes where that keeps the score accurate for data far from the origin.
    """
    with full_float32(x.device):
        found = [_indices(part, codes) for part, codes in zip(x, codebook, strict=True)]
        return torch.stack(found) if found else x.new_empty(x.shape[:2], dtype=torch.int64)


def _indices(x: Tensor, codebook: Tensor) -> Tensor:
    dtype = wide_dtype(x, codebook)
    codes = codebook.to(dtype)
    finite = codes.isfinite().all(1)
    centre = _centre(codes)
    # A code that is not finite must not be chosen, and its products must not be NaN.
    codes = torch.where(finite[:, None], codes - centre, 0)
    half_norms = torch.where(finite, codes.square().sum(1) / 2, torch.inf)
    rows = max(1, _CHUNK_SCORES // codes.shape[0])
    indices = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows].to(dtype) - centre
        least, index = torch.addmm(half_norms, part, codes.T, alpha=-1).min(1)
        indices[start : start + rows] = torch.where(least.isfinite(), index, -1)
    return indices


def _centre(codes: Tensor) -> Tensor:
    """The mean m [D] of the codes [K, D] that are not longer than 2 r, r being the length of the second shortest code;
    zeros if that would cost accuracy.

    An error matters between two codes only, and the longer of any two has at least length r, so everything is measured
    by max(|c|, r), and longer codes have no say. The error of a score is that of its product, some u |x - m| |c - m|,
    and without a centre at most u (|x| + |c|)^2 / 4. If |m| |c - m| <= max(|c|, r)^2 / 4 for all codes, a centre leaves
    it about there. Of the shortest code that is not asked if |c| <= r / 4: vectors half-way to another one are too far
    from the origin to be harmed.
    """
    squares = codes.square().sum(1)
    usable = squares.isfinite()
    squares = torch.where(usable, squares, torch.inf)
    shortest = squares.topk(min(2, codes.shape[0]), largest=False).values
    least, second = shortest[0], shortest[-1]
    near = usable & (squares <= 4 * second)
    centre = torch.where(near[:, None], codes, 0).sum(0) / near.sum().clamp(min=1)
    harmless = 4 * centre.norm() * (codes - centre).norm(dim=1) <= squares.clamp(min=second)
    harmless |= ~usable | ((squares == least) & (16 * least <= second))
    return torch.where(harmless.all(), centre, 0)


def statistics_reference(
    x: Tensor, codebook: Tensor, assigned: Tensor, error_where: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error [H], sums [H, K, D] and counts [H, K] of vectors assigned to codes.

    ``assigned`` [H, N] holds -1 for vectors that counts and sums leave out; the error leaves out those where
    ``error_where`` is False, and takes code 0 for the others that have none.
    """
    heads, num_codes, width = codebook.shape
    dtype = wide_dtype(x, codebook)
    counts = torch.zeros(heads, num_codes, dtype=torch.int64, device=x.device)
    sums = torch.zeros(heads, num_codes, width, dtype=dtype, device=x.device)
    errors = torch.zeros(heads, dtype=dtype, device=x.device)
    for head in range(heads):
        used = assigned[head] >= 0
        index, vectors = assigned[head].clamp(min=0), x[head].to(dtype)
        counts[head].index_add_(0, index, used.long())
        sums[head].index_add_(0, index, torch.where(used[:, None], vectors, 0))
        gaps = (vectors - F.embedding(index, codebook[head].to(dtype))).square().sum(1)
        errors[head] = (gaps if error_where is None else torch.where(error_where[head], gaps, 0)).sum()
    return errors, sums, counts


def indices(x: Tensor, codebook: Tensor, options: Options) -> Tensor:
    """Indices [H, N], 0 where no code has a finite score."""
    return indices_reference(x, codebook).clamp(min=0)


def statistics(x: Tensor, codebook: Tensor, mask: Tensor | None, options: StatisticsOptions) -> Statistics:
    """The statistics of the codes found, of vectors that have one and that the mask leaves."""
    found = indices_reference(x, codebook)
    assigned = found if mask is None else torch.where(mask, found, -1)
    return *statistics_reference(x, codebook, assigned, mask), found.clamp(min=0)


def wide_dtype(x: Tensor, codebook: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 if either is."""
    return torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
