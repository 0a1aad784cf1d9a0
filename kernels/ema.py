"""The moving averages of a codebook, on a GPU: decay, sums, smoothing, division, in one launch where it is small.

Every code's divisor depends on all counts, and whether anything moves on all sums: a survey comes before the move. Up
to `_SMALL` elements one program does both for a codebook, K 512 and D 64 being 32768 of them; beyond, programs share
the survey in a launch of its own, since they cannot wait for each other.

Floor: counts, sums and averages are read once, averages and codes written: 16 K D + 16 K bytes, 0.53 MB at K 512, D 64
and 8.5 MB at K 8192, D 64; 4 K D operations. On an H200 at its copy rate of 4.2 TB/s that is 0.1 us and 2 us, far below
a launch (derived, not measured). One program has one multiprocessor's share of the L2 cache, about 100 GB/s: K 512,
D 64 then takes some 6 us (derived; measured 8.4 us).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.kernels.launch import Form, Launcher, form, hardware, on_device
from fastvq.kernels.tuning import planned, tuned

__all__ = ["ema_update", "ema_updates"]

# Elements of a codebook that one program moves.
_SMALL = 1 << 16
# Programs that share a survey, and read it.
_MOST_PARTS = 128


class Tiles(NamedTuple):
    """Codes and columns at a time, counts at a time, warps, and parts that a codebook is moved in."""

    block_k: int
    block_d: int
    block_counts: int
    warps: int
    parts: int


class Block(NamedTuple):
    """Codes x columns at a time, and warps."""

    elements: int
    warps: int


# Of a codebook that one program moves the first, of one that many do the last.
CANDIDATES = (Block(8192, 16), Block(4096, 8), Block(2048, 4))


def update_tiles(num_codes: int, width: int, capability: int) -> Tiles:
    """Tiles of `_update_kernel`; one multiprocessor alone needs many loads in flight."""
    alone = num_codes * width <= _SMALL
    sizes = f"d{triton.next_power_of_2(max(width, 1))} k{triton.next_power_of_2(num_codes)}"
    elements, warps = tuned("ema_update", capability, sizes, CANDIDATES) or CANDIDATES[0 if alone else -1]
    block_d = min(128, triton.next_power_of_2(max(width, 1)))
    block_k = min(elements // block_d, triton.next_power_of_2(num_codes))
    parts = 1 if alone else min(triton.cdiv(num_codes, block_k), _MOST_PARTS)
    return Tiles(block_k, block_d, min(1024, triton.next_power_of_2(num_codes)), warps, parts)


@triton.jit
def _totals(counts_ptr, cluster_size_ptr, keep, take, num_codes, BLOCK_COUNTS: tl.constexpr):
    """Sums over all codes of the counts and of what the averages of counts become, in float64."""
    counted = tl.zeros([BLOCK_COUNTS], tl.float64)  # [BLOCK_COUNTS]
    whole = tl.zeros([BLOCK_COUNTS], tl.float64)  # [BLOCK_COUNTS]
    for first in range(0, num_codes, BLOCK_COUNTS):
        offs_k = first + tl.arange(0, BLOCK_COUNTS)  # [BLOCK_COUNTS]
        mask_k = offs_k < num_codes  # [BLOCK_COUNTS]
        count = tl.load(counts_ptr + offs_k, mask=mask_k, other=0).to(tl.float32)  # [BLOCK_COUNTS]
        size = keep * tl.load(cluster_size_ptr + offs_k, mask=mask_k, other=0.0) + take * count  # [BLOCK_COUNTS]
        counted += count.to(tl.float64)  # [BLOCK_COUNTS]
        whole += size.to(tl.float64)  # [BLOCK_COUNTS]
    return tl.sum(counted, axis=0), tl.sum(whole, axis=0)


@triton.jit
def _at(address_ptr):
    """float32 at an address, which is a multiple of 16."""
    return tl.multiple_of(tl.load(address_ptr), 16).to(tl.pointer_type(tl.float32))


@triton.jit
def _update_kernel(
    counts_ptr, sums_ptr, cluster_size_ptr, embedding_sum_ptr, embedding_ptr, addresses_ptr, wholes_ptr, unusable_ptr,
    keep, take, eps, num_codes, width, heads,
    SKIP: tl.constexpr, SURVEY: tl.constexpr, MOVE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_COUNTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (p, head) handles every PARTS-th block of codes; with PARTS 1 it surveys and moves, else one of these.

    Codebooks lie side by side, or each where ``addresses`` [3, heads] says.
    """
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    counts_ptr += head * num_codes
    sums_ptr += head * num_codes * width
    if addresses_ptr is None:
        cluster_size_ptr += head * num_codes
        embedding_sum_ptr += head * num_codes * width
        embedding_ptr += head * num_codes * width
    else:
        cluster_size_ptr = _at(addresses_ptr + head)
        embedding_sum_ptr = _at(addresses_ptr + heads + head)
        embedding_ptr = _at(addresses_ptr + 2 * heads + head)
    local_k, local_d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)  # [BLOCK_K], [BLOCK_D]

    # The number of programs with something in their part that forbids to move.
    bad = 0
    if SURVEY:
        counted, whole = _totals(counts_ptr, cluster_size_ptr, keep, take, num_codes, BLOCK_COUNTS)
        if SKIP:
            found = tl.zeros([BLOCK_K, BLOCK_D], tl.int32)  # [BLOCK_K, BLOCK_D]
            for first in range(part * BLOCK_K, num_codes, PARTS * BLOCK_K):
                for start in range(0, width, BLOCK_D):
                    offs_k, offs_d = first + local_k, start + local_d  # [BLOCK_K], [BLOCK_D]
                    mask = (offs_k < num_codes)[:, None] & (offs_d < width)[None, :]  # [BLOCK_K, BLOCK_D]
                    sums_ptrs = sums_ptr + offs_k[:, None].to(tl.int64) * width + offs_d[None, :]  # [BLOCK_K, BLOCK_D]
                    sums = tl.load(sums_ptrs, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_D]
                    found |= ((tl.abs(sums) < float("inf")) == 0).to(tl.int32)  # [BLOCK_K, BLOCK_D]
            bad = tl.max(tl.max(found, axis=1), axis=0)
            bad = tl.where(counted > 0, bad, 1)
        if not MOVE:
            tl.store(unusable_ptr + head * PARTS + part, bad)
            if part == 0:
                tl.store(wholes_ptr + head, whole)
    else:
        whole = tl.load(wholes_ptr + head)
        offs_part = tl.arange(0, triton.next_power_of_2(PARTS))  # [PARTS, a power of two]
        bad = tl.max(tl.load(unusable_ptr + head * PARTS + offs_part, mask=offs_part < PARTS, other=0), axis=0)

    if MOVE:  # noqa: SIM102  (known when it is compiled)
        if bad == 0:
            scale = whole / (whole + num_codes * eps)
            # Where nothing is left to divide by codes keep their place.
            divided = tl.where(whole > 0, width, 0)
            for first in range(part * BLOCK_K, num_codes, PARTS * BLOCK_K):
                offs_k = first + local_k  # [BLOCK_K]
                mask_k = offs_k < num_codes  # [BLOCK_K]
                count = tl.load(counts_ptr + offs_k, mask=mask_k, other=0).to(tl.float32)  # [BLOCK_K]
                size = keep * tl.load(cluster_size_ptr + offs_k, mask=mask_k, other=0.0) + take * count  # [BLOCK_K]
                divisor = ((size.to(tl.float64) + eps) * scale).to(tl.float32)  # [BLOCK_K]
                for start in range(0, width, BLOCK_D):
                    offs_d = start + local_d  # [BLOCK_D]
                    mask = mask_k[:, None] & (offs_d < width)[None, :]  # [BLOCK_K, BLOCK_D]
                    offs = offs_k[:, None].to(tl.int64) * width + offs_d[None, :]  # [BLOCK_K, BLOCK_D]
                    sums = tl.load(sums_ptr + offs, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_D]
                    total = tl.load(embedding_sum_ptr + offs, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_D]
                    total = keep * total + take * sums  # [BLOCK_K, BLOCK_D]
                    # Warps may hold the same elements: all have read them before one writes.
                    tl.debug_barrier()
                    tl.store(embedding_sum_ptr + offs, total, mask=mask)
                    code = tl.div_rn(total, tl.broadcast_to(divisor[:, None], [BLOCK_K, BLOCK_D]))
                    tl.store(embedding_ptr + offs, code, mask=mask & (offs_d < divided)[None, :])
                tl.store(cluster_size_ptr + offs_k, size, mask=mask_k)


