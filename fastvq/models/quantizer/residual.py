"""Residual vector quantisation: each level quantises what the levels before it left over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvq._check import require_bool, require_choice, require_positive_int, require_tensor
from fastvq.errors import ArgumentError
from fastvq.models.quantizer.assignment import Assignment, OpenPass, require_vectors
from fastvq.models.quantizer.gradient import CODE_GRADIENTS, CodeGradient, pass_gradient
from fastvq.models.quantizer.one_pass import Levels, encode_levels, quantize_levels, why_in_turn
from fastvq.models.quantizer.projected import Projected
from fastvq.models.quantizer.vector import QuantizerOutput, VectorQuantizer
from fastvq.ops.explain import explain_backend


class ResidualVQOutput(NamedTuple):
    """Result of :class:`ResidualVQ`, of Q levels.

    Attributes:
        quantized: the sum of the levels' codes, shape and dtype of the input, whose gradient goes to the input once,
            as ``gradient`` says. Zero where masked.
        codes: int64, the input's shape without the vector axis, and levels last: [..., Q]. -1 where masked or dropped.
        commitment_loss: the levels' commitment losses added up, a scalar.
        perplexity: [Q], as of :class:`fastvq.models.QuantizerOutput`.
        codebook_loss: the levels' codebook losses added up, a scalar.
        dead_codes: int64 [Q].
        level_losses: commitment loss of each level, [Q].
    """

    quantized: Tensor
    codes: Tensor
    commitment_loss: Tensor
    perplexity: Tensor
    codebook_loss: Tensor
    dead_codes: Tensor
    level_losses: Tensor

    @property
    def loss(self) -> Tensor:
        """What to add to the reconstruction's error: commitment and codebook loss."""
        return self.commitment_loss + self.codebook_loss


