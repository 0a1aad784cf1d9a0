"""What the sampler's benchmark needs of engines beyond their calls; no other file here knows what they are made of."""

from __future__ import annotations

from fastvq.models.prior import Prior
from fastvq.sampling import EngineOptions
from fastvq.sampling.engines import fill
from fastvq.sampling.request import SampleRequest


def phase_seconds(engine: str, prior: Prior, request: SampleRequest, options: EngineOptions) -> dict[str, float]:
    """Seconds of the device in each phase of a grid, all rows together."""
    spent: dict[str, float] = {}

    def on_phase(name: str, seconds: float) -> None:
        spent[name] = spent.get(name, 0.0) + seconds

    fill(engine, prior, request, lambda rows: None, options, on_phase=on_phase)
    return spent