@torch.no_grad()
def ema_update(
    counts: Tensor,
    sums: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor,
    embedding: Tensor,
    *,
    decay: float,
    eps: float,
    skip_unusable: bool,
) -> None:
    """`fastvq.ops.ema_update` on contiguous float32 [H, K, D] or [K, D]; counts may be of any type of integers."""
    heads = embedding.shape[0] if embedding.ndim == 3 else 1
    _update(counts, sums, (cluster_size, embedding_sum, embedding), None, heads, decay, eps, skip_unusable)


@torch.no_grad()
def ema_updates(
    counts: Tensor, sums: Tensor, buffers: Sequence[Sequence[Tensor]], *, decay: float, eps: float, skip_unusable: bool
) -> None:
    """`ema_update` of H codebooks that lie anywhere, in as many launches as of one.

    Args:
        counts, sums: [H, K] and float32 [H, K, D], contiguous.
        buffers: H times cluster_size [K], embedding_sum [K, D] and embedding [K, D], contiguous float32 that begins at
            a multiple of 16 bytes.
    """
    places = _addresses(tuple(one.data_ptr() for several in zip(*buffers, strict=True) for one in several), sums.device)
    _update(counts, sums, (None, None, None), places, len(buffers), decay, eps, skip_unusable)


@functools.lru_cache(maxsize=64)
def _addresses(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=device)


