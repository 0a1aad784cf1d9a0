"""An autoencoder and its priors together: from nothing to images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from fastvq._check import require_choice
from fastvq._evaluation import in_evaluation
from fastvq._files import read_json, reading, replacing_folder, require_seal, sealed, write_json
from fastvq._schema import TEXT, optional, several
from fastvq._unwrap import require_model
from fastvq._version import __version__
from fastvq.errors import ArgumentError, ArgumentTypeError, CorruptFileError, MissingFileError
from fastvq.models.limits import MOST_LEVELS
from fastvq.models.pretrained import load_pretrained
from fastvq.models.prior import Prior
from fastvq.models.vqvae import HierarchicalVQVAE
from fastvq.sampling.api import Run, living_threads
from fastvq.sampling.engines import warn_slow
from fastvq.sampling.noise import fixed_seed, uniforms
from fastvq.sampling.options import EngineOptions, Precision, engine_options
from fastvq.sampling.project import DATA_FILE, class_names, is_project, load_priors, load_vqvae
from fastvq.sampling.request import Settings, assemble, check_indices, check_labels, micro_batches

PIPELINE_FILE = "pipeline.json"
FORMAT = 1
# Samples decoded together, whose features take more memory than the sampler's.
DECODED = 8

T = TypeVar("T")


class Samples(NamedTuple):
    """Result of :meth:`Pipeline.sample`.

    Attributes:
        images: float32 [n, C, H, W], clamped to [-1, 1]; up to the decoder's rounding, which may depend on how many
            images are decoded together.
        codes: int64 [n, h, w] for each level, top first.
        seed, micro_batch: what to pass to get the same codes again; ``micro_batch`` matters where engines round
            differently for other sizes.
    """

    images: Tensor
    codes: tuple[Tensor, ...]
    seed: int
    micro_batch: int


@dataclass(frozen=True)
class Levels:
    """How the codes of all levels will be drawn, decided before anything is.

    Attributes:
        runs: of each level, top first; all with the same micro-batch.
        settings: of each level.
    """

    runs: tuple[Run, ...]
    settings: tuple[Settings, ...]

    @property
    def micro_batch(self) -> int:
        return self.runs[0].micro_batch

    def warn_slow(self, stacklevel: int) -> None:
        """Say once what of it takes the naive engine; ``stacklevel`` 1 is the caller's line."""
        warn_slow([run.slow for run in self.runs if run.slow is not None], stacklevel=stacklevel + 1)

    def draw(
        self, n: int, *, seed: int, start: int = 0, labels: Tensor | None = None, progress: bool = False
    ) -> tuple[Tensor, ...]:
        """Codes of samples ``start .. start + n - 1``: int64 [n, h, w] for each level, top first."""
        codes: tuple[Tensor, ...] = ()
        for run, given in zip(self.runs, self.settings, strict=True):
            config = run.prior.config
            noise = uniforms(seed, start, n, config.shape, level=config.level)
            request = assemble(run.prior, given, noise, codes, labels)
            codes = (*codes, run.draw(request, start, progress=progress))
        return codes


