"""The command that puts parts together: ``merge``."""

from __future__ import annotations

import argparse

from fastvq.cli.generate import check_free
from fastvq.cli.project import require_folder_name
from fastvq.sampling import merge_samples


def merge(arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        require_folder_name(arguments.out)
        check_free(arguments.out, arguments.overwrite, picture=False)
    out = merge_samples(arguments.folder, arguments.out, overwrite=arguments.overwrite)
    print(f"all samples in {out}")
