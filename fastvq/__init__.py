"""fastvq: hierarchical vector-quantised autoencoders and autoregressive priors over their codes.

Importing this package is light: PyTorch is imported with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# It has to be there to see the process fork.
from fastvq import _engine as _engine
from fastvq._version import __version__

if TYPE_CHECKING:
    from fastvq.interop.quantizers import accelerate, acceleration, restore
    from fastvq.models import FSQ, LFQ, VQVAE, VQVAE2, GatedPixelCNN, PixelSNAIL, ResidualVQ, SimVQ, VectorQuantizer
    from fastvq.sampling import EngineOptions, Pipeline, PlanBuilder, check_causal, explain, sample, trace, with_plan

_HOMES = {
    "EngineOptions": "fastvq.sampling",
    "FSQ": "fastvq.models",
    "GatedPixelCNN": "fastvq.models",
    "LFQ": "fastvq.models",
    "PixelSNAIL": "fastvq.models",
    "PlanBuilder": "fastvq.sampling",
    "Pipeline": "fastvq.sampling",
    "ResidualVQ": "fastvq.models",
    "SimVQ": "fastvq.models",
    "VQVAE": "fastvq.models",
    "VQVAE2": "fastvq.models",
    "VectorQuantizer": "fastvq.models",
    "accelerate": "fastvq.interop.quantizers",
    "acceleration": "fastvq.interop.quantizers",
    "check_causal": "fastvq.sampling",
    "explain": "fastvq.sampling",
    "restore": "fastvq.interop.quantizers",
    "sample": "fastvq.sampling",
    "trace": "fastvq.sampling",
    "with_plan": "fastvq.sampling",
}

# Reached as attributes, and imported then.
_ROOMS = ("data", "distributed", "errors", "evaluation", "interop", "models", "ops", "sampling", "training")

__all__ = [
    "FSQ",
    "LFQ",
    "VQVAE",
    "VQVAE2",
    "EngineOptions",
    "GatedPixelCNN",
    "Pipeline",
    "PixelSNAIL",
    "PlanBuilder",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantizer",
    "__version__",
    "accelerate",
    "acceleration",
    "check_causal",
    "explain",
    "restore",
    "sample",
    "trace",
    "with_plan",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"fastvq.{name}")
    raise AttributeError(f"module 'fastvq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
