"""Vector quantisation with a codebook that follows the data by exponential moving averages, or by gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._check import (
    require_bool,
    require_choice,
    require_codes,
    require_dense,
    require_floating,
    require_integer,
    require_tensor,
)
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.models.code_gradient import CODE_GRADIENTS, CodeGradient, pass_gradient
from fastvq.models.codebook import Codebook, CodebookInit
from fastvq.models.codebook_update import LEAST_LENGTH
from fastvq.models.repeated_pass import is_repetition
from fastvq.ops.dispatch import is_batched
from fastvq.ops.nearest_code import MODES, CodeStatistics, Metric, Mode, nearest_code, nearest_code_statistics


class QuantizerOutput(NamedTuple):
    """Result of :class:`VectorQuantizer`.

    Attributes:
        quantized: codes' vectors, shape and dtype of the input; its gradient passes straight to the input, or as the
            option ``gradient`` says. Zero where masked.
        codes: int64, the input's shape without the vector axis; with several heads [..., heads]. -1 where masked.
        commitment_loss: beta * mean |x - sg[e]|^2, a scalar.
        perplexity: exp of the entropy of code use in this batch, between 1 and K, a scalar without gradient; averaged
            over heads that have a codebook each.
        codebook_loss: mean |sg[x] - e|^2, a scalar; 0 unless the codebook is learnable.
        dead_codes: int64 scalar, how many codes no vector of this batch has, of all codebooks.
    """

    quantized: Tensor
    codes: Tensor
    commitment_loss: Tensor
    perplexity: Tensor
    codebook_loss: Tensor
    dead_codes: Tensor

    @property
    def loss(self) -> Tensor:
        """What to add to the reconstruction's error: commitment and codebook loss."""
        return self.commitment_loss + self.codebook_loss


class Assignment(NamedTuple):
    """What a pass found for vectors [N, heads, D], before the codebook moves; ``errors`` are commitment and codebook
    loss, unweighted.
    """

    quantized: Tensor
    codes: Tensor
    statistics: CodeStatistics
    errors: tuple[Tensor, Tensor]


