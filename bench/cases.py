"""The cases that benchmarks run, each with a small twin for the smoke run."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastvq import Pipeline, PixelSNAIL
from fastvq.models import PRESETS, GatedPixelCNNConfig, PixelSNAILConfig
from fastvq.models.prior import Prior
from fastvq.ops.grid import Form, Mask

BATCHES = (1, 2, 8, 32)
# Whoever is much slower is not measured at every batch.
FEW_BATCHES = (1, 8, 32)
# In the smoke run, where it is enough that some batch is neither 1 nor a multiple of anything.
SMALL_BATCHES = {1: 1, 2: 2, 8: 3, 32: 7}
CALLS = ("default call", "pipeline call")
Grid = tuple[int, int]


@dataclass(frozen=True)
class Case(ABC):
    """One row of a benchmark: an operation on inputs of a given kind and batch size, on ``cpu`` or ``cuda``."""

    operation: str
    name: str
    batch: int
    device: str = field(default="cpu", kw_only=True)

    @property
    def id(self) -> str:
        kind = f"{self.operation.replace(' ', '-')}-" if self.operation in CALLS else ""
        return f"{kind}{self.name}-b{self.batch}"

    def __str__(self) -> str:
        return self.id

    @abstractmethod
    def small(self) -> Case:
        """The twin for the smoke run."""


@dataclass(frozen=True)
class SamplerCase(Case):
    """Sampling a batch of grids from a prior, all of them computed together (``micro_batch`` is the batch).

    Attributes:
        config: of a prior with random weights; None for the shipped digits prior of ``level``.
        small_config: of its small twin.
        full_seconds: an engine that would take longer is measured at some rows, and its time is extrapolated.
        naive_batch: the naive sampler of larger batches is measured at this one, and its time scaled.
        checked: how many samples of the batch are checked against the naive model; None for all.
        bf16_batches: where the ``cpu`` engine with bfloat16 weights is measured too.
        memory: whether peak memory is measured; of the smallest models it drowns in that of the libraries.
    """

    config: PixelSNAILConfig | None = None
    small_config: PixelSNAILConfig | None = None
    level: int = 0
    full_seconds: float = float("inf")
    naive_batch: int = 1 << 30
    checked: int | None = None
    bf16_batches: tuple[int, ...] = FEW_BATCHES
    memory: bool = True

    def small(self) -> SamplerCase:
        batch = SMALL_BATCHES.get(self.batch, 5)
        return dataclasses.replace(self, config=self.small_config, batch=batch, checked=None)

    def prior(self) -> Prior:
        """The prior in evaluation mode; the same object until another case asks for its own."""
        return _prior(self.config, self.level)

    def inputs(self, prior: Prior) -> dict[str, Any]:
        """Arguments of :func:`fastvq.sample`: random condition and labels where the prior wants them, a seed."""
        generator = torch.Generator().manual_seed(1)
        grids = zip(prior.config.condition_shapes, prior.config.condition_num_codes, strict=True)
        condition = [torch.randint(count, (self.batch, *shape), generator=generator) for shape, count in grids]
        classes = prior.config.num_classes
        label = None if classes is None else torch.arange(self.batch) % classes
        return {"condition": condition or None, "label": label, "seed": 0}


@functools.lru_cache(maxsize=1)
def _prior(config: PixelSNAILConfig | None, level: int) -> Prior:
    if config is None:
        return Pipeline.from_pretrained("digits").priors[level]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return PixelSNAIL(config).eval()


def _digits(level: int, name: str, batch: int) -> SamplerCase:
    return SamplerCase("sampling", f"digits-{name}", batch, level=level, memory=False)


def _top(shape: Grid, mask: Mask, channels: int, blocks: int, layers: int) -> PixelSNAILConfig:
    return PixelSNAILConfig(
        shape=shape,
        num_codes=512,
        channels=channels,
        residual_channels=channels,
        kernel_size=5,
        mask=mask,
        blocks=blocks,
        layers_per_block=layers,
    )


def _bottom(top: PixelSNAILConfig) -> PixelSNAILConfig:
    return dataclasses.replace(
        top,
        shape=(2 * top.shape[0], 2 * top.shape[1]),
        level=1,
        attention=False,
        condition_shapes=(top.shape,),
        condition_num_codes=(512,),
        condition_channels=top.channels,
        condition_blocks=3,
    )


def _sampler_cases() -> list[SamplerCase]:
    masks: tuple[Mask, ...] = ("strict", "inclusive")
    cases = [_digits(level, name, batch) for level, name in enumerate(("top", "bottom")) for batch in BATCHES]
    for mask in masks:
        # Names: 64 channels, 2 blocks of 4 layers.
        small, tiny = _top((16, 16), mask, 64, 2, 4), _top((3, 4), mask, 64, 2, 4)
        for place, config, twin in (("top", small, tiny), ("bottom", _bottom(small), _bottom(tiny))):
            # Of one mask everything is measured in full, the naive sampler too: minutes for 32 grids.
            full_seconds = 600.0 if mask == "strict" else 60.0
            cases += [
                SamplerCase("sampling", f"small-{mask}-{place}", batch, config, twin, full_seconds=full_seconds)
                for batch in BATCHES
            ]
    for mask in masks:
        default, tiny = _top((32, 32), mask, 256, 4, 4), _top((2, 3), mask, 128, 2, 1)
        for place, config, twin in (("top", default, tiny), ("bottom", _bottom(default), _bottom(tiny))):
            cases += [
                SamplerCase(
                    "sampling",
                    f"default-{mask}-{place}",
                    batch,
                    config,
                    twin,
                    full_seconds=10.0,
                    naive_batch=8,
                    checked=2,
                    bf16_batches=(1, 8),
                )
                for batch in BATCHES
            ]
    return cases


SAMPLER_CASES = _sampler_cases()


@dataclass(frozen=True)
class PipelineCase(Case):
    """Sampling ``batch`` digits with the shipped pipeline, decoded, as a user does."""

    def small(self) -> PipelineCase:
        return dataclasses.replace(self, batch=5)


_CALLED_BATCHES = (1, 8, 100, 1000)


def _call_cases() -> list[SamplerCase | PipelineCase]:
    """Calls with nothing but what they must be given, of as many samples as take seconds."""
    found: list[SamplerCase | PipelineCase] = [PipelineCase("pipeline call", "digits", n) for n in _CALLED_BATCHES]
    most = {"digits-top": 1000, "digits-bottom": 1000, "small-strict-bottom": 100, "small-inclusive-bottom": 100}
    most |= {"default-strict-bottom": 8, "default-inclusive-bottom": 8}
    known = {case.name: case for case in SAMPLER_CASES}
    for name, largest in most.items():
        case = dataclasses.replace(known[name], operation="default call", checked=8, memory=False)
        found += [dataclasses.replace(case, batch=n) for n in _CALLED_BATCHES if n <= largest]
    return found


CALL_CASES = _call_cases()


What = Literal["forward", "forward + EMA", "module"]
_SMALL_SIZES = {4096: 77, 16384: 150, 65536: 389, 1 << 20: 1003}
_SMALL_CODES = {256: 13, 512: 61, 1024: 127, 8192: 301, 65536: 515}


@dataclass(frozen=True)
class NearestCodeCase(Case):
    """Assigning ``batch`` standard normal vectors [N, D] to a standard normal codebook [K, D].

    Attributes:
        num_codes: K.
        code_dim: D.
        what: ``forward``: the indices. ``forward + EMA``: indices, the counts and sums of each code, and the update of
            the three buffers that make up an EMA codebook. ``module``: a training forward of a quantiser module.
        dtype: of the vectors; the codebook is float32.
        memory: peers whose peak memory is measured.
    """

    num_codes: int = 0
    code_dim: int = 0
    what: What = "forward"
    dtype: torch.dtype = torch.float32
    memory: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        what = self.what.replace(" + ", "-").lower()
        rest = [part for part in (self._type, "" if self.device == "cpu" else self.device) if part]
        return "-".join([f"n{self.batch}", f"k{self.num_codes}", f"d{self.code_dim}", what, *rest])

    @property
    def _type(self) -> str:
        return {torch.float32: "", torch.bfloat16: "bf16"}[self.dtype]

    @property
    def scores(self) -> int:
        """N x K."""
        return self.batch * self.num_codes

    @property
    def flops(self) -> float:
        """Of the product of all vectors with all codes."""
        return 2.0 * self.scores * self.code_dim

    def small(self) -> NearestCodeCase:
        """The twin for the smoke run, with sizes that are multiples of nothing."""
        return dataclasses.replace(
            self,
            batch=_SMALL_SIZES.get(self.batch, min(self.batch, 1003)),
            num_codes=_SMALL_CODES.get(self.num_codes, min(self.num_codes, 515)),
            code_dim=self.code_dim // 8 + 1,
        )

    def inputs(self, count: int) -> tuple[list[Tensor], Tensor]:
        """``count`` different x [N, D], and a codebook [K, D]."""
        generator = torch.Generator(self.device).manual_seed(1)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, self.code_dim, generator=generator, device=self.device)

        codebook = normal(self.num_codes)
        return [normal(self.batch).to(self.dtype) for _ in range(count)], codebook


def nearest_code_case(
    batch: int, num_codes: int, code_dim: int, what: What, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> NearestCodeCase:
    """The case, with a name that says all but N, and memory measured where N x K would be large."""
    operation = "quantiser module" if what == "module" else "nearest code"
    bf16 = ", bf16" if dtype == torch.bfloat16 else ""
    name = f"K {num_codes}, D {code_dim}, {what}{bf16}{', GPU' if device != 'cpu' else ''}"
    memory: tuple[str, ...] = ()
    if num_codes >= 8192 and batch >= 65536 and dtype == torch.float32:
        memory = ("fastvq",)
        if (batch, code_dim, what) == (65536, 64, "forward + EMA"):
            memory += ("eager", "vector-quantize-pytorch")
    return NearestCodeCase(operation, name, batch, num_codes, code_dim, what, dtype, memory, device=device)


_NEAREST_CODE_SHAPES = (
    (4096, 512, 64),
    (65536, 256, 32),
    (65536, 512, 64),
    (65536, 1024, 128),
    (65536, 1024, 512),
    (65536, 8192, 64),
    (65536, 8192, 256),
    (16384, 65536, 64),
    (1 << 20, 512, 64),
    (1 << 20, 8192, 64),
)
_BF16_SHAPES = ((65536, 512, 64), (65536, 1024, 128))
_MODULE_SHAPES = ((4096, 512, 64), (65536, 512, 64), (65536, 1024, 128), (65536, 8192, 64))
_LARGER_SHAPES = ((1 << 20, 8192, 256), (1 << 20, 65536, 64))


def _nearest_code_cases(device: str) -> list[NearestCodeCase]:
    fp32 = _NEAREST_CODE_SHAPES + (() if device == "cpu" else _LARGER_SHAPES)
    shapes = [(shape, torch.float32) for shape in fp32] + [(shape, torch.bfloat16) for shape in _BF16_SHAPES]
    both: tuple[What, ...] = ("forward", "forward + EMA")
    cases = [nearest_code_case(*shape, what, dtype, device) for shape, dtype in shapes for what in both]
    return cases + [nearest_code_case(*shape, "module", device=device) for shape in _MODULE_SHAPES]


ResidualWhat = Literal["training", "encode"]


@dataclass(frozen=True)
class ResidualCase(Case):
    """A residual quantiser on ``batch`` standard normal vectors [N, D], with codes of level q scaled by 0.8^q, about as
    long as what is left there.

    Attributes:
        num_codes: K.
        code_dim: D.
        levels: Q.
        what: ``training``: forward of the module for vectors that need a gradient. ``encode``: the codes alone.
    """

    num_codes: int = 0
    code_dim: int = 0
    levels: int = 0
    what: ResidualWhat = "training"

    @property
    def id(self) -> str:
        sizes = f"n{self.batch}-k{self.num_codes}-d{self.code_dim}-q{self.levels}"
        return f"residual-{sizes}-{self.what}{'' if self.device == 'cpu' else '-' + self.device}"

    @property
    def flops(self) -> float:
        """Of the products of all vectors with all codes of all levels."""
        return 2.0 * self.batch * self.num_codes * self.code_dim * self.levels

    def small(self) -> ResidualCase:
        """The twin for the smoke run, with sizes that are multiples of nothing."""
        return dataclasses.replace(
            self, batch=389, num_codes=_SMALL_CODES[self.num_codes], code_dim=self.code_dim // 8 + 1, levels=3
        )

    def inputs(self, count: int) -> tuple[list[Tensor], Tensor]:
        """``count`` different x [N, D], and codebooks [Q, K, D]."""
        generator = torch.Generator(self.device).manual_seed(1)
        shape = self.levels, self.num_codes, self.code_dim
        codebooks = torch.randn(shape, generator=generator, device=self.device)
        codebooks *= 0.8 ** torch.arange(self.levels, device=self.device)[:, None, None]
        rows = self.batch, self.code_dim
        return [torch.randn(rows, generator=generator, device=self.device) for _ in range(count)], codebooks


def _residual_cases(device: str) -> list[ResidualCase]:
    gpu = "" if device == "cpu" else ", GPU"
    whats: tuple[ResidualWhat, ...] = ("training", "encode")
    return [
        ResidualCase("residual quantiser", f"K {k}, D {d}, Q {q}, {what}{gpu}", 12288, k, d, q, what, device=device)
        for k, d, q in ((1024, 128, 8), (256, 64, 8))
        for what in whats
    ]


AcceleratedModule = Literal["VectorQuantize", "EMAQuantizer", "ResidualVQ"]


@dataclass(frozen=True)
class AcceleratedCase(ResidualCase):
    """A quantiser of another library on ``batch`` vectors, as it is and after :func:`fastvq.accelerate`: the forward
    pass of its training. The codebooks are as those of :class:`ResidualCase`; one level but for ``ResidualVQ``.

    Attributes:
        module: ``VectorQuantize`` and ``ResidualVQ`` of vector-quantize-pytorch, ``EMAQuantizer`` of MONAI, whose
            vectors lie along the second axis of a square.
    """

    module: AcceleratedModule = "VectorQuantize"

    @property
    def id(self) -> str:
        return super().id.replace("residual-", f"accelerated-{self.module.lower()}-", 1)

    def small(self) -> AcceleratedCase:
        levels = min(self.levels, 3)
        return dataclasses.replace(self, batch=400, num_codes=61, code_dim=self.code_dim // 8 + 1, levels=levels)


def _accelerated_cases(device: str) -> list[AcceleratedCase]:
    gpu = "" if device == "cpu" else ", GPU"
    sizes: tuple[tuple[AcceleratedModule, int, int, int, int], ...] = (
        ("VectorQuantize", 4096, 512, 64, 1),
        ("VectorQuantize", 65536, 512, 64, 1),
        ("EMAQuantizer", 4096, 512, 64, 1),
        ("EMAQuantizer", 65536, 512, 64, 1),
        ("ResidualVQ", 12288, 1024, 128, 8),
    )
    return [
        AcceleratedCase("accelerated quantiser", f"{name}, N {n}, K {k}{gpu}", n, k, d, q, device=device, module=name)
        for name, n, k, d, q in sizes
    ]


CausalWhat = Literal["forward", "forward + backward"]
WHATS: tuple[CausalWhat, ...] = ("forward", "forward + backward")


@dataclass(frozen=True)
class CausalCase(Case):
    """A convolution or a gated residual block on ``batch`` grids of normal features, or attention over them.

    Attributes:
        channels: of the input, the inner layer and the output; of attention, all heads together.
        shape: of the grid.
    """

    channels: int = 0
    shape: tuple[int, int] = (1, 1)
    mask: Mask = "strict"
    form: Form = "rows"
    kernel_size: int = 5
    heads: int = 8
    what: CausalWhat = "forward"

    @property
    def id(self) -> str:
        parts = [self.operation.replace("causal ", "causal-").replace(" ", "-"), *self.name.split(", ")]
        return "-".join(part.replace(" + ", "-").replace(" ", "") for part in [*parts, f"b{self.batch}"])

    @property
    def positions(self) -> int:
        return self.shape[0] * self.shape[1]

    def small(self) -> CausalCase:
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


@dataclass(frozen=True)
class OwnPriorCase(Case):
    """A prior of another project with random weights; see :mod:`bench.own`.

    Attributes:
        layers: gated layers, or blocks of four of them and attention.
        hidden: width before the logits, of the gated PixelCNN.
    """

    module: Literal["gated PixelCNN", "PixelSNAIL"] = "gated PixelCNN"
    shape: Grid = (32, 32)
    num_codes: int = 512
    channels: int = 64
    layers: int = 15
    hidden: int = 512

    @property
    def id(self) -> str:
        return f"own-prior-{self.name.lower().replace(' ', '-')}-b{self.batch}"

    def small(self) -> OwnPriorCase:
        return dataclasses.replace(
            self, batch=SMALL_BATCHES[self.batch], shape=(4, 5), num_codes=7, channels=8, layers=2, hidden=6
        )


def _own_prior_cases() -> list[OwnPriorCase]:
    return [
        OwnPriorCase("own prior", name, batch, module=name, layers=layers)
        for name, layers in (("gated PixelCNN", 15), ("PixelSNAIL", 2))
        for batch in (1, 8)
    ]


@dataclass(frozen=True)
class ProductCase(Case):
    """What one row of the grids of ``batch`` samples takes of two rows above it, five columns each.

    Attributes:
        channels: of these rows.
        columns: of the output.
        width: of the row.
    """

    channels: int = 0
    columns: int = 0
    width: int = 0

    @property
    def id(self) -> str:
        return f"row-product-{self.name.replace(' ', '')}-b{self.batch}"

    def small(self) -> ProductCase:
        return dataclasses.replace(self, batch=3, channels=13, columns=21, width=7)


def _product_cases() -> list[ProductCase]:
    sizes = ((256, 512, 64), (256, 256, 64), (64, 128, 32), (64, 64, 32))
    return [
        ProductCase("row product", f"{channels} to {columns} channels, width {width}", batch, channels, columns, width)
        for channels, columns, width in sizes
        for batch in BATCHES
    ]


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
    if device == "cuda":
        default = _top((32, 32), "strict", 256, 4, 4)
        forms: tuple[Form, ...] = ("rows", "symmetric")
        configs |= {f"default-top-{form}": (dataclasses.replace(default, form=form), 16) for form in forms}
    return [
        PriorCase("causal prior", _name(name, what, gpu), batch, config, what, device=device)
        for name, (config, batch) in configs.items()
        for what in ("training", "scoring")
    ]


DEVICES = ("cpu", "cuda")
CASES: list[Case] = [*SAMPLER_CASES, *CALL_CASES, *_product_cases(), *_own_prior_cases()]
for _device in DEVICES:
    CASES += [*_nearest_code_cases(_device), *_residual_cases(_device), *_accelerated_cases(_device)]
    CASES += [*_convolution_cases(_device), *_attention_cases(_device)]
    CASES += _prior_cases(_device)


def case_of(case_id: str) -> Any:
    """The case of that id."""
    return next(case for case in CASES if case.id == case_id)
