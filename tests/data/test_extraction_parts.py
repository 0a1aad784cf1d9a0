"""Codes extracted in parts: put together, byte for byte what one extraction writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refuses
from PIL import Image
from training_helpers import VQVAE_CONFIG, Noise, before, dies_by_sigkill, files, kill_myself

from fastvq import _shards
from fastvq._shards import read_shards, write_shard
from fastvq.cli import main
from fastvq.data import Augment, CodeDataset, Shard, extract_codes, extract_shard, merge_codes
from fastvq.data import codes as codes_module
from fastvq.errors import ArgumentError, CorruptFileError, FileConflictError, MissingFileError
from fastvq.models import VQVAE2, VQVAEConfig

pytestmark = pytest.mark.usefixtures("steady")
# 40 rows, whose batches of 7 end where no part does.
SETTINGS: dict[str, Any] = {"batch_size": 7, "augment": Augment(1, True), "copies": 2, "seed": 5}
CUTS = [("0/1",), ("0/2", "1/2"), ("0/4", "1/4", "2/4", "3/4"), ("0/2", "2/4", "3/4")]


def make_model(seed: int = 0) -> VQVAE2:
    torch.manual_seed(seed)
    return VQVAE2(VQVAEConfig.from_dict({**VQVAE_CONFIG.to_dict(), "codebook_init": "normal"})).eval()


def unlabelled() -> Noise:
    data = Noise()
    data.labels, data.num_classes, data.class_names = None, None, ()  # type: ignore[assignment]
    return data


def part(folder: Path, text: str, **changes: Any) -> Path:
    given: dict[str, Any] = {"model": make_model(), "dataset": Noise(), "indices": np.arange(1, 21), **SETTINGS}
    return extract_shard(shard=Shard.parse(text), folder=folder, **{**given, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract_codes(make_model(), Noise(), np.arange(1, 21), tmp_path_factory.mktemp("whole") / "out", **SETTINGS)


@pytest.mark.parametrize("texts", CUTS, ids=" ".join)
def test_parts_become_the_files_of_one_extraction(texts: tuple[str, ...], whole: Path, tmp_path: Path) -> None:
    for text in reversed(texts):
        part(tmp_path / "parts", text)
    assert merge_codes(tmp_path / "parts", tmp_path / "out") == tmp_path / "out"
    assert files(tmp_path / "out") == files(whole)
    assert len(read_shards(tmp_path / "parts", "codes")) == len(texts)
    merge_codes(tmp_path / "parts", tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)


def test_more_parts_than_rows_and_no_labels(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dataset": unlabelled(), "indices": [3, 0], "copies": 1, "augment": None}
    for index in range(3):
        part(tmp_path / "parts", f"{index}/3", **settings)
    merge_codes(tmp_path / "parts", tmp_path / "out")
    extract_codes(make_model(), folder=tmp_path / "whole", seed=5, **settings)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert CodeDataset(tmp_path / "out").source.tolist() == [3, 0]


def test_images_are_encoded_with_those_of_the_uncut_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: dict[str, list[bytes]] = {"whole": [], "parts": []}
    encode = VQVAE2.encode

    def noting(where: str) -> Callable[..., Any]:
        def noted(self: VQVAE2, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            batches[where].append(images.numpy().tobytes())
            return encode(self, images)

        return noted

    monkeypatch.setattr(VQVAE2, "encode", noting("whole"))
    extract_codes(make_model(), Noise(), np.arange(1, 21), tmp_path / "out", **SETTINGS)
    monkeypatch.setattr(VQVAE2, "encode", noting("parts"))
    for index in range(3):
        part(tmp_path / "parts", f"{index}/3")
    assert [*dict.fromkeys(batches["parts"])] == batches["whole"]


def test_a_finished_part_is_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part(tmp_path, "0/2")
    monkeypatch.setattr(VQVAE2, "encode", lambda *arguments: pytest.fail("it was"))
    part(tmp_path, "0/2")


def test_a_killed_part_goes_on(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shards, "_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(VQVAE2, "encode", before(VQVAE2.encode, 2, kill_myself))
        dies_by_sigkill(lambda: part(tmp_path / "parts", "1/2"))
    encoded = []
    encode = VQVAE2.encode

    def counting(self: VQVAE2, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoded.append(len(images))
        return encode(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(VQVAE2, "encode", counting)
        part(tmp_path / "parts", "1/2")
    assert encoded == [7, 5]  # rows 28 to 40, 20 to 27 were there
    part(tmp_path / "parts", "0/2")
    merge_codes(tmp_path / "parts", tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)
    assert len(files(tmp_path / "parts")) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": make_model(seed=1)}, "arguments: "),
        ({"indices": np.arange(20)}, "arguments: "),
        ({"copies": 3}, "total: 40 there, 60 now"),
        ({"dataset": unlabelled()}, "num_classes: 3 there, null now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_parts_are_not_mixed_in(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    part(tmp_path, "0/2")
    contents = files(tmp_path)
    for text in ("0/2", "1/2"):
        with pytest.raises(FileConflictError, match=message):
            part(tmp_path, text, **changes)
    assert files(tmp_path) == contents


@pytest.mark.parametrize("changes", [{"indices": [22]}, {"batch_size": 0}, {"copies": 2, "augment": None}], ids=str)
def test_bad_arguments(changes: dict[str, Any], tmp_path: Path) -> None:
    with refuses(ArgumentError, f"{next(iter(changes))}: "):
        part(tmp_path / "new", "0/2", **changes)
    assert not (tmp_path / "new").exists()


def test_damaged_and_missing_parts(whole: Path, tmp_path: Path) -> None:
    parts, out = tmp_path / "parts", tmp_path / "out"
    path = part(parts, "0/2")
    with pytest.raises(MissingFileError, match=r"lacks indices 20\.\.39 of 0\.\.39"):
        merge_codes(parts, out)
    part(parts, "1/2")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="codes-00000-of-00002.safetensors: checksum differs"):
        merge_codes(parts, out)
    assert not out.exists()
    part_again = tmp_path / "again"
    shutil.copytree(parts, part_again)
    for name in ("codes-00000-of-00002.safetensors", "codes-00000-of-00002.json"):
        (part_again / name).unlink()
    part(part_again, "0/2")
    shutil.copytree(whole, out)
    with (out / "codes.json").open("a") as file:
        file.write("}")
    with pytest.raises(CorruptFileError, match="codes.json"):
        merge_codes(part_again, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("keep")
    with pytest.raises(FileConflictError, match="is not empty and holds no codes.json"):
        merge_codes(part_again, tmp_path / "mine")
    write_shard(Shard(0, 1).path(tmp_path, "codes"), {}, kind="samples", total=1, indices=range(1), identity={})
    with refuses(ArgumentError, "parts: .* holds samples, expected codes"):
        merge_codes(tmp_path, out)


def test_an_extraction_that_was_begun_is_ended_from_parts(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(VQVAE2, "encode", before(VQVAE2.encode, 4, kill_myself))
        dies_by_sigkill(
            lambda: extract_codes(make_model(), Noise(), np.arange(1, 21), tmp_path / "out", flush_rows=7, **SETTINGS)
        )
    for index in range(3):
        part(tmp_path / "parts", f"{index}/3")
    with monkeypatch.context() as patch:
        patch.setattr(codes_module, "_flush", before(codes_module._flush, 0, kill_myself))
        dies_by_sigkill(lambda: merge_codes(tmp_path / "parts", tmp_path / "out"))
    merge_codes(tmp_path / "parts", tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)


# ---- The commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, photos = (tmp_path_factory.mktemp("trained") / name for name in ("my", "photos"))
    make_model().save_pretrained(run / "vqvae" / "model")
    photos.mkdir()
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{index}.png")
    description = {"data": str(photos), "size": [8, 8], "channels": 1, "class_names": []}
    description |= {"skip_broken": False, "flip": False, "shift": 1, "validation": 0.3, "seed": 0}
    (run / "data.json").write_text(json.dumps(description))
    return run


def command(*arguments: object) -> int:
    return main([*map(str, arguments)])


def test_a_projects_parts_become_its_codes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, run):
        shutil.copytree(trained, folder)
    extract = ["--copies", 2, "--quiet"]
    assert command("extract", "--run", whole, *extract) == 0
    for index in range(2):
        assert command("extract", "--run", run, *extract, "--shard", f"{index}/2") == 0
    assert command("extract", "--run", run, *extract, "--shard", "1/2") == 0
    names = [f"{kind}/codes-0000{i}-of-00002.safetensors" for kind in ("train", "validation") for i in range(2)]
    assert sorted(name for name in files(run / "codes" / "parts") if not name.endswith("json")) == names
    assert command("merge", run, "--out", tmp_path / "out") == 1
    assert "--out: codes of a project go to" in capsys.readouterr().err
    assert command("merge", run) == 0
    assert files(run) == files(whole)
    assert not (run / "codes" / "parts").exists()
    contents = files(run)
    assert command("merge", run) == 0
    assert "codes of 28 rows in" in capsys.readouterr().out
    assert command("extract", "--run", run, *extract, "--shard", "1/2") == 1
    assert "--shard: " in capsys.readouterr().err
    assert files(run) == contents


def test_a_project_with_half_its_parts(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert command("merge", run) == 1
    assert "FOLDER: " in capsys.readouterr().err
    assert command("extract", "--run", run, "--quiet", "--shard", "1/2") == 0
    capsys.readouterr()
    assert command("merge", run) == 1
    assert "lacks indices 0..2 of 0..5" in capsys.readouterr().err
    assert not (run / "codes" / "train").exists()
    assert len(files(run / "codes" / "parts")) == 4
