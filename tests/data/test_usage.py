"""How many codes are used, when these are few, and which items stand for all classes."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import VQVAE_CONFIG, Noise, make_codes

from fastvq.data import CodeDataset, extract_codes
from fastvq.data.base import spread_over_classes
from fastvq.data.usage import CodeUse, level_name
from fastvq.models import build


def use(perplexity: float, num_codes: int = 512, vectors: int = 10_000) -> CodeUse:
    return CodeUse(0, 2, num_codes, used=3, perplexity=perplexity, vectors=vectors)


def test_use_of_counts_by_hand() -> None:
    found = CodeUse.of_counts(1, 2, torch.tensor([6, 0, 3, 3, 0, 0, 0, 0]))
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert (found.num_codes, found.used, found.vectors, found.share) == (8, 3, 12, 3 / 8)
    assert found.perplexity == pytest.approx(math.exp(entropy))
    assert str(found) == "level 1 (bottom): 3 of 8 codes in use, perplexity 2.8"


@pytest.mark.parametrize(
    ("few", "case"),
    {
        "one-of-512": (True, use(1.0)),
        "a-fiftieth-of-512": (True, use(10.2)),
        "more-than-a-fiftieth": (False, use(10.3)),
        "a-fiftieth-of-what-there-could-be": (False, use(10.2, vectors=500)),
        "two-of-64": (True, use(2.0, num_codes=64)),
        "three-of-64": (False, use(3.0, num_codes=64)),
        "two-of-16": (True, use(2.0, num_codes=16)),
        "two-of-8": (False, use(2.0, num_codes=8)),
        "one-of-8": (True, use(1.0, num_codes=8)),
        "one-of-a-large-codebook-by-8-vectors": (True, use(1.0, vectors=8)),
        "too-few-vectors-to-judge": (False, use(1.0, vectors=7)),
        "too-few-codes-to-judge": (False, use(1.0, num_codes=4)),
    }.values(),
    ids=lambda value: (
        None if isinstance(value, bool) else f"{value.perplexity}-of-{value.num_codes}-in-{value.vectors}"
    ),
)
def test_when_codes_are_few(few: bool, case: CodeUse) -> None:
    assert case.few is few


def test_level_names() -> None:
    assert [level_name(level, 3) for level in range(3)] == ["level 0 (top)", "level 1", "level 2 (bottom)"]
    assert level_name(0, 1) == "level 0"


def test_use_of_stored_codes(tmp_path: Path) -> None:
    codes = CodeDataset(make_codes(tmp_path) / "train")
    for level in range(2):
        grids = codes.codes(level, slice(None)).numpy()
        found = codes.use(level)
        assert found == CodeUse.of_counts(level, 2, torch.from_numpy(np.bincount(grids.ravel(), minlength=8)))
        part = codes.use(level, most=5)
        assert part == CodeUse.of_counts(level, 2, torch.from_numpy(np.bincount(grids[::4].ravel(), minlength=8)))


def test_use_is_counted_in_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    codes = CodeDataset(extract_codes(build(VQVAE_CONFIG).eval(), Noise(), range(11), tmp_path))
    whole = codes.use(1)
    monkeypatch.setattr("fastvq.data.codes._COUNTED", 3)
    assert codes.use(1) == whole
    assert whole.vectors == 11 * 16


def test_items_of_all_classes() -> None:
    labels = torch.tensor([0] * 50 + [1] * 2 + [2] * 30)
    found = spread_over_classes(labels, 82, 9)
    assert labels[found].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert found.tolist() == [0, 12, 25, 37, 50, 51, 52, 62, 72]


def test_items_of_more_classes_than_asked_for() -> None:
    labels = torch.arange(100).repeat(3)
    assert labels[spread_over_classes(labels, 300, 4)].tolist() == [0, 25, 50, 75]


def test_items_without_classes_are_spread() -> None:
    assert spread_over_classes(None, 100, 4).tolist() == [0, 25, 50, 75]


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13, 40])
def test_no_item_comes_twice(count: int) -> None:
    labels = torch.tensor([3, 0, 0, 5, 3, 3, 3, 3, 5, 0, 3, 5, 5])
    found = spread_over_classes(labels, 13, count)
    assert len(found) == len(set(found.tolist())) == min(count, 13)
    # As even as the classes allow, of which one has three items.
    each = Counter(labels[found].tolist())
    most = max(each.values())
    assert all(number >= min(most - 1, 3) for number in each.values())
