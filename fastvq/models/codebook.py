"""The state of a quantiser: codes, their moving averages, and how they start, move and are looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._check import require_bool, require_choice, require_positive_int
from fastvq.errors import ArgumentError
from fastvq.models import codebook_update  # noqa: F401  (registers the operations)
from fastvq.models.code_gradient import pass_gradient
from fastvq.models.repeated_pass import Pass, PassMemory, is_repetition, may_be_repeated, refuse_repetition
from fastvq.ops.nearest_code import METRICS, Metric

CodebookInit = Literal["normal", "data", "kmeans"]
CODEBOOK_INITS: tuple[CodebookInit, ...] = ("normal", "data", "kmeans")


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
        initialized: whether the codes are more than random numbers, a buffer of shape []: 0 or 1, or between them in a
            moving average of models, where anything but 0 says yes. Floating point, so that it can be averaged.
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
        self.register_buffer("initialized", torch.tensor(float(init == "normal"), dtype=torch.float32))
        self._passes = PassMemory()

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

    def _stored(self) -> Tensor:
        """The state's codes [G, K, D]."""
        return self.embedding if self.separate_codebook_per_head else self.embedding[None]

    def _compared(self, stored: Tensor) -> Tensor:
        """Codes [G, K, D] as they are compared and handed out, of those of the state."""
        return F.normalize(stored, dim=-1) if self.metric == "cosine" and self.learnable_codebook else stored

    def _codes(self) -> Tensor:
        """Codes [G, K, D] as they are compared and handed out, differentiable if they are learnt."""
        return self._compared(self._stored())

    def _open_pass(
        self, vectors: Tensor, moves: bool, searched: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Pass | None]:
        """The state's codes for one pass, neither changed by its updates nor differentiable, started from ``searched``
        [G, M, D] where ``mask`` if they ``moves`` and that is still to be done; and the first run of a repetition,
        whose codes they then are.

        ``vectors`` is the pass's input, by which the repetition knows its first run.
        """
        if is_repetition():
            first = self._passes.recall(vectors)
            if first is not None:
                return first.codes, first
            if moves:
                refuse_repetition("its first run is not known: other input, or too long ago")
        elif moves and self._may_have_to_start:
            self._start(searched, mask)
        stored = self._stored().detach()
        return torch.ops.fastvq.snapshot(stored, moves) if self.training else stored, None

    def _close_pass(
        self,
        vectors: Tensor,
        stored: Tensor,
        first: Pass | None,
        moves: bool,
        counts: Tensor,
        sums: Tensor,
        searched: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Move the codebook by what a pass has found, as `_move` does, unless it is a repetition; counts [L, G, K] of
        all processes.
        """
        if not moves:
            used = counts.to(torch.promote_types(self.embedding.dtype, torch.float32))
        elif first is None:
            used = self._move(counts, sums, searched, mask)
        else:
            used = first.used
        if first is not None:
            first.skip_draws()
        elif self.training and may_be_repeated():
            self._passes.remember(vectors, stored, used)
        return used

    def _vectors(self, codes: Tensor, table: Tensor) -> Tensor:
        """Rows of table [G, K, D] at codes [..., heads], or [...] with one head: [..., D]."""
        if table.shape[0] > 1:
            codes = codes + torch.arange(0, table.shape[0] * self.num_codes, self.num_codes, device=codes.device)
        return F.embedding(codes, table.reshape(-1, self.code_dim))

    def _start(self, searched: Tensor, mask: Tensor | None) -> None:
        """Initialise from vectors [G, M, D], unless the buffer says that it was done."""
        self._drawing(
            torch.ops.fastvq.start_codebook,
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
        return self._drawing(
            torch.ops.fastvq.move_codebook,
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

    def _drawing(self, operation: Callable[..., Any], *args: Any) -> Any:
        """An operation that may draw random numbers; a pass that may be repeated keeps note of them."""
        if not may_be_repeated():
            return operation(*args)
        with self._passes.drawing(self.embedding.device):
            return operation(*args)

    def _codebook_error(self, stored: Tensor, counts: Tensor, sums: Tensor, error: Tensor) -> Tensor:
        """sum |sg[x] - e|^2: of value ``error``, with the gradient 2 (n_i e_i - s_i) that counts and sums give."""
        # Of the codes from before the pass moves them.
        codes = self._compared(pass_gradient(self._stored(), stored, "straight_through"))
        moment = (counts[..., None] * codes.square()).sum() - 2 * (codes * sums).sum()
        return error.detach() + (moment - moment.detach())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Whole modules pickled by earlier versions have none.
        self.__dict__.setdefault("_passes", PassMemory())
        self._take_old_state()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._may_have_to_start = self.init != "normal"
        self._take_old_state()

    def _take_old_state(self) -> None:
        """Earlier versions had a bool, which comes in with whole modules and where a state dict is assigned."""
        if self.initialized.dtype == torch.bool:
            self.initialized = self.initialized.float()
