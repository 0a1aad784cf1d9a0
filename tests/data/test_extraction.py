"""Codes on disk: what is written, going on after a kill, refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import VQVAE_CONFIG, Noise, before, dies_by_sigkill, files, kill_myself

from fastvq._files import sealed
from fastvq.data import Augment, CodeDataset, extract_codes, model_checksum
from fastvq.data import codes as codes_module
from fastvq.errors import ArgumentError, CorruptFileError, FileConflictError, MissingFileError
from fastvq.models import VQVAE2, VQVAEConfig

AUGMENT = Augment(1, True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(seed: int = 0, **changes: Any) -> VQVAE2:
    torch.manual_seed(seed)
    return VQVAE2(VQVAEConfig.from_dict({**VQVAE_CONFIG.to_dict(), "codebook_init": "normal", **changes})).eval()


def extract(folder: Path, **changes: Any) -> Path:
    """40 rows in batches of 3, flushed every 2 batches."""
    options: dict[str, Any] = {
        "model": make_model(),
        "dataset": Noise(),
        "indices": np.arange(1, 21),
        "batch_size": 3,
        "augment": AUGMENT,
        "copies": 2,
        "seed": 5,
        "flush_rows": 6,
    }
    return extract_codes(folder=folder, **{**options, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return extract(tmp_path_factory.mktemp("whole") / "codes")


# ---- What is written


def test_codes_are_those_of_the_model(whole: Path) -> None:
    model, data, stored = make_model(), Noise(), CodeDataset(whole)
    assert len(stored) == 40
    assert stored.shapes == ((2, 2), (4, 4)) == model.code_shapes((8, 8))
    assert stored.num_codes == (8, 8)
    assert stored.num_classes == 3
    assert stored.class_names == ("a", "b", "c")
    assert stored.source.tolist() == [*range(1, 21)] * 2
    assert stored.labels is not None
    assert data.labels is not None
    assert torch.equal(stored.labels, data.labels[stored.source])
    assert stored.model == model_checksum(model)
    for row in range(40):
        source = int(stored.source[row])
        image = AUGMENT(data.image(source), seed=5, index=source, variant=row // 20)
        for level, codes in enumerate(model.encode(image[None])):
            assert torch.equal(stored.codes(level, [row]), codes)  # type: ignore[arg-type]
    assert stored.codes(0, slice(None)).dtype == torch.int64
    assert torch.equal(stored.codes(1, torch.tensor([3, 1])), stored.codes(1, np.array([3, 1])))


@pytest.mark.parametrize(("num_codes", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")])
def test_smallest_integer_type(num_codes: int, dtype: str, tmp_path: Path) -> None:
    model = make_model(num_codes=num_codes, code_dim=2)
    extract(tmp_path / "codes", model=model, indices=[0, 1], copies=1)
    assert np.load(tmp_path / "codes" / "level1.npy").dtype == dtype
    stored = CodeDataset(tmp_path / "codes")
    assert torch.equal(stored.codes(1, slice(None)), model.encode(Noise().pixels[:2])[1])


def test_all_images_by_default_and_no_labels(tmp_path: Path) -> None:
    data = Noise()
    data.labels, data.num_classes, data.class_names = None, None, ()  # type: ignore[assignment]
    stored = CodeDataset(extract(tmp_path / "codes", dataset=data, indices=None, copies=1, augment=None))
    assert stored.source.tolist() == list(range(22))
    assert (stored.labels, stored.num_classes, stored.class_names) == (None, None, ())
    assert not (tmp_path / "codes" / "labels.npy").exists()


def test_batch_size_workers_and_mode_change_nothing(whole: Path, tmp_path: Path) -> None:
    model = make_model().train()
    extract(tmp_path / "codes", model=model, batch_size=7, num_workers=3, flush_rows=4096, device="cpu")
    assert model.training
    assert model_checksum(model) == model_checksum(make_model())
    assert files(tmp_path / "codes") == files(whole)


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extract(tmp_path / "codes", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "40/40" in captured.err


def test_checksum_sees_weights_buffers_and_configuration() -> None:
    first = model_checksum(make_model())
    assert model_checksum(make_model()) == first
    assert model_checksum(make_model(seed=1)) != first
    assert model_checksum(make_model(commitment=0.5)) != first
    moved = make_model()
    moved.get_buffer("quantizers.1.embedding")[0, 0] += 1e-3
    assert model_checksum(moved) != first


# ---- Going on


def kill_in(name: str, call: int) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(codes_module, name, before(getattr(codes_module, name), call, kill_myself))


def kill_in_encode(call: int) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(VQVAE2, "encode", before(VQVAE2.encode, call, kill_myself))


KILLS = {
    "before the first file": kill_in("write_json", 0),
    "between description and arrays": kill_in("sync", 0),
    "between two arrays": kill_in("sync", 1),
    "before the first flush": kill_in_encode(1),
    "right after a flush": kill_in_encode(4),
    "between flushes": kill_in_encode(5),
    "arrays flushed, description not": kill_in("write_json", 3),
    "one array flushed, the other not": kill_in("sync", 5),
    "in the last description": kill_in("write_json", 7),
}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS.keys())
def test_resume_after_sigkill_is_identical(
    kill: Callable[[pytest.MonkeyPatch], None], whole: Path, tmp_path: Path
) -> None:
    def run_and_die() -> None:
        with pytest.MonkeyPatch.context() as patch:
            kill(patch)
            extract(tmp_path / "codes")

    dies_by_sigkill(run_and_die)
    with pytest.raises((CorruptFileError, MissingFileError)):
        CodeDataset(tmp_path / "codes")
    extract(tmp_path / "codes")
    assert files(tmp_path / "codes") == files(whole)


def test_goes_on_after_the_last_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def stop() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(VQVAE2, "encode", before(VQVAE2.encode, 5, stop))
        with pytest.raises(Killed):
            extract(tmp_path / "codes")
    assert json.loads((tmp_path / "codes" / "codes.json").read_text())["rows_done"] == 12
    with pytest.raises(CorruptFileError, match=r"not complete \(12 of 40 rows\); run it again"):
        CodeDataset(tmp_path / "codes")
    encoded = []
    encode = VQVAE2.encode

    def counting(self: VQVAE2, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoded.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(VQVAE2, "encode", counting)
    extract(tmp_path / "codes")
    assert sum(encoded) == 28
    extract(tmp_path / "codes")
    assert sum(encoded) == 28


def test_sigkill_from_outside(whole: Path, tmp_path: Path) -> None:
    script = """
