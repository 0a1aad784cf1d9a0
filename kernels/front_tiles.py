"""Tiles of the kernels of steps along a front; importing this imports no Triton.

Bits depend on how deep tiles of products are, and this on the precision alone. Positions, columns, warps and stages are
chosen by how many positions a step has: every sum is over the same depths in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

from fastvq.kernels.tuning import tuned

__all__ = [
    "PACKED_COLUMNS",
    "PLANES",
    "DrawTiles",
    "ProductTiles",
    "TailTiles",
    "draw_tiles",
    "product_depth",
    "product_tiles",
    "tail_tiles",
]

# Whether tiles of products are chosen by the number of positions, rather than one for all.
BY_POSITIONS = True
# Of a tile of packed weights, which programs take all or some of.
PACKED_COLUMNS = 128
# Numbers of bfloat16 that a number of features or weights is kept as: three carry the 24 bits of float32.
PLANES = {"float32": 3, "bfloat16": 1}
_DEPTH = {"float32": 32, "bfloat16": 64}
# Positions of a step, at most, and the tiles for these; the last are for any.
_FEW, _SOME, _MANY, _MOST = 32, 64, 512, 1024
# Bytes that the stages of a product may take on a Hopper, and on chips before it.
_SHARED, _SHARED_BEFORE = 208 * 1024, 152 * 1024

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


# By precision and positions; the first is the rule. On a Hopper no register is spilled; on other chips it is for the
# clock to say.
PRODUCT_CANDIDATES: dict[tuple[str, int], tuple[ProductTiles, ...]] = {
    ("float32", _FEW): (
        ProductTiles(32, 64, 32, 4, 4),
        ProductTiles(32, 64, 32, 4, 3),
        ProductTiles(32, 128, 32, 4, 3),
        ProductTiles(32, 128, 32, 8, 4),
    ),
    ("float32", _SOME): (
        ProductTiles(64, 64, 32, 4, 4),
        ProductTiles(64, 64, 32, 4, 3),
        ProductTiles(64, 128, 32, 8, 3),
    ),
    ("float32", _MANY): (
        ProductTiles(128, 128, 32, 8, 4),
        ProductTiles(128, 128, 32, 8, 3),
        ProductTiles(128, 64, 32, 8, 3),
        ProductTiles(64, 128, 32, 8, 3),
    ),
    ("float32", _MOST): (
        ProductTiles(128, 128, 32, 8, 4),
        ProductTiles(128, 128, 32, 8, 3),
    ),
    ("bfloat16", _FEW): (
        ProductTiles(32, 64, 64, 4, 4),
        ProductTiles(32, 64, 64, 4, 6),
        ProductTiles(32, 128, 64, 4, 4),
        ProductTiles(32, 128, 64, 8, 4),
    ),
    ("bfloat16", _SOME): (
        ProductTiles(64, 64, 64, 4, 4),
        ProductTiles(64, 128, 64, 4, 4),
        ProductTiles(64, 128, 64, 8, 4),
    ),
    ("bfloat16", _MANY): (
        ProductTiles(128, 128, 64, 8, 4),
        ProductTiles(128, 128, 64, 8, 3),
        ProductTiles(128, 64, 64, 4, 4),
        ProductTiles(64, 128, 64, 8, 4),
    ),
    ("bfloat16", _MOST): (
        ProductTiles(256, 128, 64, 8, 4),
        ProductTiles(256, 128, 64, 8, 3),
        ProductTiles(256, 128, 64, 16, 4),
        ProductTiles(128, 128, 64, 8, 4),
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


def product_depth(precision: str) -> int:
    """Of a tile, in channels."""
    return _DEPTH[precision]


def product_tiles(precision: str, positions: int, capability: int) -> ProductTiles:
    """
    Args:
        precision: of features and weights, ``float32`` or ``bfloat16``.
        positions: of a step, at most.
        capability: compute capability such as 90.
    """
    most = next((most for most in (_FEW, _SOME, _MANY) if positions <= most), _MOST) if BY_POSITIONS else _MANY
    candidates = product_candidates(precision, most, capability)
    return tuned("front_product", capability, f"{precision} positions {most}", candidates) or candidates[0]


def product_candidates(precision: str, most: int, capability: int) -> list[ProductTiles]:
    """Those of `PRODUCT_CANDIDATES` that a chip has the memory for."""
    if capability >= 100 and PLANES[precision] > 1:
        most = _FEW  # there Triton 3.6 takes twice the memory for products that are added to each other
    candidates = PRODUCT_CANDIDATES[precision, most]
    room = _SHARED if capability >= 90 else _SHARED_BEFORE
    return [t for t in candidates if 2 * PLANES[precision] * (t.block_m + t.block_n) * t.block_k * t.stages <= room]


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