class VectorQuantizer(Codebook):
    """Nearest code with straight-through gradient and EMA codebook (van den Oord et al. 2017, appendix A.1).

    In training mode each forward pass moves the codebook: with n_i vectors assigned to code i and their sum s_i,
    N_i <- g N_i + (1 - g) n_i, m_i <- g m_i + (1 - g) s_i, e_i = m_i / N'_i, where N' is N with Laplace smoothing,
    N'_i = (N_i + eps) / (sum N + K eps) * sum N. Under ``torch.distributed`` counts and sums are added over all
    processes first. Vectors that are not finite are left out: they have code 0 (if no ``check_finite`` refuses them),
    show in the losses and move nothing; a batch without others leaves the codebook as it was.

    The codebook's state keeps its own type, float32 unless the module is converted, under autocast and for input of
    any floating-point type.

    A pass inside `torch.utils.checkpoint` (of either kind) is repeated in backward: with the codebook of its first run,
    and without moving it again. Passes in training mode with gradients off, or with hooks for saved tensors, are kept
    for that: each costs a copy of the codes until it was repeated, at most 16, or more if they fit into 64 MiB.
    Repetitions are told by their input, up to rounding. A compiled pass that moves the codebook cannot be repeated.

    Args:
        num_codes: K.
        code_dim: D.
        decay: g, in [0, 1).
        eps: Laplace smoothing, in counts.
        commitment: beta.
        init: ``normal``, or from the first training batch by ``data`` (random vectors of it) or ``kmeans``.
        revive_below: codes whose N_i falls below this many vectors per batch are moved onto random vectors of the
            batch, with N_i = max(1, revive_below); 0 switches this off.
        channels_last: whether vectors lie along the last axis ([..., C]) rather than axis 1 ([B, C, ...]).
        metric: ``euclidean``, or ``cosine``: vectors and codes are scaled to unit length, e_i = m_i / |m_i|, and
            ``quantized`` holds unit vectors (Yu et al. 2022, ViT-VQGAN, section 3.2).
        heads: into how many vectors of D channels each input vector of C = heads * D channels is split.
        separate_codebook_per_head: a codebook for each head instead of one for all.
        mode: ``exact`` or ``fast``, see `fastvq.ops.nearest_code`.
        deterministic: see `fastvq.ops.nearest_code_statistics`.
        gradient: ``straight_through`` or ``rotation``, see `fastvq.models.code_gradient.pass_gradient`.
        learnable_codebook: the codes are a parameter that an optimiser moves by ``codebook_loss``, which belongs into
            the loss (van den Oord et al. 2017, equation 3), in place of moving averages.
        kmeans_iters: Lloyd's iterations of ``init = "kmeans"``.
        freeze_codebook: leave the codebook alone in training mode too; may be set at any time.
        sync_codebook: whether processes of ``torch.distributed`` share their statistics; None: if there are any.
        check_finite: raise for vectors that are not finite.

    Raises:
        UnavailableError: a pass that moves the codebook runs in backward, and its first run is not known; or under
            torch.vmap.
    """

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
        metric: Metric = "euclidean",
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        mode: Mode = "exact",
        deterministic: bool | None = None,
        gradient: CodeGradient = "straight_through",
        learnable_codebook: bool = False,
        kmeans_iters: int = 10,
        freeze_codebook: bool = False,
        sync_codebook: bool | None = None,
        check_finite: bool = False,
    ) -> None:
        super().__init__(
            num_codes,
            code_dim,
            decay=decay,
            eps=eps,
            init=init,
            kmeans_iters=kmeans_iters,
            revive_below=revive_below,
            metric=metric,
            heads=heads,
            separate_codebook_per_head=separate_codebook_per_head,
            learnable_codebook=learnable_codebook,
            freeze_codebook=freeze_codebook,
            sync_codebook=sync_codebook,
        )
        if not (eps > 0 and commitment >= 0 and revive_below >= 0):
            raise ArgumentError(
                "eps must be positive, commitment and revive_below not negative; "
                f"got {eps!r}, {commitment!r}, {revive_below!r}"
            )
        require_choice("mode", mode, MODES)
        require_choice("gradient", gradient, CODE_GRADIENTS)
        require_bool("channels_last", channels_last)
        require_bool("deterministic", deterministic, optional=True)
        require_bool("check_finite", check_finite)
        self.commitment, self.channels_last = commitment, channels_last
        self.mode, self.deterministic, self.gradient = mode, deterministic, gradient
        self.check_finite = check_finite

    def extra_repr(self) -> str:
        text = (
            f"{self.num_codes}, {self.code_dim}, decay={self.decay}, commitment={self.commitment}, init={self.init!r}"
        )
        usual = {"metric": "euclidean", "heads": 1, "gradient": "straight_through", "learnable_codebook": False}
        return text + "".join(f", {k}={getattr(self, k)!r}" for k, v in usual.items() if getattr(self, k) != v)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, freeze_codebook: bool | None = None) -> QuantizerOutput:
        """Quantise vectors [B, C, ...] (or [..., C] when ``channels_last``).

        Args:
            x: of any floating-point type.
            mask: bool, the shape of x without the vector axis; where it is False there is no vector (padding):
                ``quantized`` is 0, codes are -1, and nothing else takes account of it.
            freeze_codebook: overrides the attribute for this pass.
        """
        vectors, real = self._arrange(x, mask)
        moves = self._moves(freeze_codebook)
        # The codebook's averages must not be rounded to the activations' type.
        with torch.autocast(x.device.type, enabled=False):
            searched, group_mask = self._searched(vectors, real), self._group_mask(real)
            stored, first = self._open_pass(vectors, moves, searched, group_mask)
            found = self._assign(vectors, searched, real, group_mask, stored)
            counts, sums = found.statistics.counts[None], found.statistics.sums  # [1, G, K], [G, K, D]
            used = self._close_pass(vectors, stored, first, moves, counts, sums, searched, group_mask)[0]
            commitment, codebook = found.errors
            return QuantizerOutput(
                self._restore(found.quantized.flatten(1), x),
                found.codes.view(self._grid(x)),
                self.commitment * commitment,
                perplexity(used).mean(),
                codebook,
                (used == 0).sum(),
            )

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The codes alone, as :meth:`forward` gives them, without statistics; moves nothing."""
        vectors, real = self._arrange(x, mask)
        searched = self._searched(vectors, real)
        if real is not None and self.check_finite:
            searched = torch.where(self._grouped(real[:, None].expand(-1, self.heads))[..., None], searched, 0)
        table = self._codes()
        indices = nearest_code(searched, table, mode=self.mode, check_finite=self.check_finite)
        return self._absent(self._ungrouped(indices), real, -1).view(self._grid(x))

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors of codes: integers [B, ...], with several heads [B, ..., heads], to [B, C, ...] (or [..., C] when
        ``channels_last``). Code -1, which stands for a masked position, gives zeros.
        """
        codes = require_integer("codes", codes)
        absent = codes == -1
        codes = require_codes("codes", codes.masked_fill(absent, 0), [None] * codes.ndim, self.num_codes)
        if self.heads > 1 and (codes.ndim < 2 or codes.shape[-1] != self.heads):
            raise ArgumentError(f"codes: expected a last axis of {self.heads} heads, got shape {list(codes.shape)}")
        vectors = self._vectors(codes, self._codes()).masked_fill(absent[..., None], 0)
        if self.heads > 1:
            vectors = vectors.flatten(-2)
        return vectors if self.channels_last else vectors.movedim(-1, 1)

    @torch.no_grad()
    def initialize(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Start the codes anew from vectors, shaped as for a pass, as the first training pass would.

        Raises:
            ArgumentError: ``init`` is ``normal``, or no vector is finite; x or mask do not fit.
        """
        if self.init == "normal":
            raise ArgumentError("init: expected 'data' or 'kmeans' to initialise from vectors, got 'normal'")
        self._arrange(x, mask)  # what it refuses must change nothing
        self.initialized.fill_(0)
        self._may_have_to_start = True
        self._begin(x, mask)

    def _moves(self, freeze_codebook: bool | None) -> bool:
        """Whether a pass moves the codebook."""
        moves = self.training and not (self.freeze_codebook if freeze_codebook is None else freeze_codebook)
        if moves and is_batched():
            raise UnavailableError(
                "VectorQuantizer: vmap cannot batch a pass that moves the codebook; call eval() or freeze the codebook"
            )
        return moves

    def _begin(self, x: Tensor, mask: Tensor | None) -> None:
        """Initialise from the vectors of a pass, if that is still to be done."""
        if self._may_have_to_start and not is_repetition():
            vectors, real = self._arrange(x, mask)
            self._start(self._searched(vectors, real), self._group_mask(real))

    def _assign(
        self, vectors: Tensor, searched: Tensor, real: Tensor | None, mask: Tensor | None, stored: Tensor
    ) -> Assignment:
        """Codes of vectors [N, heads, D] where ``real`` [N], searched as [G, M, D] where ``mask`` [G, M] in the state's
        codes [G, K, D].
        """
        table = self._compared(stored)
        # In evaluation too: with the sums it is still one pass over x, and leaving them out would take several.
        found = nearest_code_statistics(
            searched,
            table,
            mask=mask,
            mode=self.mode,
            deterministic=self.deterministic,
            check_finite=self.check_finite,
        )
        values = max(vectors.numel(), 1) if real is None else real.sum().clamp(min=1) * vectors.shape[1:].numel()
        error = found.squared_error.sum()
        codebook_error = torch.zeros_like(error)
        if self.learnable_codebook:
            codebook_error = self._codebook_error(stored, found.counts, found.sums, error)
        codes = self._ungrouped(found.indices)
        # In the type that is compared: with the cosine the gradient passes through the scaling as well.
        compared = self._ungrouped(searched)
        chosen = self._vectors(codes if self.heads > 1 else codes[:, 0], table).view(vectors.shape)
        quantized = pass_gradient(compared, chosen.to(compared.dtype), self.gradient).to(vectors.dtype)
        return Assignment(
            self._absent(quantized, real, 0),
            self._absent(codes, real, -1),
            found,
            (error / values, codebook_error / values),
        )

    def _arrange(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Checked input as vectors [N, heads, D], and the mask as [N]."""
        axis = -1 if self.channels_last else 1
        channels = self.heads * self.code_dim
        require_floating("x", require_tensor("x", x))
        if x.ndim < 2 or x.shape[axis] != channels:
            raise ArgumentError(f"x: expected {channels} channels along axis {axis}, got shape {list(x.shape)}")
        if mask is not None:
            if require_tensor("mask", mask).dtype != torch.bool:
                raise ArgumentTypeError(f"mask: expected torch.bool, got {mask.dtype}")
            require_dense("mask", mask)
            expected = [*x.shape[:-1]] if self.channels_last else [x.shape[0], *x.shape[2:]]
            if list(mask.shape) != expected:
                raise ArgumentError(f"mask: expected shape {expected}, got {list(mask.shape)}")
            if mask.device != x.device:
                raise ArgumentError(f"mask: expected device {x.device} as for x, got {mask.device}")
            mask = mask.flatten()
        return x.movedim(axis, -1).reshape(-1, self.heads, self.code_dim), mask

    def _restore(self, quantized: Tensor, x: Tensor) -> Tensor:
        """Vectors [N, C] in the shape of x."""
        if self.channels_last:
            return quantized.view(x.shape)
        return quantized.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)

    def _grid(self, x: Tensor) -> list[int]:
        shape = [*x.shape[:-1]] if self.channels_last else [x.shape[0], *x.shape[2:]]
        return shape if self.heads == 1 else [*shape, self.heads]

    def _searched(self, vectors: Tensor, real: Tensor | None) -> Tensor:
        """[N, heads, D] as [G, M, D], scaled to unit length for the cosine, where nearest by angle is nearest."""
        if self.metric == "cosine":
            wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
            if real is not None:
                # NaN in the padding would come back from the scaling as a NaN gradient.
                wide = torch.where(real[:, None, None], wide, 0)
            vectors = F.normalize(wide, dim=-1, eps=LEAST_LENGTH)
        return self._grouped(vectors)

    def _group_mask(self, real: Tensor | None) -> Tensor | None:
        return None if real is None else self._grouped(real[:, None].expand(-1, self.heads))

    def _grouped(self, value: Tensor) -> Tensor:
        """[N, heads, ...] to [G, M, ...]."""
        return value.transpose(0, 1) if self.separate_codebook_per_head else value.flatten(0, 1)[None]

    def _ungrouped(self, value: Tensor) -> Tensor:
        """[G, M, ...] to [N, heads, ...]."""
        if self.separate_codebook_per_head:
            return value.transpose(0, 1)
        return value.reshape(-1, self.heads, *value.shape[2:])

    def _absent(self, value: Tensor, real: Tensor | None, filler: int) -> Tensor:
        """[N, heads, ...] with ``filler`` where ``real`` [N] is False."""
        if real is None:
            return value.contiguous()
        return torch.where(real.view(-1, *[1] * (value.ndim - 1)), value, filler)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of counts [..., K]; 1 where there are none."""
    usage = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.exp(-torch.xlogy(usage, usage).sum(-1))
