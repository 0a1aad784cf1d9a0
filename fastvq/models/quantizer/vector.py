"""Vector quantisation with a codebook that follows the data by exponential moving averages, or by gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._check import (
    require_bool,
    require_choice,
    require_number,
    require_positive_int,
)
from fastvq.errors import ArgumentError, UnavailableError
from fastvq.models.quantizer.assignment import Assignment, OpenPass, Vectors, require_code_grid, require_vectors
from fastvq.models.quantizer.codebook import CODEBOOK_INITS, Codebook, CodebookInit
from fastvq.models.quantizer.gradient import CODE_GRADIENTS, CodeGradient, pass_gradient
from fastvq.models.quantizer.projected import Projected
from fastvq.models.quantizer.update import LEAST_LENGTH
from fastvq.models.repeated_pass import PassMemory, is_repetition, may_be_repeated, refuse_repetition
from fastvq.ops.dispatch import is_batched
from fastvq.ops.nearest_code import METRICS, MODES, Metric, Mode, nearest_code, nearest_code_statistics


class QuantizerOutput(NamedTuple):
    """Result of :class:`VectorQuantizer`.

    Attributes:
        quantized: codes' vectors, shape and dtype of the input; its gradient passes straight to the input, or as the
            option ``gradient`` says. Zero where masked.
        codes: int64, the input's shape without the vector axis; with several heads [..., heads]. -1 where masked.
        commitment_loss: ``beta * mean |x - sg[e]|^2``, a scalar.
        perplexity: exp of the entropy of code use in this batch, between 1 and K, a scalar without gradient; averaged
            over heads that have a codebook each.
        codebook_loss: ``mean |sg[x] - e|^2``, a scalar; 0 unless the codebook is learnable.
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