class ResidualVQ(Projected):
    """Q quantisers in a row: r_0 = x, q_l = nearest code of level l to r_l, r_{l+1} = r_l - sg[q_l], out = sum of q_l.

    Zeghidour et al. 2021 (SoundStream, arXiv 2107.03312, algorithm 1); with a shared codebook Lee et al. 2022 (RQ-VAE,
    arXiv 2203.01941, section 3.1). The gradient of the sum passes to x once, whatever the number of levels; each
    level's commitment loss pulls its own residual. Residuals are kept in float32 at least. All levels are taken in one
    pass over the vectors (`fastvq.ops.residual_codes`) where the options allow it, which :meth:`explain` tells.

    Args:
        num_quantizers: Q.
        num_codes: K, or one for each level.
        code_dim: D, also the number of channels of the input unless ``input_dim`` says another.
        shared_codebook: one codebook for all levels. It moves once per pass, by counts and sums of all levels; ``init``
            from data takes it from the first level's vectors.
        quantize_dropout: in training mode each sample of the batch (index along the first axis) uses only its first n
            levels, n uniform in quantize_dropout_min..Q; the levels beyond it are masked for this sample (SoundStream,
            section III.C).
        quantize_dropout_min: the fewest levels that are left.
        channels_last: whether vectors lie along the last axis ([..., D]) rather than axis 1 ([B, D, ...]).
        gradient: between x and the sum, see `fastvq.models.quantizer.gradient.pass_gradient`.
        input_dim: channels of the input, which a linear map takes to D channels before the first level and another one
            back after the sum; losses are those between the maps.
        options: of :class:`fastvq.VectorQuantizer`, for every level; no heads.

    Attributes:
        num_codes: K, or a tuple with that of each level where they differ.
    """

    def __init__(
        self,
        num_quantizers: int,
        num_codes: int | Sequence[int],
        code_dim: int,
        *,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_min: int = 1,
        channels_last: bool = False,
        gradient: CodeGradient = "straight_through",
        input_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_quantizers = require_positive_int("num_quantizers", num_quantizers)
        require_bool("shared_codebook", shared_codebook)
        require_bool("quantize_dropout", quantize_dropout)
        require_bool("channels_last", channels_last)
        require_choice("gradient", gradient, CODE_GRADIENTS)
        if require_positive_int("quantize_dropout_min", quantize_dropout_min) > num_quantizers:
            raise ArgumentError(
                f"quantize_dropout_min: expected at most num_quantizers, {num_quantizers}, got {quantize_dropout_min}"
            )
        for name in ("heads", "separate_codebook_per_head"):
            if name in options:
                raise ArgumentError(f"{name}: a residual quantiser has no heads, got {options[name]!r}")
        sizes = list(num_codes) if isinstance(num_codes, Sequence) else [num_codes] * num_quantizers
        if len(sizes) != num_quantizers:
            raise ArgumentError(f"num_codes: expected one for each of {num_quantizers} levels, got {len(sizes)}")
        if shared_codebook and len(set(sizes)) > 1:
            raise ArgumentError(f"num_codes: expected a single number for a shared codebook, got {sizes}")
        self.code_dim, self.shared_codebook, self.channels_last = code_dim, shared_codebook, channels_last
        self.quantize_dropout, self.quantize_dropout_min = quantize_dropout, quantize_dropout_min
        self.gradient = gradient
        self.levels = nn.ModuleList(
            [
                VectorQuantizer(size, code_dim, channels_last=True, **options)
                for size in (sizes[:1] if shared_codebook else sizes)
            ]
        )
        counts = tuple(self.quantizer(level).num_codes for level in range(num_quantizers))
        self.num_codes = counts[0] if len(set(counts)) == 1 else counts
        self._make_projections(input_dim, code_dim)

    def extra_repr(self) -> str:
        return f"{self.num_quantizers}, shared_codebook={self.shared_codebook}, gradient={self.gradient!r}"

    def quantizer(self, level: int) -> VectorQuantizer:
        """The quantiser of a level, counted from 0; the same for all levels if they share their codebook."""
        found = self.levels[0 if self.shared_codebook else level]
        assert isinstance(found, VectorQuantizer)
        return found

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, freeze_codebook: bool | None = None
    ) -> ResidualVQOutput:
        """Quantise vectors [B, D, ...] (or [..., D] when ``channels_last``).

        Args:
            x, mask, freeze_codebook: as of :meth:`VectorQuantizer.forward`.
        """
        start = self._checked(x, mask)
        with torch.autocast(x.device.type, enabled=False):
            found = self._quantize(start, mask, self._kept(start), freeze_codebook)
            quantized = pass_gradient(start, found.total, self.gradient)
            if mask is not None:
                quantized = torch.where(mask[..., None], quantized, 0)
        quantized = self._widened(quantized, mask).to(x.dtype)
        return ResidualVQOutput(
            quantized if self.channels_last else quantized.movedim(-1, 1),
            found.codes,
            found.losses.sum(),
            found.perplexity,
            found.codebook_losses.sum(),
            found.dead_codes,
            found.losses,
        )

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes of all levels, without statistics or dropout; moves nothing.

        Args:
            x, mask: as of :meth:`forward`.

        Returns:
            int64 [B, ..., Q]; -1 where masked.
        """
        residual = self._checked(x, mask)
        levels = self._all_levels()
        if why_in_turn(levels, moves=False, remembers=False) is None:
            with torch.autocast(x.device.type, enabled=False):
                return encode_levels(levels, residual, self._depths(mask, None))
        codes = []
        for quantizer in levels:
            codes.append(quantizer.encode(residual, mask))
            residual = residual - quantizer.lookup(codes[-1])
        return torch.stack(codes, -1)

    def explain(self, x: Tensor, *, freeze_codebook: bool | None = None) -> str:
        """How a pass over x would be taken, and why.

        All levels in one, by which backend of `fastvq.ops.residual_codes`, or one after the other.

        Args:
            x, freeze_codebook: as of :meth:`forward`.
        """
        start, levels = self._checked(x, None), self._all_levels()
        reason = why_in_turn(levels, moves=self._moves(freeze_codebook), remembers=True)
        if reason is not None:
            return f"levels in turn: {reason}"
        flat, codebooks = start.reshape(-1, self.code_dim), levels[0].codebook.stored.expand(len(levels), -1, -1)
        return "one pass\n" + explain_backend("residual_codes", flat, codebooks)

    def lookup(self, codes: Tensor) -> Tensor:
        """Sum of the vectors of codes.

        Args:
            codes: integers [B, ..., q], of the first q <= Q levels. Code -1 adds nothing.

        Returns:
            [B, D, ...], or [..., D] when ``channels_last``.

        Raises:
            ArgumentError, ArgumentTypeError: codes of another shape, type or (on the CPU) range.
        """
        if require_tensor("codes", codes).ndim < 2 or not 1 <= codes.shape[-1] <= self.num_quantizers:
            raise ArgumentError(
                f"codes: expected a last axis of 1 to {self.num_quantizers} levels, got shape {list(codes.shape)}"
            )
        # One after the other, as a pass adds them up.
        total = self.quantizer(0).lookup(codes[..., 0])
        for level in range(1, codes.shape[-1]):
            total = total + self.quantizer(level).lookup(codes[..., level])
        if self.project_out is not None:
            total = self._widened(total, (codes != -1).any(-1))
        return total if self.channels_last else total.movedim(-1, 1)

    def _checked(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x, mapped, as [B, ..., D] in float32 at least."""
        axis = -1 if self.channels_last else 1
        require_vectors(x, mask, self._channels(self.code_dim), axis)
        narrow = self._narrowed(x.movedim(axis, -1), mask)
        return narrow.to(torch.promote_types(narrow.dtype, torch.float32))

    def _all_levels(self) -> list[VectorQuantizer]:
        return [self.quantizer(level) for level in range(self.num_quantizers)]

    def _moves(self, freeze_codebook: bool | None) -> bool:
        return any(level.moves(freeze_codebook) for level in self._all_levels())

    def _kept(self, start: Tensor) -> Tensor | None:
        """How many levels each vector keeps, the shape of the codes of one level; None if all keep all."""
        if not (self.training and self.quantize_dropout):
            return None
        batch = start.shape[0]
        kept = torch.randint(self.quantize_dropout_min, self.num_quantizers + 1, (batch,), device=start.device)
        return kept.view(-1, *[1] * (start.ndim - 2)).expand(start.shape[:-1])

    def _depths(self, mask: Tensor | None, kept: Tensor | None) -> Tensor | None:
        """How many levels each vector takes part in; None if all do in all."""
        if mask is None:
            return kept
        return torch.where(mask, self.num_quantizers if kept is None else kept, 0)

    def _level_masks(self, mask: Tensor | None, kept: Tensor | None) -> list[Tensor | None]:
        if kept is None:
            return [mask] * self.num_quantizers
        found: list[Tensor | None] = []
        for level in range(self.num_quantizers):
            # The levels that are never dropped need no mask of their own.
            present = None if level < self.quantize_dropout_min else kept > level
            found.append(mask if present is None else present if mask is None else present & mask)
        return found

    def _quantize(
        self, start: Tensor, mask: Tensor | None, kept: Tensor | None, freeze_codebook: bool | None
    ) -> Levels:
        levels = self._all_levels()
        if why_in_turn(levels, moves=self._moves(freeze_codebook), remembers=True) is None:
            return quantize_levels(levels, start, self._depths(mask, kept), freeze_codebook)
        masks = self._level_masks(mask, kept)
        if self.shared_codebook:
            outputs, total = self._shared(start, masks, freeze_codebook)
        else:
            outputs, total = self._separate(start, masks, mask, freeze_codebook)
        return Levels(
            total,
            torch.stack([out.codes for out in outputs], -1),
            torch.stack([out.commitment_loss for out in outputs]),
            torch.stack([out.codebook_loss for out in outputs]),
            torch.stack([out.perplexity for out in outputs]),
            torch.stack([out.dead_codes for out in outputs]),
        )

    def _separate(
        self, residual: Tensor, masks: list[Tensor | None], real: Tensor | None, freeze_codebook: bool | None
    ) -> tuple[list[QuantizerOutput], Tensor]:
        outputs: list[QuantizerOutput] = []
        total = torch.zeros_like(residual)
        for level, mask in enumerate(masks):
            quantizer = self.quantizer(level)
            if mask is not real and quantizer.moves(freeze_codebook):
                # From all samples: those that are left at this level may be none.
                quantizer.start(quantizer.arrange(residual, real))
            outputs.append(out := quantizer(residual, mask, freeze_codebook=freeze_codebook))
            code = out.quantized.detach()
            residual, total = residual - code, total + code
        return outputs, total.detach()

    def _shared(
        self, residual: Tensor, masks: list[Tensor | None], freeze_codebook: bool | None
    ) -> tuple[list[QuantizerOutput], Tensor]:
        """All levels against the codebook as it is, then one move by what they found together."""
        quantizer, total = self.quantizer(0), torch.zeros_like(residual)
        opened: OpenPass | None = None
        found: list[Assignment] = []
        for mask in masks:
            vectors = quantizer.arrange(residual, mask)
            if opened is None:
                opened = quantizer.open_pass(vectors, freeze_codebook)
            found.append(quantizer.assign(vectors, opened))
            code = found[-1].quantized.detach().view(residual.shape)
            residual, total = residual - code, total + code
        assert opened is not None
        used = quantizer.close_pass(opened, found)
        return [quantizer.output(one, counts) for one, counts in zip(found, used, strict=True)], total.detach()
