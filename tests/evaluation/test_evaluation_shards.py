"""Statistics gathered in parts against those of one process, and parts that do not belong together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_helpers import Flatten, Images, Ripples, all_grids, gaussian, readable_pipeline, write_samples
from helpers import refuses
from torch import Tensor

from fastvq import Pipeline
from fastvq._shards import description_of, read_shard, write_shard
from fastvq.errors import ArgumentError, CorruptFileError, FileConflictError, MissingFileError
from fastvq.evaluation import (
    DrawnSamples,
    Evaluation,
    EvaluationConfig,
    FeatureExtractor,
    Features,
    FeatureStatistics,
    GaussianStatistics,
    InceptionScore,
    draw_samples,
    evaluate,
    frechet_distance,
    gather,
    samples_from_shards,
    score_shard,
    shard_settings,
    sources,
    statistics_from_shards,
)
from fastvq.evaluation.statistics import image_batches
from fastvq.evaluation.tables import to_dict
from fastvq.models import VQVAE2
from fastvq.sampling import Shard

N, BATCH, KEEP = 203, 16, 40


class Judged(FeatureExtractor):
    """Pixels as features, and logits beside them."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(Flatten(scale), name=f"judged {scale}")
        self.judge = Ripples(3)

    def _extract(self, images: Tensor) -> Features:
        return Features(self.module(images), self.judge(images))

    @property
    def calls(self) -> int:
        assert isinstance(self.module, Flatten)
        return self.module.calls


def assert_same(found: FeatureStatistics, expected: FeatureStatistics) -> None:
    """Counts and the vectors kept exactly, sums up to the order in which they were added."""
    assert found.count == expected.count
    assert torch.equal(found.numbers, expected.numbers)
    assert torch.equal(found.vectors, expected.vectors)
    for name, tensor in expected.state().items():
        scale = float(tensor.double().abs().max())
        torch.testing.assert_close(found.state()[name], tensor, rtol=1e-12, atol=1e-12 * scale, msg=name)


def cut(vectors: Tensor, logits: Tensor, ends: list[int], keep: int = KEEP) -> list[FeatureStatistics]:
    """Statistics of the stretches between some places of a stream, a few vectors at a time."""
    parts = []
    for start, stop in zip([0, *ends], [*ends, len(vectors)], strict=True):
        part = FeatureStatistics(vectors.shape[1], num_classes=logits.shape[1], keep=keep, seed=3, first=start)
        for rows in torch.arange(start, stop).split(29):
            part.update(Features(vectors[rows], logits[rows]))
        parts.append(part)
    return parts


@pytest.mark.parametrize(
    ("ends", "order", "keep"),
    [
        ([], 1, KEEP),
        ([100], -1, KEEP),
        ([60, 61, 170], 1, KEEP),
        ([0, 90, 90, N], 2, KEEP),
        ([13, 26, 100, 150], 2, KEEP),
        ([13, 26, 100, 150], -1, 500),
    ],
    ids=["one", "two-backwards", "four-uneven", "some-empty-mixed", "five-mixed", "five-all-kept"],
)
def test_merged_parts_are_one_stream(ends: list[int], order: int, keep: int) -> None:
    vectors, logits = gaussian(N, 6, shift=2), gaussian(N, 4, seed=1, scale=3)
    (whole,) = cut(vectors, logits, [], keep)
    parts = cut(vectors, logits, ends, keep)
    parts = parts[::order] if order < 2 else parts[1::2] + parts[::2]
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    assert_same(merged, whole)
    real = GaussianStatistics(6)
    real.update(gaussian(N, 6, seed=2))
    distances = [frechet_distance(real, found.gaussian) for found in (merged, whole)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)
    assert merged.inception is not None
    assert whole.inception is not None
    assert merged.inception.compute() == pytest.approx(whole.inception.compute(), rel=1e-12)
    # What was merged goes on where the stream ends.
    more = Features(gaussian(9, 6, seed=5), gaussian(9, 4, seed=6))
    for statistics in (merged, whole):
        statistics.update(more)
    assert_same(merged, whole)


