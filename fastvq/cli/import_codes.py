"""The command that takes codes of another autoencoder: ``import-codes``."""

from __future__ import annotations

import argparse

from fastvq.cli.project import Project, say_next_priors
from fastvq.data import CodeDataset, split_indices
from fastvq.data import import_codes as import_from_files
from fastvq.data.made_elsewhere import count_rows
from fastvq.errors import FileConflictError


def import_codes(arguments: argparse.Namespace) -> None:
    project = Project(arguments.run)
    if project.started:
        raise FileConflictError(
            f"--run: {project.vqvae} holds an autoencoder, whose codes are others; choose another folder"
        )
    training, validation = split_indices(count_rows(arguments.source), arguments.validation, arguments.seed)
    if len(validation):
        import_from_files(arguments.source, project.validation_codes, indices=validation)
    elif project.validation_codes.exists():
        raise FileConflictError(f"--validation: {project.validation_codes} is there already, expected a share above 0")
    import_from_files(arguments.source, project.codes, indices=training)
    codes = CodeDataset(project.codes)
    grids = ", ".join(
        f"{height} x {width} of {count}" for (height, width), count in zip(codes.shapes, codes.num_codes, strict=True)
    )
    print(f"codes of {len(codes)} rows, and {len(validation)} held out, in {project.codes.parent}: {grids}")
    say_next_priors(arguments.run, codes.num_levels)
