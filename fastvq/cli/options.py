"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_drawing(parser: argparse.ArgumentParser, *, seed_note: str = "") -> None:
    parser.add_argument(
        "--label",
        nargs="+",
        metavar="CLASS",
        help="classes that take turns: their numbers, or names as `fastvq info` shows them (default: all)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="T",
        help="below 1: likelier codes, 0: always the likeliest, above 1: more various ones; one value, or one per "
        "level, top first (default: 1)",
    )
    parser.add_argument("--top-k", type=int, help="draw from the likeliest K codes")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest codes of together this probability")
    parser.add_argument("--seed", type=int, help=f"any integer, modulo 2**64 (default: a new one, printed){seed_note}")
    parser.add_argument(
        "--engine", default="auto", help="cuda, cpu, torch, naive, or auto for the fastest that runs (default: auto)"
    )
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16"),
        help="weights in the steps of the cuda and cpu engines; bfloat16 is not exact (default: float32)",
    )
    parser.add_argument("--micro-batch", type=int, help="samples computed together")


def add_cache_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-images",
        type=Path,
        nargs="?",
        const=True,
        metavar="DIR",
        help="store all images decoded and resized (H x W x channels bytes each) and take them from there, in DIR or, "
        "for all commands that follow, in RUN/cache",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="a folder of images, or 'digits' (default: the project's)")
    add_skip_broken(parser)
    parser.add_argument(
        "--changed-data",
        action="store_true",
        help="take other images than the project's, of the same classes, for this command alone",
    )
    parser.add_argument(
        "--flip", action="store_true", default=None, help="mirror images for classifiers (default: as the project)"
    )
    parser.add_argument(
        "--shift", type=int, metavar="PIXELS", help="shift images for classifiers (default: as the project)"
    )
    parser.add_argument("--validation", type=float, metavar="FRACTION", help="share held out (default: the project's)")


def add_skip_broken(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        default=None,
        help="leave out images that cannot be read (a project remembers it)",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="project folder")


def add_shard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="do part I of N, I in 0..N-1, or 'env': as SLURM_ARRAY_TASK_ID, RANK or SLURM_PROCID say",
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be trained, and what it takes; write nothing"
    )


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on exactly where an earlier run was stopped; its record has all other settings",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only results and what is wrong")


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> argparse._MutuallyExclusiveGroup:
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="a project, saved pipeline, model, run or checkpoint",
    )
    group.add_argument("--pretrained", metavar="NAME", help="a model that ships with fastvq, such as digits")
    add_weights(parser)
    return group


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=("last", "best"),
        default="last",
        help="of a project's priors, or of a run: those of the last step, or of the best validation (default: last)",
    )


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--out", type=Path, default=Path(default), help=f"where to write (default: {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_training(
    parser: argparse.ArgumentParser, *, preset: str | None, kind: str, learning_rate: float, batch_size: int
) -> None:
    recipe = "--size, --batch-size, --lr and --steps" if kind == "autoencoder" else "--batch-size, --lr and --steps"
    parser.add_argument(
        "--preset",
        help=f"architecture of the {kind}, and what of {recipe} is not typed where it has a recipe; `fastvq info` "
        f"lists them (default: {preset or 'the one for the preset of the autoencoder'})",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the preset; repeatable"
    )
    parser.set_defaults(default_preset=preset)
    add_schedule(
        parser, learning_rate=learning_rate, batch_size=batch_size, weight_decay=0.0, ema=0.999, grad_clip=None
    )
    parser.add_argument("--optimizer", choices=("adamw", "adam"), help="(default: adamw)")
    parser.add_argument("--grad-clip", type=float, help="clip the gradient's norm")
    parser.add_argument("--accumulate", type=int, metavar="PARTS", help="compute each step in parts (default: 1)")
    parser.add_argument("--bf16", action="store_true", default=None, help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", default=None, help="torch.compile the model")
    parser.add_argument("--seed", type=int, help="(default: 0)")
    parser.add_argument("--image-every", type=int, metavar="STEPS", help="(default: 1000)")
    add_dry_run(parser)
    add_resume(parser)


def add_schedule(
    parser: argparse.ArgumentParser,
    *,
    learning_rate: float,
    batch_size: int,
    weight_decay: float,
    ema: float,
    **more: float | None,
) -> None:
    """Options without a default of argparse's: a run that goes on takes from its record what is not typed."""
    defaults = {
        "batch_size": batch_size,
        "lr": learning_rate,
        "weight_decay": weight_decay,
        "ema": ema,
        "log_every": 50,
        "checkpoint_every": 1000,
        **more,
    }
    parser.set_defaults(defaults=defaults)
    parser.add_argument(
        "--steps",
        type=int,
        help="optimiser steps; with --resume a new number of them, with which the run ends",
    )
    parser.add_argument("--batch-size", type=int, help=f"images per step (default: {batch_size})")
    parser.add_argument("--lr", type=float, help=f"learning rate (default: {learning_rate})")
    parser.add_argument("--weight-decay", type=float, help=f"(default: {weight_decay:g})")
    parser.add_argument("--warmup", type=int, metavar="STEPS", help="linear warm-up, then cosine decay (default: 0)")
    parser.add_argument("--ema", type=float, metavar="DECAY", help=f"weight averaging; 0: off (default: {ema})")
    parser.add_argument(
        "--no-cuda-graph",
        dest="cuda_graph",
        action="store_false",
        default=None,
        help="on a GPU, launch the work of every step anew instead of replaying a recording",
    )
    parser.add_argument(
        "--workers", type=int, help="processes that load data (default: 0, but some for image files beside a GPU)"
    )
    parser.add_argument("--log-every", type=int, metavar="STEPS", help="(default: 50)")
    parser.add_argument("--validate-every", type=int, metavar="STEPS", help="(default: after every epoch)")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="instead of a progress bar a line every --log-every steps, as where stderr is no terminal",
    )
    parser.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="(default: 1000)")
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="FOLDER",
        help="start from the weights of a saved model, a run or a checkpoint, whose architecture is the default then",
    )
