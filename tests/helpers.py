"""Tiny priors, grids of codes, and a prior whose probabilities can be computed by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastvq.models import GatedPixelCNN, GatedPixelCNNConfig, PixelSNAIL, PixelSNAILConfig, Prior, PriorConfig


def refuses(error: type[Exception], message: str) -> Any:
    """Expects an error of exactly this class whose message begins with ``message``."""
    return pytest.raises(error, match=f"^{message}", check=lambda raised: type(raised) is error)


def script_at(path: Path) -> ModuleType:
    """A script that belongs to no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_codes(*shape: int, num_codes: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(num_codes, shape, generator=torch.Generator().manual_seed(seed))


def snail(**changes: Any) -> PixelSNAIL:
    fields: dict[str, Any] = {
        "shape": (3, 4),
        "num_codes": 5,
        "channels": 4,
        "residual_channels": 4,
        "kernel_size": 3,
        "blocks": 1,
        "layers_per_block": 1,
        "attention_heads": 2,
        "condition_channels": 4,
        "condition_blocks": 1,
        "dropout": 0.0,
    }
    return PixelSNAIL(PixelSNAILConfig(**{**fields, **changes})).eval()


def pixelcnn(**changes: Any) -> GatedPixelCNN:
    fields: dict[str, Any] = {
        "shape": (3, 4),
        "num_codes": 5,
        "channels": 16,
        "layers": 1,
        "output_channels": 32,
        "condition_channels": 4,
        "condition_blocks": 1,
        "dropout": 0.0,
    }
    return GatedPixelCNN(GatedPixelCNNConfig(**{**fields, **changes})).eval()


class TablePrior(Prior):
    """Logits at position p are ``position[p] + follow[code at p - 1]``: a Markov chain in raster order.

    Counts the passes, and can be told to fail in one of them.
    """

    def __init__(self, shape: tuple[int, int], num_codes: int, *, level: int = 0, seed: int = 0) -> None:
        super().__init__(PriorConfig(shape=shape, num_codes=num_codes, level=level))
        generator = torch.Generator().manual_seed(seed)
        self.position = nn.Parameter(torch.randn(shape[0] * shape[1], num_codes, generator=generator))
        self.follow = nn.Parameter(2 * torch.randn(num_codes, num_codes, generator=generator))
        self._passes = [0]
        self.fail_at: int | None = None

    @property
    def passes(self) -> int:
        """Of the prior and of what it is evaluated as, which have the list in common."""
        return self._passes[0]

    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        assert context is None
        if self.passes == self.fail_at:
            raise RuntimeError("the pass that was told to fail")
        self._passes[0] += 1
        flat = self.check_codes(codes).flatten(1)
        logits = self.position[: flat.shape[1]].repeat(flat.shape[0], 1, 1)
        logits[:, 1:] += self.follow[flat[:, :-1]]
        return logits.movedim(-1, 1).unflatten(2, (-1, codes.shape[2]))

    def by_hand(self, uniforms: Tensor, known: Tensor | None = None, temperature: float = 1.0) -> np.ndarray:
        """The chain at these uniforms [n, H, W] in float64, one sample and position at a time.

        Where ``known`` is not negative it is the code. Uniforms too near to a boundary to call are refused.
        """
        position, follow = self.position.detach().double().numpy(), self.follow.detach().double().numpy()
        codes = np.zeros(uniforms.shape, dtype=np.int64)
        for i, points in enumerate(uniforms.double().numpy()):
            before: int | None = None
            for p, u in enumerate(points.flat):
                logits = (position[p] + (0 if before is None else follow[before])) / temperature
                cdf = np.cumsum(np.exp(logits)) / np.exp(logits).sum()
                code = int((cdf <= u).sum())
                given = -1 if known is None else int(known[i].flatten()[p])
                if given >= 0:
                    code = given
                else:
                    assert np.abs(cdf - u).min() > 1e-6, "choose another seed"
                codes[i].flat[p] = before = code
        return codes
