"""A prior from outside the package, in one file: its configuration, the model and a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fastvq.models import Prior, PriorConfig


@dataclass(frozen=True, kw_only=True)
class BigramConfig(PriorConfig):
    width: int = 3


class Bigram(Prior):
    """Logits from the code to the left."""

    config_class: ClassVar[type[BigramConfig]] = BigramConfig
    config: BigramConfig
    presets: ClassVar[Mapping[str, BigramConfig]] = {"toy-bigram": BigramConfig(shape=(3, 4), num_codes=5)}

    def __init__(self, config: BigramConfig) -> None:
        super().__init__(config)
        self.inner = nn.Embedding(config.num_codes, config.width)
        self.outer = nn.Linear(config.width, config.num_codes)

    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        return self.outer(self.inner(nn.functional.pad(codes, (1, 0))[..., :-1])).permute(0, 3, 1, 2)
