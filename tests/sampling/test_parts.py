"""Samples drawn in parts: the same however they are cut, put together as one call gives them, and their images."""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pixelcnn, refuses, snail
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from training_helpers import VQVAE_CONFIG, before, dies_by_sigkill, files, kill_myself

from fastvq import _shards
from fastvq._shards import read_shard
from fastvq.cli import main
from fastvq.data import model_checksum
from fastvq.errors import ArgumentError, ArgumentTypeError, CorruptFileError, FileConflictError, MissingFileError
from fastvq.models import build
from fastvq.sampling import Pipeline, Shard, merge_samples, sample_shard
from fastvq.sampling import parts as parts_module
from fastvq.sampling.pipeline import Levels

pytestmark = pytest.mark.usefixtures("steady")
N = 203  # no multiple of micro-batches, parts or classes
PARTS = ["0/1", "0/2", "1/2", "0/4", "1/4", "2/4", "3/4"]


@pytest.fixture(scope="module")
def digits() -> Pipeline:
    return Pipeline.from_pretrained("digits")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one call of the command writes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    command = ["sample", "--pretrained", "digits", "-n", str(N), "--seed", "7", "--engine", "cpu", "--quiet"]
    assert main([*command, "--micro-batch", "30", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def stored(digits: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of PARTS, each in a folder of its own."""
    root = tmp_path_factory.mktemp("stored")
    for text in PARTS:
        sample_shard(digits, N, Shard.parse(text), root / text.replace("/", "of"), seed=7, engine="cpu")
    return root


def gathered(stored: Path, folder: Path, *texts: str) -> Path:
    for text in texts:
        shutil.copytree(stored / text.replace("/", "of"), folder, dirs_exist_ok=True)
    return folder


CUTS = [
    ("0/1",),
    ("0/2", "1/2"),
    ("0/4", "1/4", "2/4", "3/4"),
    ("0/2", "2/4", "3/4"),
    ("0/4", "1/4", "1/2"),
]


@pytest.mark.parametrize("texts", CUTS, ids=" ".join)
def test_parts_are_put_together_to_the_files_of_one_call(
    texts: tuple[str, ...], stored: Path, whole: Path, tmp_path: Path
) -> None:
    folder = gathered(stored, tmp_path / "parts", *texts)
    before_merge = files(folder)
    assert merge_samples(folder, tmp_path / "out") == tmp_path / "out"
    assert files(folder) == before_merge
    merged = files(tmp_path / "out")
    assert sorted(merged) == ["codes.safetensors", "samples.json"]
    assert merged["codes.safetensors"] == (whole / "codes.safetensors").read_bytes()
    # Bits do not depend on micro-batches, so parts do not remember them.
    expected = {**json.loads((whole / "samples.json").read_text()), "micro_batch": None}
    assert json.loads(merged["samples.json"]) == expected
    assert expected["labels"] == [index % 10 for index in range(N)]


def test_a_part_holds_what_it_says(digits: Pipeline, stored: Path) -> None:
    shard = read_shard(stored / "1of4" / "samples-00001-of-00004.safetensors")
    tensors = shard.tensors()
    assert {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "level0": ([51, 2, 2], torch.uint8),
        "level1": ([51, 4, 4], torch.uint8),
        "labels": ([51], torch.int64),
    }
    assert (shard.kind, shard.total, shard.indices) == ("samples", N, range(50, 101))
    assert tensors["labels"].tolist() == [index % 10 for index in range(50, 101)]
    drawn = digits.sample(51, start=50, seed=7, label=tensors["labels"], engine="cpu")
    for level, codes in enumerate(drawn.codes):
        assert torch.equal(tensors[f"level{level}"].long(), codes)
    assert shard.identity["vqvae"] == model_checksum(digits.vqvae)
    assert shard.identity["priors"] == [model_checksum(prior) for prior in digits.priors]
    names = {"seed", "temperature", "top_k", "top_p", "label", "engine", "micro_batch", "precision", "shapes"}
    names |= {"vqvae", "priors", "num_codes", "image", "num_classes", "class_names", "fastvq_version"}
    assert shard.identity.keys() == names
    assert "(" not in json.dumps(shard.identity)
    assert shard.identity["image"] == list(drawn.images.shape[1:])
    assert (shard.identity["seed"], shard.identity["label"]) == (7, "in turn")
    assert all(f"``{name}``" in str(sample_shard.__doc__) for name in names)


def tiny(num_classes: int | None = None, num_codes: int = 8, attention: bool = True) -> Pipeline:
    """Two levels of random weights."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_codes": num_codes, "num_classes": num_classes}
    make = snail if attention else pixelcnn
    top = make(shape=(2, 2), **fields)
    bottom = make(shape=(4, 4), level=1, condition_shapes=((2, 2),), condition_num_codes=(num_codes,), **fields)
    config = VQVAE_CONFIG.from_dict({**VQVAE_CONFIG.to_dict(), "num_codes": num_codes, "codebook_init": "normal"})
    return Pipeline(build(config).eval(), [top, bottom])


def rows_of(folder: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for shard in _shards.read_shards(folder, "samples"):
        for name, tensor in shard.tensors().items():
            found.setdefault(name, []).extend(tensor.tolist())
    return found


@pytest.mark.parametrize("attention", [True, False], ids=["snail", "pixelcnn"])
@pytest.mark.parametrize("count", [1, 2, 4, 13])
def test_any_cut_of_any_prior(attention: bool, count: int, tmp_path: Path) -> None:
    pipeline = tiny(attention=attention, num_codes=300)
    drawn = pipeline.sample(9, seed=1, engine="cpu", temperature=[1.0, 0.5])
    for index in range(count):
        sample_shard(pipeline, 9, Shard(index, count), tmp_path, seed=1, temperature=[1.0, 0.5], micro_batch=2)
    found = rows_of(tmp_path)
    assert found == {f"level{level}": codes.tolist() for level, codes in enumerate(drawn.codes)}
    first = read_shard(Shard(0, count).path(tmp_path, "samples"))
    assert first.tensors()["level0"].dtype == torch.uint16
    assert first.identity["label"] is None
    merged = json.loads((merge_samples(tmp_path) / "samples.json").read_text())
    assert (merged["labels"], merged["temperature"], merged["engine"]) == (None, [1.0, 0.5], "cpu")
    stored = load_file(tmp_path / "codes.safetensors")
    assert all(torch.equal(stored[f"level{level}"], codes.contiguous()) for level, codes in enumerate(drawn.codes))


def test_engines_whose_bits_depend_on_it_record_the_micro_batch(tmp_path: Path) -> None:
    pipeline = tiny()
    sample_shard(pipeline, 6, Shard(0, 2), tmp_path, seed=1, engine="torch", micro_batch=4)
    assert read_shard(Shard(0, 2).path(tmp_path, "samples")).identity["micro_batch"] == 4
    with pytest.raises(FileConflictError, match="micro_batch: 4 there, 2 now"):
        sample_shard(pipeline, 6, Shard(1, 2), tmp_path, seed=1, engine="torch", micro_batch=2)


def test_one_class(digits: Pipeline, tmp_path: Path) -> None:
    for index in range(2):
        sample_shard(digits, 5, Shard(index, 2), tmp_path, seed=3, label=4)
    assert rows_of(tmp_path)["labels"] == [4] * 5
    assert rows_of(tmp_path)["level0"] == digits.sample(5, label=4, seed=3).codes[0].tolist()
    assert json.loads((merge_samples(tmp_path) / "samples.json").read_text())["labels"] == [4] * 5


@pytest.mark.parametrize(
    ("label", "identity"), [([7, "3"], [7, 3]), (["4"], 4), (list(range(10)), "in turn")], ids=["two", "one", "all"]
)
def test_classes_that_take_turns(label: list[int | str], identity: Any, digits: Pipeline, tmp_path: Path) -> None:
    for index in range(3):
        sample_shard(digits, 11, Shard(index, 3), tmp_path, seed=3, label=label)
    numbers = [int(one) for one in label]
    expected = [numbers[index % len(numbers)] for index in range(11)]
    assert rows_of(tmp_path)["labels"] == expected
    assert rows_of(tmp_path)["level1"] == digits.sample(11, label=label, seed=3).codes[1].tolist()
    assert read_shard(tmp_path / "samples-00001-of-00003.safetensors").identity["label"] == identity
    assert json.loads((merge_samples(tmp_path) / "samples.json").read_text())["labels"] == expected


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"n": 0}, ArgumentError, "n: must be at least 1"),
        ({"temperature": [[1.0] * 4, 1.0]}, ArgumentError, "temperature: expected one value, or one per level"),
        ({"seed": None}, ArgumentTypeError, "seed: "),
        ({"label": 10}, ArgumentError, "label: must lie in 0..9, got 10"),
        ({"temperature": [1.0]}, ArgumentError, "temperature: expected one value or 2"),
        ({"images": "jpg"}, ArgumentError, "images: expected"),
        ({"engine": "gpu"}, ArgumentError, "engine: "),
        ({"micro_batch": 0}, ArgumentError, "micro_batch: "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_mistakes_write_nothing(
    changes: dict[str, Any], error: type[Exception], words: str, digits: Pipeline, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"n": 4, "shard": Shard(0, 2), "folder": tmp_path / "new", "seed": 0}
    with refuses(error, words):
        sample_shard(digits, **{**given, **changes})
    assert not (tmp_path / "new").exists()


# ---- Going on


def test_killed_parts_go_on_where_they_stopped(
    digits: Pipeline, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shards, "_SECONDS", 0.0)
    drawn: list[int] = []
    draw = Levels.draw

    def counted(self: Levels, n: int, **given: Any) -> tuple[Tensor, ...]:
        drawn.append(given["start"])
        return draw(self, n, **given)

    def part() -> None:
        sample_shard(digits, N, Shard(1, 2), tmp_path, seed=7, engine="cpu", micro_batch=16)

    with monkeypatch.context() as patch:
        patch.setattr(Levels, "draw", before(Levels.draw, 1, kill_myself))
        dies_by_sigkill(part)
    monkeypatch.setattr(Levels, "draw", counted)
    part()
    assert drawn == [128, 192]  # the first stretch, 101..127, is not drawn again
    name = "samples-00001-of-00002"
    expected = stored / "1of2"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json", f"{name}.safetensors"]
    assert files(tmp_path) == files(expected)
    part()
    assert len(drawn) == 2


def test_a_folder_is_for_one_whole(digits: Pipeline, tmp_path: Path) -> None:
    sample_shard(digits, 4, Shard(0, 2), tmp_path, seed=0)
    contents = files(tmp_path)
    for changes, words in (
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"label": 3}, 'label: "in turn" there, 3 now'),
        ({"temperature": 0.5}, r"temperature: \[1.0, 1.0\] there, \[0.5, 0.5\] now"),
        ({"n": 5}, "total: 4 there, 5 now"),
    ):
        given: dict[str, Any] = {"n": 4, "seed": 0, **changes}
        for index in range(2):
            with pytest.raises(FileConflictError, match=f"samples-00000-of-00002.safetensors: .*\n  {words}"):
                sample_shard(digits, shard=Shard(index, 2), folder=tmp_path, **given)
    assert files(tmp_path) == contents


