"""Random vectors, brute-force distances, and quantisers' layouts and state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvq.models import VectorQuantizer

BUFFERS = ("embedding", "cluster_size", "embedding_sum", "initialized")

EACH_LAYOUT = pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "cosine"},
        {"heads": 3},
        {"heads": 3, "metric": "cosine"},
        {"heads": 3, "separate_codebook_per_head": True},
        {"heads": 3, "separate_codebook_per_head": True, "metric": "cosine"},
    ],
    ids=["plain", "cosine", "shared-heads", "shared-heads-cosine", "own-heads", "own-heads-cosine"],
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def buffers(quantizer: VectorQuantizer) -> dict[str, Tensor]:
    return {name: getattr(quantizer, name).detach().clone() for name in BUFFERS}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in BUFFERS)


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    return (x.double()[:, None] - codebook.double()).square().sum(-1)


def is_row_of(vectors: Tensor, batch: Tensor) -> bool:
    return bool((vectors[:, None] == batch[None]).all(-1).any(1).all())


def rotation_matrices(x: Tensor, code: Tensor) -> Tensor:
    """s R for each row, [N, D, D] in float64, written out as in the paper."""
    x, code = x.double(), code.double()
    a, b = x / x.norm(dim=1, keepdim=True), code / code.norm(dim=1, keepdim=True)
    r = (a + b) / (a + b).norm(dim=1, keepdim=True)
    identity = torch.eye(x.shape[1], dtype=torch.float64)
    turn = identity - 2 * r[:, :, None] * r[:, None] + 2 * b[:, :, None] * a[:, None]
    return turn * (code.norm(dim=1) / x.norm(dim=1))[:, None, None]
