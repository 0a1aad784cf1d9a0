"""Vector quantisation with a codebook that follows the data by exponential moving averages."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._check import require_choice, require_codes, require_floating, require_positive_int, require_tensor
from fastvq.errors import ArgumentError
from fastvq.models.config import CODEBOOK_INITS, CodebookInit
from fastvq.ops.nearest_code import nearest_code

_KMEANS_ITERATIONS = 10
_KMEANS_VECTORS_PER_CODE = 256


class QuantizerOutput(NamedTuple):
    """Result of :class:`VectorQuantizer`.

    Attributes:
        quantized: codes' vectors, shape and dtype of the input; its gradient passes straight to the input.
        codes: int64, the input's shape without the vector axis.
        commitment_loss: beta * mean |x - sg[e]|^2, a scalar.
        perplexity: exp of the entropy of code use in this batch, between 1 and K, a scalar without gradient.
    """

    quantized: Tensor
    codes: Tensor
    commitment_loss: Tensor
    perplexity: Tensor


class VectorQuantizer(nn.Module):
    """Nearest code with straight-through gradient and EMA codebook (van den Oord et al. 2017, appendix A.1).

    In training mode each forward pass moves the codebook: with n_i vectors assigned to code i and their sum s_i,
    N_i <- g N_i + (1 - g) n_i, m_i <- g m_i + (1 - g) s_i, e_i = m_i / N'_i, where N' is N with Laplace smoothing,
    N'_i = (N_i + eps) / (sum N + K eps) * sum N. Under ``torch.distributed`` counts and sums are added over all
    processes first. Vectors that are not finite leave the codebook as it was.

    Args:
        num_codes: K.
        code_dim: D.
        decay: g, in [0, 1).
        eps: Laplace smoothing, in counts.
        commitment: beta.
        init: ``normal``, or from the first training batch by ``data`` (random vectors of it) or ``kmeans``.
        revive_below: codes whose N_i falls below this many vectors per batch are moved onto random vectors of the
            batch; 0 switches this off.
        channels_last: whether vectors lie along the last axis ([..., D]) rather than axis 1 ([B, D, ...]).
    """

    embedding: Tensor
    cluster_size: Tensor
    embedding_sum: Tensor
    initialized: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        decay: float = 0.99,
        eps: float = 1e-5,
        commitment: float = 0.25,
        init: CodebookInit = "normal",
        revive_below: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.num_codes = require_positive_int("num_codes", num_codes)
        self.code_dim = require_positive_int("code_dim", code_dim)
        require_choice("init", init, CODEBOOK_INITS)
        if not 0 <= decay < 1:
            raise ArgumentError(f"decay: must lie in [0, 1), got {decay!r}")
        if eps <= 0 or commitment < 0 or revive_below < 0:
            raise ArgumentError(
                "eps must be positive, commitment and revive_below not negative; "
                f"got {eps!r}, {commitment!r}, {revive_below!r}"
            )
        self.decay, self.eps, self.commitment, self.revive_below = decay, eps, commitment, revive_below
        self.init, self.channels_last = init, channels_last
        embedding = torch.randn(num_codes, code_dim)
        self.register_buffer("embedding", embedding)
        self.register_buffer("cluster_size", torch.ones(num_codes))
        self.register_buffer("embedding_sum", embedding.clone())
        self.register_buffer("initialized", torch.tensor(init == "normal"))

    def extra_repr(self) -> str:
        return (
            f"{self.num_codes}, {self.code_dim}, decay={self.decay}, commitment={self.commitment}, init={self.init!r}"
        )

    def forward(self, x: Tensor) -> QuantizerOutput:
        """Quantise vectors [B, D, ...] (or [..., D] when ``channels_last``)."""
        axis = -1 if self.channels_last else 1
        require_floating("x", require_tensor("x", x))
        if x.ndim < 2 or x.shape[axis] != self.code_dim:
            raise ArgumentError(f"x: expected {self.code_dim} channels along axis {axis}, got shape {list(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            # float32 at least: the codebook's averages must not be rounded to the activations' type.
            wide = x.movedim(axis, -1).to(torch.promote_types(x.dtype, torch.float32))
            flat = wide.detach().reshape(-1, self.code_dim)
            if self.training and self.init != "normal" and not bool(self.initialized):
                self._initialize(flat)
            codes = nearest_code(flat, self.embedding)
            vectors = F.embedding(codes, self.embedding).to(wide.dtype).view_as(wide)
            loss = self.commitment * F.mse_loss(wide, vectors)
            # The added zero carries the gradient; adding vectors - wide to wide would round.
            quantized = vectors + (wide - wide.detach())
            counts = self._batch_counts(codes)
            if self.training:
                self._update(flat, codes, counts)
        usage = counts / counts.sum().clamp(min=1)
        perplexity = torch.exp(-torch.xlogy(usage, usage).sum())
        return QuantizerOutput(quantized.to(x.dtype).movedim(-1, axis), codes.view(wide.shape[:-1]), loss, perplexity)

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors of codes: int [B, ...] to [B, D, ...] (or [..., D] when ``channels_last``)."""
        codes = require_codes("codes", codes, [None] * require_tensor("codes", codes).ndim, self.num_codes)
        vectors = F.embedding(codes, self.embedding)
        return vectors if self.channels_last else vectors.movedim(-1, 1)

    def _batch_counts(self, codes: Tensor) -> Tensor:
        counts = torch.bincount(codes, minlength=self.num_codes).to(self.embedding.dtype)
        return _sum_over_processes(counts) if self.training else counts

    @torch.no_grad()
    def _update(self, flat: Tensor, codes: Tensor, counts: Tensor) -> None:
        flat = flat.to(self.embedding.dtype)
        sums = _sum_over_processes(torch.zeros_like(self.embedding_sum).index_add_(0, codes, flat))
        usable = torch.isfinite(sums).all() & (counts.sum() > 0)
        size = torch.lerp(counts, self.cluster_size, self.decay)
        total = torch.lerp(sums, self.embedding_sum, self.decay)
        smoothed = (size + self.eps) / (size.sum() + self.num_codes * self.eps) * size.sum()
        embedding = total / smoothed[:, None]
        if self.revive_below > 0:
            dead = size < self.revive_below
            fresh = self.embedding.clone()
            if flat.shape[0]:
                fresh = flat[torch.randint(flat.shape[0], (self.num_codes,), device=flat.device)]
            fresh = _from_first_process(fresh)
            size = torch.where(dead, torch.ones_like(size), size)
            total = torch.where(dead[:, None], fresh, total)
            embedding = torch.where(dead[:, None], fresh, embedding)
        self.cluster_size.copy_(torch.where(usable, size, self.cluster_size))
        self.embedding_sum.copy_(torch.where(usable, total, self.embedding_sum))
        self.embedding.copy_(torch.where(usable, embedding, self.embedding))

    @torch.no_grad()
    def _initialize(self, flat: Tensor) -> None:
        flat = flat[torch.isfinite(flat).all(1)].to(self.embedding.dtype)
        if flat.shape[0] == 0:
            raise ArgumentError("x: the first batch holds no finite vector to initialise the codebook from")
        codebook = flat[_spread(flat.shape[0], self.num_codes, flat.device)]
        if self.init == "kmeans":
            subset = min(flat.shape[0], self.num_codes * _KMEANS_VECTORS_PER_CODE)
            codebook = _kmeans(flat[_spread(flat.shape[0], subset, flat.device)], codebook)
        codebook = _from_first_process(codebook)
        self.embedding.copy_(codebook)
        self.embedding_sum.copy_(codebook)
        self.cluster_size.fill_(1)
        self.initialized.fill_(True)


def _spread(available: int, wanted: int, device: torch.device) -> Tensor:
    """Random indices, each available one used before any is repeated."""
    return torch.cat([torch.randperm(available, device=device) for _ in range(-(-wanted // available))])[:wanted]


def _kmeans(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Lloyd's iterations; an empty cluster keeps its centre."""
    for _ in range(_KMEANS_ITERATIONS):
        codes = nearest_code(vectors, codebook)
        counts = torch.bincount(codes, minlength=codebook.shape[0])[:, None]
        sums = torch.zeros_like(codebook).index_add_(0, codes, vectors)
        codebook = torch.where(counts > 0, sums / counts.clamp(min=1), codebook)
    return codebook


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _sum_over_processes(value: Tensor) -> Tensor:
    if _distributed():
        dist.all_reduce(value)
    return value


def _from_first_process(value: Tensor) -> Tensor:
    if _distributed():
        value = value.contiguous()
        dist.broadcast(value, src=0)
    return value
