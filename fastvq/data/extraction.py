"""Codes of a data set from a stage-1 model: all in one call, or in parts that are put together."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq._bar import bar
from fastvq._check import require_positive_int, require_seed
from fastvq._nvtx import annotate
from fastvq._shards import Shard, StoredShard, fill_shard, read_shards
from fastvq._tensors import smallest_type
from fastvq._unwrap import unwrap
from fastvq._version import __version__
from fastvq.data.augment import Augment
from fastvq.data.base import ImageDataset
from fastvq.data.codes import FORMAT, LABELS, SOURCE, Encoded, checked_indices, model_checksum, write_codes
from fastvq.errors import ArgumentError

KIND = PREFIX = "codes"
_FLUSH_ROWS = 4096
_VECTORS = {"source": SOURCE, "labels": LABELS}


@annotate("extract_codes")
def extract_codes(
    model: Any,
    dataset: ImageDataset,
    indices: np.ndarray | Tensor | list[int] | None,
    folder: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    augment: Augment | None = None,
    copies: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    flush_rows: int = _FLUSH_ROWS,
    progress: bool = False,
) -> Path:
    """Write the codes of some images to a folder; returns its path.

    The folder receives ``level0.npy`` (top), ``level1.npy``, ... ([N * copies, h, w] in the smallest integer type that
    fits), ``source.npy`` (each row's image index), ``labels.npy`` (if the data have labels) and ``codes.json``. Rows
    are ordered copy by copy. After an interruption at any point, the same call goes on after the last rows that
    reached the disk; once complete, it returns at once.

    Args:
        model: a VQVAE or VQVAE2, also inside torch.compile, DataParallel, DistributedDataParallel or AveragedModel. It
            is copied, so it keeps its mode and its device.
        dataset: images of the model's channels, of a size that it takes.
        indices: images to encode, int [N]; None for all.
        batch_size: images encoded at a time.
        augment: how copies after the first differ from the image.
        copies: rows per image; the first copy is the unchanged image.
        seed: of the augmentation.
        device: where to encode; by default where the model is.
        num_workers: threads that load images; 0: none.
        flush_rows: rows between two points from which an interrupted extraction can go on.
        progress: show a progress bar on stderr.

    Raises:
        ArgumentError: an index out of range, no index, copies without augmentation, channels that do not fit.
        FileConflictError: the folder holds something else, or codes of another model, of other data or settings.
        CorruptFileError: files of an earlier, interrupted call are damaged.
        DiskFullError: there is no room for all codes; found out before anything is encoded, and nothing is left behind.
    """
    require_positive_int("flush_rows", flush_rows)
    work = _Extraction(model, dataset, indices, batch_size, augment, copies, seed, device, num_workers, progress)
    folder, everything = Path(folder), range(work.total)

    def encoded(done: int) -> Encoded:
        return work.encoded(everything, done, "extracting codes")

    vectors = {_VECTORS[name]: vector for name, vector in work.vectors(everything).items()}
    write_codes(folder, _description(work.identity, work.total), vectors, encoded, flush_rows=flush_rows)
    return folder


@annotate("extract_shard")
def extract_shard(
    model: Any,
    dataset: ImageDataset,
    indices: np.ndarray | Tensor | list[int] | None,
    shard: Shard,
    folder: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    augment: Augment | None = None,
    copies: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> Path:
    """Write one part of the codes of some images to a folder; returns the part's file.

    :func:`merge_codes` puts the parts together. The part is ``codes-IIIII-of-NNNNN.safetensors``, some of the rows that
    :func:`extract_codes` writes: ``level0``, ``level1``, ..., ``source`` and ``labels``, with a line of JSON beside it.
    A call that was killed goes on where it stopped when it is made again, and a part that is there is not encoded
    again.

    Args:
        shard: which part, such as ``Shard(0, 8)``.
        batch_size: images encoded at a time. They are the images that an uncut extraction encodes together, so that
            codes are the same even where an encoder rounds differently for other batches.

    The other arguments are those of :func:`extract_codes`, and so are errors; a FileConflictError also says that
    another process is at this part, or that the folder has parts of something else.
    """
    work = _Extraction(model, dataset, indices, batch_size, augment, copies, seed, device, num_workers, progress)
    rows = shard.range(work.total)
    vectors = work.vectors(rows)

    def fill(arrays: dict[str, np.ndarray], done: int) -> Iterator[int]:
        for name, vector in vectors.items():
            arrays[name][:] = vector
        for part, codes in work.encoded(rows, done, f"extracting codes {shard}"):
            for level, grid in enumerate(codes):
                arrays[f"level{level}"][part] = grid
            yield part.stop

    levels = enumerate(zip(work.identity["shapes"], work.identity["num_codes"], strict=True))
    specs = {f"level{level}": ((len(rows), *shape), smallest_type(num_codes)) for level, (shape, num_codes) in levels}
    specs |= {name: (vector.shape, vector.dtype) for name, vector in vectors.items()}
    path = shard.path(Path(folder), PREFIX)
    fill_shard(path, specs, fill, kind=KIND, total=work.total, indices=rows, identity=work.identity)
    return path


def merge_codes(parts: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Put the parts of :func:`extract_shard` together, their checksums compared, into a folder; returns it.

    Its files are, byte for byte, those of :func:`extract_codes`. Memory does not grow with the codes. After an
    interruption the same call goes on, and once complete it returns at once. The parts stay.

    Args:
        parts: the folder in which they lie.
        folder: where the codes are to be.

    Raises:
        MissingFileError: there is no part, or rows are missing; names the gaps.
        FileConflictError: rows are there twice, parts differ in model, data or settings, or the folder holds something
            else.
        CorruptFileError: a part is damaged, or files of an earlier, interrupted call.
        DiskFullError: there is no room for all codes; nothing is left behind.
    """
    shards = read_shards(Path(parts), PREFIX)
    for shard in shards:
        if shard.kind != KIND:
            raise ArgumentError(f"parts: {shard.path} holds {shard.kind}, expected {KIND}")
        shard.verify()
    identity = shards[0].identity
    names = ["source"] if identity["num_classes"] is None else ["source", "labels"]
    vectors = {
        _VECTORS[name]: np.concatenate([shard.rows(name, slice(None)) for shard in shards if shard.indices])
        for name in names
    }

    def encoded(done: int) -> Encoded:
        for shard in shards:
            yield from _stored(shard, len(identity["shapes"]), done)

    description = _description(identity, shards[0].total)
    write_codes(Path(folder), description, vectors, encoded, flush_rows=_FLUSH_ROWS)
    return Path(folder)


def _stored(shard: StoredShard, levels: int, done: int) -> Encoded:
    """The rows of a part from row ``done`` of the whole on."""
    first = shard.indices.start
    for rows in shard.stretches():
        kept = slice(max(rows.start, done - first), rows.stop)
        if kept.start < kept.stop:
            codes = [shard.rows(f"level{level}", kept) for level in range(levels)]
            yield slice(first + kept.start, first + kept.stop), codes


def _description(identity: dict[str, Any], rows: int) -> dict[str, Any]:
    """What ``codes.json`` says before anything is done."""
    names = ("format", "fastvq_version")
    head = {name: identity[name] for name in names}
    rest = {name: value for name, value in identity.items() if name not in names}
    return {**head, "rows": rows, **rest, "rows_done": 0, "complete": False}


class _Extraction:
    """Which rows of codes there are to be, and how they are computed."""

    def __init__(
        self,
        model: Any,
        dataset: ImageDataset,
        indices: np.ndarray | Tensor | list[int] | None,
        batch_size: int,
        augment: Augment | None,
        copies: int,
        seed: int,
        device: str | torch.device | None,
        num_workers: int,
        progress: bool,
    ) -> None:
        model = unwrap(model)
        batch_size, copies = require_positive_int("batch_size", batch_size), require_positive_int("copies", copies)
        num_workers = require_positive_int("num_workers", num_workers, minimum=0)
        require_seed("seed", seed)
        images = checked_indices(indices, len(dataset))
        if copies > 1 and augment is None:
            raise ArgumentError(f"copies: {copies} copies without augmentation would all be the same")
        if model.config.in_channels != dataset.channels:
            raise ArgumentError(
                f"dataset: has {dataset.channels} channels, the model takes {model.config.in_channels} (in_channels)"
            )
        shapes = [list(shape) for shape in model.code_shapes(dataset.size)]
        self.model, self.dataset, self.images, self.batch_size = model, dataset, images, batch_size
        self.augment, self.seed, self.device = augment, seed, device
        self.num_workers, self.progress = num_workers, progress
        self.total = len(images) * copies
        self.identity: dict[str, Any] = {
            "format": FORMAT,
            "fastvq_version": __version__,
            "shapes": shapes,
            "num_codes": [int(model.config.num_codes)] * len(shapes),
            "num_classes": dataset.num_classes,
            "class_names": list(dataset.class_names),
            "arguments": {
                "model": model_checksum(model),
                "dataset": dataset.fingerprint(),
                "indices": hashlib.sha256(images.tobytes()).hexdigest(),
                "augment": dataclasses.asdict(augment) if augment is not None else None,
                "copies": copies,
                "seed": seed,
            },
        }

    def vectors(self, rows: range) -> dict[str, np.ndarray]:
        """Index of the image of each row, and its label if there are any: int64 [rows]."""
        images = self.images[np.arange(rows.start, rows.stop) % len(self.images)]
        vectors = {"source": images}
        if self.dataset.labels is not None:
            vectors["labels"] = self.dataset.labels.cpu().numpy()[images].astype(np.int64)
        return vectors

    def encoded(self, rows: range, done: int, title: str) -> Encoded:
        """Codes of some rows but the first ``done``; places are counted from their first.

        Batches begin at multiples of their size among all rows.
        """
        encoder = copy.deepcopy(self.model).eval()
        if self.device is not None:
            encoder = encoder.to(self.device)
        target = next(encoder.parameters()).device
        first, size = rows.start + done, self.batch_size
        with (
            bar(title, show=self.progress, total=len(rows), initial=done) as shown,
            ThreadPoolExecutor(max(1, self.num_workers)) as pool,
        ):
            for low in range(first - first % size, rows.stop, size):
                batch = np.arange(low, min(low + size, self.total))
                sources = self.images[batch % len(self.images)]
                with annotate("load"):
                    load = pool.map if self.num_workers else map
                    images = torch.stack(list(load(self.dataset.image, sources.tolist())))
                    if self.augment is not None:
                        variants = batch // len(self.images)
                        images = self.augment.batch(images, seed=self.seed, indices=sources, variants=variants)
                kept = slice(max(first, low), min(rows.stop, low + size))
                # Not around the yield, where it would be the caller's mode as well.
                with annotate("encode"), torch.inference_mode():
                    grids = [codes.cpu().numpy() for codes in encoder.encode(images.to(target))]
                shown.update(kept.stop - kept.start)
                place = slice(kept.start - rows.start, kept.stop - rows.start)
                yield place, [grid[kept.start - low : kept.stop - low] for grid in grids]
