"""What ``fastvq info`` says of the installation: enough for a report of a bug, whatever is missing or broken."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

import fastvq
from fastvq import _engine
from fastvq.cli import installation, main

OPERATIONS = {"causal_attention", "causal_conv2d", "draw", "ema_update", "nearest_code", "residual_codes"}


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines above the presets."""
    assert main(["info", "--device", "cpu"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert max(map(len, found)) <= installation.WIDTH
    return found[: found.index("")]


def test_for_programs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVQ_REQUIRE_EXT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MY_CUDA_TOKEN", "secret")
    assert main(["info", "--json", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["fastvq"]["version"] == fastvq.__version__
    assert found["pytorch"]["version"] == torch.__version__
    assert found["environment"].items() >= {"FASTVQ_REQUIRE_EXT": "1", "OMP_NUM_THREADS": "3"}.items()
    assert "secret" not in out
    assert found["engines"].items() >= {"torch": None, "naive": None}.items()
    assert found["engines"]["cuda"] == "it computes on a GPU, the prior is on cpu"
    assert found["backends"].keys() == OPERATIONS
    assert all(rows["torch"] is None for rows in found["backends"].values())
    assert found["memory"]["total"] is None or found["memory"]["total"] > found["memory"]["free"] > 0
    assert found["pretrained"] == ["digits", "emoji"]


def test_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in installation.installation("cpu")["environment"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(installation, "_PACKAGES", ("numpy", "no-such-package"))
    found = lines(capsys)
    assert "environment nothing set" in found
    assert "            not there: no-such-package" in found
    assert "            not cuda: it computes on a GPU, the prior is on cpu" in found
    assert any(line.startswith("            not triton: it needs a GPU") for line in found)
    names = [line.split()[0] for line in found if line[0] != " "]
    assert names[:4] == ["fastvq", "pytorch", "packages", "extension"]
    assert names[-4:] == ["environment", "engines", "backends", "pretrained"]


def test_without_the_extension(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "_load", lambda: (None, "it cannot be imported"))
    found = lines(capsys)
    assert any(line.startswith("extension   it cannot be imported. Build it with") for line in found)
    assert "cuda        not in the extension" in found
    assert "engines     torch, naive (on cpu)" in found
    assert "            not cpu: it needs the extension" in found
    assert "            not cpp: it needs the extension" in found


def test_gpus_that_do_not_start(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("CUDA error: out of order\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    (devices,) = (line for line in lines(capsys) if line.startswith("devices"))
    assert devices.endswith("threads), GPUs that do not start (CUDA error: out of order)")


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 09:55:41 UTC 2025\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (archive)\n",
    ],
    ids=["closed", "open"],
)
def test_the_driver(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text(text, encoding="utf-8")
    monkeypatch.setattr(installation, "_DRIVER", tmp_path / "version")
    assert "driver      NVIDIA 580.95.05" in lines(capsys)


def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "fastvq" / "__init__.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.setattr(fastvq, "__file__", str(module))
    assert installation.installation("cpu")["fastvq"]["commit"] is None

    def git(*arguments: str) -> str:
        named = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ("git", "-C", str(tmp_path), *named, *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "--no-gpg-sign", "-m", "first")
    commit = git("rev-parse", "HEAD")
    expected = {"version": fastvq.__version__, "commit": commit, "changed": False, "path": str(module.parent)}
    assert installation.installation("cpu")["fastvq"] == expected
    module.write_text("changed = True\n")
    assert installation.installation("cpu")["fastvq"] == {**expected, "changed": True}
