"""What commands say of the use of an autoencoder's codes."""

from __future__ import annotations

import sys

from fastvq.cli.project import Project
from fastvq.data import CodeDataset
from fastvq.data.codes import DESCRIPTION
from fastvq.data.usage import CodeUse
from fastvq.training.codebook import CodebookTraining, few_codes
from fastvq.training.log import last_validation, metrics_path
from fastvq.training.run import RunFolder

# Rows of codes that are read where a command is not about them.
_ROWS = 4096


def say_use_of_run(project: Project, *, warn: bool) -> bool:
    """Print how many codes of each level the last validation of the autoencoder found in use; False if there was none.

    Args:
        warn: say on stderr what to do where these are few.
    """
    training = _training(project)
    if training is None or not metrics_path(project.vqvae).is_file():
        return False
    levels = range(len(training.grids))
    values = last_validation(project.vqvae, *(f"{name}_{n}" for name in ("perplexity", "usage") for n in levels))
    if values:
        _say(training.use(values, training.validated), training, "validation", warn=warn)
    return bool(values)


def say_use_of_codes(project: Project, *, whole: bool) -> None:
    """Print how many codes of each level occur in a project's codes; on stderr what to do where these are few.

    Args:
        whole: count all rows, and not a part of them that tells as much.
    """
    for folder, name in ((project.codes, "training"), (project.validation_codes, "validation")):
        if (folder / DESCRIPTION).is_file():
            codes = CodeDataset(folder)
            most = None if whole else _ROWS
            uses = [codes.use(level, most=most) for level in range(codes.num_levels)]
            _say(uses, _training(project), name, warn=folder == project.codes)


def _say(uses: list[CodeUse], training: CodebookTraining | None, where: str, *, warn: bool) -> None:
    for use in uses:
        print(f"{where:11} {use}")
    concern = few_codes(uses, training, where) if warn else None
    if concern is not None:
        sys.stdout.flush()
        print(f"fastvq: warning: {concern}", file=sys.stderr)


def _training(project: Project) -> CodebookTraining | None:
    """How the autoencoder was trained; None if only its model is there."""
    return CodebookTraining.of_run(project.vqvae) if RunFolder(project.vqvae).config.is_file() else None
