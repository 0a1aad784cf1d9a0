"""Commands over a folder of images: what is refused before it is touched, and what a start does not do again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from group_helpers import run_group
from PIL import Image

from fastvq.cli import main
from fastvq.data import images, pictures
from fastvq.data.search import Search
from fastvq.training import batches
from fastvq.training.batches import suggested_workers

pytestmark = pytest.mark.usefixtures("steady")

QUIET = ["--quiet", "--device", "cpu"]
MODEL = ["--size", "8", "--preset", "tiny", "--channels", "3", "--steps", "2", "--batch-size", "4"]
TRAIN = ["train-vqvae", "--run", "my", "--data", "photos", *MODEL, "--validation", "0.25", *QUIET]
CLASSIFIER = ["train-classifier", "--run", "my", "--steps", "2", "--batch-size", "4", "--set", "channels=(4,)", *QUIET]


def add(path: Path, seed: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(rough).resize((size, size), Image.Resampling.BICUBIC).save(path)


def photos(folder: Path, size: int = 8) -> None:
    """Eight pictures of two classes."""
    for index in range(8):
        add(folder / ("cat", "dog")[index % 2] / f"{index}.{('png', 'jpg')[index // 4]}", index, size)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("started")
    photos(root / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(TRAIN) == 0
        assert main(CLASSIFIER) == 0
    (root / "file").write_text("words")
    return root


@pytest.fixture
def here(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working folder."""
    root = tmp_path / "work"
    shutil.copytree(started, root)
    monkeypatch.chdir(root)
    edit(data=str(root / "photos"))
    return root


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(**changes: object) -> None:
    described = json.loads(Path("my/data.json").read_text()) | changes
    Path("my/data.json").write_text(json.dumps({name: value for name, value in described.items() if value is not None}))


def losses(run: str) -> list[float]:
    lines = (Path(run) / "vqvae" / "logs" / "metrics.jsonl").read_text().splitlines()
    return [record["mse"] for record in map(json.loads, lines) if "mse" in record]