def test_parts_of_two_models_do_not_mix(digits: Pipeline, tmp_path: Path) -> None:
    sample_shard(digits, 4, Shard(0, 2), tmp_path, seed=0)
    other = Pipeline.from_pretrained("digits")
    with torch.no_grad():
        next(other.priors[1].parameters()).add_(1e-3)
    with pytest.raises(FileConflictError, match="priors: .* there, .* now"):
        sample_shard(other, 4, Shard(1, 2), tmp_path, seed=0)
    sample_shard(other, 4, Shard(1, 2), tmp_path / "other", seed=0)
    shutil.copytree(tmp_path / "other", tmp_path, dirs_exist_ok=True)
    with pytest.raises(FileConflictError, match=r"different wholes; they differ in\n  priors: "):
        merge_samples(tmp_path)
    assert not (tmp_path / "codes.safetensors").exists()


# ---- Putting together


def test_merging_again_needs_to_be_asked_for(stored: Path, tmp_path: Path) -> None:
    folder = gathered(stored, tmp_path / "parts", "0/2", "1/2")
    merge_samples(folder)
    contents = files(folder)
    assert {"codes.safetensors", "samples.json"} <= contents.keys()
    with pytest.raises(FileConflictError, match="samples.json exists already"):
        merge_samples(folder)
    merge_samples(folder, overwrite=True)
    merge_samples(folder, tmp_path / "out")
    with pytest.raises(FileConflictError, match="not an empty folder"):
        merge_samples(folder, tmp_path / "out")
    merge_samples(folder, tmp_path / "out", overwrite=True)
    assert files(folder) == contents
    assert files(tmp_path / "out").items() <= contents.items()