class VectorQuantizer(Projected):
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
    Recorded as a CUDA graph, a pass takes a codebook that starts from data for started: run one before.

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
        metric: ``euclidean``, or ``cosine``: vectors and codes are scaled to unit length, ``e_i = m_i / |m_i|``, and
            ``quantized`` holds unit vectors (Yu et al. 2022, ViT-VQGAN, section 3.2).
        heads: into how many vectors of D channels each input vector of C = heads * D channels is split.
        separate_codebook_per_head: a codebook for each head instead of one for all.
        mode: ``exact`` or ``fast``, see `fastvq.ops.nearest_code`.
        deterministic: see `fastvq.ops.nearest_code_statistics`.
        gradient: ``straight_through`` or ``rotation``, see `fastvq.models.quantizer.gradient.pass_gradient`.
        learnable_codebook: the codes are a parameter that an optimiser moves by ``codebook_loss``, which belongs into
            the loss (van den Oord et al. 2017, equation 3), in place of moving averages.
        kmeans_iters: Lloyd's iterations of ``init = "kmeans"``.
        freeze_codebook: leave the codebook alone in training mode too; may be set at any time.
        sync_codebook: whether processes of ``torch.distributed`` share their statistics; None: if there are any.
        check_finite: raise for vectors that are not finite.
        input_dim: channels of the input, which a linear map takes to C = heads * D channels and another one back, so
            that codes are searched for in few channels and losses are theirs (Yu et al. 2022, ViT-VQGAN, section
            3.2: factorised codes); None: the input has C channels and is quantised as it is.

    Attributes:
        embedding: codes [G, K, D], where G is ``heads`` with a codebook per head; without, that axis is absent here and
            below. A buffer, or a parameter if ``learnable_codebook``.
        cluster_size: N [G, K], a buffer.
        embedding_sum: m [G, K, D], a buffer; None if ``learnable_codebook``.
        initialized: whether the codes are more than random numbers, a buffer of shape []: 0 or 1, or between them in a
            moving average of models, where anything but 0 says yes. Floating point, so that it can be averaged.
        project_in, project_out: linear layers with bias; None without ``input_dim``.

    Raises:
        UnavailableError: a pass that moves the codebook runs in backward, and its first run is not known; or under
            torch.vmap.
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
        input_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_codes = require_positive_int("num_codes", num_codes)
        self.code_dim = require_positive_int("code_dim", code_dim)
        self.heads = require_positive_int("heads", heads)
        self.kmeans_iters = require_positive_int("kmeans_iters", kmeans_iters)
        require_choice("metric", metric, METRICS)
        require_number("decay", decay, least=0, below=1)
        for name, flag in (
            ("separate_codebook_per_head", separate_codebook_per_head),
            ("learnable_codebook", learnable_codebook),
            ("freeze_codebook", freeze_codebook),
            ("channels_last", channels_last),
            ("check_finite", check_finite),
        ):
            require_bool(name, flag)
        require_bool("sync_codebook", sync_codebook, optional=True)
        require_bool("deterministic", deterministic, optional=True)
        if separate_codebook_per_head and heads == 1:
            raise ArgumentError("separate_codebook_per_head: expected heads of 2 or more, got 1")
        if not (eps > 0 and commitment >= 0 and revive_below >= 0):
            raise ArgumentError(
                "eps must be positive, commitment and revive_below not negative; "
                f"got {eps!r}, {commitment!r}, {revive_below!r}"
            )
        require_choice("mode", mode, MODES)
        require_choice("gradient", gradient, CODE_GRADIENTS)
        self.decay, self.eps, self.revive_below, self.metric = decay, eps, revive_below, metric
        self.separate_codebook_per_head, self.learnable_codebook = separate_codebook_per_head, learnable_codebook
        self.freeze_codebook, self.sync_codebook = freeze_codebook, sync_codebook
        self.commitment, self.channels_last, self.check_finite = commitment, channels_last, check_finite
        self.mode, self.deterministic, self.gradient = mode, deterministic, gradient
        self.init = init
        shape = (heads, num_codes) if separate_codebook_per_head else (num_codes,)
        # Averages that move by a hundredth of their value are lost in a shorter type.
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        embedding = torch.randn(*shape, code_dim, dtype=torch.get_default_dtype() if learnable_codebook else wide)
        if metric == "cosine":
            embedding = F.normalize(embedding, dim=-1)
        if learnable_codebook:
            self.embedding = nn.Parameter(embedding)
        else:
            self.register_buffer("embedding", embedding)
        self.register_buffer("cluster_size", torch.ones(shape, dtype=wide))
        self.register_buffer("embedding_sum", None if learnable_codebook else embedding.clone())
        self.register_buffer("initialized", torch.tensor(float(init == "normal"), dtype=torch.float32))
        self._passes = PassMemory()
        self._make_projections(input_dim, heads * code_dim)

    @property
    def init(self) -> CodebookInit:
        """How the codes start; setting it lets the next training pass look at ``initialized`` again."""
        return self._init

    @init.setter
    def init(self, value: CodebookInit) -> None:
        require_choice("init", value, CODEBOOK_INITS)
        self._init = value
        self._may_have_to_start = value != "normal"

    @property
    def may_have_to_start(self) -> bool:
        """Whether the next pass that moves the codebook asks if the codes are still to be taken from data."""
        return self._may_have_to_start

    @property
    def codebook(self) -> Codebook:
        """This module's codes and averages, with the rules by which they start and move, as they are set now."""
        return Codebook(
            embedding=self.embedding,
            cluster_size=self.cluster_size,
            embedding_sum=self.embedding_sum,
            initialized=self.initialized,
            init=self._init,
            kmeans_iters=self.kmeans_iters,
            decay=self.decay,
            eps=self.eps,
            revive_below=self.revive_below,
            metric=self.metric,
            sync=self.sync_codebook,
            transform=self._code_map(),
        )

    def _code_map(self) -> Tensor | None:
        """W, for a subclass whose codes are W c."""
        return None

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
        vectors = self.arrange(x, mask)
        # The codebook's averages must not be rounded to the activations' type.
        with torch.autocast(x.device.type, enabled=False):
            opened = self.open_pass(vectors, freeze_codebook)
            found = self.assign(vectors, opened)
            used = self.close_pass(opened, [found])[0]
        return self.output(found, used)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The codes alone, without statistics; moves nothing.

        Args:
            x, mask: as of :meth:`forward`.

        Returns:
            int64, as ``codes`` of :class:`QuantizerOutput`.
        """
        vectors, codebook = self.arrange(x, mask), self.codebook
        searched = vectors.searched
        if vectors.mask is not None and self.check_finite:
            searched = torch.where(vectors.mask[..., None], searched, 0)
        indices = nearest_code(searched, codebook.table, mode=self.mode, check_finite=self.check_finite)
        return _absent(self._ungrouped(indices), vectors.real, -1).view(self._grid(vectors.shape))

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors of codes.

        Args:
            codes: integers [B, ...], with several heads [B, ..., heads]. Code -1, which stands for a masked position,
                gives zeros.

        Returns:
            [B, C, ...], or [..., C] when ``channels_last``.

        Raises:
            ArgumentError, ArgumentTypeError: codes of another shape, type or (on the CPU) range.
        """
        codes, absent = require_code_grid(codes, self.heads, self.num_codes)
        found = self.codebook.lookup(codes)
        return self._looked_up(found, absent, heads=self.heads, channels_last=self.channels_last)

    @torch.no_grad()
    def initialize(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Start the codes anew from vectors, as the first training pass would.

        Args:
            x, mask: as of :meth:`forward`.

        Raises:
            ArgumentError: ``init`` is ``normal``, or no vector is finite; x or mask do not fit.
        """
        if self.init == "normal":
            raise ArgumentError("init: expected 'data' or 'kmeans' to initialise from vectors, got 'normal'")
        vectors = self.arrange(x, mask)  # what it refuses must change nothing
        self.initialized.fill_(0)
        self._may_have_to_start = True
        self.start(vectors)

    def orthogonal_loss(self) -> Tensor:
        """How far the codes' directions are from orthogonal, a scalar.

        The mean over pairs of cos^2, less what a code has with itself: sum of (e_i.e_j)^2 / K^2 - 1 / K over unit
        vectors, averaged over codebooks. To be added to the loss of a learnable codebook (Shin et al. 2021, arXiv
        2112.00384, equation 2).
        """
        return self.codebook.orthogonal_loss()

    def arrange(self, x: Tensor, mask: Tensor | None) -> Vectors:
        """Input of a pass, ``x`` and ``mask`` of :meth:`forward`, checked and ready to be searched."""
        axis = -1 if self.channels_last else 1
        require_vectors(x, mask, self._channels(self.heads * self.code_dim), axis)
        given = self._narrowed(x.movedim(axis, -1), mask).reshape(-1, self.heads, self.code_dim)
        searched, real = given, None if mask is None else mask.flatten()
        if self.metric == "cosine":
            with torch.autocast(x.device.type, enabled=False):
                searched = searched.to(torch.promote_types(searched.dtype, torch.float32))
                if real is not None:
                    # NaN in the padding would come back from the scaling as a NaN gradient.
                    searched = torch.where(real[:, None, None], searched, 0)
                searched = F.normalize(searched, dim=-1, eps=LEAST_LENGTH)
        grouped = None if real is None else self._grouped(real[:, None].expand(-1, self.heads))
        return Vectors(x.shape, x.dtype, given, self._grouped(searched), real, grouped)

    def moves(self, freeze_codebook: bool | None) -> bool:
        """Whether a pass moves the codebook, given ``freeze_codebook`` of :meth:`forward`."""
        moves = self.training and not (self.freeze_codebook if freeze_codebook is None else freeze_codebook)
        if moves and is_batched():
            raise UnavailableError(
                "VectorQuantizer: vmap cannot batch a pass that moves the codebook; call eval() or freeze the codebook"
            )
        return moves

    def start(self, vectors: Vectors) -> None:
        """Start the codes from vectors, if that is still to be done."""
        if self._may_have_to_start and not is_repetition():
            self._drawing(self.codebook.start, vectors.searched, vectors.mask)
            # Asking the buffer in every step would make a GPU wait.
            self._may_have_to_start = False

    def open_pass(self, vectors: Vectors, freeze_codebook: bool | None = None) -> OpenPass:
        """Begin a pass over vectors, which are those that codes start from; a repetition has its first run's codes.

        Args:
            vectors: what :meth:`arrange` gave.
            freeze_codebook: as of :meth:`forward`.
        """
        codebook, moves = self.codebook, self.moves(freeze_codebook)
        if is_repetition():
            first = self._passes.recall(vectors.given)
            if first is not None:
                return OpenPass(vectors.given, codebook, first.codes, moves, first)
            if moves:
                refuse_repetition("its first run is not known: other input, or too long ago")
        elif moves:
            self.start(vectors)
        codes = codebook.stored.detach()
        if self.training:
            codes = torch.ops.fastvq.snapshot(codes, moves)
        return OpenPass(vectors.given, codebook, codes, moves, None)

    def assign(self, vectors: Vectors, opened: OpenPass) -> Assignment:
        """The nearest codes of ``vectors``, in a pass that :meth:`open_pass` has ``opened``."""
        codebook, stored, given, real = opened.codebook, opened.codes, vectors.given, vectors.real
        # A learnt map gets its gradient from the codebook's error, and none from the vectors'.
        table = codebook.compared(stored).detach()
        # In evaluation too: with the sums it is still one pass over x, and leaving them out would take several.
        found = nearest_code_statistics(
            vectors.searched,
            table,
            mask=vectors.mask,
            mode=self.mode,
            deterministic=self.deterministic,
            check_finite=self.check_finite,
        )
        values = max(given.numel(), 1) if real is None else real.sum().clamp(min=1) * given.shape[1:].numel()
        error = found.squared_error.sum()
        codebook_error = torch.zeros_like(error)
        if self.learnable_codebook:
            codebook_error = codebook.error(stored, found.counts, found.sums, error)
        codes = self._ungrouped(found.indices)
        # In the type that is compared: with the cosine the gradient passes through the scaling as well.
        compared = self._ungrouped(vectors.searched)
        chosen = codebook.lookup(codes if self.heads > 1 else codes[:, 0], table).view(given.shape)
        quantized = pass_gradient(compared, chosen.to(compared.dtype), self.gradient).to(given.dtype)
        return Assignment(
            vectors,
            _absent(quantized, real, 0),
            _absent(codes, real, -1),
            found,
            error / values,
            codebook_error / values,
        )

    def close_pass(self, opened: OpenPass, found: Sequence[Assignment]) -> Tensor:
        """Move the codebook by what L assignments of a pass found together, unless it is a repetition.

        Args:
            opened: the pass.
            found: what :meth:`assign` gave.

        Returns:
            counts [L, G, K] of all processes.
        """
        counts = [one.statistics.counts for one in found]
        together = counts[0][None] if len(found) == 1 else torch.stack(counts)
        if not opened.moves:
            used = together.to(torch.promote_types(self.embedding.dtype, torch.float32))
        elif opened.first is None:
            used = self._drawing(opened.codebook.move, together, *self._gathered(found))
        else:
            used = opened.first.used
        if opened.first is not None:
            opened.first.skip_draws()
        elif self.training and may_be_repeated():
            self._passes.remember(opened.given, opened.codes, used)
        return used

    def output(self, found: Assignment, used: Tensor) -> QuantizerOutput:
        """What a pass gives for the assignment ``found``, with its counts ``used`` [G, K] of all processes."""
        shape, real = found.vectors.shape, found.vectors.real
        quantized = self._widened(found.quantized.flatten(1), real).to(found.vectors.dtype)
        if self.channels_last:
            quantized = quantized.view(shape)
        else:
            quantized = quantized.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return QuantizerOutput(
            quantized,
            found.codes.view(self._grid(shape)),
            self.commitment * found.commitment_error,
            perplexity(used).mean(),
            found.codebook_error,
            (used == 0).sum(),
        )

    def _gathered(self, found: Sequence[Assignment]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums of assignments, and the vectors, with their mask, among which dead codes find new places."""
        first = found[0]
        if len(found) == 1:
            return first.statistics.sums, first.vectors.searched, first.vectors.mask
        sums = torch.stack([one.statistics.sums for one in found]).sum(0)
        if self.revive_below <= 0:  # no places are asked for
            return sums, first.vectors.searched, first.vectors.mask
        mask = None
        if any(one.vectors.mask is not None for one in found):
            mask = torch.stack([self._grouped(one.codes >= 0) for one in found], 2).flatten(1)
        # By vectors first and then by passes, so that all processes together number them as one would.
        return sums, torch.stack([one.vectors.searched.detach() for one in found], 2).flatten(1, 2), mask

    def _drawing(self, operation: Callable[..., Any], *args: Any) -> Any:
        """An operation that may draw random numbers; a pass that may be repeated keeps note of them."""
        if not may_be_repeated():
            return operation(*args)
        with self._passes.drawing(self.embedding.device):
            return operation(*args)

    def _grid(self, shape: torch.Size) -> list[int]:
        """Shape of the codes of an input."""
        grid = [*shape[:-1]] if self.channels_last else [shape[0], *shape[2:]]
        return grid if self.heads == 1 else [*grid, self.heads]

    def _grouped(self, value: Tensor) -> Tensor:
        """[N, heads, ...] to [G, M, ...]."""
        return value.transpose(0, 1) if self.separate_codebook_per_head else value.flatten(0, 1)[None]

    def _ungrouped(self, value: Tensor) -> Tensor:
        """[G, M, ...] to [N, heads, ...]."""
        if self.separate_codebook_per_head:
            return value.transpose(0, 1)
        return value.reshape(-1, self.heads, *value.shape[2:])

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


def _absent(value: Tensor, real: Tensor | None, filler: int) -> Tensor:
    """[N, heads, ...] with ``filler`` where ``real`` [N] is False."""
    if real is None:
        return value.contiguous()
    return torch.where(real.view(-1, *[1] * (value.ndim - 1)), value, filler)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of counts [..., K]; 1 where there are none."""
    usage = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.exp(-torch.xlogy(usage, usage).sum(-1))
