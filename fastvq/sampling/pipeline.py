"""An autoencoder and its priors together: from nothing to images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Self, TypedDict, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from fastvq._check import require_bool, require_choice, require_positive_int
from fastvq._files import read_json, reading, replacing_folder, require_seal, sealed, write_json
from fastvq._names import names_like
from fastvq._schema import TEXT, optional, several
from fastvq._unwrap import require_model, unwrap
from fastvq._version import __version__
from fastvq.errors import ArgumentError, ArgumentTypeError, CorruptFileError, MissingFileError
from fastvq.models.limits import MOST_LEVELS
from fastvq.models.pretrained import load_pretrained
from fastvq.models.prior import Prior
from fastvq.models.vqvae import HierarchicalVQVAE
from fastvq.sampling.api import Run, living_threads, require_callback
from fastvq.sampling.autoencoder import AnyAutoencoder, Autoencoder, OwnAutoencoder, own_autoencoder, weight_of
from fastvq.sampling.coding import decode, encode, frames, image_shape_of, reconstruct
from fastvq.sampling.known import Known, check_pictures, check_upper_codes, known_cells, without_region
from fastvq.sampling.levels import Levels, LevelsCallback
from fastvq.sampling.noise import Seed, fixed_seed
from fastvq.sampling.options import EngineOptions, Precision, engine_options
from fastvq.sampling.project import DATA_FILE, class_names, is_project, load_priors, load_vqvae
from fastvq.sampling.request import Settings, check_indices, check_labels
from fastvq.sampling.samples import Samples

PIPELINE_FILE = "pipeline.json"
FORMAT = 1
# Names of classes in a line.
_SHOWN = 12

T = TypeVar("T")
# Classes: of all samples, in turn by their index, or (an array or a tensor [n]) of each.
Label = int | str | Sequence[int | str] | np.ndarray | Tensor
# Of all levels, or of each; and then of all samples, or (a sequence, an array or a tensor, [n]) of each.
Temperature = float | np.ndarray | Tensor | Sequence[float | Sequence[float] | np.ndarray | Tensor]


class Drawing(TypedDict, total=False):
    """How codes are drawn: arguments that :meth:`Pipeline.sample` explains."""

    temperature: Temperature
    top_k: int | Sequence[int | None] | None
    top_p: float | Sequence[float | None] | None
    engine: str
    micro_batch: int | None
    memory_limit: int | None


class Pipeline:
    """An autoencoder and one prior per level, top first.

    Args:
        vqvae: VQVAE or VQVAE2, or an autoencoder of another project: any object with ``encode`` and ``decode`` as
            :class:`fastvq.sampling.Autoencoder` has them. It and the priors may lie inside torch.compile,
            DataParallel, DistributedDataParallel or AveragedModel, which are taken off.
        priors: the prior of each level; prior i is conditioned on the codes of levels 0..i-1.
        class_names: a name per label, for class-conditional priors.
        image_shape: (C, H, W) of the images of an autoencoder of another project; by default its attribute of this
            name. One such image is encoded and decoded here, to find out whether all fits.

    Attributes:
        vqvae: the autoencoder; one of another project is ``vqvae.model``.

    Raises:
        ArgumentError, ArgumentTypeError: priors that do not fit the autoencoder or each other, or are none.
    """

    def __init__(
        self,
        vqvae: HierarchicalVQVAE | Autoencoder | nn.Module,
        priors: Sequence[Prior | nn.Module],
        *,
        class_names: Sequence[str] | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        self.priors = tuple(
            require_model(f"priors[{i}]", prior, Prior)  # type: ignore[type-abstract]
            for i, prior in enumerate(priors)
        )
        self.class_names = None if class_names is None else _names(class_names)
        inner = unwrap(vqvae)
        configs = [prior.config for prior in self.priors]
        shapes, num_codes = tuple(one.shape for one in configs), tuple(one.num_codes for one in configs)
        if isinstance(inner, HierarchicalVQVAE):
            if len(self.priors) != inner.num_levels:
                raise ArgumentError(f"priors: expected {inner.num_levels}, one per level, got {len(self.priors)}")
            scale = inner.total_stride
            found = inner.code_shapes((shapes[0][0] * scale, shapes[0][1] * scale))
            shapes = tuple((height, width) for height, width in found)
            num_codes = (inner.config.num_codes,) * len(shapes)
        elif not self.priors:
            raise ArgumentError("priors: expected one per level, got none")
        self._check(shapes, num_codes)
        self.vqvae: AnyAutoencoder
        if isinstance(inner, HierarchicalVQVAE):
            self.vqvae = inner
        else:
            if isinstance(inner, OwnAutoencoder):  # of another pipeline, whose priors were others
                inner, image_shape = inner.model, image_shape or inner.image_shape
            device = next(self.priors[0].parameters()).device
            self.vqvae = own_autoencoder(inner, image_shape, shapes, num_codes, device)
        if image_shape is not None and tuple(image_shape) != self.image_shape:
            raise ArgumentError(f"image_shape: this autoencoder has {self.image_shape}, got {tuple(image_shape)}")

    def _check(self, shapes: tuple[tuple[int, int], ...], num_codes: tuple[int, ...]) -> None:
        """Whether the priors are of these grids and codebooks, and of each other."""
        classes = {prior.config.num_classes for prior in self.priors}
        for level, (prior, shape) in enumerate(zip(self.priors, shapes, strict=True)):
            config = prior.config
            given = (config.shape, config.num_codes, config.level)
            wanted = (shape, num_codes[level], level)
            if given != wanted:
                raise ArgumentError(f"priors[{level}]: (shape, num_codes, level) is {given}, expected {wanted}")
            above = (config.condition_shapes, config.condition_num_codes)
            levels_above = (shapes[:level], num_codes[:level])
            if above != levels_above:
                raise ArgumentError(
                    f"priors[{level}]: (condition_shapes, condition_num_codes) is {above}, expected {levels_above}"
                )
        if len(classes) > 1:
            raise ArgumentError(f"priors: all levels must have the same num_classes, got {sorted(map(str, classes))}")
        if self.class_names is not None and self.num_classes is None:
            raise ArgumentError(f"class_names: these priors know no classes, got {len(self.class_names)} names")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ArgumentError(f"class_names: expected {self.num_classes} names, got {len(self.class_names)}")

    @property
    def num_classes(self) -> int | None:
        """Number of labels, the same for all priors; None without."""
        return self.priors[0].config.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of samples."""
        return image_shape_of(self.vqvae, self.priors[0].config.shape)

    @property
    def device(self) -> torch.device:
        """Where the autoencoder is."""
        return weight_of(self.vqvae).device

    def __repr__(self) -> str:
        own = self.vqvae.model if isinstance(self.vqvae, OwnAutoencoder) else self.vqvae
        lines = [f"images {' x '.join(map(str, self.image_shape))} on {self.device}", f"vqvae  {type(own).__name__}"]
        for level, prior in enumerate(self.priors):
            config, size = prior.config, sum(weight.numel() for weight in prior.parameters())
            grid = f"{config.shape[0]} x {config.shape[1]} of {config.num_codes} codes"
            lines.append(f"prior{level} {type(prior).__name__}, {grid}, {size:,} parameters")
        if self.num_classes is not None:
            names = [repr(name) for name in (self.class_names or ())]
            shown = names if len(names) <= _SHOWN else [*names[: _SHOWN - 1], "..."]
            lines.append(f"labels 0..{self.num_classes - 1}" + (f": {', '.join(shown)}" if shown else ""))
        return "\n  ".join(["Pipeline(", *lines]) + "\n)"

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
        label: Label | None = None,
        codes: Sequence[Tensor] = (),
        temperature: Temperature = 1.0,
        top_k: int | Sequence[int | None] | None = None,
        top_p: float | Sequence[float | None] | None = None,
        seed: Seed | None = None,
        progress: bool = False,
        engine: str = "auto",
        start: int = 0,
        micro_batch: int | None = None,
        memory_limit: int | None = None,
        precision: Precision = "float32",
        options: EngineOptions | None = None,
        callback: LevelsCallback | None = None,
        return_logprobs: bool = False,
    ) -> Samples:
        """Draw all levels, top first, and decode them; ``pipeline(...)`` is the same.

        Other arguments are those of :func:`fastvq.sample`; ``temperature``, ``top_k`` and ``top_p`` may also be a
        sequence with one value per level, top first.

        Raises:
            ArgumentError, ArgumentTypeError: arguments that do not fit; nothing has been computed then.
            UnavailableError: the engine asked for cannot run here.

        Args:
            label: class of all samples: a number, or a name of ``class_names``; or a sequence, an array or a tensor of
                them, of which sample i (counted from 0, not from ``start``) is of the one at i modulo their number. An
                array or a tensor [n] has the class of each sample drawn, in their order.
            temperature: of all samples and levels; a sequence is one per level. An array or a tensor [n], in place of
                any of these numbers, has one for each sample; per level such a one may be a sequence as well.
            codes: of the first levels, top first, int [n, h, w] or [1, h, w] each, such as from :meth:`encode`. The
                levels below are drawn: given the top alone, what is coarse stays and the details vary.
            callback: as of :func:`fastvq.sample`, called with the rows done of all levels that are drawn and with a
                tuple of the codes of the levels so far. Where it ends sampling, images are of what there is: a missing
                code is the mean vector of its level (with an autoencoder of another project: code 0).
            return_logprobs: ``logprobs`` of the result are those of the codes of each level.
        """
        require_callback(callback)
        require_bool("return_logprobs", return_logprobs)
        n, start = check_indices(n, start)
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
        labels = self._labels_of(n, start, label)
        known = check_upper_codes(self.priors, codes, n)
        levels.warn_slow(stacklevel=3, first=len(known))  # past the decorator
        drawn = levels.draw(n, seed=seed, start=start, labels=labels, known=known, progress=progress, callback=callback)
        there = None if all(bool((grid >= 0).all()) for grid in drawn) else [grid >= 0 for grid in drawn]
        images = decode(self.vqvae, [grid.clamp(min=0) for grid in drawn], there)
        found = levels.log_probabilities(drawn, labels) if return_logprobs else None
        return Samples(images, drawn, seed, levels.micro_batch, labels, self.class_names, found)

    __call__ = sample

    @living_threads()
    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        n: int | None = None,
        *,
        label: Label | None = None,
        margin: int = 0,
        rounds: int = 2,
        paste: bool = True,
        seed: Seed | None = None,
        start: int = 0,
        progress: bool = False,
        precision: Precision = "float32",
        options: EngineOptions | None = None,
        **drawing: Unpack[Drawing],
    ) -> Samples:
        """Paint a region of images anew.

        The region is filled with a smooth continuation of what surrounds it, and all is encoded. Codes whose cell of
        pixels overlaps the region are drawn, level by level, the others kept; then all is decoded.

        Each code is drawn given the codes before it in raster order and those of the levels above. What lies below the
        region, or to its right in its lowest row, has no say in it, except by codes of upper levels that are kept; so a
        region that reaches the lower edge is continued best. Conditioning on all codes would take a search over them.

        Encoders look further than a cell, so codes beside the region depend on what fills it (on what was there before,
        none does). Therefore what was drawn fills it in another round, in which all is encoded and drawn again.

        Args:
            images: [B, C, H, W] in [-1, 1], of the size that the pipeline samples; B is n or 1.
            mask: bool [H, W] or [B, H, W], True where an image is painted anew (white in a mask picture), as usual for
                in-painting of images. The ``mask`` of :func:`fastvq.sample`, of codes, is True where one is kept. True
                everywhere is sampling.
            n: number of samples; by default one of each image.
            label: class, as of :meth:`sample`.
            margin: so many cells of each level around the region are drawn as well.
            rounds: how often the region is drawn; 1 takes half the time of 2, and leaves more of a seam.
            paste: give the pixels outside of the region back as they came; False: as decoded.
            seed: sample i depends on (seed, i, level), and on its image and mask.
            start, precision, options: as of :func:`fastvq.sample`.
            drawing: temperature, top_k, top_p, engine, micro_batch and memory_limit, as of :meth:`sample`.

        Raises:
            ArgumentError, ArgumentTypeError: arguments that do not fit; nothing has been computed then.
        """
        for level, prior in enumerate(self.priors):
            (_, *size), grid = self.image_shape, prior.config.shape
            if size[0] % grid[0] or size[1] % grid[1]:
                raise ArgumentError(
                    f"inpaint: images of {tuple(size)} are no multiple of {grid}, the grid of level {level}"
                )
        images, mask, n = check_pictures(images, mask, n, self.image_shape)
        n, start = check_indices(n, start)
        require_positive_int("margin", margin, minimum=0)
        require_positive_int("rounds", rounds)
        levels = self.levels(n, options=engine_options(precision, options), **drawing)
        seed = fixed_seed(seed)
        labels = self._labels_of(n, start, label)
        levels.warn_slow(stacklevel=3)  # past the decorator
        where = [known_cells(mask, prior.config.shape, margin).expand(n, -1, -1) for prior in self.priors]
        images, region = images.to(self.device), mask[:, None].to(self.device)
        filled = without_region(images, region)
        for _ in range(rounds):
            codes = self.encode(filled)
            known = [Known(grids.expand(n, -1, -1), kept) for grids, kept in zip(codes, where, strict=True)]
            drawn = levels.draw(n, seed=seed, start=start, labels=labels, known=known, progress=progress)
            painted = self.decode(drawn)
            filled = torch.where(region, painted, images)
        return Samples(filled if paste else painted, drawn, seed, levels.micro_batch, labels, self.class_names)

    def levels(
        self,
        n: int,
        *,
        temperature: Temperature = 1.0,
        top_k: int | Sequence[int | None] | None = None,
        top_p: float | Sequence[float | None] | None = None,
        engine: str = "auto",
        micro_batch: int | None = None,
        memory_limit: int | None = None,
        options: EngineOptions,
    ) -> Levels:
        """How n samples will be drawn; arguments are those of :meth:`Pipeline.sample`.

        Raises:
            ArgumentError, ArgumentTypeError, UnavailableError: as of :meth:`Pipeline.sample`.
        """
        each = isinstance(temperature, (np.ndarray, Tensor)) and temperature.ndim > 0
        temperatures = [temperature] * len(self.priors) if each else self._per_level("temperature", temperature)
        top_ks = self._per_level("top_k", top_k)
        top_ps = self._per_level("top_p", top_p)
        settings = tuple(Settings.of(*given, n) for given in zip(temperatures, top_ks, top_ps, strict=True))
        runs = []
        for prior, given in zip(self.priors, settings, strict=True):
            given.check(prior.config.num_codes)
            runs.append(Run.chosen(prior, n, engine, options, micro_batch, memory_limit))
        size = min(run.micro_batch for run in runs)  # all levels and the decoder work on the same micro-batches
        return Levels(tuple(dataclasses.replace(run, micro_batch=size) for run in runs), settings)

    def labels(self, indices: range, label: Label | None = None) -> Tensor | None:
        """Labels of samples by their indices.

        Args:
            indices: of the n samples.
            label: as of :meth:`sample`; None: all classes in turn.

        Returns:
            int64 [n]; None without classes.

        Raises:
            ArgumentError, ArgumentTypeError: there is no such class.
        """
        if isinstance(label, (np.ndarray, Tensor)) and label.shape == (len(indices),):
            return torch.tensor(self.classes(label) if len(label) else (), dtype=torch.int64)
        classes = self.classes(label)
        if classes is None:
            return None
        return torch.tensor([classes[index % len(classes)] for index in indices], dtype=torch.int64)

    def classes(self, label: Label | None = None) -> tuple[int, ...] | None:
        """Numbers of the classes that ``label`` names, or of all; None without classes.

        Raises:
            ArgumentError, ArgumentTypeError: there is no such class.
        """
        count, names = self.num_classes, self.class_names or ()
        if label is None:
            return None if count is None else tuple(range(count))
        if count is None:
            raise ArgumentError(f"label: these priors are not class-conditional, got {label!r}")
        plain = label.tolist() if isinstance(label, (np.ndarray, Tensor)) else label
        given = [plain] if isinstance(plain, (int, float, np.integer, str)) else plain
        if not isinstance(given, Sequence):
            raise ArgumentTypeError(
                f"label: expected a class, or a sequence, an array or a tensor of them, got {type(label).__name__}"
            )
        if not given:
            raise ArgumentError("label: expected at least one class, got none")
        numbers = []
        for one in given:
            if isinstance(one, bool) or not isinstance(one, (int, np.integer, str)):
                raise ArgumentTypeError(f"label: expected a class's number or name, got {type(one).__name__} {one!r}")
            if isinstance(one, str) and one not in names:
                raise ArgumentError(f"label: expected one of the names {names_like(one, names)}; got {one!r}")
            number = names.index(one) if isinstance(one, str) else int(one)
            if not 0 <= number < count:
                raise ArgumentError(f"label: must lie in 0..{count - 1}, got {number}")
            numbers.append(number)
        return tuple(numbers)

    def _labels_of(self, n: int, start: int, label: Label | None) -> Tensor | None:
        """Of samples that are drawn; here a class has to be named."""
        if label is None:
            return check_labels(self.priors[0], None, n)
        return self.labels(range(start, start + n), label)

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Codes of images [n, C, H, W] in [-1, 1]: int64 [n, h, w] for each level, top first.

        Raises:
            ArgumentError, ArgumentTypeError: images that do not fit the autoencoder.
        """
        return encode(self.vqvae, images)

    def decode(self, codes: Tensor | Sequence[Tensor]) -> Tensor:
        """Images of codes, int64 [n, h, w] of each level, top first: float32 [n, C, H, W], clamped to [-1, 1].

        Of a single level they may come as the tensor alone.

        Raises:
            ArgumentError, ArgumentTypeError: codes that do not fit the autoencoder.
        """
        return decode(self.vqvae, codes)

    def reconstruct(self, images: Tensor) -> Tensor:
        """What codes keep of images [n, C, H, W] in [-1, 1]: float32 [n, C, H, W], clamped to [-1, 1].

        Raises:
            ArgumentError, ArgumentTypeError: images that do not fit the autoencoder.
        """
        return reconstruct(self.vqvae, images)

    def frames(
        self, codes: Tensor | Sequence[Tensor], *, known: Sequence[Tensor] | None = None, most: int = 60
    ) -> Iterator[Tensor]:
        """Images of the grids of :class:`Samples` being filled; arguments are those of :func:`fastvq.sampling.frames`.

        Yields:
            float32 [n, C, H, W], clamped to [-1, 1].
        """
        return frames(self.vqvae, codes, known=known, most=most)

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
        """Write all models to a folder, whole or not at all; returns its path.

        Raises:
            FileConflictError: the folder holds something and ``overwrite`` is False.
            ArgumentError: the autoencoder is of another project, or a model could not be loaded again.
            DiskFullError: there is no room; what was there is as it was.
        """
        folder = Path(folder)
        if isinstance(self.vqvae, OwnAutoencoder):
            raise ArgumentError(
                f"save_pretrained: the autoencoder is a {type(self.vqvae.model).__name__}, which only its own project "
                "can save; save each prior with prior.save_pretrained, and make the pipeline anew from what was loaded"
            )
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
                "a run in vqvae/, so it is no project folder"
            )
        with reading(f"{folder}: the models do not fit together"):
            if not optional(several(TEXT)).test(names):
                raise ArgumentError(f"class_names: expected a list of names, got {names!r}")
            return cls(vqvae, priors, class_names=names)  # type: ignore[arg-type]


def _names(given: object) -> tuple[str, ...]:
    names = () if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if not names or not all(isinstance(one, str) for one in names):
        raise ArgumentTypeError(f"class_names: expected a sequence of names, one per class, got {given!r}")
    return names


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
