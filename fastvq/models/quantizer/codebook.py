"""What a quantiser has: codes and their moving averages, and how they start, move and are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.models.quantizer import update  # noqa: F401  (registers the operations)
from fastvq.models.quantizer.gradient import pass_gradient
from fastvq.ops.nearest_code import Metric

CodebookInit = Literal["normal", "data", "kmeans"]
CODEBOOK_INITS: tuple[CodebookInit, ...] = ("normal", "data", "kmeans")


@dataclass(frozen=True, eq=False, kw_only=True)
class Codebook:
    """Codes, their moving averages, and the rules by which they follow data.

    The tensors belong to the module that made them its parameters and buffers, and change in place.

    Args:
        embedding: codes [G, K, D], or [K, D] where there is one codebook.
        cluster_size: N, [G, K] or [K].
        embedding_sum: m, like ``embedding``; None if gradients move the codes.
        initialized: whether the codes are more than random numbers, shape []: 0, or anything else for yes.
        init, kmeans_iters, decay, eps, revive_below, metric: see :class:`fastvq.VectorQuantizer`.
        sync: whether processes share their statistics; None: if there are any.
        transform: W [D, D], where the codes are a linear map W c of ``embedding``; None: they are that itself.
    """

    embedding: Tensor
    cluster_size: Tensor
    embedding_sum: Tensor | None
    initialized: Tensor
    init: CodebookInit
    kmeans_iters: int
    decay: float
    eps: float
    revive_below: float
    metric: Metric
    sync: bool | None
    transform: Tensor | None = None

    @property
    def stored(self) -> Tensor:
        """The state's codes [G, K, D]."""
        return self.embedding if self.embedding.ndim == 3 else self.embedding[None]

    def compared(self, stored: Tensor) -> Tensor:
        """What becomes of the state's codes, ``stored`` [G, K, D] now or earlier, to be compared."""
        if self.transform is not None:
            # The same codes whatever surrounds the call.
            with torch.autocast(stored.device.type, enabled=False):
                stored = F.linear(stored, self.transform)
        return F.normalize(stored, dim=-1) if self.metric == "cosine" and self.embedding_sum is None else stored

    @property
    def table(self) -> Tensor:
        """Codes [G, K, D] as they are compared and handed out, differentiable if they are learnt."""
        return self.compared(self.stored)

    def lookup(self, codes: Tensor, table: Tensor | None = None) -> Tensor:
        """Vectors [..., D] of codes [..., G], or [...] with one codebook; of another table [G, K, D] if given."""
        table = self.table if table is None else table
        groups, count, depth = table.shape
        if groups > 1:
            codes = codes + torch.arange(0, groups * count, count, device=codes.device)
        return F.embedding(codes, table.reshape(-1, depth))

    def start(self, vectors: Tensor, mask: Tensor | None = None) -> None:
        """Take the codes from vectors [G, M, D] where ``mask`` [G, M], as ``init`` says, unless that was done."""
        torch.ops.fastvq.start_codebook(
            vectors.detach(),
            mask,
            self.embedding.detach(),
            self.cluster_size,
            self.embedding_sum,
            self.initialized,
            self.init,
            self.kmeans_iters,
            self.metric == "cosine",
            self.sync,
        )

    def move(self, counts: Tensor, sums: Tensor, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        """One step by what L passes found.

        Args:
            counts, sums: [L, G, K] and [G, K, D], of this process.
            vectors, mask: among which dead codes find new places, [G, M, D], where ``mask`` [G, M] is True.

        Returns:
            counts of all processes, as floating point.
        """
        return torch.ops.fastvq.move_codebook(
            counts,
            sums,
            vectors.detach(),
            mask,
            self.embedding.detach(),
            self.cluster_size,
            self.embedding_sum,
            self.decay,
            self.eps,
            self.revive_below,
            self.metric == "cosine",
            self.sync,
        )

    def error(self, stored: Tensor, counts: Tensor, sums: Tensor, value: Tensor) -> Tensor:
        """``sum |sg[x] - e|^2``: of a known value, with the gradient 2 (n_i e_i - s_i) that counts and sums give.

        ``stored`` are the codes that were searched in, before the pass moves them.
        """
        codes = self.compared(pass_gradient(self.stored, stored, "straight_through"))
        moment = (counts[..., None] * codes.square()).sum() - 2 * (codes * sums).sum()
        return value.detach() + (moment - moment.detach())

    def orthogonal_loss(self) -> Tensor:
        """See :meth:`fastvq.VectorQuantizer.orthogonal_loss`."""
        with torch.autocast(self.embedding.device.type, enabled=False):
            codes = F.normalize(self.table, dim=-1)
            count, depth = codes.shape[1:]
            # |E E'|^2 = |E' E|^2: the smaller of the two will do.
            rows = codes if count <= depth else codes.mT
            squares = (rows @ rows.mT).square().sum((1, 2))
        return (squares / count**2 - 1 / count).mean()


def move_alike(books: Sequence[Codebook]) -> bool:
    """Whether codebooks [K, D] of the Euclidean metric move by averages alone, and all by the same rule."""
    plain = all(book.embedding_sum is not None and book.revive_below <= 0 for book in books)
    return plain and len({(book.decay, book.eps, book.sync) for book in books}) == 1


def move_together(books: Sequence[Codebook], counts: Tensor, sums: Tensor) -> Tensor:
    """`Codebook.move` of Q codebooks of one size that move alike, by one pass over each: counts [Q, K] and sums
    [Q, K, D].
    """
    first = books[0]
    moved: Tensor = torch.ops.fastvq.move_codebooks(
        counts,
        sums,
        [book.embedding.detach() for book in books],
        [book.cluster_size for book in books],
        [book.embedding_sum for book in books],
        first.decay,
        first.eps,
        first.sync,
    )
    return moved
