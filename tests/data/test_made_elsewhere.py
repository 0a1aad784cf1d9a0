"""Codes of another project: brought in from files, learned by a prior, and what is said of files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refuses
from safetensors.numpy import save_file

from fastvq import PixelSNAIL, sample
from fastvq.cli import main
from fastvq.data import CodeDataset, import_codes
from fastvq.errors import ArgumentError, ArgumentTypeError, CorruptFileError, FileConflictError, MissingFileError
from fastvq.training import TrainConfig, train_prior

ROWS = 12
TOLD: dict[str, Any] = {"num_codes": [5, 300], "class_names": ["a", "b", "c"]}


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "level0": generator.integers(5, size=(ROWS, 2, 3)),
        "level1": generator.integers(300, size=(ROWS, 4, 6)).astype(np.int16),
        "labels": generator.integers(3, size=ROWS).astype(np.uint8),
    }


def write(folder: Path, given: dict[str, np.ndarray], told: dict[str, Any], *, one_file: bool = False) -> Path:
    folder.mkdir()
    (folder / "codes.json").write_text(json.dumps(told))
    if one_file:
        save_file(given, folder / "codes.safetensors")
        return folder
    for name, array in given.items():
        np.save(folder / f"{name}.npy", array)
    return folder


@pytest.mark.parametrize("one_file", [False, True], ids=["npy", "safetensors"])
def test_codes_are_those_of_the_files(one_file: bool, tmp_path: Path) -> None:
    given = arrays()
    codes = CodeDataset(import_codes(write(tmp_path / "in", given, TOLD, one_file=one_file), tmp_path / "out"))
    codes.verify()
    assert (codes.shapes, codes.num_codes, codes.num_classes) == (((2, 3), (4, 6)), (5, 300), 3)
    assert codes.class_names == ("a", "b", "c")
    for level in range(2):
        assert np.array_equal(codes.codes(level, slice(None)).numpy(), given[f"level{level}"])
    assert codes.labels is not None
    assert codes.labels.tolist() == given["labels"].tolist()
    assert codes.source.tolist() == list(range(ROWS))
    assert [np.load(tmp_path / "out" / f"level{level}.npy").dtype for level in range(2)] == [np.uint8, np.uint16]


def test_some_rows_by_rows_without_labels(tmp_path: Path) -> None:
    given = arrays()
    flat = {"level0": given["level0"].reshape(ROWS, 6), "level1": given["level1"]}
    told = {"num_codes": 300, "shapes": [[2, 3], [4, 6]]}
    codes = CodeDataset(import_codes(write(tmp_path / "in", flat, told), tmp_path / "out", indices=[7, 2, 9]))
    assert np.array_equal(codes.codes(0, slice(None)).numpy(), given["level0"][[7, 2, 9]])
    assert np.array_equal(codes.codes(1, slice(None)).numpy(), given["level1"][[7, 2, 9]])
    assert (codes.num_codes, codes.num_classes, codes.labels) == ((300, 300), None, None)
    assert codes.source.tolist() == [7, 2, 9]


def test_a_call_made_again_finds_all_there_and_other_codes_are_refused(tmp_path: Path) -> None:
    given = arrays()
    source = write(tmp_path / "in", given, TOLD)
    import_codes(source, tmp_path / "out")
    before = (tmp_path / "out" / "codes.json").read_bytes()
    import_codes(source, tmp_path / "out")
    assert (tmp_path / "out" / "codes.json").read_bytes() == before
    np.save(source / "labels.npy", (given["labels"] + 1) % 3)
    with pytest.raises(FileConflictError, match="holds codes that differ in"):
        import_codes(source, tmp_path / "out")


def test_two_steps_of_training_and_samples(tmp_path: Path) -> None:
    folder = import_codes(write(tmp_path / "in", arrays(), TOLD), tmp_path / "out")
    above: tuple[torch.Tensor, ...] = ()
    for level, (shape, count) in enumerate([((2, 3), 5), ((4, 6), 300)]):
        config = PixelSNAIL(
            shape=shape, num_codes=count, num_classes=3, level=level, condition_shapes=((2, 3),)[:level],
            condition_num_codes=(5,)[:level], channels=4, residual_channels=4, kernel_size=3, blocks=1,
            layers_per_block=1, attention_heads=2, condition_channels=4, condition_blocks=1,
        ).config  # fmt: skip
        settings = TrainConfig(steps=2, batch_size=4, warmup_steps=0)
        prior = train_prior(folder, level, config, settings, tmp_path / f"run{level}")
        codes = sample(prior, 2, label=[0, 2], condition=above, seed=0)
        assert codes.shape == (2, *shape)
        above = (*above, codes)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", arrays(), TOLD)
    assert main(["import-codes", "in", "--run", "my", "--validation", "0.25"]) == 0
    told = capsys.readouterr().out
    assert "codes of 9 rows, and 3 held out, in my/codes: 2 x 3 of 5, 4 x 6 of 300" in told
    assert told.endswith("next: fastvq train-prior --run my --level 0\n      fastvq train-prior --run my --level 1\n")
    kept, held_out = CodeDataset("my/codes/train"), CodeDataset("my/codes/validation")
    assert sorted([*kept.source.tolist(), *held_out.source.tolist()]) == list(range(ROWS))
    assert main(["import-codes", "in", "--run", "my", "--validation", "0"]) == 1
    assert "--validation: my/codes/validation is there already" in capsys.readouterr().err
    assert main(["import-codes", "in", "--run", "my", "--validation", "1"]) == 1
    assert "--validation: must lie in [0, 1)" in capsys.readouterr().err
    assert main(["import-codes", "nowhere", "--run", "new"]) == 1
    assert "SOURCE: nowhere holds no codes.json" in capsys.readouterr().err
    (tmp_path / "other" / "vqvae").mkdir(parents=True)
    (tmp_path / "other" / "vqvae" / "config.json").write_text("{}")
    assert main(["import-codes", "in", "--run", "other"]) == 1
    assert "--run: other/vqvae holds an autoencoder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_sampling_imported_codes_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", arrays(), TOLD)
    assert main(["import-codes", "in", "--run", "my", "--validation", "0"]) == 0
    small = ["channels=4", "residual_channels=4", "attention_heads=2", "condition_channels=4", "condition_blocks=1"]
    settings = [word for setting in small for word in ("--set", setting)]
    train = ["train-prior", "--run", "my", "--level", "0", "--preset", "tiny-top", "--steps", "1", "--batch-size", "4"]
    assert main([*train, "--warmup", "0", "--quiet", "--device", "cpu", *settings]) == 0
    how = "sample in Python from fastvq.Pipeline(your_autoencoder, priors), where priors are "
    how += "fastvq.training.load_weights("
    told = capsys.readouterr().out
    assert f'once all levels have one: {how}"my/prior0"), ... (docs/own-autoencoders.md)' in told
    assert "fastvq sample" not in told
    for command in (["sample", "--checkpoint", "my"], ["reconstruct", "--checkpoint", "my", "--data", "digits"]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert f"--checkpoint: the codes of my were made elsewhere, so it holds no autoencoder; {how}" in error
    assert main(["info", "--checkpoint", "my"]) == 0
    told = capsys.readouterr().out
    assert "codes       2 x 3, 4 x 6 (top first), 12 rows, made elsewhere, so there is no autoencoder here" in told
    assert "prior0      finished, 1 steps" in told
    assert "prior1      has not begun" in told
    assert f"next        {how}" in told
    assert "prior0: PixelSNAIL" in told


def changed(**changes: Any) -> Callable[[], dict[str, np.ndarray]]:
    return lambda: {name: array for name, array in {**arrays(), **changes}.items() if array is not None}


CODES = arrays()
MISFITS: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "no-size": (
        arrays,
        {"num_codes": None},
        CorruptFileError,
        ".*codes.json: missing or wrong entry: num_codes is null",
    ),
    "sizes": (
        arrays,
        {"num_codes": [5]},
        CorruptFileError,
        r".*num_codes is \[5\], expected a list of 2 of",
    ),
    "size-0": (arrays, {"num_codes": 0}, CorruptFileError, ".*num_codes is 0, expected an integer in 1"),
    "shapes": (arrays, {"shapes": [[2, 3]]}, ArgumentError, ".*codes.json: tells shapes of 1 levels, there are 2"),
    "shape": (
        arrays,
        {"shapes": [[2, 3], [4, 5]]},
        ArgumentError,
        r"level1: expected codes of shape \[N, 4, 5\], got \[12, 4, 6\]",
    ),
    "ours": (arrays, {"format": 1}, ArgumentError, "source: .* holds codes as fastvq writes them"),
    "no-level": (
        changed(level0=None),
        {},
        MissingFileError,
        "source: .* holds neither level0.npy nor",
    ),
    "floats": (changed(level1=CODES["level1"] * 1.0), {}, ArgumentTypeError, "level1: expected integers, got float64"),
    "flat": (
        changed(level0=CODES["level0"].reshape(ROWS, 6)),
        {},
        ArgumentError,
        r"level0: expected codes of shape \[N, h, w\], got \[12, 6\]",
    ),
    "rows": (changed(level1=CODES["level1"][:7]), {}, ArgumentError, "level1: expected 12 rows as in level0, got 7"),
    "none": (changed(level0=CODES["level0"][:0]), {}, ArgumentError, "level0: expected some rows as in level0, got 0"),
    "range": (changed(level0=CODES["level0"] + 1), {}, ArgumentError, r"level0: values must lie in 0\.\.4, got 5"),
    "negative": (
        changed(level1=CODES["level1"] - 300),
        {},
        ArgumentError,
        r"level1: values must lie in 0",
    ),
    "no-labels": (
        changed(labels=None),
        {},
        MissingFileError,
        "source: .* tells of classes, but .* no labels.npy",
    ),
    "no-classes": (
        arrays,
        {"class_names": None},
        CorruptFileError,
        ".*class_names is null, expected a list",
    ),
    "names": (arrays, {"num_classes": 2}, ArgumentError, ".*codes.json: expected 2 class_names, got 3"),
    "labels": (changed(labels=CODES["labels"] + 1), {}, ArgumentError, r"labels: values must lie in 0\.\.2, got 3"),
    "label-rows": (changed(labels=CODES["labels"][:5]), {}, ArgumentError, r"labels: expected shape \[12\], got \[5\]"),
    "label-type": (
        changed(labels=CODES["labels"] * 0.5),
        {},
        ArgumentTypeError,
        "labels: expected integers, got",
    ),
}


@pytest.mark.parametrize("one_file", [False, True], ids=["npy", "safetensors"])
@pytest.mark.parametrize(("given", "told", "error", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_misfits(
    given: Callable[[], Any], told: dict[str, Any], error: type[Exception], message: str, one_file: bool, tmp_path: Path
) -> None:
    source = write(tmp_path / "in", given(), {**TOLD, **told}, one_file=one_file)
    with refuses(error, message):
        import_codes(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_without_classes(tmp_path: Path) -> None:
    source = write(tmp_path / "in", arrays(), {"num_codes": 300})
    with refuses(ArgumentError, ".*codes.json: there are labels, expected num_classes or class_names, got neither"):
        import_codes(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["level0.npy", "codes.safetensors"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", arrays(), TOLD, one_file=name.startswith("codes"))
    (source / name).write_bytes((source / name).read_bytes()[:-40])
    with refuses(CorruptFileError, f".*{name}: not a "):
        import_codes(source, tmp_path / "out")


@pytest.mark.parametrize("indices", [[12], [-1], [], [0.5]], ids=str)
def test_rows_that_there_are_not(indices: Any, tmp_path: Path) -> None:
    with refuses(ArgumentError, "indices: "):
        import_codes(write(tmp_path / "in", arrays(), TOLD), tmp_path / "out", indices=indices)
