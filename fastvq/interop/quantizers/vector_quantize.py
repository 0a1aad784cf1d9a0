"""VectorQuantize and ResidualVQ of vector-quantize-pytorch."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.interop.quantizers.kind import Accelerated, Draw, original_class, processes_meet
from fastvq.interop.quantizers.steps import assign, can_run, compact, mean_error, straight_through
from fastvq.interop.quantizers.vector_quantize_steps import (
    assign_by_angle,
    has_hooks,
    make_ready,
    option_in_the_way,
    quantize_levels,
    rotated,
    routes_gradients,
    update_codebook,
)

# Attributes of a residual quantiser, each named as its option, that ask for one level after the other.
_RESIDUAL_OPTIONS = (
    "implicit_neural_codebook",
    "diveq",
    "beam_size",
    "eval_beam_size",
    "shared_codebook",
    "quant_grad_frac",
    "accept_image_fmap",
)


class VectorQuantize(Accelerated):
    kind = "vector-quantize-pytorch VectorQuantize"
    classes = ("VectorQuantize",)
    has = ("_codebook", "project_in", "project_out", "zero", "rotation_trick", "commitment_weight", "heads")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return option_in_the_way(module)

    @classmethod
    def codebooks_of(cls, module: Any) -> list[Tensor]:
        return [module._codebook.embed]

    @classmethod
    def ready(cls, copy: Any, draw: Draw) -> None:
        make_ready(copy, draw)

    @classmethod
    def example(cls, module: Any, method: str, draw: Draw) -> tuple[Any, ...]:
        if module.accept_image_fmap:
            return (draw(2, module.dim, 2, 3),)
        if module.accept_3d_fmap:
            return (draw(2, module.dim, 2, 1, 3),)
        return (draw(2, 6, module.dim) if module.channel_last else draw(2, module.dim, 6),)

    @classmethod
    def keywords(cls, module: Any) -> list[dict[str, Any]]:
        real = torch.tensor([[True] * 6, [True] * 2 + [False] * 4], device=module._codebook.embed.device)
        return [{}, {"mask": real}] if cls._masked(module) else [{}]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = dict(kwargs)
        frozen, mask, lens = (options.pop(name, None) for name in ("freeze_codebook", "mask", "lens"))
        # Whatever else is asked for is left to the original.
        asked = args or any(value is not None and value is not False for value in options.values())
        if asked or options.get("ema_update") is False or not self._fits(x):
            return super().forward(x, *args, **kwargs)
        if mask is not None or lens is not None:
            if not self._takes_mask(mask, lens):
                return super().forward(x, *args, **kwargs)
            if lens is not None:
                mask = torch.arange(x.shape[1], device=x.device) < lens[:, None]
        return self._quantize(x, self.freeze_codebook if frozen is None else frozen, mask)

    def _fits(self, x: Tensor) -> bool:
        """Whether no option was changed since, and the input is a batch of sequences or grids."""
        axes = 5 if self.accept_3d_fmap else 4 if self.accept_image_fmap else 3
        return can_run(x, self._codebook.embed) and x.ndim == axes and option_in_the_way(self) is None

    def _takes_mask(self, mask: Tensor | None, lens: Tensor | None) -> bool:
        """Of the one that is given."""
        if not self._masked(self) or (mask is not None and lens is not None):
            return False
        return self.channel_last if mask is None else mask.ndim == 2 and mask.dtype is torch.bool

    @staticmethod
    def _masked(module: Any) -> bool:
        grids = module.accept_image_fmap or module.accept_3d_fmap
        return module.heads == 1 and not (module.has_projections or grids)

    def _quantize(self, given: Tensor, frozen: bool, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        channels_first = self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last
        rows = given.flatten(2).transpose(1, 2) if channels_first else given
        book = self._codebook
        vectors = book.transform_input(self._split(self.project_in(rows)))
        # [H, N, D] for H codebooks.
        packed = compact(vectors) if vectors.ndim == 3 else vectors.detach()
        flat = packed.reshape(book.num_codebooks, -1, vectors.shape[-1]).float()
        real = None if mask is None else mask.reshape(1, -1)
        book.init_embed_(flat, mask=real)
        find = assign_by_angle if self.use_cosine_sim else assign
        found = find(flat, book.embed.detach(), real)
        loss = self.zero
        if self.training:
            loss.requires_grad_()
        quantized = self._look_up(found.indices).view(vectors.shape).type(given.dtype)
        out = quantized
        if self.training:
            if not frozen:
                update_codebook(book, found.counts, found.sums, lambda: flat, real)
            learns = self.learnable_codebook and not frozen
            if self.has_commitment_loss:
                if mask is not None:
                    # Of vectors that are not scaled, whatever the codes are compared with.
                    learnt = quantized if learns else quantized.detach()
                    error = F.mse_loss(learnt, rows, reduction="none")[mask].mean()
                elif learns:
                    error = F.mse_loss(quantized, vectors)
                else:
                    error = mean_error(vectors, quantized, found.squared_error)
                loss = loss + error * self.commitment_weight
            if given.requires_grad and routes_gradients(self):
                wide = quantized.to(torch.promote_types(vectors.dtype, quantized.dtype))
                out = rotated(vectors, wide) if self.rotation_trick else straight_through(vectors, wide)
            elif vectors.requires_grad:
                out = quantized.clone()
        out = self.project_out(self._join(out))
        indices = self._indices(found.indices, rows.shape)
        if mask is not None:
            padding = torch.zeros_like(rows) if self.return_zeros_for_masked_padding else rows
            out = torch.where(mask[..., None], out, padding)
            indices = torch.where(mask, indices, -1)
        if channels_first:
            out = out.transpose(1, 2)
            if given.ndim > 3:
                out = out.unflatten(2, given.shape[2:])
                indices = indices.unflatten(1, given.shape[2:])
        return out, indices, loss

    def _look_up(self, indices: Tensor) -> Tensor:
        """[H, N, D], differentiable if the codes are learnt."""
        embed = self._codebook.embed if self._codebook.learnable_codebook else self._codebook.embed.detach()
        if len(embed) == 1:
            return F.embedding(indices, embed[0])
        return embed.gather(1, indices[..., None].expand(-1, -1, embed.shape[-1]))

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, heads * D] to [H, B', N, D] where there are several heads."""
        return self.maybe_split_heads_from_input(x)

    def _join(self, x: Tensor) -> Tensor:
        """The opposite of `_split`."""
        if self.heads == 1:
            return x
        if not self.separate_codebook_per_head:
            x = x[0].unflatten(0, (-1, self.heads)).transpose(0, 1)
        return x.permute(1, 2, 0, 3).flatten(2)

    def _indices(self, indices: Tensor, shape: torch.Size) -> Tensor:
        """[H, N] to [B, N], or [B, N, heads]."""
        if self.heads == 1:
            return indices.view(shape[:2])
        if self.separate_codebook_per_head:
            return indices.view(self.heads, *shape[:2]).permute(1, 2, 0)
        return indices.view(shape[0], self.heads, shape[1]).transpose(1, 2)


