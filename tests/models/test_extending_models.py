"""A model from outside the package, defined in one file, goes wherever those of the package go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import random_codes, refuses
from toys.model import Bigram, BigramConfig

from fastvq import sample
from fastvq.errors import ArgumentError
from fastvq.models import (
    MODEL_CLASSES,
    PRESETS,
    VQVAE,
    VQVAE2,
    Classifier,
    ClassifierConfig,
    PixelSNAIL,
    PixelSNAILConfig,
    VQVAEConfig,
    build,
    load_pretrained,
    preset,
)

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Names that a test adds go with it."""
    kept = [(table, dict(table)) for table in (MODEL_CLASSES, PRESETS)]
    yield
    for table, entries in kept:
        table.clear()
        table.update(entries)  # type: ignore[arg-type]


def in_a_fresh_process(code: str, *, first: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{first}\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


def test_it_is_built_of_its_configuration_and_its_preset() -> None:
    assert MODEL_CLASSES["Bigram"] is Bigram
    config = BigramConfig(shape=(2, 2), num_codes=7, width=4)
    assert type(build(config)) is Bigram
    assert build(config).config == config
    assert preset("toy-bigram", width=2) == (Bigram, BigramConfig(shape=(3, 4), num_codes=5, width=2))
    assert Bigram.from_preset("toy-bigram").config == PRESETS["toy-bigram"][1]
    with refuses(ArgumentError, "name: preset 'toy-bigram' is a Bigram, not a PixelSNAIL"):
        PixelSNAIL.from_preset("toy-bigram")


def test_it_is_saved_and_loaded_also_where_only_its_file_is_imported(tmp_path: Path) -> None:
    prior = Bigram.from_preset("toy-bigram").eval()
    prior.save_pretrained(tmp_path / "model")
    back = load_pretrained(tmp_path / "model")
    assert isinstance(back, Bigram)
    codes = random_codes(2, 3, 4)
    assert torch.equal(back(codes), prior(codes))
    drawn = sample(prior, 2, seed=3, engine="naive")
    code = f"""
from fastvq import sample
from fastvq.models import build, load_pretrained, preset
model = load_pretrained({str(tmp_path / "model")!r})
print(type(model).__module__, type(build(preset("toy-bigram")[1])).__name__)
print(sample(model, 2, seed=3, engine="naive").tolist())
"""
    done = in_a_fresh_process(code, first="import toys.model")
    assert done.stdout.splitlines() == ["toys.model Bigram", str(drawn.tolist())], done.stderr


def test_without_its_file_the_module_to_import_is_named(tmp_path: Path) -> None:
    Bigram.from_preset("toy-bigram").save_pretrained(tmp_path / "model")
    done = in_a_fresh_process(
        f"from fastvq.models import load_pretrained; load_pretrained({str(tmp_path / 'model')!r})"
    )
    assert done.returncode
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fastvq.errors.CorruptFileError: ")
    assert "model 'Bigram', expected one of ['Classifier'" in last
    assert last.endswith("import the module that defines it, toys.model, before loading")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (VQVAEConfig(strides=(4,), channels=2), VQVAE),
        (VQVAEConfig(strides=(4, 2), channels=2), VQVAE2),
        (PixelSNAILConfig(shape=(2, 2), num_codes=3, channels=8, attention_heads=2), PixelSNAIL),
        (ClassifierConfig(channels=(2,)), Classifier),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_classes_that_derive_from_one_of_the_package_do_not_take_its_place(config: Any, expected: type[Any]) -> None:
    heir = type("Heir", (expected,), {})
    told = type("Told", (expected,), {"config_class": expected.config_class})
    with torch.device("meta"):
        assert type(build(config)) is expected
    assert heir.config_class is told.config_class is type(config)


def test_a_configuration_of_ones_own_leads_to_ones_own_class() -> None:
    @dataclass(frozen=True, kw_only=True)
    class DeepConfig(VQVAEConfig):
        depth: int = 1

    with torch.device("meta"):
        assert type(build(DeepConfig(strides=(4, 2)))) is VQVAE2
        for _ in range(2):  # as where a cell of a notebook runs again

            class Deep(VQVAE2):
                config_class: ClassVar[type[DeepConfig]] = DeepConfig
                presets: ClassVar[Mapping[str, DeepConfig]] = {"deep": DeepConfig(strides=(4, 2), depth=3)}

            assert type(build(DeepConfig(strides=(4, 2)))) is Deep
            assert type(Deep.from_preset("deep")) is Deep


def test_names_of_presets_are_taken_once() -> None:
    with refuses(ArgumentError, "presets: 'digits' is a VQVAE2 already"):
        type("Thief", (PixelSNAIL,), {"presets": {"digits": PRESETS["digits-top"][1]}})
    assert PRESETS["digits"][0] is VQVAE2
    assert "Thief" not in MODEL_CLASSES
