"""Tiles of the kernels of steps along a front; importing this imports no Triton.

Of one size for all batches, since bits may differ between sizes.
"""

from __future__ import annotations

from typing import NamedTuple

from fastvq.kernels.tuning import tuned

__all__ = ["DrawTiles", "ProductTiles", "TailTiles", "draw_tiles", "product_tiles", "tail_tiles"]

# Pairs of logits that a warp of a filtered draw compares at a time.
_COMPARED = 1024


class ProductTiles(NamedTuple):
    """Of `fastvq.kernels.front_product`: positions, columns, depth; warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class TailTiles(NamedTuple):
    """Of `fastvq.kernels.front_tail`: positions, channels; warps."""

    block_m: int
    block_c: int
    warps: int


class DrawTiles(NamedTuple):
    """Of `fastvq.kernels.front_draw`, in which one program draws one code: warps."""

    warps: int


# On a Hopper no register is spilled; on other chips it is for the clock to say.
PRODUCT_CANDIDATES: dict[str, tuple[ProductTiles, ...]] = {
    "float32": (
        ProductTiles(64, 64, 32, 8, 3),
        ProductTiles(64, 64, 32, 4, 3),
        ProductTiles(64, 64, 32, 8, 2),
        ProductTiles(64, 32, 32, 8, 3),
        ProductTiles(128, 64, 32, 8, 2),
    ),
    "bfloat16": (
        ProductTiles(64, 128, 64, 8, 4),
        ProductTiles(64, 128, 64, 4, 4),
        ProductTiles(64, 64, 64, 8, 4),
        ProductTiles(64, 64, 64, 4, 4),
        ProductTiles(128, 64, 64, 8, 3),
        ProductTiles(128, 128, 64, 8, 3),
    ),
}
TAIL_CANDIDATES = (
    TailTiles(2, 256, 4),
    TailTiles(1, 256, 4),
    TailTiles(2, 256, 8),
    TailTiles(4, 256, 8),
    TailTiles(4, 128, 4),
    TailTiles(8, 128, 8),
)
DRAW_CANDIDATES = tuple(DrawTiles(warps) for warps in (1, 2, 4, 8, 16))
# Logits of a warp, at most, where there are warps enough; and at least.
_MOST_OF_A_WARP, _LEAST_OF_A_WARP = 256, 32


def product_tiles(precision: str, capability: int) -> ProductTiles:
    """
    Args:
        precision: of features and weights, ``float32`` or ``bfloat16``.
        capability: compute capability such as 90.
    """
    found = tuned("front_product", capability, precision, PRODUCT_CANDIDATES[precision])
    # Eight warps share out the accumulators, which Blackwell has in a memory of their own.
    warps = 4 if capability >= 100 else 8
    blocks = (64, 128, 64, warps, 4) if precision == "bfloat16" else (64, 64, 32, warps, 3)
    return found or ProductTiles(*blocks)


def tail_tiles(capability: int) -> TailTiles:
    """``capability``: compute capability such as 90."""
    return tuned("front_tail", capability, "any", TAIL_CANDIDATES) or TailTiles(2, 256, 4)


def draw_tiles(num_codes: int, capability: int) -> DrawTiles:
    """
    Args:
        num_codes: of a position.
        capability: compute capability such as 90.
    """
    block = draw_block(num_codes)
    least, most = min(16, block // _MOST_OF_A_WARP), max(1, block // _LEAST_OF_A_WARP)
    fitting = [tiles for tiles in DRAW_CANDIDATES if least <= tiles.warps <= most]
    found = tuned("front_draw", capability, f"block {block}", fitting)
    return found or DrawTiles(max(1, min(16, block // 128)))


def draw_block(num_codes: int) -> int:
    """Logits of a program: the next power of two."""
    return max(16, 1 << (num_codes - 1).bit_length())


def ranked_block(block: int, warps: int) -> int:
    """Logits that a filtered draw compares with all others at a time."""
    return max(1, min(block, warps * _COMPARED // block))
