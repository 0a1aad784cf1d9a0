"""The state of a quantiser: codes, their moving averages, and how they start, move and are looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._check import require_choice, require_positive_int
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import codebook_update  # noqa: F401  (registers the operations)
from fastvq.models.code_gradient import pass_gradient
from fastvq.models.config import CODEBOOK_INITS, CodebookInit
from fastvq.ops.nearest_code import METRICS, Metric


def require_bool(name: str, value: object, *, optional: bool = False) -> None:
    if not isinstance(value, bool) and not (optional and value is None):
        expected = "a bool or None" if optional else "a bool"
        raise ArgumentTypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}")


def _wide_default() -> torch.dtype:
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class Codebook(nn.Module):
    """The codebook part of :class:`fastvq.VectorQuantizer`, which explains the arguments.

    G is ``heads`` with a codebook per head and 1 otherwise; the axis of G is absent from the state where heads share a
    codebook.

    Attributes:
        embedding: codes [G, K, D]; a buffer, or a parameter if ``learnable_codebook``.
        cluster_size: N [G, K], a buffer.
        embedding_sum: m [G, K, D], a buffer; None if ``learnable_codebook``.
        initialized: whether the codes are more than random numbers, a bool buffer of shape [].
        freeze_codebook: whether passes in training mode leave the codebook alone; may be set at any time.
    """

    embedding: Tensor
    cluster_size: Tensor
    embedding_sum: Tensor | None
    initialized: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        decay: float,
        eps: float,
        init: CodebookInit,
        kmeans_iters: int,
        revive_below: float,
        metric: Metric,
        heads: int,
        separate_codebook_per_head: bool,
        learnable_codebook: bool,
        freeze_codebook: bool,
        sync_codebook: bool | None,
    ) -> None:
        super().__init__()
        self.num_codes = require_positive_int("num_codes", num_codes)
        self.code_dim = require_positive_int("code_dim", code_dim)
        self.heads = require_positive_int("heads", heads)
        self.kmeans_iters = require_positive_int("kmeans_iters", kmeans_iters)
        require_choice("metric", metric, METRICS)
        if not 0 <= decay < 1:
            raise ArgumentError(f"decay: must lie in [0, 1), got {decay!r}")
        for name, flag in (
            ("separate_codebook_per_head", separate_codebook_per_head),
            ("learnable_codebook", learnable_codebook),
            ("freeze_codebook", freeze_codebook),
        ):
            require_bool(name, flag)
        require_bool("sync_codebook", sync_codebook, optional=True)
        if separate_codebook_per_head and heads == 1:
            raise ArgumentError("separate_codebook_per_head: expected heads of 2 or more, got 1")
        self.decay, self.eps, self.revive_below, self.metric = decay, eps, revive_below, metric
        self.separate_codebook_per_head, self.learnable_codebook = separate_codebook_per_head, learnable_codebook
        self.freeze_codebook, self.sync_codebook = freeze_codebook, sync_codebook
        self.init = init
        shape = (heads, num_codes) if separate_codebook_per_head else (num_codes,)
        # Averages that move by a hundredth of their value are lost in a shorter type.
        dtype = torch.get_default_dtype() if learnable_codebook else _wide_default()
        embedding = torch.randn(*shape, code_dim, dtype=dtype)
        if metric == "cosine":
            embedding = F.normalize(embedding, dim=-1)
        if learnable_codebook:
            self.embedding = nn.Parameter(embedding)
        else:
            self.register_buffer("embedding", embedding)
        self.register_buffer("cluster_size", torch.ones(shape, dtype=_wide_default()))
        self.register_buffer("embedding_sum", None if learnable_codebook else embedding.clone())
        self.register_buffer("initialized", torch.tensor(init == "normal"))

    @property
    def init(self) -> CodebookInit:
        """How the codes start; setting it lets the next training pass look at ``initialized`` again."""
        return self._init

    @init.setter
    def init(self, value: CodebookInit) -> None:
        require_choice("init", value, CODEBOOK_INITS)
        self._init = value
        self._may_have_to_start = value != "normal"

    def orthogonal_loss(self) -> Tensor:
        """How far the codes' directions are from orthogonal: mean over pairs of cos^2, less what a code has with
        itself, sum of (e_i.e_j)^2 / K^2 - 1 / K over unit vectors, averaged over codebooks; a scalar.

        To be added to the loss of a learnable codebook (Shin et al. 2021, arXiv 2112.00384, equation 2).
        """
        with torch.autocast(self.embedding.device.type, enabled=False):
            codes = F.normalize(self._codes(), dim=-1)
            # |E E'|^2 = |E' E|^2: the smaller of the two will do.
            rows = codes if self.num_codes <= self.code_dim else codes.mT
            squares = (rows @ rows.mT).square().sum((1, 2))
        return (squares / self.num_codes**2 - 1 / self.num_codes).mean()

    def _codes(self) -> Tensor:
        """Codes [G, K, D] as they are compared and handed out, differentiable if they are learnt."""
        codes = self.embedding if self.separate_codebook_per_head else self.embedding[None]
        return F.normalize(codes, dim=-1) if self.metric == "cosine" and self.learnable_codebook else codes

    def _steady_codes(self) -> Tensor:
        """The same for one pass: neither changed by its updates nor differentiable."""
        codes = self._codes().detach()
        return torch.ops.fastvq.snapshot(codes) if self.training else codes

    def _vectors(self, codes: Tensor, table: Tensor) -> Tensor:
        """Rows of table [G, K, D] at codes [..., heads], or [...] with one head: [..., D]."""
        if table.shape[0] > 1:
            codes = codes + torch.arange(0, table.shape[0] * self.num_codes, self.num_codes, device=codes.device)
        return F.embedding(codes, table.reshape(-1, self.code_dim))

    def _start(self, searched: Tensor, mask: Tensor | None) -> None:
        """Initialise from vectors [G, M, D], unless the buffer says that it was done."""
        torch.ops.fastvq.start_codebook(
            searched.detach(),
            mask,
            self.embedding.detach(),
            self.cluster_size,
            self.embedding_sum,
            self.initialized,
            self.init,
            self.kmeans_iters,
            self.metric == "cosine",
            self.sync_codebook,
        )
        # Asking the buffer in every step would make a GPU wait.
        self._may_have_to_start = False

    def _move(self, counts: Tensor, sums: Tensor, searched: Tensor, mask: Tensor | None) -> Tensor:
        """One step by counts [L, G, K] and sums [G, K, D]; the counts of all processes."""
        return torch.ops.fastvq.move_codebook(
            counts,
            sums,
            searched.detach(),
            mask,
            self.embedding.detach(),
            self.cluster_size,
            self.embedding_sum,
            self.decay,
            self.eps,
            self.revive_below,
            self.metric == "cosine",
            self.sync_codebook,
        )

    def _codebook_error(self, table: Tensor, counts: Tensor, sums: Tensor, error: Tensor) -> Tensor:
        """sum |sg[x] - e|^2: of value ``error``, with the gradient 2 (n_i e_i - s_i) that counts and sums give."""
        codes = pass_gradient(self._codes(), table, "straight_through")
        moment = (counts[..., None] * codes.square()).sum() - 2 * (codes * sums).sum()
        return error.detach() + (moment - moment.detach())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._may_have_to_start = self.init != "normal"