class ResidualVQ(Accelerated):
    """All levels in one pass, where nothing that a level is asked for needs the one before it to be done."""

    kind = "vector-quantize-pytorch ResidualVQ"
    classes = ("ResidualVQ",)
    has = ("layers", "num_quantizers", "quant_grad_frac", "quantize_dropout", "shared_codebook", "project_in")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        for name in _RESIDUAL_OPTIONS:
            value = getattr(module, name, None)
            if value and (value is True or "beam" not in name or value > 1):
                return name if value is True else f"{name}={value}"
        if not module.uniform_codebook_size:
            return f"codebook_size={module.codebook_sizes}: levels differ"
        for level in module.layers:
            if original_class(level).__name__ not in VectorQuantize.classes or "forward" in level.__dict__:
                return "a level with a forward of its own"
            reason = option_in_the_way(level) or ("a hook of a level" if has_hooks(level) else None)
            for name in ("use_cosine_sim", "learnable_codebook"):
                if getattr(level, name):
                    reason = reason or name
            if reason is not None:
                return reason
        if len({(level.rotation_trick, routes_gradients(level)) for level in module.layers}) > 1:
            return "levels differ in rotation_trick"
        return None

    @classmethod
    def codebooks_of(cls, module: Any) -> list[Tensor]:
        return [level._codebook.embed for level in module.layers]

    @classmethod
    def ready(cls, copy: Any, draw: Draw) -> None:
        if processes_meet():
            copy.quantize_dropout = False
        # All of one scale: codes that are small beside what they are taken from leave the choice to rounding.
        for level in copy.layers:
            make_ready(level, draw)

    @classmethod
    def example(cls, module: Any, method: str, draw: Draw) -> tuple[Any, ...]:
        width = module.project_in.in_features if module.has_projections else module.codebook_dim
        return (draw(2, 6, width),)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = dict(kwargs)
        frozen, seed = options.pop("freeze_codebook", False), options.pop("rand_quantize_dropout_fixed_seed", None)
        asked = args or any(value is not None and value is not False for value in options.values())
        if asked or not self._fits(x):
            return super().forward(x, *args, **kwargs)
        vectors = self.project_in(x)
        levels = [*self.layers][: self._depth(x.device, seed)]
        out, indices, losses = quantize_levels(levels, vectors, moves=self.training and not frozen)
        missing = len(self.layers) - len(levels)
        if missing:
            indices, losses = F.pad(indices, (0, missing), value=-1), F.pad(losses, (0, missing))
        return self.project_out(out), indices, losses

    def _fits(self, x: Tensor) -> bool:
        """Whether levels may be taken together: in half precision the original rounds what is left for the next."""
        if x.ndim != 3 or x.dtype is not torch.float32 or self.why_not(self) is not None:
            return False
        if self.has_projections and torch.is_autocast_enabled(x.device.type):
            return False
        if not can_run(x, *self.codebooks_of(self)):
            return False
        return all(level.training == self.training and level._codebook.initted for level in self.layers)

    def _depth(self, device: torch.device, seed: int | None) -> int:
        """How many levels are taken, drawn as the original draws."""
        count = len(self.layers)
        if not (self.training and self.quantize_dropout):
            return count
        if seed is None:
            seed = self.original.forward.__globals__["get_maybe_sync_seed"](device)
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, count)
        multiple = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // multiple) * multiple, count)