import sys, time
sys.path[:0] = ["tests", "tests/data"]
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_extraction import extract
from training_helpers import Noise
class Slow(Noise):
    def image(self, index):
        time.sleep(0.05)
        return super().image(index)
extract(Path(sys.argv[1]), dataset=Slow())
"""
    folder = tmp_path / "codes"
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    done = 0
    while done == 0:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
        if (folder / "codes.json").exists():
            done = json.loads((folder / "codes.json").read_text())["rows_done"]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    extract(folder)
    assert files(folder) == files(whole)


# ---- Refusals


class Renamed(Noise):
    class_names = ("x", "y", "z")


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": make_model(seed=1)}, "model: "),
        ({"dataset": Noise(seed=1)}, 'dataset: "noise-22-0" there, "noise-22-1" now'),
        ({"dataset": Renamed()}, "class_names: "),
        ({"indices": np.arange(20)}, "indices: "),
        ({"augment": Augment(1)}, "augment: "),
        ({"copies": 3}, r"copies: 2 there, 3 now"),
        ({"seed": 6}, "seed: 5 there, 6 now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_codes_are_not_mixed_in(changes: dict[str, Any], message: str, complete: bool, tmp_path: Path) -> None:
    folder = extract(tmp_path / "codes")
    if not complete:
        description = json.loads((folder / "codes.json").read_text())
        (folder / "codes.json").write_text(json.dumps(sealed({**description, "rows_done": 12, "complete": False})))
    contents = files(folder)
    with pytest.raises(FileConflictError, match=message):
        extract(folder, **changes)
    assert files(folder) == contents


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileConflictError, match="is not empty and holds no codes.json"):
        extract(tmp_path)
    with pytest.raises(FileConflictError, match="is a file"):
        extract(tmp_path / "mine.txt")
    assert files(tmp_path) == {"mine.txt": b"keep"}


def test_damage_to_an_interrupted_extraction(tmp_path: Path) -> None:
    folder = extract(tmp_path / "codes")
    description = json.loads((folder / "codes.json").read_text())
    (folder / "codes.json").write_text(json.dumps(sealed({**description, "rows_done": 12, "complete": False})))
    array = folder / "level1.npy"
    array.write_bytes(array.read_bytes()[:-5])
    with pytest.raises(CorruptFileError, match=r"level1.npy: not a complete array file"):
        extract(folder)
    array.unlink()
    with pytest.raises(MissingFileError, match=r"level1.npy: no such file"):
        extract(folder)
    (folder / "codes.json").write_text(json.dumps(sealed({**description, "rows_done": 41})))
    with pytest.raises(CorruptFileError, match=r"rows_done is 41, expected 0..40"):
        extract(folder)
    (folder / "codes.json").write_text("{")
    with pytest.raises(CorruptFileError, match="not valid JSON"):
        extract(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": [0, 22]}, r"indices: must lie in 0..21, got 0..22"),
        ({"indices": [-1]}, "indices: must lie in"),
        ({"indices": []}, "indices: expected a non-empty list of integers"),
        ({"indices": [0.5]}, "indices: expected a non-empty list of integers"),
        ({"copies": 0}, "copies: must be at least 1"),
        ({"copies": 2, "augment": None}, "copies: 2 copies without augmentation"),
        ({"batch_size": 0}, "batch_size: must be at least 1"),
        ({"seed": -1}, r"seed: must lie in 0..2\*\*63-1"),
        ({"num_workers": -1}, "num_workers: must be at least 0"),
        ({"model": make_model(in_channels=3)}, "dataset: has 1 channels, the model takes 3"),
        ({"model": make_model(strides=(4, 4))}, "multiples of 16"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        extract(tmp_path / "codes", **changes)
    assert not (tmp_path / "codes").exists()


def test_code_outside_the_codebook(tmp_path: Path) -> None:
    folder = extract(tmp_path / "codes")
    array = np.load(folder / "level1.npy", mmap_mode="r+")
    array[7, 0, 0] = 8
    array.flush()
    stored = CodeDataset(folder)
    assert stored.codes(1, np.array([6])).shape == (1, 4, 4)
    with pytest.raises(CorruptFileError, match=r"level1.npy: holds code 8, expected 0..7"):
        stored.codes(1, np.array([6, 7]))
    with pytest.raises(ArgumentError, match=r"level: expected 0..1, got 2"):
        stored.codes(2, np.array([0]))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    def damaged(name: str, data: bytes | None, error: type[Exception], message: str) -> None:
        path = folder / name
        original = path.read_bytes()
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(error, match=message):
            CodeDataset(folder)
        if name != "codes.json":
            with pytest.raises(error, match=message):
                extract(folder)  # complete, it says; it must not be believed
        path.write_bytes(original)

    folder = extract(tmp_path / "codes")
    level = (folder / "level0.npy").read_bytes()
    description = json.loads((folder / "codes.json").read_text())
    del description["shapes"]
    damaged("level0.npy", None, MissingFileError, "level0.npy: no such file")
    damaged("level0.npy", level[:-1], CorruptFileError, "level0.npy: not a complete array file")
    damaged("level0.npy", level[:40], CorruptFileError, "level0.npy: not a complete array file")
    damaged("level0.npy", level + b"x", CorruptFileError, r"level0.npy: \d+ bytes, expected \d+")
    damaged("level0.npy", (folder / "level1.npy").read_bytes(), CorruptFileError, r"uint8 of shape \[40, 4, 4\]")
    damaged("level0.npy", level.replace(b"|u1", b"|i1"), CorruptFileError, "holds int8")
    damaged("source.npy", None, MissingFileError, "source.npy: no such file")
    damaged("labels.npy", (folder / "labels.npy").read_bytes()[:-8], CorruptFileError, "labels.npy")
    damaged("codes.json", None, MissingFileError, "holds no codes.json")
    damaged("codes.json", b"[]", CorruptFileError, "expected a JSON object")
    damaged("codes.json", json.dumps(description).encode(), CorruptFileError, "missing or wrong entry.*shapes")
    damaged("codes.json", b'{"format": 2}', CorruptFileError, "format 2, expected 1")
    labels = np.load(folder / "labels.npy")
    labels[3] = 3
    np.save(folder / "labels.npy", labels)
    with pytest.raises(CorruptFileError, match=r"labels.npy: labels outside 0..2"):
        CodeDataset(folder)
    with pytest.raises(MissingFileError, match="holds no codes.json"):
        CodeDataset(tmp_path / "nowhere")


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    folder = extract(tmp_path / "codes")
    np.save(folder / "source.npy", np.array([{"a": 1}] * 40, dtype=object), allow_pickle=True)
    with pytest.raises(CorruptFileError, match="source.npy"):
        CodeDataset(folder)
