"""Samples from the parts of ``fastvq sample --shard``, and their features gathered in parts."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastvq._check import require_positive_int
from fastvq._files import reading
from fastvq._schema import TEXT, integer, number, optional, require_entries, several
from fastvq._shards import (
    StoredShard,
    description_of,
    finished_shard,
    read_shards,
    require_same_whole,
    working_on,
    write_shard,
)
from fastvq.data.codes import model_checksum
from fastvq.errors import ArgumentError, FileConflictError, MissingFileError
from fastvq.evaluation.features import FeatureExtractor, as_extractor
from fastvq.evaluation.sources import DrawnSamples, StoredRows, once_if_same
from fastvq.evaluation.statistics import KEPT_VECTORS, FeatureStatistics, image_batches
from fastvq.sampling import Pipeline, Shard
from fastvq.sampling.parts import LABELS, PREFIX

FEATURES = "features"


def shard_settings(pipeline: Pipeline, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What samples in a folder of parts were drawn with, as fields of :class:`EvaluationConfig`.

    Args:
        pipeline: what drew them.

    Returns:
        ``samples`` (their number), ``seed`` and ``temperature``.

    Raises:
        MissingFileError, FileConflictError, CorruptFileError: as :func:`samples_from_shards`.
    """
    first = _sample_parts(pipeline, Path(folder))[0]
    temperature = once_if_same(first.identity["temperature"])
    return {"samples": first.total, "seed": first.identity["seed"], "temperature": temperature}


def samples_from_shards(
    pipeline: Pipeline, folder: str | os.PathLike[str], indices: range | None = None
) -> DrawnSamples:
    """The samples in a folder of parts, read when they are asked for: memory does not grow with them.

    Args:
        pipeline: what drew them.
        indices: only these of the samples, one after the other; parts that hold none of them are not read.

    Raises:
        ArgumentError: indices that are not among those of the samples.
        MissingFileError: parts are missing; names the indices.
        FileConflictError: they are of another model than the pipeline's, or no parts of one whole.
        CorruptFileError: one has changed since it was written.
    """
    parts = _sample_parts(pipeline, Path(folder))
    every = range(parts[0].total)
    indices = every if indices is None else indices
    if every[indices.start : indices.stop] != indices:
        raise ArgumentError(f"indices: expected a range within 0..{len(every)}, got {indices}")
    return _open(pipeline, parts, indices)


