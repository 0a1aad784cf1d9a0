"""A project goes on with the images that it was started with, wherever they lie, and with others only if told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvq.cli import main

MODEL = ["--size", "8", "--preset", "tiny", "--channels", "3", "--steps", "2", "--batch-size", "4"]
QUIET = ["--quiet", "--device", "cpu"]
TRAIN = ["train-vqvae", "--run", "my", "--data", "photos", *MODEL, "--validation", "0.25", *QUIET]
PRIOR = ["train-prior", "--run", "my", "--steps", "2", "--batch-size", "4", "--image-every", "9", *QUIET]


def add(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photos`` of two classes, eight images, and ``my``, an autoencoder trained on them."""
    root = tmp_path_factory.mktemp("started")
    for index in range(8):
        add(root / "photos" / ("cat", "dog")[index % 2] / f"{index}.png", index)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(TRAIN) == 0
    return root


@pytest.fixture
def here(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working folder, as if it had been started here."""
    root = tmp_path / "work"
    shutil.copytree(started, root)
    monkeypatch.chdir(root)
    edit(data=str(root / "photos"))
    return root


def described() -> dict[str, object]:
    return json.loads(Path("my/data.json").read_text())


def edit(**changes: object) -> None:
    Path("my/data.json").write_text(json.dumps({**described(), **changes}))


def make_old() -> None:
    """A project as it was before it recorded more than the path."""
    newer = ("data_from_run", "suffixes", "images", "fingerprint")
    old = {name: value for name, value in described().items() if name not in newer}
    Path("my/data.json").write_text(json.dumps({**old, "data": "photos"}))
    Path("my/files.json").unlink()


def contents(folder: str = "my") -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def codes(part: str) -> dict[str, object]:
    return json.loads(Path(f"my/codes/{part}/codes.json").read_text())


def names_of(part: str) -> list[str]:
    """Names of the images whose codes are in a part."""
    files = list(json.loads(Path("my/files.json").read_text())["files"])
    return [files[index] for index in np.load(f"my/codes/{part}/source.npy")]


# ---- The same images


@pytest.mark.parametrize("old", [False, True], ids=["", "old"])
@pytest.mark.parametrize("data", ["./photos", "{here}/photos", "photos/../photos"])
def test_the_spelling_of_a_path_does_not_matter(data: str, old: bool, here: Path) -> None:
    if old:
        make_old()
    assert main([*TRAIN[:4], data.format(here=here), *TRAIN[5:], "--resume"]) == 0


@pytest.mark.parametrize("old", [False, True], ids=["", "old"])
def test_a_renamed_folder_is_remembered(old: bool, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if old:
        make_old()
    Path("photos").rename("pictures")
    before = contents()
    assert main(["extract", "--run", "my", *QUIET]) == 1
    assert "--data: the images of my are no longer in" in capsys.readouterr().err
    assert contents() == before
    assert main(["extract", "--run", "my", "--data", "pictures", *QUIET]) == 0
    assert described()["data"] == str(here / "pictures")
    assert described()["images"] == 8
    shutil.rmtree("my/codes")
    assert main(["extract", "--run", "my", *QUIET]) == 0
    assert (codes("train")["rows"], codes("validation")["rows"]) == (6, 2)


def test_another_working_folder_and_both_moved(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    assert main(["extract", "--run", "../my", *QUIET]) == 0
    monkeypatch.chdir(here.parent)
    here.rename("elsewhere")
    shutil.rmtree("elsewhere/my/codes")
    assert main(["extract", "--run", "elsewhere/my", *QUIET]) == 0
    assert json.loads(Path("elsewhere/my/data.json").read_text())["data"] == str(Path("elsewhere/photos").absolute())


def test_a_project_below_its_images_is_none_of_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("my", "photos/other")
    command = ["train-vqvae", "--run", "photos/run", "--data", "photos", *MODEL, *QUIET]
    assert main(command) == 0
    assert "other, a folder that fastvq wrote" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert main(["extract", "--run", "photos/run", *QUIET]) == 0
    written = json.loads(Path("photos/run/codes/train/codes.json").read_text())
    assert written["class_names"] == ["cat", "dog"]
    assert main(["train-vqvae", "--run", "photos", "--data", "photos", *MODEL, *QUIET]) == 1
    assert "--run: photos is the folder of images itself" in capsys.readouterr().err


def test_an_old_project_keeps_the_types_that_it_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_old()
    add(Path("photos/cat/a.bmp"))
    add(Path("photos/ant/a.gif"))
    assert main(["extract", "--run", "my", *QUIET]) == 0
    assert "1 .bmp (cat/a.bmp)" in capsys.readouterr().err
    assert codes("train")["class_names"] == ["cat", "dog"]
    assert described()["suffixes"] == [".jpg", ".jpeg", ".png", ".webp"]


# ---- Other images


@pytest.mark.parametrize("old", [False, True], ids=["", "old"])
@pytest.mark.parametrize(
    "command",
    [["extract", "--run", "my"], ["train-classifier", "--run", "my", "--steps", "1"], [*TRAIN, "--resume"]],
    ids=["extract", "train-classifier", "train-vqvae"],
)
def test_other_images_are_refused(
    command: list[str], old: bool, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if old:
        make_old()
    add(Path("photos/bird/b.png"))
    Path("photos/cat/0.png").unlink()
    add(Path("photos/cat/00.png"))
    add(Path("photos/dog/1.png"), 99)
    Path("photos/dog/1.png").write_bytes(Path("photos/dog/1.png").read_bytes() + b"more")
    before = contents()
    assert main([*command, *QUIET]) == 1
    error = capsys.readouterr().err
    assert "holds other images than my was trained on\n  8 images then, 9 now\n" in error
    assert "  classes added: bird (1)\n" in error
    if old:
        assert "names are not compared: they were not recorded then" in error
    else:
        assert "  images added: bird/b.png, cat/00.png (2)\n" in error
        assert "  images gone: cat/0.png (1)\n" in error
        assert "  files of another size: dog/1.png (1)\n" in error
    assert ("--changed-data" in error) == (command[0] != "train-vqvae")
    assert contents() == before


def test_a_class_whose_images_were_all_broken_counts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files that are read stay the same, and the labels move."""
    Path("photos/cow").mkdir()
    Path("photos/cow/x.png").write_text("x")
    assert main(["train-vqvae", "--run", "other", *TRAIN[3:], "--skip-broken"]) == 0
    shutil.rmtree("photos/cow")
    assert main(["extract", "--run", "other", *QUIET]) == 1
    assert "classes gone: cow (1)" in capsys.readouterr().err


def test_changed_images_become_the_projects(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "--run", "my", *QUIET]) == 0
    held_out = names_of("validation")
    for index in range(8):
        add(Path(f"photos/bird/{index}.png"), index)
    Path("photos/cat/x.bmp").write_bytes(b"")
    before = contents()
    command = ["extract", "--run", "my", *QUIET, "--changed-data"]
    assert main([*command, "--skip-broken"]) == 1
    assert "--changed-data: made from the images before: my/codes. Move these elsewhere" in capsys.readouterr().err
    assert contents() == before
    Path("my/codes").rename("codes-before")
    assert main(command) == 1
    assert "--skip-broken goes on without them" in capsys.readouterr().err
    assert main([*command, "--skip-broken"]) == 0
    assert "images added: bird/0.png, bird/1.png, bird/2.png, ... (8)" in capsys.readouterr().err
    assert described()["class_names"] == codes("train")["class_names"] == ["bird", "cat", "dog"]
    # Images that were held out stay so, and none that the autoencoder learned from is.
    new = [name for name in names_of("validation") if name.startswith("bird/")]
    assert [name for name in names_of("validation") if name not in new] == held_out
    assert len(new) == 2
    assert sorted([*names_of("train"), *names_of("validation")]) == list(
        json.loads(Path("my/files.json").read_text())["files"]
    )
    # From now on these are the project's.
    shutil.rmtree("my/codes")
    assert main(["extract", "--run", "my", *QUIET]) == 0
    assert [name for name in names_of("validation") if name not in new] == held_out
    Path("photos/cat/x.bmp").unlink()
    assert main([*TRAIN, "--resume", "--skip-broken"]) == 1
    assert "A run goes on with the images that it was started with" in capsys.readouterr().err


