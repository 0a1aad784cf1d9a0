"""One process at a time in a folder that it fills."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_helpers import Noise, files, make_codes, stage1, stage2, train_config

from fastvq._lock import LOCK, locked
from fastvq.cli import main
from fastvq.data import extract_codes
from fastvq.errors import FileConflictError
from fastvq.models import load_pretrained

pytestmark = pytest.mark.usefixtures("steady")
HOLD = """
import sys, time
from pathlib import Path
from fastvq._lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_every_writer_is_refused_with_the_holders_name(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    codes = make_codes(tmp_path / "codes")
    run = tmp_path / "run"
    before = files(run)
    name = f"in use by process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(FileConflictError, match=name):
        stage1(run)
    with pytest.raises(FileConflictError, match=name):
        stage2(codes, run)
    with pytest.raises(FileConflictError, match=name):
        extract_codes(stage1(tmp_path / "other", train_config(steps=2)), Noise(), None, run)
    assert files(run) == before


def test_a_killed_holder_holds_no_longer(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    stage1(tmp_path / "run", train_config(steps=2))
    assert not (tmp_path / "run" / LOCK).exists()
    load_pretrained(tmp_path / "run" / "model")


def test_processes_that_load_data_do_not_keep_it(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            signal.pause()
        (tmp_path / "run" / "file").touch()
    command = [sys.executable, "-c", HOLD.replace("time.sleep(100)", ""), str(tmp_path / "run")]
    try:
        assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == "held\n"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_thread_enters_again_and_another_does_not(tmp_path: Path) -> None:
    caught: list[Exception] = []

    def enter() -> None:
        try:
            with locked(tmp_path):
                pass
        except FileConflictError as error:
            caught.append(error)

    with locked(tmp_path):
        with locked(tmp_path):
            assert (tmp_path / LOCK).exists()
        assert (tmp_path / LOCK).exists()
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert "another thread of this process" in str(caught[0])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_nothing_was_written_goes(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_commands_say_who_has_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "my"
    command = [sys.executable, "-c", HOLD, str(run / "vqvae")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        settings = ["--data", "digits", "--preset", "digits", "--steps", "1", "--quiet"]
        assert main(["train-vqvae", "--run", str(run), *settings]) == 1
        process.kill()
    assert f"process {process.pid} on" in capsys.readouterr().err
    assert not (run / "data.json").exists()
