"""Recipes of docs/several-processes.md, run as they stand but for how many samples and parts there are."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from page_blocks import ROOT
from safetensors.torch import load_file

from fastvq.cli.parser import build_parser
from fastvq.sampling import Pipeline

PAGE = (ROOT / "docs" / "several-processes.md").read_text(encoding="utf-8")
# By their names: what is said of one, and its lines.
RECIPES = {
    name: (text, code)
    for name, text, code in re.findall(r"^\*\*([\w ]+)\*\*((?:(?!```).)*)```\w+\n(.*?)^```$", PAGE, re.M | re.S)
}
COUNT = 6
SMALLER = {
    "50000": str(COUNT),
    "0 1 2 3": "0 1",
    "/4": "/2",
    "n_workers=4": "n_workers=2",
    "range(8), [8] * 8": "range(2), [2] * 2",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model ``my``, and with the command ``fastvq``."""
    folder = tmp_path_factory.mktemp("work")
    Pipeline.from_pretrained("digits").save_pretrained(folder / "my")
    command = folder / "bin" / "fastvq"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m fastvq "$@"\n')
    command.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """Codes that one process draws."""
    pipeline = Pipeline.from_pretrained("digits")
    return list(pipeline.sample(COUNT, label=torch.arange(COUNT) % 10, seed=0).codes)


def run(name: str, work: Path, *command: str) -> dict[str, torch.Tensor]:
    """What a recipe leaves in ``samples``."""
    folder = work / name
    folder.mkdir()
    (folder / "my").symlink_to(work / "my")
    recipe = RECIPES[name][1]
    for large, small in SMALLER.items():
        recipe = recipe.replace(large, small)
    (folder / "recipe").write_text(recipe)
    variables = {**os.environ, "PATH": f"{work / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "recipe"],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, said
    return load_file(folder / "samples" / "codes.safetensors")


def test_shell_loop(work: Path, expected: list[torch.Tensor]) -> None:
    found = run("Shell", work, "bash", "-e")
    assert all(torch.equal(found[f"level{level}"], codes) for level, codes in enumerate(expected))
    assert len(list((work / "Shell" / "drawn").glob("samples-*-of-00002.json"))) == 2


def test_dask(work: Path, expected: list[torch.Tensor]) -> None:
    pytest.importorskip("distributed")
    found = run("Dask", work, sys.executable)
    assert all(torch.equal(found[f"level{level}"], codes) for level, codes in enumerate(expected))


def test_the_page_says_what_was_run() -> None:
    assert len(RECIPES) == 8
    for name, (text, _) in RECIPES.items():
        assert re.search(r"\((not )?run\b", text), name
        assert "SLURM" not in name or "(not run" in text


def test_commands_are_understood() -> None:
    """Those inside of scripts and of the table too, which no block says by itself."""
    joined, commands = PAGE.replace("\\\n", " "), set()
    names = "train-vqvae|train-prior|extract|sample|merge|evaluate|info"
    for line in re.findall(rf"fastvq ((?:{names}) [^\"`&\n]*)", joined):
        commands.add(build_parser().parse_args(shlex.split(line)).command)
    assert len(commands) == 7
