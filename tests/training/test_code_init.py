"""Priors that start from codebooks: what a run records of it, and the option of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refuses
from training_helpers import TOP_CONFIG, VQVAE_CONFIG, before, dies_by_sigkill, files, kill_myself, stage2, train_config

from fastvq.cli import main
from fastvq.errors import ArgumentError, FileConflictError
from fastvq.models import Prior, build
from fastvq.training.batches import StepBatches

pytestmark = pytest.mark.usefixtures("steady")

BOOKS = (torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.ones(3, 2))
ONE = train_config(steps=1, learning_rate=1e-30, warmup_steps=0, ema_decay=None)


def record(run: Path) -> Any:
    return json.loads((run / "config.json").read_text())


def test_a_run_starts_from_the_codebooks_of_its_levels(tmp_path: Path, codes: Path) -> None:
    trained = stage2(codes, tmp_path / "alike", ONE, codebooks=BOOKS)
    with torch.random.fork_rng():
        torch.manual_seed(ONE.seed)
        expected = build(TOP_CONFIG)
    assert isinstance(expected, Prior)
    expected.start_from_codebooks(BOOKS[:1])
    for name, value in expected.state_dict().items():
        assert torch.equal(trained.state_dict()[name], value), name
    random = stage2(codes, tmp_path / "random", ONE)
    assert not torch.equal(random.input.weight, trained.input.weight)
    assert len(record(tmp_path / "alike")["codebooks"]) == 64
    assert record(tmp_path / "random")["codebooks"] is None


def kept(run: Path) -> dict[str, bytes]:
    """What is in its folder but for the lock, which a process that was killed leaves behind."""
    return {name: data for name, data in files(run).items() if name != ".lock"}


def test_a_run_goes_on_from_the_codebooks_it_had(tmp_path: Path, codes: Path) -> None:
    whole = stage2(codes, tmp_path / "whole", codebooks=BOOKS)

    def dies() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepBatches, "__getitem__", before(StepBatches.__getitem__, 2, kill_myself))
            stage2(codes, tmp_path / "killed", codebooks=BOOKS)

    dies_by_sigkill(dies)
    for other in (None, (BOOKS[0] + 1,)):
        found = kept(tmp_path / "killed")
        with pytest.raises(FileConflictError, match="codebooks: "):
            stage2(codes, tmp_path / "killed", codebooks=other, resume=True)
        assert kept(tmp_path / "killed") == found
    gone_on = stage2(codes, tmp_path / "killed", codebooks=BOOKS, resume=True)
    assert all(torch.equal(value, gone_on.state_dict()[name]) for name, value in whole.state_dict().items())


def test_weights_to_start_from_go_first(tmp_path: Path, codes: Path) -> None:
    first = stage2(codes, tmp_path / "first", ONE)
    second = stage2(codes, tmp_path / "second", ONE, init_from=tmp_path / "first", codebooks=BOOKS)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert record(tmp_path / "second")["codebooks"] is None


def test_codebooks_that_do_not_fit_are_refused_before_a_run_begins(tmp_path: Path, codes: Path) -> None:
    with refuses(ArgumentError, r"codebooks\[0\]: expected shape \[8, D\], got \[3, 2\]"):
        stage2(codes, tmp_path / "run", codebooks=BOOKS[1:])
    assert not (tmp_path / "run").exists()


QUIET = ["--batch-size", "4", "--quiet", "--device", "cpu"]
TINY = ["--preset", "tiny", "--channels", "1", "--size", "32"]


def project() -> list[str]:
    """A project with an autoencoder and its codes; returns the command that trains its top prior."""
    assert main(["train-vqvae", "--run", "my", "--data", "digits", *TINY, "--steps", "1", *QUIET]) == 0
    assert main(["extract", "--run", "my", *QUIET]) == 0
    command = ["train-prior", "--run", "my", "--level", "0", "--preset", "tiny-top"]
    return [*command, "--steps", "2", "--checkpoint-every", "1", *QUIET]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    command = project()
    prior = Path("my/prior0")
    assert main(command) == 0
    assert len(record(prior)["codebooks"]) == 64
    assert main([*command, "--resume"]) == 0
    capsys.readouterr()
    assert main([*command, "--resume", "--code-init", "random"]) == 1
    assert "--code-init: the prior in my/prior0 was started with codebooks, got random" in capsys.readouterr().err

    prior.rename("first")
    assert main([*command, "--code-init", "random"]) == 0
    assert record(prior)["codebooks"] is None
    assert main([*command, "--resume"]) == 0

    prior.rename("second")
    assert main([*command, "--init-from", "first"]) == 0
    assert record(prior)["codebooks"] is None
    assert main([*command, "--resume"]) == 0
    prior.rename("third")
    capsys.readouterr()
    assert main([*command, "--init-from", "first", "--code-init", "codebooks"]) == 1
    assert "--code-init: codebooks cannot be with --init-from" in capsys.readouterr().err

    Path("my/vqvae").rename("away")
    assert main([*command, "--code-init", "codebooks"]) == 1
    assert "--code-init: codebooks are those of an autoencoder, and my has none" in capsys.readouterr().err
    assert not prior.exists()
    assert main(command) == 0
    assert record(prior)["codebooks"] is None


def test_the_autoencoder_of_these_helpers_fits() -> None:
    assert [tuple(book.shape) for book in build(VQVAE_CONFIG).codebooks] == [(8, 4)] * 2