def codes(run: str = "my") -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(run, "codes").rglob("*.npy"))]


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names of the files whose headers are checked, and of those that are decoded."""
    seen: dict[str, list[str]] = {"check_picture": [], "read_picture": []}

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def note(path: Path, *rest: Any, **more: Any) -> Any:
            seen[name].append(path.name)
            return function(path, *rest, **more)

        return note

    for name in seen:
        monkeypatch.setattr(images, name, noting(name, getattr(pictures, name)))
    return seen


# ---- Before any image is touched

EVERY_TRAINING = [
    "--steps 0",
    "--batch-size 0",
    "--lr 0",
    "--warmup 3",
    "--ema 1",
    "--workers -1",
    "--seed -1",
    "--init-from nowhere",
    "--set chanels=3",
    "--set channels=0",
    "--device abacus",
    "--shift 8",
    "--shift -1",
    "--validation 1",
    "--size 1 2 3",
    "--cache-images file",
    "--cache-images photos/cat",
]
NEW = "train-vqvae --run new --data photos --size 8 --preset tiny --channels 3 --steps 2 --batch-size 4 --warmup 0"
RESUMED = "train-vqvae --run my --resume"
LEARNER = "train-classifier --run my --name other --steps 2 --batch-size 4 --warmup 0"
EVALUATE = "evaluate --pretrained digits --data photos -n 4 --no-curves"
REFUSED = {
    NEW: [*EVERY_TRAINING, "--run my", "--run photos", "--size 6", "--preset absent", "--preset tiny-top"],
    RESUMED: [
        "--lr 1",
        "--batch-size 5",
        "--size 16",
        "--shift 1",
        "--flip",
        "--no-draft",
        "--skip-broken",
        "--seed 1",
        "--validation 0.5",
        "--preset tiny-single",
        "--set channels=3",
        "--set spatial_dims=1",
        "--channels 1",
        "--cache-images file",
        "--device abacus",
    ],
    "extract --run my": [
        "--batch-size 0",
        "--copies 0",
        "--copies 2",
        "--workers -1",
        "--shard 2/2",
        "--cache-images file",
        "--device abacus",
    ],
    LEARNER: [*EVERY_TRAINING, "--name classifier"],
    "train-classifier --run my --resume": ["--lr 1", "--batch-size 5", "--set channels=(8,)", "--seed 1"],
    EVALUATE: [
        "-n 0",
        "--temperature -1",
        "--keep 2",
        "--vectors 0",
        "--neighbours 0",
        "--batch-size 0",
        "--accuracy-steps -1",
        "--shift 32",
        "--shift -1",
        "--validation 1",
        "--features nowhere",
        "--out file",
        "--device abacus",
    ],
}


@pytest.mark.parametrize(
    "line", [f"{command} {end}" for command, ends in REFUSED.items() for end in ends], ids=lambda line: str(line)
)
def test_wrong_options_are_refused_before_the_folder_is_listed(
    line: str, started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def touched(*_: object) -> None:
        pytest.fail("the folder of images was listed")

    monkeypatch.chdir(started)
    monkeypatch.setattr(Search, "images", touched)
    before = sorted(started.rglob("*"))
    assert main(line.split()) == 1
    assert "fastvq: error: " in capsys.readouterr().err
    assert sorted(started.rglob("*")) == before


def test_right_options_list_it(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without which the test above says nothing."""

    def touched(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.chdir(started)
    monkeypatch.setattr(Search, "images", touched)
    for command in REFUSED:
        with pytest.raises(ZeroDivisionError):
            main(command.split())


# ---- What is known of the files


def test_commands_after_the_first_open_what_is_new_or_changed(
    empty: Path, looked: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(Path("photos"))
    assert main(TRAIN) == 0
    assert sorted(looked["check_picture"]) == sorted(path.name for path in Path("photos").rglob("*.*"))
    assert Path("my/cache/files").is_file()
    looked["check_picture"].clear()
    for command in (["extract", "--run", "my", *QUIET], CLASSIFIER, [*TRAIN, "--resume", "--steps", "3"]):
        assert main(command) == 0
        assert looked["check_picture"] == []
    os.utime("photos/dog/1.png", ns=(0, 1))
    Path("my/cache/files").write_text("foreign")
    assert main([*TRAIN, "--resume", "--steps", "4"]) == 0
    assert len(looked["check_picture"]) == 8
    os.utime("photos/dog/1.png", ns=(0, 2))
    looked["check_picture"].clear()
    assert main([*TRAIN, "--resume", "--steps", "5"]) == 0
    assert looked["check_picture"] == ["1.png"]
    assert sorted(path.name for path in Path("photos").iterdir()) == ["cat", "dog"]


def test_damage_inside_is_said_when_it_is_met_and_left_out_on_request(
    empty: Path, looked: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    photos(Path("photos"), size=64)
    path = Path("photos/cat/2.png")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    for workers in ("0", "1"):
        assert main(["train-vqvae", "--run", f"my{workers}", *TRAIN[3:], "--workers", workers]) == 1
        error, note, kept = capsys.readouterr().err.splitlines()
        assert error.startswith("fastvq: error: photos/cat/2.png: ")
        assert note == (
            "Its header was in order, and no more was checked. Mend it, or leave it out: in a new run with "
            f"--skip-broken, from the weights of this one with --init-from my{workers}/vqvae."
        )
        assert kept.startswith("The 1 finished steps are in ")
    new = ["train-vqvae", "--run", "new", *TRAIN[3:], "--skip-broken", "--init-from", "my1/vqvae"]
    assert main(new) == 0
    assert "1 of 8 images cannot be read; going on without them" in capsys.readouterr().err
    assert json.loads(Path("new/data.json").read_text())["images"] == 7
    # All but the broken one are known to be whole.
    looked["read_picture"].clear()
    assert main([*new, "--resume"]) == 0
    assert looked == {"check_picture": looked["check_picture"], "read_picture": ["2.png"]}


# ---- Decoded images in a file


def test_stored_images_change_no_result(empty: Path, looked: dict[str, list[str]]) -> None:
    photos(Path("photos"), size=40)
    assert main(TRAIN) == 0
    assert main(["extract", "--run", "my", *QUIET]) == 0
    stored = ["train-vqvae", "--run", "stored", *TRAIN[3:], "--cache-images"]
    assert main(stored) == 0
    assert losses("stored") == losses("my")
    (entry,) = Path("stored/cache").glob("pixels-*")
    # From here on some images are read to compare them, and the others not.
    looked["read_picture"].clear()
    assert main(["extract", "--run", "stored", *QUIET]) == 0
    assert len(looked["read_picture"]) == 8
    assert codes("stored") == codes("my")
    assert main(["extract", "--run", "my", "--cache-images", "elsewhere", *QUIET]) == 0
    assert [path.name for path in Path("elsewhere").iterdir()] == [entry.name]


def test_the_size_of_stored_images_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "--run", "my", "--cache-images", "--device", "cpu"]) == 0
    (entry,) = Path("my/cache").glob("pixels-*")
    assert f"fastvq: decoded images in {entry}, 0.0 MB" in capsys.readouterr().err


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch is built without gloo")
def test_several_processes_share_what_the_first_one_stored(empty: Path) -> None:
    photos(Path("photos"), size=40)
    assert main(TRAIN) == 0
    group = ["train-vqvae", "--run", "group", *TRAIN[3:], "--cache-images"]
    ended = run_group(2, Path("said"), lambda rank: main(group))
    assert [one.status for one in ended] == [0, 0], ended
    assert losses("group") == pytest.approx(losses("my"), rel=1e-4)
    assert sorted(path.name.partition("-")[0] for path in Path("group/cache").iterdir()) == ["files", "pixels"]


# ---- Reduced decoding


def test_new_projects_decode_at_a_reduced_size_and_old_ones_as_before(empty: Path) -> None:
    photos(Path("photos"), size=200)
    for path in Path("photos").rglob("*.png"):
        path.unlink()
    assert main(TRAIN) == 0
    whole = ["train-vqvae", "--run", "whole", *TRAIN[3:]]
    assert main([*whole, "--no-draft"]) == 0
    recorded = [json.loads(Path(run, "data.json").read_text())["draft"] for run in ("my", "whole")]
    assert recorded == [True, False]
    assert losses("my") != losses("whole")
    assert losses("my") == pytest.approx(losses("whole"), rel=0.05)
    # As a project was before it recorded that.
    shutil.copytree("whole", "old")
    described = json.loads(Path("old/data.json").read_text())
    del described["draft"]
    Path("old/data.json").write_text(json.dumps(described))
    for run in ("old", "whole"):
        assert main(["train-vqvae", "--run", run, "--resume", "--steps", "3", *QUIET]) == 0
        assert main(["extract", "--run", run, *QUIET]) == 0
    assert losses("old") == losses("whole")
    assert codes("old") == codes("whole")


# ---- Who loads images


@pytest.mark.parametrize(
    ("device", "cores", "processes", "room", "decodes", "expected"),
    [
        ("cpu", 64, 1, 2**40, True, 0),
        ("cuda", 16, 1, 2**40, True, 8),
        ("cuda:1", 6, 1, 2**40, True, 5),
        ("cuda", 16, 4, 2**40, True, 3),
        ("cuda", 2, 4, 2**40, True, 0),
        ("cuda", 16, 1, 2**40, False, 0),
        ("cuda", 16, 1, 64 * 2**20, True, 3),
        ("cuda", 16, 1, 2**20, True, 0),
    ],
    ids=["cpu", "gpu", "few-cores", "processes", "no-core-left", "decoded", "container", "no-room"],
)
def test_number_of_loading_processes(
    device: str, cores: int, processes: int, room: int, decodes: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(room, 0, room))
    batch = 64 * 3 * 64 * 64 * 4
    assert suggested_workers(device, batch, decodes=decodes) == expected


def test_the_chosen_number_is_said_and_recorded(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(Path("photos"))
    monkeypatch.setattr("fastvq.cli.loading.suggested_workers", lambda device, size, decodes: 1 if decodes else 0)
    loud = [word for word in TRAIN if word != "--quiet"]
    assert main(loud) == 0
    assert "fastvq: 1 processes load images (--workers)" in capsys.readouterr().err
    assert main(["train-vqvae", "--run", "none", *loud[3:], "--workers", "0"]) == 0
    assert "(--workers)" not in capsys.readouterr().err
    counts = [json.loads(Path(run, "vqvae/config.json").read_text())["train"]["num_workers"] for run in ("my", "none")]
    assert counts == [1, 0]
    assert losses("my") == losses("none")
    for run in ("my", "none"):
        assert main(["extract", "--run", run, *QUIET]) == 0
    assert codes("my") == codes("none")