def score_shard(
    pipeline: Pipeline,
    folder: str | os.PathLike[str],
    extractor: FeatureExtractor | nn.Module,
    shard: Shard,
    *,
    keep: int = KEPT_VECTORS,
    batch_size: int = 64,
    progress: bool = False,
) -> Path:
    """Write the statistics of the features of a part of the samples in a folder beside them; returns the file.

    Nothing else is shared between the processes that do this, and their number need not be that of the sample parts.
    Batches are those of one process that goes through all samples, because networks round differently for batches of
    other sizes: parts take whole batches. A part that is there already is kept.

    Args:
        pipeline: what drew the samples.
        folder: with all parts of the samples.
        extractor: what gives features.
        shard: which part, such as ``Shard(0, 8)``.
        keep: feature vectors to keep of all samples together.
        batch_size: images at a time; the same for all parts.

    Raises:
        MissingFileError, CorruptFileError: as :func:`samples_from_shards`.
        FileConflictError: as there; or parts are there for other samples, another extractor or other settings, or
            another process is at this one.
    """
    folder, features = Path(folder), as_extractor(extractor)
    parts = _sample_parts(pipeline, folder)
    total = parts[0].total
    batches = shard.range(-(-total // require_positive_int("batch_size", batch_size)))
    indices = range(min(total, batches.start * batch_size), min(total, batches.stop * batch_size))
    identity = _identity(parts, features, keep, batch_size)
    path = shard.path(folder, _prefix(features))
    require_same_whole(folder, _prefix(features), kind=FEATURES, total=total, identity=identity)
    with working_on(path):
        if finished_shard(path, kind=FEATURES, total=total, indices=indices, identity=identity) is not None:
            return path
        samples = _open(pipeline, parts, indices)
        # What an empty part has no images to tell.
        found = features.extract(torch.zeros(1, samples.channels, *samples.size, dtype=torch.float32))
        statistics = FeatureStatistics(
            found.vectors.shape[1],
            num_classes=None if found.logits is None else found.logits.shape[1],
            keep=keep,
            seed=samples.seed,
            first=indices.start,
        )
        rows = np.arange(len(samples))
        for images in image_batches(samples, rows, batch_size, f"features, part {shard}", progress=progress):
            statistics.update(features.extract(images))
        write_shard(path, statistics.state(), kind=FEATURES, total=total, indices=indices, identity=identity)
    return path


def statistics_from_shards(
    pipeline: Pipeline,
    folder: str | os.PathLike[str],
    extractor: FeatureExtractor | nn.Module,
    *,
    keep: int = KEPT_VECTORS,
    batch_size: int = 64,
) -> FeatureStatistics | None:
    """What :func:`score_shard` wrote of all samples in a folder, put together; None where a part is missing.

    Some parts without the others, as jobs that failed leave them, are warned of.

    Args:
        pipeline, folder, extractor, keep, batch_size: as :func:`score_shard` was given them.

    Raises:
        MissingFileError: as :func:`samples_from_shards`.
        FileConflictError: they are of other samples, another extractor or other settings; names what differs.
        CorruptFileError: one has changed since it was written.
    """
    folder, features = Path(folder), as_extractor(extractor)
    prefix = _prefix(features)
    if not any(folder.glob(f"{prefix}-*.json")):
        return None
    parts = _sample_parts(pipeline, folder)
    total, seed = parts[0].total, parts[0].identity["seed"]
    identity = _identity(parts, features, keep, batch_size)
    require_same_whole(folder, prefix, kind=FEATURES, total=total, identity=identity)
    try:
        scored = read_shards(folder, prefix)
    except MissingFileError as error:
        warnings.warn(
            f"features that were gathered in parts are not used, since some are missing ({error})", stacklevel=2
        )
        return None
    whole: FeatureStatistics | None = None
    for part in scored:
        part.verify()
        first, count = part.indices.start, len(part.indices)
        with reading(f"{part.path}: no statistics of features"):
            statistics = FeatureStatistics.from_state(part.tensors(), count, keep=keep, seed=seed, first=first)
        if whole is None:
            whole = statistics
        else:
            whole.merge(statistics)
    return whole


def _sample_parts(pipeline: Pipeline, folder: Path) -> list[StoredShard]:
    """All parts of the samples, drawn by this pipeline."""
    parts = read_shards(folder, PREFIX)
    for part in parts:
        require_entries(description_of(part.path), part.identity, _IDENTITY)
    there = parts[0].identity
    now = {"vqvae": model_checksum(pipeline.vqvae), "priors": [model_checksum(prior) for prior in pipeline.priors]}
    differing = [name for name, checksum in now.items() if there[name] != checksum]
    if differing:
        raise FileConflictError(
            f"folder: the samples in {folder} were drawn by another model; its checksums differ in "
            + " and ".join(differing)
        )
    return parts


# What the draws depend on beside model and seed.
_SETTINGS = ("temperature", "top_k", "top_p", "precision")
_IDENTITY = {
    "vqvae": TEXT,
    "priors": several(TEXT),
    "seed": integer(0, 2**64 - 1),
    "temperature": several(number(), least=1),
    "top_k": several(optional(integer())),
    "top_p": several(optional(number())),
    "precision": TEXT,
}


def _open(pipeline: Pipeline, parts: list[StoredShard], indices: range) -> DrawnSamples:
    for part in parts:
        if range(max(part.indices.start, indices.start), min(part.indices.stop, indices.stop)):
            part.verify()
    codes = [
        StoredRows(parts, f"level{level}", prior.config.shape, indices) for level, prior in enumerate(pipeline.priors)
    ]
    labels = None if pipeline.num_classes is None else torch.from_numpy(StoredRows(parts, LABELS, (), indices)[:])
    identity, none = parts[0].identity, [None] * len(codes)
    settings = {name: identity[name] for name in _SETTINGS if identity[name] not in ("float32", none)}
    return DrawnSamples(pipeline, codes, labels, identity["seed"], settings)


def _prefix(extractor: FeatureExtractor) -> str:
    return f"{FEATURES}-{extractor.digest[:12]}"


def _identity(parts: list[StoredShard], extractor: FeatureExtractor, keep: int, batch_size: int) -> dict[str, Any]:
    """What the statistics of all parts have in common."""
    files = [[part.indices.start, part.indices.stop, part.checksum] for part in parts]
    return {
        "extractor": extractor.digest,
        "vqvae": parts[0].identity["vqvae"],
        "samples": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "seed": parts[0].identity["seed"],
        "keep": keep,
        "batch_size": batch_size,
    }
