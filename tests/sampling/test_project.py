"""A project folder in Python: opened by the name that opens saved pipelines, and what is said of one half finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import refuses

from fastvq.cli import main
from fastvq.errors import CorruptFileError, MissingFileError
from fastvq.sampling import Pipeline

pytestmark = pytest.mark.usefixtures("steady")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The shipped digits, laid out as training leaves them."""
    digits, folder = Pipeline.from_pretrained("digits"), tmp_path / "my"
    digits.vqvae.save_pretrained(folder / "vqvae" / "model")
    for level, prior in enumerate(digits.priors):
        prior.save_pretrained(folder / f"prior{level}" / "model")
    names = [f"digit {index}" for index in range(10)]
    (folder / "data.json").write_text(json.dumps({"data": "digits", "size": [32, 32], "class_names": names}))
    return folder


@pytest.mark.parametrize("spelling", [str, Path, lambda path: os.path.relpath(path)], ids=["text", "path", "relative"])
def test_opened_as_a_pipeline(project: Path, spelling: Callable[[Path], str | Path]) -> None:
    pipeline = Pipeline.from_pretrained(spelling(project))
    assert pipeline.class_names == tuple(f"digit {index}" for index in range(10))
    want = Pipeline.from_pretrained("digits").sample(2, label=7, seed=1)
    got = pipeline.sample(2, label=7, seed=1)
    assert torch.equal(got.images, want.images)
    again = Pipeline.from_pretrained(pipeline.save_pretrained(project / "pipeline"))
    assert again.class_names == pipeline.class_names


def test_the_command_line_reads_the_same(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["sample", "--checkpoint", str(project), "-n", "2", "--label", "digit 7", "--seed", "1", "--quiet"]
    assert main([*command, "--out", str(out)]) == 0
    assert json.loads((out / "samples.json").read_text())["labels"] == [7, 7]


def test_without_data_json_classes_have_no_names(project: Path) -> None:
    (project / "data.json").unlink()
    assert Pipeline.from_pretrained(project).class_names is None


UNFINISHED: dict[str, tuple[list[str], str]] = {
    "nothing-trained": (
        ["vqvae", "prior0", "prior1"],
        r"{my}/vqvae has not begun; run `fastvq train-vqvae --run {my}`",
    ),
    "vqvae-empty": (["vqvae/model"], r"{my}/vqvae has not begun; run `fastvq train-vqvae --run {my}`"),
    "one-prior": (["prior1"], r"{my}/prior1 has not begun; run `fastvq train-prior --run {my} --level 1`"),
    "both-priors": (
        ["prior0/model", "prior1"],
        r"{my}/prior0 has not begun; run `fastvq train-prior --run {my} --level 0`; "
        r"{my}/prior1 has not begun; run `fastvq train-prior --run {my} --level 1`",
    ),
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_half_finished_projects_say_what_is_missing(
    case: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    removed, message = UNFINISHED[case]
    for name in removed:
        shutil.rmtree(project / name)
    expected = message.format(my=project)
    with pytest.raises(MissingFileError) as refused:
        Pipeline.from_pretrained(project)
    assert str(refused.value) == f"name: {expected}"
    assert main(["sample", "--checkpoint", str(project), "-n", "1", "--out", str(project / "new.png")]) == 1
    assert expected in capsys.readouterr().err


def test_models_in_the_wrong_place(project: Path) -> None:
    shutil.rmtree(project / "prior1" / "model")
    shutil.copytree(project / "vqvae" / "model", project / "prior1" / "model")
    with refuses(CorruptFileError, ".*prior1: expected a prior, found a VQVAE2"):
        Pipeline.from_pretrained(project)
    shutil.rmtree(project / "prior1" / "model")
    shutil.copytree(project / "prior0" / "model", project / "prior1" / "model")
    with refuses(CorruptFileError, ".*my: the models do not fit together"):
        Pipeline.from_pretrained(project)


def test_a_path_is_a_folder_and_never_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refuses(MissingFileError, "name: no folder digits$"):
        Pipeline.from_pretrained(Path("digits"))
    (tmp_path / "digits").mkdir()
    with refuses(MissingFileError, "name: digits holds no pipeline.json, .* so it is no project folder$"):
        Pipeline.from_pretrained(Path("digits"))
    assert Pipeline.from_pretrained("digits").num_classes == 10
