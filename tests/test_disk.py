"""Full disks, permissions, and what a killed writer leaves beside its file."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import VQVAE_CONFIG, Noise, before, files, stage1, state_tensors

from fastvq import _files
from fastvq._files import new_array, remove_leftovers, replacing_folder, reserve, save_tensors, sweep, write_json
from fastvq.data import extract_codes, save_grid
from fastvq.errors import DiskFullError
from fastvq.models import build
from fastvq.training import loop as loop_module

pytestmark = pytest.mark.usefixtures("steady")
MEGABYTE = 1 << 20


@pytest.fixture(params=["tmpfs", "limit"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with room for one megabyte: a file system of its own, or one where reserving more is refused."""
    if request.param == "limit":
        allocate = os.posix_fallocate

        def limited(descriptor: int, offset: int, size: int) -> None:
            if offset + size > MEGABYTE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            allocate(descriptor, offset, size)

        monkeypatch.setattr(os, "posix_fallocate", limited)
        yield tmp_path
        return
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTE}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    with (folder / "filler").open("wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - leave))


def model() -> Any:
    torch.manual_seed(0)
    return build(VQVAE_CONFIG).eval()


def test_codes_that_do_not_fit_are_refused_before_encoding(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Noise(400)
    data.image = lambda index: pytest.fail("an image was read")  # type: ignore[method-assign]
    rows = np.arange(400).repeat(500)
    with pytest.raises(DiskFullError) as caught:
        extract_codes(model(), data, rows, small_disk / "codes")
    # source.npy comes first: 8 bytes a row after a header of 128.
    assert str(caught.value).startswith(f"{small_disk / 'codes' / 'source.npy'}: No space left on device; ")
    assert "1600128 bytes are needed" in str(caught.value)
    assert "bytes are free" in str(caught.value)
    assert not (small_disk / "codes").exists()


def test_weights_that_do_not_fit_leave_the_model_that_was_there(small_disk: Path) -> None:
    model().save_pretrained(small_disk / "model")
    contents = files(small_disk)
    large = build(dataclasses.replace(VQVAE_CONFIG, channels=256))
    needed = sum(tensor.numel() * tensor.element_size() for tensor in large.state_dict().values())
    with pytest.raises(DiskFullError, match=f"model.safetensors: No space left on device.*{needed} bytes are needed"):
        large.save_pretrained(small_disk / "model", overwrite=True)
    assert files(small_disk) == contents
    assert [path.name for path in small_disk.iterdir()] == ["model"]


def test_limit_on_file_sizes_reads_as_one(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch; from pathlib import Path; from fastvq._files import save_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "save_tensors({'a': torch.zeros(2048)}, Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"DiskFullError: {tmp_path / 'a'}: File too large" in done.stderr
    assert "8192 bytes are needed" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("small_disk", ["tmpfs"], indirect=True)
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_disk / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            loop_module, "save_checkpoint", before(loop_module.save_checkpoint, 1, lambda: fill(small_disk, 8192))
        )
        with pytest.raises(DiskFullError, match=r"state.safetensors: No space left on device; \d+ bytes are free, \d+"):
            stage1(run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000004"]
    (small_disk / "filler").unlink()
    stage1(run, resume=True)
    stage1(tmp_path / "whole")
    assert state_tensors(run) == state_tensors(tmp_path / "whole")


@pytest.mark.parametrize("small_disk", ["tmpfs"], indirect=True)
@pytest.mark.parametrize("kind", ["json", "png", "jpg", "webp", "folder"])
def test_small_files_on_a_full_disk(kind: str, small_disk: Path) -> None:
    path = small_disk / ("a" if kind == "folder" else f"a.{kind}")

    def write(size: int) -> None:
        if kind == "json":
            write_json(path, "x" * size)
        elif kind != "folder":
            save_grid(path, torch.rand(1, 1, size // 128, 128), overwrite=True)
        else:
            with replacing_folder(path, overwrite=True) as folder:
                (folder / "text").write_text("x" * size)

    write(1024)
    contents = files(small_disk)
    fill(small_disk, 8192)
    with pytest.raises(DiskFullError, match=f"{path}: No space left on device"):
        write(65536)
    (small_disk / "filler").unlink()
    assert files(small_disk) == contents


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002], ids=oct)
def test_permissions_follow_the_umask(mask: int, tmp_path: Path) -> None:
    previous = os.umask(mask)
    try:
        out = tmp_path / "out"
        trained = stage1(out / "run")
        trained.save_pretrained(out / "run" / "model", overwrite=True)
        extract_codes(trained, Noise(), None, out / "codes")
        save_grid(out / "grid.png", torch.zeros(1, 1, 8, 8))
        save_tensors({"a": torch.zeros(2)}, out / "a.safetensors")
    finally:
        os.umask(previous)
    for path in (out, *out.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.mark.parametrize("missing", ["call", "support"])
def test_space_is_reserved_where_the_system_has_no_call_for_it(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*arguments: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if missing == "call":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    (tmp_path / "a").write_bytes(b"kept")
    reserve(tmp_path / "a", 3 * MEGABYTE + 5)
    assert (tmp_path / "a").read_bytes() == b"kept" + bytes(3 * MEGABYTE + 1)
    assert (tmp_path / "a").stat().st_blocks * 512 >= 3 * MEGABYTE


@pytest.mark.parametrize("shape", [(3, 2, 2), (7,), (1000,)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float32])
def test_new_arrays_are_those_of_numpy(shape: tuple[int, ...], dtype: type, tmp_path: Path) -> None:
    new_array(tmp_path / "a.npy", shape, dtype)[:] = 3
    np.save(tmp_path / "b.npy", np.full(shape, 3, dtype))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


# ---- What a killed process leaves


def leave(path: Path, process: int, kind: str) -> Path:
    leftover = path.with_name(f".{path.name}.{process}-0123abcd.{kind}")
    leftover.mkdir()
    (leftover / path.name).write_text("before")
    return leftover


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_folder_is_put_back_whose_replacement_was_killed_between_two_renames(tmp_path: Path) -> None:
    leave(tmp_path / "out", dead_process(), "old")
    leave(tmp_path / "out", dead_process(), "tmp")
    remove_leftovers(tmp_path / "out")
    assert files(tmp_path) == {"out": b"before"}


def test_files_of_living_processes_stay(tmp_path: Path) -> None:
    others = leave(tmp_path / "out", os.getppid(), "tmp")
    mine = leave(tmp_path / "out", os.getpid(), "tmp")
    remove_leftovers(tmp_path / "out")
    assert others.exists()
    assert mine.exists()
    os.utime(mine, (0, 0))  # of an earlier process with this number
    remove_leftovers(tmp_path / "out")
    assert not mine.exists()


def test_a_folder_is_swept_all_the_way_down(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / ".hidden.tmp").write_text("mine")
    leave(tmp_path / "a" / "b" / "x.png", os.getppid(), "tmp")
    sweep(tmp_path)
    assert files(tmp_path) == {"a/.hidden.tmp": b"mine"}
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_an_error_of_another_kind_passes(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), _files.full_disk_named(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")
