"""The cases of causal convolution, attention, gated blocks and whole priors, each with a small twin."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from bench.harness import Case
from fastvq.models import PRESETS, GatedPixelCNNConfig, PixelSNAILConfig
from fastvq.ops.grid import Form, Mask

What = Literal["forward", "forward + backward"]
WHATS: tuple[What, ...] = ("forward", "forward + backward")


@dataclass(frozen=True)
class CausalCase(Case):
    """A convolution or a gated residual block on ``batch`` grids of normal features, or attention over them.

    Attributes:
        channels: of the input, the inner layer and the output; of attention, all heads together.
        shape: of the grid.
        device: ``cpu`` or ``cuda``.
    """

    channels: int = 0
    shape: tuple[int, int] = (1, 1)
    mask: Mask = "strict"
    form: Form = "rows"
    kernel_size: int = 5
    heads: int = 8
    what: What = "forward"
    device: str = "cpu"

    @property
    def id(self) -> str:
        parts = [self.operation.replace("causal ", "causal-").replace(" ", "-"), *self.name.split(", ")]
        return "-".join(part.replace(" + ", "-").replace(" ", "") for part in [*parts, f"b{self.batch}"])

    @property
    def positions(self) -> int:
        return self.shape[0] * self.shape[1]

    def small(self) -> CausalCase:
        """The twin for the smoke run."""
        return dataclasses.replace(self, batch=3, channels=16, shape=(5, 7))


@dataclass(frozen=True)
class PriorCase(Case):
    """A training step, or scoring (negative log-likelihoods without gradients), of a prior with random weights.

    Attributes:
        config: of the prior.
        what: ``training`` or ``scoring``.
    """

    config: PixelSNAILConfig | GatedPixelCNNConfig | None = None
    what: str = "training"
    device: str = "cpu"

    @property
    def id(self) -> str:
        return f"causal-prior-{self.name}-b{self.batch}".replace(", ", "-")

    def small(self) -> PriorCase:
        """The twin for the smoke run: the same kind of prior, with as little of everything as it can have."""
        assert self.config is not None
        changes: dict[str, Any] = {"channels": 16, "shape": (4, 6), "condition_channels": 16}
        changes["condition_blocks"] = 1
        changes["condition_shapes"] = tuple((2, 3) for _ in self.config.condition_shapes)
        if isinstance(self.config, PixelSNAILConfig):
            heads = {"attention_heads": 2, "attention_channels": None}
            changes |= {"residual_channels": 16, "blocks": 1, "layers_per_block": 1, "output_blocks": 1, **heads}
        else:
            changes |= {"layers": 2, "output_channels": 16}
        return dataclasses.replace(self, batch=2, config=dataclasses.replace(self.config, **changes))


def _name(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _convolution_cases(device: str) -> list[CausalCase]:
    gpu = "GPU" if device == "cuda" else ""
    sizes = [(256, 32), (64, 64)] if device == "cpu" else [(256, 32), (256, 64), (64, 64)]
    batch = 8 if device == "cpu" else 32
    masks: tuple[Mask, ...] = ("strict", "inclusive")
    forms: tuple[Form, ...] = ("symmetric", "rows")
    cases = []
    for channels, side in sizes:
        for form in forms:
            for mask in masks if channels > 64 else masks[:1]:
                for what in WHATS:
                    name = _name(form, mask, f"{channels} channels", f"{side}x{side}", what, gpu)
                    shape, rest = (side, side), {"mask": mask, "form": form, "what": what, "device": device}
                    cases.append(CausalCase("causal conv", name, batch, channels, shape, **rest))
                    if mask == "strict":
                        cases.append(CausalCase("gated block", name, batch, channels, shape, **rest))
    return cases


def _attention_cases(device: str) -> list[CausalCase]:
    gpu = "GPU" if device == "cuda" else ""
    masks: tuple[Mask, ...] = ("strict", "inclusive")
    sizes = [(8, 256, 32), (2, 128, 64)] if device == "cpu" else [(32, 256, 32), (8, 256, 64)]
    return [
        CausalCase(
            "causal attention",
            _name(mask, f"width {width}", f"{side}x{side}", what, gpu),
            batch,
            width,
            (side, side),
            mask,
            what=what,
            device=device,
        )
        for batch, width, side in sizes
        for mask in masks
        for what in WHATS
    ]


# Priors whose training step takes seconds, not minutes, on two cores; of the larger ones a GPU is wanted.
_CPU_PRIORS = {"digits-top": 64, "digits-bottom": 64, "imagenet128-pixelcnn": 1}
_GPU_PRIORS = {"imagenet256-top": 8, "imagenet256-bottom": 2, "ffhq1024-top": 4, "imagenet128-pixelcnn": 16}


def _small_prior(form: Form) -> PixelSNAILConfig:
    return PixelSNAILConfig(
        shape=(32, 32),
        num_codes=512,
        channels=128,
        residual_channels=128,
        kernel_size=5,
        form=form,
        blocks=2,
        layers_per_block=4,
        dropout=0.1,
    )


def _prior_cases(device: str) -> list[PriorCase]:
    gpu = "GPU" if device == "cuda" else ""
    configs: dict[str, tuple[Any, int]] = {
        name: (PRESETS[name][1], batch) for name, batch in (_CPU_PRIORS if device == "cpu" else _GPU_PRIORS).items()
    }
    configs |= {"snail-symmetric": (_small_prior("symmetric"), 2), "snail-rows": (_small_prior("rows"), 2)}
    return [
        PriorCase("causal prior", _name(name, what, gpu), batch, config, what, device)
        for name, (config, batch) in configs.items()
        for what in ("training", "scoring")
    ]


def causal_cases(device: str) -> list[CausalCase]:
    return _convolution_cases(device) + _attention_cases(device)


CAUSAL_CASES = causal_cases("cpu")
CAUSAL_GPU_CASES = causal_cases("cuda")
PRIOR_CASES = _prior_cases("cpu")
PRIOR_GPU_CASES = _prior_cases("cuda")