def test_one_part_is_not_the_whole() -> None:
    vectors, logits = gaussian(N, 6), gaussian(N, 4, seed=1, scale=3)
    vectors[100:] *= 2
    first, second = cut(vectors, logits, [100])
    alone = first.gaussian.covariance
    first.merge(second)
    assert first.count == N
    assert float((first.gaussian.covariance - alone).abs().max()) > 0.5
    assert int(first.numbers.max()) >= 100


@pytest.mark.parametrize("parts", [2, 5, 64])
def test_merged_covariance_far_from_the_origin(parts: int) -> None:
    near = 0.01 * gaussian(640, 5).double()
    far = near + 1e4
    merged = GaussianStatistics(5)
    for part in far.chunk(parts):
        statistics = GaussianStatistics(5)
        for batch in part.split(16):
            statistics.update(batch)
        merged.merge(statistics)
    centred = far - far.mean(0)
    two_pass = centred.T @ centred / 639
    torch.testing.assert_close(merged.covariance, two_pass, rtol=1e-9, atol=1e-9 * float(two_pass.max()))


def test_merging_refuses_what_does_not_belong_together() -> None:
    def some(features: int = 2, classes: int | None = 3, first: int = 0, **options: int) -> FeatureStatistics:
        found = FeatureStatistics(features, num_classes=classes, first=first, **options)
        found.update(Features(gaussian(10, features), None if classes is None else gaussian(10, classes)))
        return found

    for other, message in (
        (some(first=9), r"other: vectors 9\.\.9 of the stream are in both"),
        (some(), r"other: vectors 0\.\.9 of the stream are in both"),
        (some(features=3, first=10), "other: expected num_features 2, got 3"),
        (some(classes=None, first=10), "other: expected num_classes 3, got None"),
        (some(keep=5, first=10), "other: expected keep 10000, got 5"),
        (some(seed=1, first=10), "other: expected seed 0, got 1"),
    ):
        statistics = some()
        before = statistics.state()
        with refuses(ArgumentError, message):
            statistics.merge(other)
        assert all(torch.equal(before[name], tensor) for name, tensor in statistics.state().items())
    with refuses(ArgumentError, r"other: expected \[splits, num_classes\] \[10, 3\], got \[4, 3\]"):
        InceptionScore(3).merge(InceptionScore(3, splits=4))
    with refuses(ArgumentError, "first: must be at least 0"):
        FeatureStatistics(2, first=-1)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return readable_pipeline(2)


