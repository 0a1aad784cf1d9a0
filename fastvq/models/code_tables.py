"""Weights that belong to codes: first values under which similar codes are alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LONGEST = 3.0


def mixed_by_codebook(weight: Tensor, codebook: Tensor, dim: int) -> Tensor:
    """Random weights of codes, mixed so that those of two codes correlate as the codes' vectors do.

    With E the codebook [K, D], less its mean and divided by its standard deviation, the result is
    ``(E E^T / D)^(1/2) @ weight`` along ``dim``: of independent entries of one variance come the same distribution and
    the same variance as of E times a random matrix, with no other random numbers. A codebook of equal codes changes
    nothing. Codes that no data have moved may lie far away; lest they decide alone what is similar, no vector counts as
    longer, seen from the median of all, than three times the median length.

    Args:
        weight: of K entries along ``dim``.
        codebook: [K, D].

    Returns:
        like ``weight``.
    """
    vectors = codebook.detach().to(weight.device, torch.float64)
    vectors = vectors - vectors.median(0).values
    lengths = vectors.norm(dim=1)
    longest = _LONGEST * lengths.median()
    if longest > 0:
        vectors *= (longest / lengths.clamp(min=longest))[:, None]
    vectors = vectors - vectors.mean(0)
    deviation = vectors.std(unbiased=False)
    if not deviation > 0:
        return weight.clone()
    # Of the thin decomposition, as the K x K matrix of a large codebook would take minutes.
    left, scales, _ = torch.linalg.svd(vectors / (deviation * math.sqrt(vectors.shape[1])), full_matrices=False)
    onto, back = left.T.to(weight.dtype), (left * scales).to(weight.dtype)
    moved = weight.detach().movedim(dim, 0)
    return (back @ (onto @ moved.flatten(1))).view(moved.shape).movedim(0, dim).contiguous()
