"""Many samples drawn in parts by processes that know nothing of each other, and the parts put together."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastvq._bar import bar
from fastvq._check import require_choice, require_positive_int, wrapped_seed
from fastvq._files import remove_leftovers, replacing_file, replacing_folder, write_json
from fastvq._shards import Shard, StoredShard, description_of, fill_shard, read_shards, working_on
from fastvq._tensors import Specs, new_tensors, smallest_type
from fastvq._version import __version__
from fastvq.data.codes import model_checksum
from fastvq.data.grid import image_grid, picture_bytes, save_grid
from fastvq.errors import ArgumentError, FileConflictError
from fastvq.sampling.api import living_threads
from fastvq.sampling.coding import DECODED
from fastvq.sampling.levels import Levels
from fastvq.sampling.options import Precision, engine_options
from fastvq.sampling.pipeline import Pipeline
from fastvq.sampling.request import padded_micro_batches
from fastvq.sampling.samples import CODES_FILE, SETTINGS_FILE

KIND = PREFIX = "samples"
IN_TURN = "in turn"
LABELS = "labels"
_LEAST_DRAWN = 64
_INT64 = np.dtype(np.int64)

Images = Literal["png", "tar"]


@living_threads()
def sample_shard(
    pipeline: Pipeline,
    n: int,
    shard: Shard,
    folder: str | os.PathLike[str],
    *,
    seed: int,
    label: int | str | Sequence[int | str] | None = None,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int | None] | None = None,
    top_p: float | Sequence[float | None] | None = None,
    engine: str = "auto",
    micro_batch: int | None = None,
    precision: Precision = "float32",
    images: Images | None = None,
    progress: bool = False,
) -> Path:
    """Draw one part of n samples into a folder; returns the part's file.

    Sample i is that of ``pipeline.sample(..., seed=seed, start=i)`` however the work is cut (what engines promise about
    bits: :func:`fastvq.sample`). A call that was killed goes on where it stopped when it is made again, and a part that
    is there is not drawn again. Memory does not grow with n. :func:`merge_samples` puts the parts together.

    The part is ``samples-IIIII-of-NNNNN.safetensors``: ``level0`` (top), ``level1``, ... [rows, h, w] in the smallest
    of uint8, uint16 and int32 that fits, and ``labels`` int64 [rows] for class-conditional priors; row r is sample
    ``start + r``. The line of JSON beside it says of which n samples (``total``) it holds which (``start``, ``stop``),
    and in ``identity`` what all parts have in common:

    - ``vqvae``: :func:`fastvq.data.model_checksum` of the autoencoder; ``priors``: of each prior, top first;
    - ``seed``; ``temperature``, ``top_k``, ``top_p``: a list with a value per level; ``precision``;
    - ``label``: ``"in turn"`` if sample i is of class i modulo the number of classes, a list if it is of the class at i
      modulo the list's length, else the class of all, or null;
    - ``engine``: the name of the engine of each level; ``micro_batch``: null where bits do not depend on it;
    - ``shapes``: [h, w] and ``num_codes``: codebook size of each level; ``image``: [C, H, W];
    - ``num_classes`` and ``class_names``, or null; ``fastvq_version``.

    Args:
        pipeline: what draws them.
        n: samples of all parts together.
        shard: which part, such as ``Shard(0, 8)``.
        seed: any integer, taken modulo 2**64, the same for all parts.
        label: class of all samples, its number or name, or several that take turns; by default all classes in turn.
        temperature, top_k, top_p, engine, micro_batch, precision: as of :meth:`Pipeline.sample`.
        images: ``png`` also writes each image as ``000123.png``, named by its index; ``tar`` writes all of the part as
            ``samples-IIIII-of-NNNNN.tar`` with members ``000123.cls`` (the label, if there are classes) and
            ``000123.png``, sorted, as webdataset reads them. Both also for a part that was drawn before.
        progress: show a progress bar on stderr.

    Raises:
        ArgumentError, ArgumentTypeError: arguments that do not fit; nothing has been computed then.
        FileConflictError: another process is at this part, or the folder holds parts of other samples, or pictures
            of the same names.
        CorruptFileError: what an earlier call left is damaged.
        DiskFullError: there is no room; for the codes found out before any is drawn.
    """
    folder = Path(folder)
    n = require_positive_int("n", n)
    seed = wrapped_seed("seed", seed)
    if images is not None:
        require_choice("images", images, ("png", "tar"))
    levels = pipeline.levels(
        n,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        engine=engine,
        micro_batch=micro_batch,
        options=engine_options(precision, None),
    )
    if any(isinstance(given.temperature, tuple) for given in levels.settings):
        raise ArgumentError("temperature: expected one value, or one per level; parts have none for each sample")
    indices, path = shard.range(n), shard.path(folder, PREFIX)
    identity = _identity(pipeline, levels, seed, label)
    pictures = _Pictures(folder, path, n, indices)
    levels.warn_slow(stacklevel=3)

    def fill(arrays: dict[str, np.ndarray], done: int) -> Iterator[int]:
        with bar(f"samples {shard}", show=progress, total=len(indices), initial=done) as shown:
            for part in _stretches(indices[done:], levels.micro_batch):
                rows = slice(part.start - indices.start, part.stop - indices.start)
                labels = pipeline.labels(part, label)
                codes = levels.draw(len(part), seed=seed, start=part.start, labels=labels)
                for level, grid in enumerate(codes):
                    arrays[f"level{level}"][rows] = grid.cpu().numpy()
                if labels is not None:
                    arrays[LABELS][rows] = labels.numpy()
                shown.update(len(part))
                yield rows.stop

    specs = _specs(identity, len(indices))
    with working_on(path):
        if not description_of(path).is_file():
            pictures.require_none()
        found = fill_shard(path, specs, fill, kind=KIND, total=n, indices=indices, identity=identity)
        if images == "png":
            pictures.write_files(pipeline, found)
        elif images == "tar":
            pictures.write_tar(pipeline, found)
    return path


def _identity(
    pipeline: Pipeline, levels: Levels, seed: int, label: int | str | Sequence[int | str] | None
) -> dict[str, Any]:
    classes, every = pipeline.classes(label), pipeline.classes()
    exact = all(run.engine.exact and not run.padded for run in levels.runs)
    return {
        "vqvae": model_checksum(pipeline.vqvae),
        "priors": [model_checksum(prior) for prior in pipeline.priors],
        "seed": seed,
        "temperature": [float(given.temperature) for given in levels.settings],  # type: ignore[arg-type]
        "top_k": [given.top_k for given in levels.settings],
        "top_p": [given.top_p for given in levels.settings],
        "label": None if classes is None else IN_TURN if classes == every else _alike(list(classes)),
        "engine": [run.engine.name for run in levels.runs],
        "micro_batch": None if exact else levels.micro_batch,
        "precision": levels.runs[0].options.precision,
        "shapes": [list(prior.config.shape) for prior in pipeline.priors],
        "num_codes": [prior.config.num_codes for prior in pipeline.priors],
        "image": list(pipeline.image_shape),
        "num_classes": pipeline.num_classes,
        "class_names": None if pipeline.class_names is None else list(pipeline.class_names),
        "fastvq_version": __version__,
    }


def _specs(identity: dict[str, Any], rows: int, dtype: np.dtype | None = None) -> Specs:
    """Of the tensors of a part, or with ``dtype`` of the codes alone in that type."""
    levels = enumerate(zip(identity["shapes"], identity["num_codes"], strict=True))
    specs = {f"level{level}": ((rows, *shape), dtype or smallest_type(codes)) for level, (shape, codes) in levels}
    if dtype is None and identity["num_classes"] is not None:
        specs[LABELS] = (rows,), _INT64
    return specs


def _stretches(indices: range, micro_batch: int) -> Iterator[range]:
    """Indices cut at multiples of a size that whole micro-batches fill: those of a sample begin at the same index."""
    size = micro_batch * max(1, _LEAST_DRAWN // micro_batch)
    for low in range(indices.start - indices.start % size, indices.stop, size):
        yield range(max(low, indices.start), min(low + size, indices.stop))


class _Pictures:
    """The images of a part: a file each, or all in a tar."""

    def __init__(self, folder: Path, path: Path, total: int, indices: range) -> None:
        self._folder, self._tar = folder, path.with_suffix(".tar")
        self._width = max(6, len(str(total - 1)))
        self._indices = indices

    def _name(self, index: int, suffix: str) -> str:
        return f"{index:0{self._width}d}.{suffix}"

    def require_none(self) -> None:
        """Pictures that are there before their codes are of something else.

        Raises:
            FileConflictError: there is one.
        """
        for path in (self._tar, *(self._folder / self._name(index, "png") for index in self._indices)):
            if path.exists():
                raise FileConflictError(
                    f"{path}: is there without the codes of this part; choose another folder or remove it"
                )

    def write_files(self, pipeline: Pipeline, shard: StoredShard) -> None:
        paths = {index: self._folder / self._name(index, "png") for index in self._indices}
        remove_leftovers(self._tar, *paths.values())
        missing = {index for index, path in paths.items() if not path.exists()}
        for index, image, _ in _decoded(pipeline, shard, missing):
            save_grid(paths[index], image[None], padding=0)

    def write_tar(self, pipeline: Pipeline, shard: StoredShard) -> None:
        remove_leftovers(self._tar)
        if self._tar.exists():
            return
        with (
            replacing_file(self._tar) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for index, image, label in _decoded(pipeline, shard, set(self._indices)):
                if label is not None:
                    _add(tar, self._name(index, "cls"), str(label).encode())
                name = self._name(index, "png")
                _add(tar, name, picture_bytes(Path(name), image_grid(image[None], padding=0)))


def _add(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
    entry = tarfile.TarInfo(name)  # of no time and no user, so that the same samples make the same file
    entry.size = len(contents)
    tar.addfile(entry, io.BytesIO(contents))


def _decoded(pipeline: Pipeline, shard: StoredShard, wanted: set[int]) -> Iterator[tuple[int, Tensor, int | None]]:
    """Index, image float32 [C, H, W] and label of the samples wanted.

    A sample always has the same place among as many that are decoded together.
    """
    names = [f"level{level}" for level in range(len(pipeline.priors))]
    first = shard.indices.start
    for index, new in padded_micro_batches(first, len(shard.indices), DECODED):
        rows = index[new]
        place = range(int(rows[0]), int(rows[-1]) + 1)
        if wanted.isdisjoint(range(first + place.start, first + place.stop)):
            continue
        part = slice(place.start, place.stop)
        codes = [torch.from_numpy(shard.rows(name, part).astype(np.int64)) for name in names]
        images = pipeline.decode([grid[index - place.start].to(pipeline.device) for grid in codes])[new].cpu()
        labels = None if pipeline.num_classes is None else shard.rows(LABELS, part)
        for row, image in zip(place, images, strict=True):
            if first + row in wanted:
                yield first + row, image, None if labels is None else int(labels[row - place.start])


def merge_samples(
    folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, overwrite: bool = False
) -> Path:
    """Put the parts of :func:`sample_shard` together, their checksums compared; returns where.

    Writes ``codes.safetensors`` and ``samples.json`` as ``fastvq sample --out FOLDER`` writes them: int64 [n, h, w] for
    each level. Memory does not grow with n. The parts and their images stay.

    Args:
        out: a new or empty folder; by default the parts' own.
        overwrite: replace what was merged before.

    Raises:
        ArgumentError: the parts lie inside ``out``, or are no samples.
        MissingFileError: there is no part, or an index is missing; names the gaps.
        FileConflictError: an index is there twice, or parts differ in model, seed or settings; or there is something in
            ``out``.
        CorruptFileError: a part is damaged.
        DiskFullError: there is no room.
    """
    folder = Path(folder)
    if out is not None and Path(out).resolve() in folder.resolve().parents:
        raise ArgumentError(f"out: {out} holds the parts themselves in {folder}")
    shards = read_shards(folder, PREFIX)
    for shard in shards:
        if shard.kind != KIND:
            raise ArgumentError(f"folder: {shard.path} holds {shard.kind}, expected {KIND}")
        shard.verify()
    if out is not None and Path(out).resolve() != folder.resolve():
        with replacing_folder(Path(out), overwrite=overwrite) as temporary:
            _write_merged(shards, temporary)
        return Path(out)
    if (folder / SETTINGS_FILE).exists() and not overwrite:
        raise FileConflictError(f"folder: {folder / SETTINGS_FILE} exists already; nothing was written")
    remove_leftovers(folder / SETTINGS_FILE, folder / CODES_FILE)
    _write_merged(shards, folder)
    return folder


def _write_merged(shards: Sequence[StoredShard], folder: Path) -> None:
    identity, total = shards[0].identity, shards[0].total
    labels: list[int] | None = None if identity["num_classes"] is None else []
    with replacing_file(folder / CODES_FILE) as temporary:
        arrays = new_tensors(temporary, _specs(identity, total, _INT64))
        for shard in shards:
            for name, array in arrays.items():
                for rows in shard.stretches():
                    array[shard.indices.start :][rows] = shard.rows(name, rows)
            if labels is not None:
                labels += shard.rows(LABELS, slice(None)).tolist()
    temperature = _alike(identity["temperature"])
    settings = {
        "n": total,
        "labels": labels,
        "class_names": identity["class_names"],
        "temperature": temperature if isinstance(temperature, list) else [temperature],
        "top_k": _alike(identity["top_k"]),
        "top_p": _alike(identity["top_p"]),
        "seed": identity["seed"],
        "micro_batch": identity["micro_batch"],
        "engine": _alike(identity["engine"]),
        "precision": identity["precision"],
        "fastvq_version": identity["fastvq_version"],
    }
    write_json(folder / SETTINGS_FILE, settings)


def _alike(values: list[Any]) -> Any:
    """The value that all have in common, or the list where there are several."""
    return values[0] if all(value == values[0] for value in values) else values
