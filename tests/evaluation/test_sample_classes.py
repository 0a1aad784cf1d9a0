"""Which classes the samples of an evaluation have: all in turn, or as often as the training images."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_helpers import Flatten, Images, Ripples, all_grids, readable_pipeline, write_samples
from helpers import refuses
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.evaluation import (
    Evaluation,
    EvaluationConfig,
    draw_samples,
    evaluate,
    labels_by_frequency,
    samples_from_shards,
)
from fastvq.evaluation.tables import to_dict

pytestmark = pytest.mark.usefixtures("steady")

GRIDS = 3**5
TRAINING, VALIDATION = np.arange(200), np.arange(200, GRIDS)
# Of three classes in four, one and one of six images.
LABELS = torch.tensor([0, 0, 1, 0, 2, 0]).repeat(GRIDS)[:GRIDS]


def measured(config: EvaluationConfig, labels: Tensor = LABELS, classes: int | None = 3, **options: Any) -> Evaluation:
    data = Images(all_grids(), None if classes is None else labels)
    options = {"extractor": Flatten(), **options}
    return evaluate(readable_pipeline(classes), data, TRAINING, VALIDATION, config, **options)


@pytest.mark.parametrize("n", [1, 2, 7, 60, 1000])
def test_every_stretch_of_samples_is_near_the_frequencies(n: int) -> None:
    labels = torch.tensor([2] * 50 + [0] * 30 + [1] * 15 + [4] * 5)
    for first in (0, 3, 12_345, 2**40):
        found = labels_by_frequency(labels, range(first, first + n))
        assert found.dtype == torch.int64
        counts = torch.bincount(found, minlength=5)
        assert counts[3] == 0
        # Of points spread by the golden ratio an interval has its share, but for a few.
        assert (counts - n * torch.tensor([0.3, 0.15, 0.5, 0.0, 0.05])).abs().max() < 3


def test_the_class_of_a_sample_depends_on_its_index_alone() -> None:
    labels = torch.randint(5, (137,), generator=torch.Generator().manual_seed(0))
    whole = labels_by_frequency(labels, range(100))
    assert torch.equal(labels_by_frequency(labels, range(37, 61)), whole[37:61])
    assert torch.equal(labels_by_frequency(labels.flip(0).to(torch.uint8), range(100)), whole)
    assert len(labels_by_frequency(labels, range(0))) == 0


def test_classes_by_frequency_enter_the_evaluation() -> None:
    found = measured(EvaluationConfig(samples=60, batch_size=32, classes_by="frequency", fractions=(1.0, 0.5)))
    assert found.draws["classes by"] == "frequency"
    assert to_dict(found)["config"]["classes_by"] == "frequency"
    expected = labels_by_frequency(LABELS[:200], range(60))
    counts = torch.bincount(expected).tolist()
    assert abs(counts[0] - 40) <= 2
    # A column for each class, as many rows as the rarest fills.
    assert found.pictures.classes == 3
    assert len(found.pictures.samples) == 3 * min(10, *counts)


def test_pictures_show_a_class_in_a_column(tmp_path: Path) -> None:
    found = measured(EvaluationConfig(samples=60, classes_by="frequency", fractions=(1.0,)))
    labels = labels_by_frequency(LABELS[:200], range(60))
    samples = draw_samples(readable_pipeline(3), 60, tmp_path, label=labels)
    depth = len(found.pictures.samples) // 3
    columns = [[index for index in range(60) if labels[index] == column][:depth] for column in range(3)]
    assert torch.equal(found.pictures.samples, samples.batch(np.array(columns).T.flatten()))


@pytest.mark.parametrize("kind", ["turn", "frequency"])
def test_samples_given_must_have_the_classes(kind: Any, tmp_path: Path) -> None:
    labels = {"turn": torch.arange(60) % 3, "frequency": labels_by_frequency(LABELS[:200], range(60))}
    pipeline = readable_pipeline(3)
    config = EvaluationConfig(samples=60, fractions=(1.0,), classes_by=kind)
    other = "turn" if kind == "frequency" else "frequency"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_samples(pipeline, tmp_path / "right", 60, 3, seed=0, label=labels[kind].tolist())
        whole = measured(config, samples=samples_from_shards(pipeline, tmp_path / "right"))
        alone = measured(config)
        assert whole.sets == alone.sets
        wrong = draw_samples(pipeline, 60, tmp_path / "wrong", label=labels[other])
        how = "labels_by_frequency" if kind == "frequency" else "all classes in turn"
        with refuses(ArgumentError, f"label: expected samples of {how}"):
            measured(config, samples=wrong)


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in seen if "classes_by" in str(one.message)]


def test_unequal_classes_in_turn_are_warned_of() -> None:
    turn, frequency = (EvaluationConfig(samples=30, fractions=(1.0,), classes_by=by) for by in ("turn", "frequency"))
    (message,) = warned(lambda: measured(turn))
    counts = torch.bincount(LABELS[:200])
    assert f"from {counts.min()} to {counts.max()} of a class" in message
    assert warned(lambda: measured(frequency)) == []
    assert warned(lambda: measured(turn, labels=torch.arange(GRIDS) % 3)) == []
    assert warned(lambda: measured(turn, extractor=None)) == []


def test_without_classes_nothing_is_said_of_them() -> None:
    assert "classes by" not in measured(EvaluationConfig(samples=30, fractions=(1.0,)), classes=None).draws


def test_refuses() -> None:
    with refuses(ArgumentError, "classes_by: expected one of 'turn', 'frequency', got 'label'"):
        EvaluationConfig(classes_by="label")  # type: ignore[arg-type]
    with refuses(ArgumentError, "classes_by: expected 'turn' of priors without classes, got 'frequency'"):
        measured(EvaluationConfig(classes_by="frequency"), classes=None, classifier=Ripples(3))
    with refuses(ArgumentError, r"labels: expected one label or more, \[N\], got shape \[0\]"):
        labels_by_frequency(torch.zeros(0).long(), range(3))
    with refuses(ArgumentTypeError, "labels: expected an integer tensor, got torch.float32"):
        labels_by_frequency(torch.zeros(3), range(3))
