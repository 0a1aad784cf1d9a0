"""The command that puts parts together: ``merge``."""

from __future__ import annotations

import argparse

from fastvq._files import remove_folder, remove_leftovers
from fastvq.cli.codebook import say_use_of_codes
from fastvq.cli.generate import check_free
from fastvq.cli.project import Project, require_folder_name, say_next_priors
from fastvq.data import CodeDataset, merge_codes
from fastvq.data.codes import DESCRIPTION
from fastvq.errors import ArgumentError
from fastvq.sampling import merge_samples
from fastvq.sampling.project import is_project


def merge(arguments: argparse.Namespace) -> None:
    if is_project(arguments.folder):
        if arguments.out is not None:
            raise ArgumentError(f"--out: codes of a project go to its folder codes, got {arguments.out}")
        if arguments.overwrite:
            raise ArgumentError("--overwrite: codes of a project are not replaced; move them elsewhere first")
        _merge_extraction(Project(arguments.folder))
        return
    if arguments.out is not None:
        require_folder_name(arguments.out)
        check_free(arguments.out, arguments.overwrite, picture=False)
    out = merge_samples(arguments.folder, arguments.out, overwrite=arguments.overwrite)
    print(f"all samples in {out}")


def _merge_extraction(project: Project) -> None:
    parts = project.code_parts
    remove_leftovers(parts)
    merged = not parts.is_dir() and (project.codes / DESCRIPTION).is_file()
    if not merged:
        for folder in (project.validation_codes, project.codes):
            if folder == project.codes or (parts / folder.name).is_dir():  # there may be no validation images
                merge_codes(parts / folder.name, folder)
        remove_folder(parts)
    codes = CodeDataset(project.codes)
    print(f"codes of {len(codes)} rows in {project.codes}")
    say_use_of_codes(project, whole=True)
    say_next_priors(project.path, codes.num_levels)
