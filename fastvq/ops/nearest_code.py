"""Nearest code by Euclidean distance."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._check import require_floating, require_shape, require_tensor
from fastvq.errors import ArgumentError

_CHUNK_SCORES = 1 << 22


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest to each vector.

    Args:
        x: vectors [N, D], floating point.
        codebook: codes [K, D], floating point, K >= 1.

    Returns:
        int64 [N]: argmin over k of |x - codebook[k]|^2, computed in float32 (float64 for float64 input). The lowest
        index among equal scores; codes nearer to each other than rounding, copies included, may change places.

    Raises:
        ArgumentError, ArgumentTypeError: shapes or dtypes that do not fit.

    The score is |c|^2 / 2 - x.c: |x|^2 is the same for every code and would only add rounding error. Both sides are
    shifted by the codebook's mean, which keeps the score accurate for data far from the origin.
    """
    require_shape("x", require_tensor("x", x), ["N", "D"])
    require_shape("codebook", require_tensor("codebook", codebook), ["K", x.shape[1]])
    require_floating("x", x)
    require_floating("codebook", codebook)
    if codebook.shape[0] == 0:
        raise ArgumentError("codebook: expected at least one code, got shape " + str(list(codebook.shape)))
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        codes = codebook.to(dtype)
        mean = codes.mean(0)
        codes = codes - mean
        half_norms = codes.square().sum(1) / 2
        rows = max(1, _CHUNK_SCORES // codes.shape[0])
        indices = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
        for start in range(0, x.shape[0], rows):
            part = x[start : start + rows].to(dtype) - mean
            scores = torch.addmm(half_norms, part, codes.T, alpha=-1)
            torch.argmin(scores, dim=1, out=indices[start : start + rows])
        return indices
