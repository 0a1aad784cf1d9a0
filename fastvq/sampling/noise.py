"""The randomness of samples: one uniform number per sample, level and position, the same wherever it is drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastvq._check import require_seed, wrapped_seed

# A word of the generator's key.
SEED_BITS = 64
Seed = int | torch.Generator


def fixed_seed(seed: Seed | None) -> int:
    """The number 0..2**64-1 that a seed means.

    Integers are taken modulo 2**64. A generator of PyTorch, or its global one for None, gives the next of its own.

    Raises:
        ArgumentTypeError: something else.
    """
    if seed is None:
        return int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**63 - 1, (), generator=seed, device=seed.device))
    return wrapped_seed("seed", seed, "an int, a torch.Generator or None")


def uniforms(seed: int, start: int, count: int, shape: tuple[int, int], *, level: int = 0) -> Tensor:
    """Uniform numbers of samples ``start`` to ``start + count - 1``: float32 [count, H, W] in [0, 1), on the CPU.

    Each sample has its own stream of the counter-based generator Philox (Salmon et al. 2011), keyed by (seed, level)
    with the sample's index in the counter, so its numbers depend on (seed, index, level) alone.

    Args:
        seed: in 0..2**64-1.
        start, count: which samples.
        shape: grid (H, W).
        level: of the grid, 0 for the top.

    Raises:
        ArgumentError, ArgumentTypeError: a seed out of range, or none.
    """
    require_seed("seed", seed, SEED_BITS)
    positions = shape[0] * shape[1]
    words = np.empty((count, positions), dtype=np.uint64)
    key = np.array([seed, level], dtype=np.uint64)
    for row in range(count):
        # The generator counts up in the low words; the index sits in a high word, out of reach of that count.
        counter = np.array([0, 0, start + row, 0], dtype=np.uint64)
        words[row] = np.random.Philox(key=key, counter=counter).random_raw(positions)
    # 24 bits fill a float32 exactly. Raw words are fixed by Philox, NumPy's distributions may change with its version.
    fractions = (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return torch.from_numpy(fractions.reshape(count, *shape))
