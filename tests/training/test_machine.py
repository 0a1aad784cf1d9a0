"""Memory that is free on a machine or in a container, as the system's files say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvq.training import machine


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8000 kB to be had, and no control group yet."""
    (tmp_path / "meminfo").write_text("MemTotal:       16000 kB\nMemFree:   10 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_LIMITS", ((tmp_path / "max", tmp_path / "stat", "anon"),))
    return tmp_path


def test_what_the_machine_has_left(files: Path) -> None:
    assert machine.free_memory("cpu") == 8000 * 1024


@pytest.mark.parametrize(
    ("limit", "left"), [("5000000\n", 4_000_000), ("max\n", 8000 * 1024), ("900000\n", 0), ("9" * 19, 8000 * 1024)]
)
def test_containers_have_less(files: Path, limit: str, left: int) -> None:
    (files / "max").write_text(limit)
    (files / "stat").write_text("file 77\nanon 1000000\nanon_thp 5\n")
    assert machine.free_memory("cpu") == left


def test_where_nothing_is_known(files: Path) -> None:
    (files / "meminfo").unlink()
    assert machine.free_memory("cpu") is None


def test_gpus_are_asked_for_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a card ({device})")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    assert machine.device_title("cuda:1") == "a card (cuda:1)"
    assert machine.free_memory("cuda:1") == 5


def test_a_cpu_is_called_by_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, title in ((1, "1 CPU core"), (2, "2 CPU cores")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert machine.device_title("cpu") == title
