"""A quantiser whose codes are learnt together: a linear map of random vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq.errors import ArgumentError
from fastvq.models.quantizer.vector import VectorQuantizer

# What says how a codebook follows data, or has a codebook per head: nothing here does.
_OTHERS = ("decay", "eps", "init", "kmeans_iters", "revive_below", "learnable_codebook", "separate_codebook_per_head")


class SimVQ(VectorQuantizer):
    """Nearest code in a frozen codebook under a learnable linear map (Zhu et al. 2024, arXiv 2411.02038, section 4).

    The codes are e_i = W c_i with random c_i that stay as they are. W is a parameter, and an optimiser moves it by
    ``codebook_loss``, which belongs into the loss: every gradient moves all codes, so that none is left behind.

    Args:
        num_codes: K.
        code_dim: D.
        options: of :class:`fastvq.VectorQuantizer`, without those that say how a codebook follows data (``decay``,
            ``eps``, ``init``, ``kmeans_iters``, ``revive_below``, ``learnable_codebook``) and without
            ``separate_codebook_per_head``.

    Attributes:
        embedding: c [K, D], normal with deviation D^-1/2, a buffer.
        transform: its ``weight`` [D, D] is W.
        cluster_size: running use of the codes [K], a buffer; nothing depends on it.
        initialized: as of the plain quantiser.
    """

    def __init__(self, num_codes: int, code_dim: int, **options: Any) -> None:
        for name in _OTHERS:
            if name in options:
                raise ArgumentError(f"{name}: a codebook that is frozen under a map has none, got {options[name]!r}")
        super().__init__(num_codes, code_dim, learnable_codebook=True, **options)
        frozen = torch.randn(num_codes, code_dim, dtype=self.embedding.dtype) * code_dim**-0.5
        del self.embedding
        self.register_buffer("embedding", frozen)
        self.transform = nn.Linear(code_dim, code_dim, bias=False)

    def _code_map(self) -> Tensor:
        return self.transform.weight

    def extra_repr(self) -> str:
        return f"{self.num_codes}, {self.code_dim}, commitment={self.commitment}, gradient={self.gradient!r}"
