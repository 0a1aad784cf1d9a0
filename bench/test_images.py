"""The benchmark of folders of images on a small one: what is compared is the same, and every way has a rate."""

from __future__ import annotations

import dataclasses

import pytest

from bench.images import CASES, measure


@pytest.mark.parametrize("name", ["tiles-png-128-to-64", "photos-jpg-500x375-to-64"])
def test_rates_of_a_small_folder(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    found = measure(dataclasses.replace(case, files=12, loaded=7), workers=1, rounds=1)
    assert set(found["files_per_s"]) == {"decode", "headers", "second"}
    assert set(found["images_per_s"]) == {"pillow", "whole", "draft", "stored", "whole, 1 processes"}
    assert all(rate > 0 for rates in (found["files_per_s"], found["images_per_s"]) for rate in rates.values())
    assert (found["draft_difference"]["largest"] > 0) == name.startswith("photos")
    assert found["draft_difference"]["mean"] < 0.5
