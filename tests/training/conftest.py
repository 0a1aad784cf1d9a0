"""Codes to train priors on, and both stages as one function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_helpers import make_codes, stage1, stage2

from fastvq.models.pretrained import PretrainedModel


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_codes(tmp_path_factory.mktemp("codes"))


@pytest.fixture(params=["stage1", "stage2"])
def train(request: pytest.FixtureRequest, codes: Path) -> Callable[..., PretrainedModel]:
    if request.param == "stage1":
        return stage1
    return lambda run_dir, config=None, **options: stage2(codes, run_dir, config, **options)