def test_damaged_and_missing_parts_are_not_merged(stored: Path, tmp_path: Path) -> None:
    folder = gathered(stored, tmp_path / "parts", "0/4", "2/4", "3/4")
    with pytest.raises(MissingFileError, match=r"lacks indices 50\.\.100 of 0\.\.202"):
        merge_samples(folder, tmp_path / "out")
    gathered(stored, folder, "1/4")
    path = folder / "samples-00001-of-00004.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="samples-00001-of-00004.safetensors: checksum differs"):
        merge_samples(folder, tmp_path / "out")
    gathered(stored, folder, "0/2")
    with pytest.raises(FileConflictError, match="twice"):
        merge_samples(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_parts_are_not_replaced_by_what_they_become(stored: Path, tmp_path: Path) -> None:
    folder = gathered(stored, tmp_path / "out" / "parts", "0/1")
    (tmp_path / "out" / "samples.json").write_text("{}")
    contents = files(tmp_path)
    for out in (tmp_path / "out", tmp_path):
        with refuses(ArgumentError, "out: .* holds the parts themselves"):
            merge_samples(folder, out, overwrite=True)
    assert files(tmp_path) == contents


def test_only_samples_are_merged_as_samples(tmp_path: Path) -> None:
    _shards.write_shard(
        Shard(0, 1).path(tmp_path, "samples"), {}, kind="features", total=1, indices=range(1), identity={}
    )
    with refuses(ArgumentError, "folder: .* holds features, expected samples"):
        merge_samples(tmp_path)


# ---- Images


def test_no_image_without_being_asked(stored: Path) -> None:
    assert {path.suffix for path in stored.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_pngs_are_those_of_one_call(digits: Pipeline, stored: Path, whole: Path, tmp_path: Path) -> None:
    folder = gathered(stored, tmp_path / "parts", "0/4")
    for text in ("0/4", "1/4", "1/2"):
        sample_shard(digits, N, Shard.parse(text), folder, seed=7, images="png", engine="cpu")
    merge_samples(folder)
    pictures = {name: data for name, data in files(folder).items() if name.endswith(".png")}
    assert pictures == {name: data for name, data in files(whole).items() if name.endswith(".png")}
    assert len(pictures) == N


def test_tars_are_read_as_webdataset_does(digits: Pipeline, whole: Path, tmp_path: Path) -> None:
    found: dict[str, dict[str, bytes]] = {}
    for index in range(3):
        sample_shard(digits, N, Shard(index, 3), tmp_path, seed=7, images="tar")
        with tarfile.open(Shard(index, 3).path(tmp_path, "samples").with_suffix(".tar")) as tar:
            names = tar.getnames()
            assert names == sorted(names)
            keys = [name.partition(".")[0] for name in names]
            # Neighbours of one key, up to the first dot, are one sample.
            assert len([*itertools.groupby(keys)]) == len(set(keys)) == len(Shard(index, 3).range(N))
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                assert (member.mtime, member.uid, member.isreg()) == (0, 0, True)
                found.setdefault(key, {})[suffix] = file.read()
    assert [*found] == [f"{index:06d}" for index in range(N)]
    for index, (key, sample) in enumerate(found.items()):
        assert sample == {"cls": str(index % 10).encode(), "png": (whole / f"{key}.png").read_bytes()}


def test_unconditional_tars_hold_pictures_alone(tmp_path: Path) -> None:
    sample_shard(tiny(), 3, Shard(0, 1), tmp_path, seed=7, images="tar")
    with tarfile.open(tmp_path / "samples-00000-of-00001.tar") as tar:
        assert tar.getnames() == ["000000.png", "000001.png", "000002.png"]
        with tar.extractfile("000002.png") as file:  # type: ignore[union-attr]
            assert np.asarray(Image.open(file)).shape == (8, 8)


@pytest.mark.parametrize("images", ["png", "tar"])
def test_images_of_a_killed_part(
    images: Any, digits: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(name: str) -> None:
        sample_shard(digits, 40, Shard(1, 2), tmp_path / name, seed=7, images=images)

    part("whole")
    for call in (0, 2):
        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, "decode", before(Pipeline.decode, call, kill_myself))
            dies_by_sigkill(lambda: part("killed"))
        half = files(tmp_path / "killed")
        assert {name: data for name, data in half.items() if "/" not in name and name[0] != "."}.items() <= files(
            tmp_path / "whole"
        ).items()
        assert len([name for name in half if name.endswith(".png")]) == (16 - 4 if call and images == "png" else 0)
    with monkeypatch.context() as patch:
        patch.setattr(Levels, "draw", lambda *arguments, **given: pytest.fail("samples were drawn again"))
        part("killed")
        assert files(tmp_path / "killed") == files(tmp_path / "whole")
        patch.setattr(Pipeline, "decode", lambda *arguments: pytest.fail("images were made again"))
        part("killed")


@pytest.mark.parametrize("name", ["000002.png", "samples-00001-of-00002.tar"])
def test_pictures_of_something_else_are_not_mixed_in(name: str, digits: Pipeline, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileConflictError, match=f"{name}: is there without the codes of this part"):
        sample_shard(digits, 4, Shard(1, 2), tmp_path, seed=0)
    assert files(tmp_path) == {name: b"mine"}


def test_names_are_wide_enough_for_all() -> None:
    pictures = parts_module._Pictures(Path("a"), Path("a/b.safetensors"), 2_000_000, range(2))
    assert pictures._name(1, "png") == "0000001.png"


# ---- The command


def test_a_part_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "out"
    command = ["sample", "--pretrained", "digits", "-n", "5", "--label", "3", "--out", str(out), "--quiet"]
    given = ["--seed", "1", "--shard"]
    assert main([*command, *given, "env"]) == 0
    said = f"part 1/2: samples 2..4 of 5 {{}} in {out / 'samples-00001-of-00002.safetensors'} (seed 1)\n"
    assert capsys.readouterr().out == said.format("are")
    contents = files(out)
    assert main([*command, *given, "1/2"]) == 0
    assert capsys.readouterr().out == said.format("were finished before")
    assert main(["merge", str(out)]) == 1
    assert capsys.readouterr().err.startswith(f"fastvq: error: FOLDER: {out} lacks indices 0..1 of 0..4")
    for mistake in (["--shard", "0/2"], [*given, "0/2", "--overwrite"], [*given, "0/2", "--top-k", "3"]):
        assert main([*command, *mistake]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "fastvq: error: --seed: --shard needs one, the same for all parts"
    assert errors[1].startswith("fastvq: error: --overwrite: ")
    assert "  --top-k: [null, null] there, [3, 3] now" in errors
    assert files(out) == contents
    assert main([*command, *given, "0/2"]) == main([*command, *given, "2/4"]) == 0
    assert main(["merge", str(out)]) == 1
    assert "twice, in" in capsys.readouterr().err
