"""Drawing the codes of one step along a front: one program for a position, see `fastvq.ops.draw`."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvq.kernels.front_product import positions


@triton.jit
def _draw_kernel(
    step_ptr, values_ptr, codes_ptr, uniforms_ptr, known_ptr, options_ptr, logits_ptr, status_ptr,
    batch, offset, num_codes,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SKEW: tl.constexpr, FILTERED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_RANKED: tl.constexpr,
):  # fmt: skip
    """Codes [B, H, W] from logits [positions, num_codes] at ``offset`` of the values, where they are not known.

    The options are temperature, top_k and top_p, float32. Logits are copied to ``logits_ptr`` [B, H, W, num_codes]
    unless that is None. Where a code cannot be drawn it is 0, and the status becomes at most
    (row * width + column) * batch + sample.
    """
    step = tl.load(step_ptr)
    m = tl.program_id(0)
    row, col, sample, exists = positions(step, m, batch, HEIGHT, WIDTH, SKEW)
    if exists:
        place = (sample.to(tl.int64) * HEIGHT + row) * WIDTH + col
        offs = tl.arange(0, BLOCK)  # [BLOCK]
        mask = offs < num_codes  # [BLOCK]
        from_ptr = values_ptr + offset + m.to(tl.int64) * num_codes
        logits = tl.load(from_ptr + offs, mask=mask, other=-float("inf"))  # [BLOCK]
        if logits_ptr is not None:
            tl.store(logits_ptr + place * num_codes + offs, logits, mask=mask)
        if tl.load(known_ptr + place) == 0:
            uniform = tl.load(uniforms_ptr + place)
            temperature = tl.load(options_ptr)
            # NaN counts as +inf, which cannot be drawn from either.
            largest = tl.max(tl.where(logits < float("inf"), logits, float("inf")), 0)
            drawable = (largest < float("inf")) & (largest > -float("inf")) & (uniform >= 0) & (uniform < 1)
            weights = tl.exp(tl.div_rn(tl.where(drawable, logits - largest, 0.0), temperature))  # [BLOCK]
            weights = tl.where(mask, weights, 0.0)  # [BLOCK]
            if FILTERED:
                top_k = tl.load(options_ptr + 1).to(tl.int32)
                top_p = tl.load(options_ptr + 2)
                rank = tl.zeros([BLOCK], tl.int32)  # [BLOCK]
                before = tl.zeros([BLOCK], tl.float64)  # [BLOCK]
                for first in range(0, num_codes, BLOCK_RANKED):
                    others = first + tl.arange(0, BLOCK_RANKED)  # [BLOCK_RANKED]
                    other = tl.load(from_ptr + others, mask=others < num_codes, other=-float("inf"))  # [BLOCK_RANKED]
                    weight = tl.exp(tl.div_rn(tl.where(drawable, other - largest, 0.0), temperature))  # [BLOCK_RANKED]
                    equal = (other[None, :] == logits[:, None]) & (others[None, :] < offs[:, None])
                    better = (other[None, :] > logits[:, None]) | equal  # [BLOCK, BLOCK_RANKED]
                    rank += tl.sum(better.to(tl.int32), 1)
                    before += tl.sum(tl.where(better, weight.to(tl.float64)[None, :], 0.0), 1)
                weights = tl.where(rank < top_k, weights, 0.0)  # [BLOCK]
                total = tl.sum(weights.to(tl.float64), 0).to(tl.float32)
                threshold = tl.where(top_p < 1, top_p * total, float("inf"))
                reached = (rank > 0) & (before.to(tl.float32) >= threshold)  # [BLOCK]
                weights = tl.where(reached, 0.0, weights)  # [BLOCK]
            # A parallel sum may grow where the weight is 0, which must not lead to a code of probability 0.
            sums = tl.cumsum(weights.to(tl.float64), 0).to(tl.float32)  # [BLOCK]
            sums = tl.where(weights > 0, sums, 0.0)  # [BLOCK]
            target = uniform * tl.max(sums, 0)
            code = tl.min(tl.where(sums > target, offs, BLOCK), 0)
            tl.store(codes_ptr + place, tl.where(drawable, code, 0).to(tl.int64))
            if not drawable:
                tl.atomic_min(status_ptr, (row * WIDTH + col).to(tl.int64) * batch + sample)
