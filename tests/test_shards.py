"""Work cut into parts: which part, what each leaves on disk, going on after a kill, and what does not go together."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refuses
from safetensors.torch import load_file, save_file
from training_helpers import before, dies_by_sigkill, files, kill_myself

from fastvq import _shards
from fastvq._files import sealed
from fastvq._lock import locked
from fastvq._shards import Shard, fill_shard, finished_shard, read_shard, read_shards, write_shard
from fastvq._tensors import new_tensors
from fastvq.errors import ArgumentError, CorruptFileError, DiskFullError, FileConflictError, MissingFileError

VARIABLES = [name for names in _shards._VARIABLES for name in names]
IDENTITY = {"seed": 3, "model": "abc", "sizes": (2, 3)}
SPECS = {"odd": ((5, 3), np.dtype(np.uint8)), "wide": ((5,), np.dtype(np.int64))}


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_shards, "_SECONDS", 0.0)


# ---- Which part


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("total", [1, 2, 29, 30, 50_000])
def test_parts_are_everything_once_in_order_and_of_like_size(total: int, count: int) -> None:
    ranges = [Shard(index, count).range(total) for index in range(count)]
    assert [index for part in ranges for index in part] == list(range(total))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_a_part_in_words() -> None:
    assert Shard.parse("3/8") == Shard(3, 8)
    assert str(Shard(3, 8)) == "3/8"
    assert Shard(3, 8).path(Path("a"), "samples") == Path("a/samples-00003-of-00008.safetensors")


@pytest.mark.parametrize("text", ["", "3", "8/8", "9/8", "-1/8", "0/0", "1/-2", "1 /2", "0.5/2", "a/b", "1/2/3", "Env"])
def test_bad_texts_are_shown(text: str) -> None:
    with refuses(ArgumentError, "shard: expected I/N with I in 0..N-1") as caught:
        Shard.parse(text)
    assert text in str(caught.value)


ARRAY, PROCID, RANK = (
    {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8"},
    {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"},
    {"RANK": "2", "WORLD_SIZE": "3"},
)
ENVIRONMENTS: dict[str, tuple[dict[str, str], Shard]] = {
    "array": (ARRAY, Shard(5, 8)),
    "array from 1": ({**ARRAY, "SLURM_ARRAY_TASK_MIN": "1"}, Shard(4, 8)),
    "array in steps": (
        {**ARRAY, "SLURM_ARRAY_TASK_ID": "11", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "5"},
        Shard(2, 8),
    ),
    "tasks": (PROCID, Shard(1, 4)),
    "process group": (RANK, Shard(2, 3)),
    "array of single tasks": ({**ARRAY, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Shard(5, 8)),
    "process group in one task": ({**RANK, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Shard(2, 3)),
    "process group on several nodes": ({**RANK, **PROCID}, Shard(2, 3)),
    "array of one": (
        {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "7"},
        Shard(0, 1),
    ),
    "tasks in an array of one": ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1", **PROCID}, Shard(1, 4)),
    "process group of one": ({"RANK": "0", "WORLD_SIZE": "1"}, Shard(0, 1)),
}


@pytest.mark.parametrize(("variables", "expected"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_schedulers_say_which(variables: dict[str, str], expected: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Shard.parse("env") == expected


BAD_ENVIRONMENTS = {
    "words": {"RANK": "first", "WORLD_SIZE": "3"},
    "past the end": {"RANK": "3", "WORLD_SIZE": "3"},
    "list with gaps": {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"},
    "below the first": {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"},
    "between steps": {
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "3",
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_STEP": "2",
    },
}


@pytest.mark.parametrize("variables", BAD_ENVIRONMENTS.values(), ids=BAD_ENVIRONMENTS)
def test_schedulers_that_say_no_part(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with refuses(ArgumentError, "shard: 'env' found no part in ") as caught:
        Shard.parse("env")
    assert all(f"{name}={value!r}" in str(caught.value) for name, value in variables.items())


def test_half_a_pair_of_variables_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with refuses(ArgumentError, "shard: 'env' needs one of these pairs of variables") as caught:
        Shard.parse("env")
    assert all(name in str(caught.value) for name in ("SLURM_ARRAY_TASK_ID", "RANK", "SLURM_NTASKS"))


# ---- What is written


def values(indices: range) -> dict[str, np.ndarray]:
    rows = np.arange(indices.start, indices.stop)
    return {"odd": (rows[:, None] * np.array([1, 2, 3])).astype(np.uint8), "wide": rows.astype(np.int64) ** 3}


def filled(folder: Path, shard: Shard, total: int = 10, prefix: str = "a", **changes: Any) -> _shards.StoredShard:
    """A part whose rows are computed two at a time."""
    indices = shard.range(total)
    wanted = values(indices)

    def fill(arrays: dict[str, np.ndarray], done: int) -> Iterator[int]:
        for row in range(done, len(indices), 2):
            part = slice(row, row + 2)
            for name, array in arrays.items():
                assert not array[part].any() or np.array_equal(array[part], wanted[name][part])
                array[part] = wanted[name][part]
            yield min(row + 2, len(indices))

    specs = {name: (array.shape, array.dtype) for name, array in wanted.items()}
    given = {"kind": "numbers", "total": total, "indices": indices, "identity": IDENTITY, **changes}
    return fill_shard(shard.path(folder, prefix), specs, fill, **given)


def written(folder: Path, shard: Shard, total: int = 10, prefix: str = "a", **changes: Any) -> _shards.StoredShard:
    """The same part at once."""
    indices = shard.range(total)
    tensors = {name: torch.from_numpy(array) for name, array in values(indices).items()}
    given = {"kind": "numbers", "total": total, "indices": indices, "identity": IDENTITY, **changes}
    return write_shard(shard.path(folder, prefix), tensors, **given)


@pytest.mark.parametrize("specs", [SPECS, {"a": ((0, 2), np.dtype(np.uint16)), "b": ((3, 1, 2), np.dtype(np.int32))}])
def test_mapped_files_are_those_of_safetensors(specs: Any, tmp_path: Path) -> None:
    arrays = new_tensors(tmp_path / "a", specs)
    for value, array in enumerate(arrays.values()):
        array[...] = value + 1
        if isinstance(array, np.memmap):
            array.flush()
    save_file({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_filling_writes_what_writing_at_once_does(tmp_path: Path) -> None:
    filled(tmp_path / "a", Shard(1, 3))
    written(tmp_path / "b", Shard(1, 3))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert sorted(files(tmp_path / "a")) == ["a-00001-of-00003.json", "a-00001-of-00003.safetensors"]


def test_a_part_says_what_it_holds(tmp_path: Path) -> None:
    shard = filled(tmp_path, Shard(1, 3))
    assert shard == read_shard(shard.path)
    assert (shard.kind, shard.total, shard.indices) == ("numbers", 10, range(3, 6))
    assert shard.identity == {"seed": 3, "model": "abc", "sizes": [2, 3]}
    lines = shard.path.with_suffix(".json").read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["start"] == 3
    assert shard.tensors()["wide"].tolist() == [27, 64, 125]
    assert shard.rows("odd", slice(1, 3)).tolist() == [[4, 8, 12], [5, 10, 15]]
    assert [*shard.stretches(2)] == [slice(0, 2), slice(2, 3)]
    shard.verify()


@pytest.mark.parametrize("make", [filled, written])
def test_more_parts_than_indices(make: Any, tmp_path: Path) -> None:
    shards = [make(tmp_path, Shard(index, 5), total=2) for index in range(5)]
    assert [len(shard.indices) for shard in shards] == [0, 0, 1, 0, 1]
    assert load_file(shards[0].path)["odd"].shape == (0, 3)
    assert [len(shard.indices) for shard in read_shards(tmp_path, "a")] == [0, 0, 1, 0, 1]


def test_a_finished_part_is_not_computed_again(tmp_path: Path) -> None:
    filled(tmp_path, Shard(0, 2))
    contents = files(tmp_path)

    def fill(arrays: dict[str, np.ndarray], done: int) -> Iterator[int]:
        pytest.fail("it was computed")

    indices = range(5)
    fill_shard(
        Shard(0, 2).path(tmp_path, "a"), SPECS, fill, kind="numbers", total=10, indices=indices, identity=IDENTITY
    )
    assert files(tmp_path) == contents


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"identity": {**IDENTITY, "seed": 4}}, "seed: 3 there, 4 now"),
        ({"identity": {"seed": 3, "model": "abc"}}, r"sizes: \[2, 3\] there, null now"),
        ({"kind": "words"}, 'kind: "numbers" there, "words" now'),
        ({"total": 11, "indices": range(5)}, "total: 10 there, 11 now"),
    ],
    ids=["seed", "lacking", "kind", "total"],
)
def test_another_part_is_not_replaced(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    filled(tmp_path, Shard(0, 2))
    contents = files(tmp_path)
    with pytest.raises(FileConflictError, match=f"holds another part, which differs in\n  {words}"):
        filled(tmp_path, Shard(0, 2), **changes)
    assert files(tmp_path) == contents
    path = Shard(0, 2).path(tmp_path, "a")
    given = {"kind": "numbers", "total": 10, "indices": range(5), "identity": IDENTITY, **changes}
    with pytest.raises(FileConflictError, match=words):
        finished_shard(path, **given)


# ---- Going on


def kill_in(name: str, call: int) -> Any:
    return lambda patch: patch.setattr(_shards, name, before(getattr(_shards, name), call, kill_myself))


def kill_after_rename(patch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def replaced(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target).endswith("00002.safetensors"):
            kill_myself()

    patch.setattr(_shards.os, "replace", replaced)


KILLS = {
    "before the tensors": kill_in("new_tensors", 0),
    "before the first record": kill_in("write_json", 0),
    "before the first rows": kill_in("_reached", 1),
    "between rows": kill_in("_reached", 2),
    "rows flushed, record not": kill_in("write_json", 2),
    "all rows, record not": kill_in("write_json", 3),
    "before the tensors move": kill_in("_make_way", 0),
    "after the tensors moved": kill_after_rename,
    "before the description": kill_in("replacing_file", 0),
    "after the description": kill_in("read_shard", 0),
}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_a_killed_part_goes_on(kill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = filled(tmp_path / "whole", Shard(1, 2))
    with monkeypatch.context() as patch:
        kill(patch)
        dies_by_sigkill(lambda: filled(tmp_path / "killed", Shard(1, 2)))
    filled(tmp_path / "killed", Shard(1, 2)).verify()
    assert files(tmp_path / "killed") == files(whole.path.parent)
    assert [path.name for path in sorted((tmp_path / "killed").rglob("*"))] == sorted(files(whole.path.parent))


def test_a_part_that_was_removed_is_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_in("read_shard", 0)(patch)
        dies_by_sigkill(lambda: filled(tmp_path, Shard(1, 2)))
    contents = {name: data for name, data in files(tmp_path).items() if "/" not in name}
    assert len(contents) == 2
    for name in contents:
        (tmp_path / name).unlink()
    filled(tmp_path, Shard(1, 2))
    assert files(tmp_path) == contents


def test_rows_that_reached_the_disk_are_kept(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    begun = []

    def fill(arrays: dict[str, np.ndarray], done: int) -> Iterator[int]:
        begun.append(done)
        for row in range(done, 5):
            if row == 3 and len(begun) == 1:
                raise Stopped
            arrays["wide"][row] = row
            yield row + 1

    path = Shard(0, 2).path(tmp_path, "a")
    given: dict[str, Any] = {"kind": "numbers", "total": 10, "indices": range(5), "identity": IDENTITY}
    with pytest.raises(Stopped):
        fill_shard(path, SPECS, fill, **given)
    with pytest.raises(FileConflictError, match="seed: 3 there, 4 now"):
        fill_shard(path, SPECS, fill, **{**given, "identity": {**IDENTITY, "seed": 4}})
    assert fill_shard(path, SPECS, fill, **given).tensors()["wide"].tolist() == [0, 1, 2, 3, 4]
    assert begun == [0, 3]


DAMAGES: dict[str, Any] = {
    "record": lambda folder: (folder / "progress.json").write_text("{"),
    "entries": lambda folder: (folder / "progress.json").write_text(
        (folder / "progress.json").read_text().replace('"rows_done": 2', '"rows_done": 4')
    ),
    "too many rows": lambda folder: (folder / "progress.json").write_text(
        json.dumps(
            sealed(
                {
                    name: value
                    for name, value in json.loads((folder / "progress.json").read_text()).items()
                    if name != "checksum"
                }
                | {"rows_done": 9}
            )
        )
    ),
    "shorter tensors": lambda folder: os.truncate(folder / "tensors.safetensors", 90),
    "other tensors": lambda folder: new_tensors(folder / "tensors.safetensors", {"odd": SPECS["odd"]}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_to_what_is_unfinished(damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            _shards, "_reached", before(_shards._reached, 2, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        )
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path, Shard(0, 2))
    damage(tmp_path / "a-00000-of-00002.unfinished")
    with pytest.raises(CorruptFileError, match=r"a-00000-of-00002.unfinished/(progress.json|tensors.safetensors): "):
        filled(tmp_path, Shard(0, 2))


def test_two_at_the_same_part(tmp_path: Path) -> None:
    caught: list[Exception] = []

    def other() -> None:
        try:
            filled(tmp_path, Shard(0, 2))
        except FileConflictError as error:
            caught.append(error)

    with locked(tmp_path / "a-00000-of-00002.unfinished"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        filled(tmp_path, Shard(1, 2))
    assert "a-00000-of-00002.unfinished is in use by another thread" in str(caught[0])


def test_no_room_is_found_out_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match="tensors.safetensors: No space left on device"):
        filled(tmp_path / "new", Shard(0, 2))
    assert not (tmp_path / "new").exists()


# ---- Putting together


def test_parts_of_different_counts(tmp_path: Path) -> None:
    for shard in (Shard(2, 4), Shard(0, 2), Shard(3, 4)):
        filled(tmp_path, shard, total=11)
    found = read_shards(tmp_path, "a")
    assert [index for shard in found for index in shard.indices] == list(range(11))


@pytest.mark.parametrize(
    ("shards", "error", "words"),
    [
        ([], MissingFileError, r"folder: .* holds no finished part \(a-\*.json\)"),
        (["0/4", "3/4"], MissingFileError, r"lacks indices 3\.\.8 of 0\.\.11; run"),
        (["1/4", "2/4"], MissingFileError, r"lacks indices 0\.\.2, 9\.\.11 of 0\.\.11; run"),
        (
            ["0/2", "1/4", "1/2"],
            FileConflictError,
            r"indices 3\.\.5 are in .* twice, in a-00000-of-00002.* and a-00001-of",
        ),
        (["0/1", "0/2"], FileConflictError, r"are in .* twice"),
    ],
    ids=["none", "middle", "ends", "overlap", "whole and half"],
)
def test_what_is_missing_or_there_twice(shards: list[str], error: type[Exception], words: str, tmp_path: Path) -> None:
    for text in shards:
        written(tmp_path, Shard.parse(text), total=12)
    with pytest.raises(error, match=words):
        read_shards(tmp_path, "a")


def test_parts_of_two_wholes(tmp_path: Path) -> None:
    written(tmp_path, Shard(0, 2))
    written(tmp_path, Shard(1, 2), identity={**IDENTITY, "seed": 4})
    with pytest.raises(FileConflictError) as caught:
        read_shards(tmp_path, "a")
    assert "seed: 3 in a-00000-of-00002.safetensors, 4 in a-00001-of-00002.safetensors" in str(caught.value)


@pytest.mark.parametrize("name", ["description", "tensors"])
def test_a_missing_file_and_a_changed_one(name: str, tmp_path: Path) -> None:
    shard = written(tmp_path / "a", Shard(0, 1))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    there, changed = ((folder / shard.path.name) for folder in (tmp_path / "a", tmp_path / "b"))
    if name == "description":
        changed = changed.with_suffix(".json")
        changed.write_text(changed.read_text().replace('"seed": 3', '"seed": 4'))
        with pytest.raises(CorruptFileError, match="do not fit the checksum"):
            read_shards(tmp_path / "b", "a")
        return
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    with pytest.raises(CorruptFileError, match="checksum differs from the one in a-00000-of-00001.json"):
        read_shards(tmp_path / "b", "a")[0].verify()
    there.unlink()
    with pytest.raises(MissingFileError, match="no such file, though a-00000-of-00001.json"):
        read_shards(tmp_path / "a", "a")
