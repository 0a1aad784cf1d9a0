"""Vectors and codebooks on which nearest codes are easy or hard to find."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clustered(rows: int, codes: int, width: int) -> tuple[Tensor, Tensor]:
    codebook = normal(codes, width, seed=1)
    return codebook[torch.arange(rows) % codes] + 0.01 * normal(rows, width), codebook


def near_ties(rows: int, codes: int, width: int) -> tuple[Tensor, Tensor]:
    """Codes in pairs a rounding apart, vectors half-way between codes."""
    half = normal((codes + 1) // 2, width, seed=1)
    codebook = torch.cat([half, torch.nextafter(half, torch.full_like(half, math.inf))])[:codes]
    first, second = torch.arange(rows) % codes, (torch.arange(rows) * 7 + 3) % codes
    return (codebook[first] + codebook[second]) / 2, codebook


def far(share: float, length: float) -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
    """Some codes so many times as long as the others, at least one."""

    def data(rows: int, codes: int, width: int) -> tuple[Tensor, Tensor]:
        codebook = normal(codes, width, seed=1)
        codebook[codes // 2 :: max(1, round(1 / share))] *= length
        return normal(rows, width), codebook

    return data


def offset_but(value: float, count: int) -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
    """All far from the origin, but for the last codes."""

    def data(rows: int, codes: int, width: int) -> tuple[Tensor, Tensor]:
        codebook = 10 + normal(codes, width, seed=1)
        codebook[max(1, codes - count) :] = value
        return 10 + normal(rows, width), codebook

    return data


def heavy_tailed(rows: int, codes: int, width: int) -> tuple[Tensor, Tensor]:
    lengths, code_lengths = normal(rows, 1, seed=2), normal(codes, 1, seed=3)
    return normal(rows, width) * (2 * lengths).exp(), normal(codes, width, seed=1) * (2 * code_lengths).exp()


def sphere(length: float, crowd: float) -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
    """Vectors near the origin and a few codes of length 1 on the other side of it from all others, a crowd."""

    def data(rows: int, codes: int, width: int) -> tuple[Tensor, Tensor]:
        axis = torch.full((width,), width**-0.5)
        few = normal(min(codes, 60), width, seed=1)
        few = few * torch.where(few @ axis > 0, -1.0, 1.0)[:, None]
        few = few / few.norm(dim=1, keepdim=True)
        others = crowd * (axis + 0.001 * normal(max(0, codes - 60), width, seed=2))
        return length * normal(rows, width) / width**0.5, torch.cat([few, others])

    return data


DATA: dict[str, Callable[[int, int, int], tuple[Tensor, Tensor]]] = {
    "random": lambda n, k, d: (normal(n, d), normal(k, d, seed=1)),
    "clustered": clustered,
    "copies": lambda n, k, d: (normal(n, d), normal((k + 2) // 3, d, seed=1).repeat(3, 1)[:k]),
    "offset-10": lambda n, k, d: (10 + normal(n, d), 10 + normal(k, d, seed=1)),
    "offset-1000": lambda n, k, d: (normal(n, d) - 1000, normal(k, d, seed=1) - 1000),
    "fresh": lambda n, k, d: (normal(n, d), (2 * torch.rand(k, d) - 1) / k),
    "near-ties": near_ties,
    "tiny": lambda n, k, d: (1e-12 * normal(n, d), 1e-12 * normal(k, d, seed=1)),
    "huge": lambda n, k, d: (1e12 * normal(n, d), 1e12 * normal(k, d, seed=1)),
    "one-far": far(1e-9, 1e6),
    "half-far-1e3": far(0.5, 1e3),
    "half-far-1e5": far(0.5, 1e5),
    "half-far-1e6": far(0.5, 1e6),
    "offset-but-one-far": offset_but(1e6, 1),
    "offset-but-a-zero": offset_but(0.0, 1),
    "offset-but-two-zeros": offset_but(0.0, 2),
    "offset-but-one-opposed": offset_but(-10.0, 1),
    "heavy-tailed": heavy_tailed,
    "sphere": sphere(1e-4, 1.0),
    "sphere-and-crowd": sphere(1e-5, 1.9),
    "sphere-and-distant-crowd": sphere(1e-5, 4.0),
}