@pytest.fixture(scope="module")
def drawn(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples in three parts; tests copy it before they write to it."""
    folder = tmp_path_factory.mktemp("drawn")
    write_samples(pipeline, folder, N, 3, seed=5, temperature=0.8)
    return folder


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    return shutil.copytree(drawn, tmp_path / "parts")


@pytest.fixture(scope="module")
def alone(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> DrawnSamples:
    """The same samples drawn by one process."""
    return draw_samples(pipeline, N, tmp_path_factory.mktemp("alone"), seed=5, temperature=0.8)


def score(pipeline: Pipeline, folder: Path, extractor: FeatureExtractor, parts: int) -> list[Path]:
    return [
        score_shard(pipeline, folder, extractor, Shard(index, parts), keep=KEEP, batch_size=BATCH)
        for index in range(parts)
    ]


def put_together(pipeline: Pipeline, folder: Path, extractor: FeatureExtractor) -> FeatureStatistics | None:
    return statistics_from_shards(pipeline, folder, extractor, keep=KEEP, batch_size=BATCH)


def test_samples_from_parts_are_those_drawn_at_once(pipeline: Pipeline, drawn: Path, alone: DrawnSamples) -> None:
    samples = samples_from_shards(pipeline, drawn)
    assert len(samples) == N
    assert samples.seed == 5
    assert samples.temperature == alone.temperature == (0.8,)
    assert shard_settings(pipeline, drawn) == {"samples": N, "seed": 5, "temperature": (0.8,)}
    assert samples.fingerprint() == alone.fingerprint()
    rows = np.array([202, 0, 67, 68, 66, 135, 136, 0])
    assert torch.equal(samples.batch(rows), alone.batch(rows))
    some = samples_from_shards(pipeline, drawn, range(60, 141))
    assert len(some) == 81
    for found, level in zip(some.codes(np.arange(81)), alone.codes(np.arange(60, 141)), strict=True):
        assert torch.equal(found, level)
    assert some.labels is not None
    assert some.labels.tolist() == [index % 2 for index in range(60, 141)]
    assert len(samples_from_shards(pipeline, drawn, range(9, 9))) == 0
    with refuses(ArgumentError, r"indices: expected a range within 0\.\.203, got range\(200, 204\)"):
        samples_from_shards(pipeline, drawn, range(200, 204))


def gathered(samples: DrawnSamples, extractor: FeatureExtractor) -> FeatureStatistics:
    batches = image_batches(samples, np.arange(N), BATCH, "features")
    return gather(batches, extractor, keep=KEEP, seed=samples.seed)


# Thirteen batches: parts of whole ones, and some of none.
@pytest.mark.parametrize("parts", [1, 2, 4, 5, 15])
def test_features_in_parts_are_those_of_one_process(
    parts: int, pipeline: Pipeline, folder: Path, alone: DrawnSamples
) -> None:
    extractor = Judged()
    assert put_together(pipeline, folder, extractor) is None
    paths = score(pipeline, folder, extractor, parts)
    stored = [read_shard(path) for path in paths]
    assert [shard.indices.start % BATCH for shard in stored if len(shard.indices)] == [0] * min(parts, 13)
    assert stored[-1].indices.stop == stored[-1].total == N
    found = put_together(pipeline, folder, extractor)
    assert found is not None
    assert_same(found, gathered(alone, extractor))


def test_stretches_are_gathered_without_files(alone: DrawnSamples) -> None:
    extractor = Judged()
    parts = [
        gather(image_batches(alone, rows, BATCH, "features"), extractor, keep=KEEP, seed=5, first=int(rows[0]))
        for rows in np.split(np.arange(N), [3 * BATCH, 5 * BATCH])
    ]
    parts[1].merge(parts[2])
    parts[1].merge(parts[0])
    assert_same(parts[1], gathered(alone, extractor))


def test_finished_parts_are_not_scored_again(pipeline: Pipeline, folder: Path) -> None:
    extractor = Judged()
    paths = score(pipeline, folder, extractor, 2)
    before, written = extractor.calls, [path.stat().st_mtime_ns for path in paths]
    assert score(pipeline, folder, extractor, 2) == paths
    assert extractor.calls == before
    # As a kill leaves a part: its description comes last.
    description_of(paths[1]).unlink()
    with pytest.warns(UserWarning, match=r"some are missing \(folder: .* lacks indices 96\.\.202 of 0\.\.202"):
        assert put_together(pipeline, folder, extractor) is None
    score(pipeline, folder, extractor, 2)
    # One call for the size of the features, seven batches.
    assert extractor.calls == before + 8
    assert paths[0].stat().st_mtime_ns == written[0]
    assert put_together(pipeline, folder, extractor) is not None


def test_memory_does_not_grow_with_the_samples(
    pipeline: Pipeline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither codes nor images are ever there for more than a batch of samples."""
    sizes: dict[str, list[int]] = {"rows": [], "decoded": []}
    read, decode = sources.StoredRows.__getitem__, type(pipeline.vqvae).decode

    def reading(self: sources.StoredRows, rows: np.ndarray | slice) -> np.ndarray:
        found = read(self, rows)
        if found.ndim > 1:  # labels are eight bytes an image
            sizes["rows"].append(len(found))
        return found

    def decoding(self: VQVAE2, codes: Sequence[Tensor]) -> Tensor:
        sizes["decoded"].append(len(codes[0]))
        return decode(self, codes)

    monkeypatch.setattr(sources.StoredRows, "__getitem__", reading)
    monkeypatch.setattr(type(pipeline.vqvae), "decode", decoding)
    score(pipeline, folder, Judged(), 2)
    assert max(sizes["rows"]) == max(sizes["decoded"]) == BATCH
    assert sum(sizes["decoded"]) == N


def another_model() -> Pipeline:
    other = readable_pipeline(2)
    with torch.no_grad():
        next(other.priors[1].parameters()).add_(1)
    return other


def test_parts_of_another_model_are_refused(folder: Path) -> None:
    message = "folder: the samples in .*parts were drawn by another model; its checksums differ in priors"
    for use in (samples_from_shards, shard_settings):
        with refuses(FileConflictError, message):
            use(another_model(), folder)
    with refuses(FileConflictError, message):
        score_shard(another_model(), folder, Judged(), Shard(0, 2))
    assert not [*folder.glob("features-*")]


def test_missing_samples_are_named(pipeline: Pipeline, folder: Path) -> None:
    description_of(Shard(1, 3).path(folder, "samples")).unlink()
    for use in (
        lambda: samples_from_shards(pipeline, folder),
        lambda: score_shard(pipeline, folder, Judged(), Shard(0, 2)),
    ):
        with refuses(MissingFileError, r"folder: .*parts lacks indices 67\.\.134 of 0\.\.202"):
            use()
    with refuses(MissingFileError, "folder: .*absent holds no finished part"):
        samples_from_shards(pipeline, folder / "absent")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def reseal(path: Path, **changes: Any) -> None:
    """Give a part's description other entries of its identity."""
    found = read_shard(path)
    tensors = {name: tensor.clone() for name, tensor in found.tensors().items()}
    identity = {**found.identity, **changes}
    write_shard(path, tensors, kind=found.kind, total=found.total, indices=found.indices, identity=identity)


def drawn_anew(pipeline: Pipeline, folder: Path) -> None:
    for path in folder.glob("samples-*"):
        path.unlink()
    write_samples(pipeline, folder, N, 3, seed=6)


MIXED: dict[str, tuple[Callable[[Pipeline, Path, list[Path]], object], type[Exception], str]] = {
    "another-seed": (
        lambda pipeline, folder, paths: drawn_anew(pipeline, folder),
        FileConflictError,
        "00000-of-00002.safetensors: is a part of another whole, which differs in.*samples: .*seed: 5 there, 6 now",
    ),
    "another-extractor": (
        lambda pipeline, folder, paths: reseal(paths[1], extractor="a" * 64),
        FileConflictError,
        'is a part of another whole, which differs in.*extractor: "aaa',
    ),
    "all-of-another-extractor": (
        lambda pipeline, folder, paths: [reseal(path, extractor="a" * 64) for path in paths],
        FileConflictError,
        'is a part of another whole, which differs in.*extractor: "aaa',
    ),
    "another-selection": (
        lambda pipeline, folder, paths: [reseal(path, keep=9) for path in paths],
        FileConflictError,
        "differs in.*keep: 9 there, 40 now",
    ),
    "other-batches": (
        lambda pipeline, folder, paths: [reseal(path, batch_size=8) for path in paths],
        FileConflictError,
        "differs in.*batch_size: 8 there, 16 now",
    ),
    "twice": (
        lambda pipeline, folder, paths: score(pipeline, folder, Judged(), 3),
        FileConflictError,
        r"indices .* are in .* twice",
    ),
    "damaged-features": (
        lambda pipeline, folder, paths: flip(paths[1]),
        CorruptFileError,
        "features-.*-00001-of-00002.safetensors: checksum differs.*remove both files",
    ),
    "damaged-samples": (
        lambda pipeline, folder, paths: flip(Shard(2, 3).path(folder, "samples")),
        CorruptFileError,
        "samples-00002-of-00003.safetensors: checksum differs",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), MIXED.values(), ids=MIXED.keys())
def test_parts_that_do_not_belong_together(
    change: Callable[[Pipeline, Path, list[Path]], object],
    error: type[Exception],
    message: str,
    pipeline: Pipeline,
    folder: Path,
) -> None:
    paths = score(pipeline, folder, Judged(), 2)
    change(pipeline, folder, paths)
    with refuses(error, f"(?s:.*{message})"):
        samples_from_shards(pipeline, folder)
        put_together(pipeline, folder, Judged())


def test_features_of_several_extractors_lie_beside_each_other(pipeline: Pipeline, folder: Path) -> None:
    first, second = Judged(), Judged(2.0)
    score(pipeline, folder, first, 2)
    assert put_together(pipeline, folder, second) is None
    score(pipeline, folder, second, 3)
    found = [put_together(pipeline, folder, extractor) for extractor in (first, second)]
    assert found[0] is not None
    assert found[1] is not None
    torch.testing.assert_close(2 * found[0].gaussian.mean, found[1].gaussian.mean)


CONFIG = EvaluationConfig(
    samples=N, seed=5, temperature=(0.8, 0.8), keep=KEEP, batch_size=BATCH, fractions=(1.0, 0.5), neighbours=2
)


def measured(pipeline: Pipeline, **given: Any) -> Evaluation:
    grids = all_grids()
    data = Images(grids, torch.arange(len(grids)) % 2)
    rows = np.arange(len(grids))
    options = {"config": CONFIG, "extractor": Judged(), "classifier": Ripples(2), **given}
    return evaluate(pipeline, data, rows[40:], rows[:40], **options)


def test_a_report_from_parts_is_that_of_one_process(pipeline: Pipeline, folder: Path) -> None:
    expected = measured(pipeline)
    samples = samples_from_shards(pipeline, folder)
    score(pipeline, folder, Judged(), 4)
    statistics = put_together(pipeline, folder, Judged())
    before = sorted(path.name for path in folder.iterdir())
    for given in (statistics, None):
        found = measured(pipeline, samples=samples, statistics=given)
        assert found.sets is not None
        assert expected.sets is not None
        ours, theirs = found.sets["samples"], expected.sets["samples"]
        assert ours.frechet == pytest.approx(theirs.frechet, rel=1e-6)
        assert ours.inception == pytest.approx(theirs.inception, rel=1e-12)
        assert (ours.images, ours.kernel, ours.manifold) == (N, theirs.kernel, theirs.manifold)
        exact = [
            {
                name: {**value, "samples": None} if name == "sets" else value
                for name, value in to_dict(evaluation).items()
                if name not in ("seconds", "draws")
            }
            for evaluation in (found, expected)
        ]
        assert exact[0] == exact[1]
        assert "sampling" in expected.seconds
        assert "sampling" not in found.seconds
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_is_given_must_be_what_is_measured(pipeline: Pipeline, folder: Path, tmp_path: Path) -> None:
    samples = samples_from_shards(pipeline, folder)
    score(pipeline, folder, Judged(), 2)
    part = read_shard(sorted(folder.glob("features-*.safetensors"))[0])
    one = FeatureStatistics.from_state(part.tensors(), len(part.indices), keep=KEEP, seed=5)
    whole = put_together(pipeline, folder, Judged())
    of_one_class = draw_samples(pipeline, N, tmp_path / "one", label=torch.ones(N).long(), seed=5, temperature=0.8)
    for given, message in (
        ({"samples": samples, "statistics": one}, "statistics: expected vectors 203, got 96"),
        ({"statistics": whole}, "statistics: expected the samples that they are of"),
        ({"samples": samples, "config": replace(CONFIG, samples=300)}, "samples: .* have 203, expected 300"),
        ({"samples": samples, "config": replace(CONFIG, seed=6)}, "seed: .* have 5, expected 6"),
        (
            {"samples": samples, "config": replace(CONFIG, temperature=(1.0,))},
            r"temperature: .* have \(0.8,\), expected",
        ),
        ({"samples": samples, "statistics": whole, "config": replace(CONFIG, keep=9)}, "statistics: expected keep 9"),
        (
            {"samples": samples, "statistics": whole, "extractor": None, "classifier": None},
            "statistics: expected the extractor",
        ),
        ({"samples": of_one_class}, "label: expected samples of all classes in turn"),
    ):
        with refuses(ArgumentError, message):
            measured(pipeline, **given)