def _update(
    counts: Tensor,
    sums: Tensor,
    moved: tuple[Tensor | None, ...],
    addresses: Tensor | None,
    heads: int,
    decay: float,
    eps: float,
    skip_unusable: bool,
) -> None:
    if counts.numel() == 0:
        return
    plan = _plan(form(sums), counts.dtype, addresses is None, float(decay), float(eps), skip_unusable)
    with on_device(sums.device):
        wholes = unusable = None
        if plan.survey is not None:
            wholes = sums.new_empty(heads, dtype=torch.float64)
            unusable = sums.new_empty((heads, plan.parts), dtype=torch.int32)
            plan.survey(counts, sums, *moved, addresses, wholes, unusable)
        plan.move(counts, sums, *moved, addresses, wholes, unusable)


class _Plan(NamedTuple):
    """Launches of the survey, if it is one of its own, and of the move; parts that a codebook is moved in."""

    survey: Launcher | None
    move: Launcher
    parts: int


@planned
def _plan(sums: Form, counts: torch.dtype, together: bool, decay: float, eps: float, skip_unusable: bool) -> _Plan:
    """For sums [H, K, D] or [K, D]; counts and where codebooks lie decide what Triton compiles."""
    num_codes, width = sums.shape[-2:]
    heads = sums.shape[0] if len(sums.shape) == 3 else 1
    tiles = update_tiles(num_codes, width, hardware(sums.device).capability)
    options = {
        "SKIP": skip_unusable,
        "BLOCK_K": tiles.block_k,
        "BLOCK_D": tiles.block_d,
        "BLOCK_COUNTS": tiles.block_counts,
        "PARTS": tiles.parts,
        "num_warps": tiles.warps,
    }
    numbers = decay, 1.0 - decay, eps, num_codes, width, heads
    alone = tiles.parts == 1
    survey, move = (
        Launcher(_update_kernel, (tiles.parts, heads), numbers, {"SURVEY": one, "MOVE": alone or not one, **options})
        for one in (True, False)
    )
    return _Plan(None if alone else survey, survey if alone else move, tiles.parts)