class Pipeline:
    """An autoencoder and one prior per level, top first.

    Args:
        vqvae: VQVAE or VQVAE2. It and the priors may lie inside torch.compile, DataParallel, DistributedDataParallel
            or AveragedModel, which are taken off.
        priors: the prior of each level; prior i is conditioned on the codes of levels 0..i-1.
        class_names: a name per label, for class-conditional priors.

    Raises:
        ArgumentError, ArgumentTypeError: priors that do not fit the autoencoder or each other, or are none.
    """

    def __init__(
        self,
        vqvae: HierarchicalVQVAE | nn.Module,
        priors: Sequence[Prior | nn.Module],
        *,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.vqvae = require_model("vqvae", vqvae, HierarchicalVQVAE)
        self.priors = tuple(
            require_model(f"priors[{i}]", prior, Prior)  # type: ignore[type-abstract]
            for i, prior in enumerate(priors)
        )
        self.class_names = None if class_names is None else tuple(class_names)
        self._check()

    def _check(self) -> None:
        if len(self.priors) != self.vqvae.num_levels:
            raise ArgumentError(f"priors: expected {self.vqvae.num_levels}, one per level, got {len(self.priors)}")
        top = self.priors[0].config.shape
        scale = self.vqvae.total_stride
        shapes = self.vqvae.code_shapes((top[0] * scale, top[1] * scale))
        classes = {prior.config.num_classes for prior in self.priors}
        for level, (prior, shape) in enumerate(zip(self.priors, shapes, strict=True)):
            config = prior.config
            given = (config.shape, config.num_codes, config.level)
            wanted = (shape, self.vqvae.config.num_codes, level)
            if given != wanted:
                raise ArgumentError(f"priors[{level}]: (shape, num_codes, level) is {given}, expected {wanted}")
            above = (config.condition_shapes, config.condition_num_codes)
            levels_above = (shapes[:level], (self.vqvae.config.num_codes,) * level)
            if above != levels_above:
                raise ArgumentError(
                    f"priors[{level}]: (condition_shapes, condition_num_codes) is {above}, expected {levels_above}"
                )
        if len(classes) > 1:
            raise ArgumentError(f"priors: all levels must have the same num_classes, got {sorted(map(str, classes))}")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ArgumentError(f"class_names: expected {self.num_classes} names, got {len(self.class_names)}")

    @property
    def num_classes(self) -> int | None:
        return self.priors[0].config.num_classes

    @property
    def device(self) -> torch.device:
        return next(self.vqvae.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Move all models; returns the pipeline itself."""
        for model in (self.vqvae, *self.priors):
            model.to(device)
        return self

    @living_threads()
    def sample(
        self,
        n: int,
        *,
        label: int | Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int | None] | None = None,
        top_p: float | Sequence[float | None] | None = None,
        seed: int | None = None,
        progress: bool = False,
        engine: str = "auto",
        start: int = 0,
        micro_batch: int | None = None,
        memory_limit: int | None = None,
        precision: Precision = "float32",
        options: EngineOptions | None = None,
    ) -> Samples:
        """Draw all levels, top first, and decode them.

        Arguments are those of :func:`fastvq.sample`; ``temperature``, ``top_k`` and ``top_p`` may also be a sequence
        with one value per level, top first.
        """
        check_indices(n, start)
        levels = self.levels(
            n,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            engine=engine,
            micro_batch=micro_batch,
            memory_limit=memory_limit,
            options=engine_options(precision, options),
        )
        seed = fixed_seed(seed)
        labels = check_labels(self.priors[0], label, n)  # all levels have the same classes
        levels.warn_slow(stacklevel=3)  # past the decorator
        codes = levels.draw(n, seed=seed, start=start, labels=labels, progress=progress)
        return Samples(self.decode(codes), codes, seed, levels.micro_batch)

    def levels(
        self,
        n: int,
        *,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int | None] | None = None,
        top_p: float | Sequence[float | None] | None = None,
        engine: str = "auto",
        micro_batch: int | None = None,
        memory_limit: int | None = None,
        options: EngineOptions,
    ) -> Levels:
        """How n samples will be drawn, from the arguments of :meth:`sample`."""
        temperatures = self._per_level("temperature", temperature)
        top_ks = self._per_level("top_k", top_k)
        top_ps = self._per_level("top_p", top_p)
        settings = tuple(Settings(*given) for given in zip(temperatures, top_ks, top_ps, strict=True))
        runs = []
        for prior, given in zip(self.priors, settings, strict=True):
            given.check(prior.config.num_codes)
            runs.append(Run.chosen(prior, n, engine, options, micro_batch, memory_limit))
        size = min(run.micro_batch for run in runs)  # all levels and the decoder work on the same micro-batches
        return Levels(tuple(dataclasses.replace(run, micro_batch=size) for run in runs), settings)

    def labels(self, indices: range, label: int | None = None) -> Tensor | None:
        """Labels of some samples by their indices, int64 [n]: ``label``, or all classes in turn; None without classes.

        Raises:
            ArgumentError: there is no such class.
        """
        if label is None and self.num_classes is not None:
            return torch.arange(indices.start, indices.stop) % self.num_classes
        return check_labels(self.priors[0], label, len(indices))

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Images of codes, int64 [n, h, w] of each level, top first: float32 [n, C, H, W], clamped to [-1, 1]."""
        n, rows, columns = codes[0].shape
        scale = self.vqvae.total_stride
        size = (n, self.vqvae.config.in_channels, rows * scale, columns * scale)
        images = torch.empty(size, dtype=torch.float32, device=codes[0].device)
        vqvae = in_evaluation(self.vqvae)
        for part in micro_batches(n, DECODED):
            images[part] = vqvae.decode([level[part] for level in codes]).float().clamp(-1, 1)
        return images

    def _per_level(self, name: str, value: T | Sequence[T]) -> list[T]:
        levels = len(self.priors)
        if isinstance(value, (list, tuple)):
            if len(value) != levels:
                raise ArgumentError(f"{name}: expected one value or {levels}, one per level, got {len(value)}")
            return list(value)
        if isinstance(value, Tensor):
            raise ArgumentTypeError(f"{name}: expected a number or a sequence of numbers, got a tensor")
        return [value] * levels  # type: ignore[list-item]

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write all models to a folder, whole or not at all; returns its path."""
        folder = Path(folder)
        with replacing_folder(folder, overwrite=overwrite) as temporary:
            self.vqvae.save_pretrained(temporary / "vqvae")
            for level, prior in enumerate(self.priors):
                prior.save_pretrained(temporary / f"prior{level}")
            description = {
                "format": FORMAT,
                "levels": len(self.priors),
                "class_names": self.class_names,
                "fastvq_version": __version__,
            }
            write_json(temporary / PIPELINE_FILE, sealed(description))
        return folder

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, device: str | torch.device = "cpu", weights: str = "last"
    ) -> Self:
        """A pipeline that ships with the package, by its name, or one in a local folder, by its path.

        Args:
            name: name of a shipped pipeline; else a folder that :meth:`save_pretrained` wrote, or the project folder of
                ``fastvq train-vqvae``, ``fastvq train-prior`` or ``fastvq demo``. A ``Path`` is always a folder.
            weights: of the priors of a project: ``last``, or ``best``, those with the lowest validation loss. Priors in
                training give those of their newest checkpoint.

        Raises:
            MissingFileError: none of these, or a project in which models are missing; says which.
            FileConflictError: priors of a project that belong to another autoencoder.
            CorruptFileError: the folder is damaged.
        """
        folder = Path(name) if isinstance(name, os.PathLike) else shipped().get(name, Path(name))
        if not folder.is_dir():
            if isinstance(name, os.PathLike):
                raise MissingFileError(f"name: no folder {folder}")
            raise MissingFileError(
                f"name: {name!r} is neither a local folder nor one of the shipped models {sorted(shipped())}"
            )
        names: object
        require_choice("weights", weights, ("last", "best"))
        if weights != "last" and not is_project(folder):
            raise ArgumentError(f"weights: a saved pipeline has no {weights} weights, only those saved")
        if (folder / PIPELINE_FILE).is_file():
            vqvae, priors, names = _saved(folder, device)
        elif is_project(folder):
            try:
                vqvae = load_vqvae(folder, device)
                priors = load_priors(folder, vqvae, device, weights)
            except MissingFileError as error:
                raise MissingFileError(f"name: {error}") from error
            names = class_names(folder) if priors[0].config.num_classes else None
        else:
            raise MissingFileError(
                f"name: {folder} holds no {PIPELINE_FILE}, so it is not a saved pipeline, and neither {DATA_FILE} nor "
                "a run in vqvae/, so it is neither a project folder"
            )
        with reading(f"{folder}: the models do not fit together"):
            if not optional(several(TEXT)).test(names):
                raise ArgumentError(f"class_names: expected a list of names, got {names!r}")
            return cls(vqvae, priors, class_names=names)  # type: ignore[arg-type]


def _saved(folder: Path, device: str | torch.device) -> tuple[HierarchicalVQVAE, list[Prior], object]:
    """Models and class names that :meth:`Pipeline.save_pretrained` wrote."""
    description = read_json(folder / PIPELINE_FILE)
    levels = description.get("levels")
    if description.get("format") != FORMAT or not isinstance(levels, int) or not 1 <= levels <= MOST_LEVELS:
        raise CorruptFileError(f"{folder / PIPELINE_FILE}: not a pipeline description of format {FORMAT}")
    require_seal(folder / PIPELINE_FILE, description)
    vqvae = load_pretrained(folder / "vqvae", device=device)
    models = [load_pretrained(folder / f"prior{level}", device=device) for level in range(levels)]
    priors = [model for model in models if isinstance(model, Prior)]
    if not isinstance(vqvae, HierarchicalVQVAE) or len(priors) < len(models):
        raise CorruptFileError(f"{folder}: expected an autoencoder in vqvae/ and priors in prior0/, prior1/, ...")
    return vqvae, priors, description.get("class_names")


def shipped() -> dict[str, Path]:
    """Names and folders of the pipelines inside the package."""
    root = Path(str(resources.files("fastvq"))) / "pretrained"
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{PIPELINE_FILE}"))}
