"""How a level's codes are used, and whether these are so few that something is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from fastvq.models.quantizer.vector import perplexity


def level_name(level: int, levels: int) -> str:
    """What a level is called in a message, such as ``level 0 (top)``."""
    ends = {0: " (top)", levels - 1: " (bottom)"} if levels > 1 else {}
    return f"level {level}{ends.get(level, '')}"


@dataclass(frozen=True)
class CodeUse:
    """Of the codes of one level.

    Attributes:
        level, levels: which one (0 = top), of how many.
        num_codes: K, the size of the codebook.
        used: how many of them occur.
        perplexity: exp of the entropy of their frequencies, between 1 and K.
        vectors: N, over how many codes this was counted.
    """

    level: int
    levels: int
    num_codes: int
    used: int
    perplexity: float
    vectors: int

    @classmethod
    def of_counts(cls, level: int, levels: int, counts: Tensor) -> Self:
        """From how often each code occurs, [K]."""
        found = float(perplexity(counts.double()))
        return cls(level, levels, len(counts), int((counts > 0).sum()), found, int(counts.sum()))

    @classmethod
    def of_metrics(cls, values: Mapping[str, float], num_codes: int, vectors: Sequence[int]) -> list[Self]:
        """All levels, from a log's ``perplexity_0``, ``usage_0`` and so on; ``vectors`` of each level."""
        levels = len(vectors)
        return [
            cls(level, levels, num_codes, round(values[f"usage_{level}"] * num_codes), values[f"perplexity_{level}"], n)
            for level, n in enumerate(vectors)
        ]

    @property
    def name(self) -> str:
        return level_name(self.level, self.levels)

    @property
    def share(self) -> float:
        """Of the codebook that occurs."""
        return self.used / self.num_codes

    @property
    def few(self) -> bool:
        """Whether the codes hardly say anything: a perplexity of at most 2, or of a fiftieth of what there could be.

        There could be min(K, N). A fiftieth wastes log2 50 = 5.6 bits of every code; data that have so little to say of
        a level are rare. Where there could be fewer than 16 the limit falls to an eighth, as a small codebook may well
        have two codes that matter; below 8 nothing is judged.
        """
        reach = min(self.num_codes, self.vectors)
        return self.perplexity <= max(min(2.0, reach / 8), reach / 50)

    def __str__(self) -> str:
        return f"{self.name}: {self.used} of {self.num_codes} codes in use, perplexity {self.perplexity:.1f}"