def test_an_old_project_splits_changed_images_anew(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_old()
    add(Path("photos/cat/new.bmp"))
    add(Path("photos/cat/new.png"))
    assert main(["extract", "--run", "my", *QUIET, "--changed-data"]) == 0
    assert "which images were held out is not recorded; these are split anew" in capsys.readouterr().err
    assert codes("train")["rows"] + codes("validation")["rows"] == described()["images"] == 10


def test_another_set_for_one_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("photos", "more")
    add(Path("more/cat/new.png"))
    before = contents()
    command = ["train-classifier", "--run", "my", "--data", "more", "--steps", "1", "--batch-size", "4", *QUIET]
    assert main(command) == 1
    assert main([*command, "--changed-data"]) == 0
    assert {name: content for name, content in contents().items() if "classifier/" not in name} == before
    shutil.rmtree("my/classifier")
    Path("more/cat").rename("more/elk")
    capsys.readouterr()
    assert main([*command, "--changed-data"]) == 1
    assert "project knows the classes cat, dog and these images dog, elk" in capsys.readouterr().err
    assert contents() == before


# ---- Going on without naming the images


def steps_of(run: str) -> int:
    return json.loads(Path(f"my/{run}/config.json").read_text())["train"]["steps"]


@pytest.mark.parametrize("run", ["vqvae", "classifier"])
def test_a_run_finds_its_images_itself(
    run: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-vqvae" if run == "vqvae" else "train-classifier", "--run", str(here / "my"), *QUIET, "--resume"]
    if run == "classifier":
        assert main([*command[:-1], "--steps", "2", "--batch-size", "4", "--shift", "1"]) == 0
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    assert main([*command, "--steps", "3"]) == 0
    monkeypatch.chdir(here)
    Path("photos").rename("pictures")
    assert main([*command, "--steps", "4"]) == 1
    assert "no longer in" in capsys.readouterr().err
    assert main([*command, "--steps", "4", "--data", "pictures"]) == 0
    assert described()["data"] == str(here / "pictures")
    assert main([*command, "--steps", "5"]) == 0
    assert steps_of(run) == 5
    add(Path("pictures/cat/new.png"))
    before = contents()
    assert main([*command, "--steps", "6"]) == 1
    assert "images added: cat/new.png (1)" in capsys.readouterr().err
    assert contents() == before


def test_a_classifier_goes_on_with_the_set_and_the_split_that_it_was_started_with(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("photos", "more")
    add(Path("more/cat/new.png"))
    command = ["train-classifier", "--run", "my", *QUIET]
    start = ["--data", "more", "--changed-data", "--validation", "0.5", "--steps", "1", "--batch-size", "4"]
    assert main([*command, *start]) == 0
    record = json.loads(Path("my/classifier/config.json").read_text())
    assert record["notes"]["data"]["data"] == str(here / "more")
    assert record["train"]["validation_fraction"] == 0.5
    assert main([*command, "--resume", "--steps", "2"]) == 0
    assert steps_of("classifier") == 2
    assert main([*command, "--resume", "--steps", "3", "--data", "photos"]) == 1
    assert "data.fingerprint" in capsys.readouterr().err
    assert steps_of("classifier") == 2
    record["notes"]["data"]["size"] = "large"
    Path("my/classifier/config.json").write_text(json.dumps(record))
    assert main([*command, "--resume"]) == 1
    assert "my/classifier/config.json: missing or wrong entry: size is" in capsys.readouterr().err


# ---- Codes and priors of another autoencoder


def test_codes_and_priors_of_another_autoencoder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "--run", "my", *QUIET]) == 0
    for level, preset in enumerate(("tiny-top", "tiny-bottom")):
        assert main([*PRIOR, "--level", str(level), "--preset", preset]) == 0
    assert main(["train-vqvae", "--run", "new", *TRAIN[3:], "--seed", "1"]) == 0
    shutil.copytree("my/codes", "new/codes")
    command = ["train-prior", "--run", "new", *PRIOR[3:], "--level", "0", "--preset", "tiny-top"]
    assert main(command) == 1
    assert "--run: new/codes/train belongs to another autoencoder" in capsys.readouterr().err
    for level in range(2):
        shutil.copytree(f"my/prior{level}", f"new/prior{level}")
    sample = ["-n", "1", "--out", "s.png", *QUIET]
    assert main(["sample", "--checkpoint", "my", *sample]) == 0
    assert main(["sample", "--checkpoint", "new", "--overwrite", *sample]) == 1
    assert "new/prior0 belongs to another autoencoder" in capsys.readouterr().err
    add(Path("photos/cat/new.png"))
    assert main(["evaluate", "my", "-n", "4", *QUIET]) == 1
    assert "images added: cat/new.png (1)" in capsys.readouterr().err
    assert main(["evaluate", "my", "-n", "4", *QUIET, "--changed-data"]) == 0
    Path("photos/cat/new.png").unlink()
    # Of a model of a version with other settings the checksum says nothing.
    config = Path("new/vqvae/model/config.json")
    stored = json.loads(config.read_text())
    del stored["config"]["legacy_skip"], stored["checksum"]
    config.write_text(json.dumps(stored))
    assert main(["sample", "--checkpoint", "new", "--overwrite", *sample]) == 0
    edit(class_names=["a", "b"])
    assert main([*PRIOR, "--level", "0", "--preset", "tiny-top", "--resume"]) == 1
    assert "are of the classes cat, dog, the project knows a, b" in capsys.readouterr().err


def test_broken_images_are_skipped_alike(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A project remembers the choice; another model's images are skipped if asked."""
    Path("photos/cat/x.png").write_text("no picture")
    assert main(["train-vqvae", "--run", "other", *TRAIN[3:]]) == 1
    assert "1 of 9 images cannot be read; --skip-broken goes on without them" in capsys.readouterr().err
    assert not Path("other").exists()
    assert main(["train-vqvae", "--run", "other", *TRAIN[3:], "--skip-broken"]) == 0
    reconstruct = ["reconstruct", "--data", "photos", "--out", "r.png", "--overwrite", *QUIET]
    assert main(["extract", "--run", "other", *QUIET]) == 0
    assert main([*reconstruct, "--checkpoint", "other"]) == 0
    command = [*reconstruct, "--checkpoint", "other/vqvae/model", "--size", "8"]
    assert main(command) == 1
    assert "--skip-broken" in capsys.readouterr().err
    assert main([*command, "--skip-broken"]) == 0
