"""Tiny data, models and settings, and processes that end by SIGKILL at a chosen point."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq.data import Augment, extract_codes
from fastvq.models import PixelSNAILConfig, VQVAEConfig, build
from fastvq.training import TrainConfig, train_prior, train_vqvae

VQVAE_CONFIG = VQVAEConfig(
    in_channels=1,
    channels=8,
    residual_channels=4,
    residual_layers=1,
    num_codes=8,
    code_dim=4,
    strides=(2, 2),
    codebook_init="data",
    revive_below=0.01,
)
TOP_CONFIG = PixelSNAILConfig(
    shape=(2, 2),
    num_codes=8,
    num_classes=3,
    condition_channels=8,
    condition_blocks=1,
    channels=8,
    residual_channels=8,
    kernel_size=3,
    blocks=1,
    layers_per_block=1,
    attention_heads=2,
    dropout=0.2,
    attention_dropout=0.2,
)


class Noise:
    """Random 8 x 8 images with three labels; the same numbers as any image set, without files."""

    channels = 1
    size = (8, 8)
    num_classes = 3
    class_names = ("a", "b", "c")

    labels: Tensor | None

    def __init__(self, count: int = 22, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.pixels = torch.from_numpy(generator.uniform(-1, 1, (count, 1, 8, 8)).astype(np.float32))
        self.labels = torch.arange(count) % 3
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Tensor:
        return self.pixels[index]

    def fingerprint(self) -> str:
        return f"noise-{len(self)}-{self.seed}"


def train_config(**changes: Any) -> TrainConfig:
    """13 steps of 8 of 20 training images: an epoch ends inside steps 3, 8, 13 and exactly after steps 5 and 10."""
    settings: dict[str, Any] = {
        "steps": 13,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "ema_decay": 0.9,
        "accumulate": 2,
        "log_every": 3,
        "image_every": None,
        "checkpoint_every": 4,
        "device": "cpu",
    }
    return TrainConfig(**{**settings, **changes})


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, except TensorBoard's, whose records hold the time."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tfevents" not in path.name
    }


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_by_sigkill(function: Callable[[], object]) -> None:
    """Run a function in a forked process and check that SIGKILL ended it."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def before(function: Callable[..., Any], call: int, action: Callable[[], object]) -> Callable[..., Any]:
    """``function``, with ``action`` before its n-th call (from 0)."""
    calls = iter(range(10**9))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            action()
        return function(*args, **kwargs)

    return wrapped


def make_codes(folder: Path) -> Path:
    """Codes of 20 images in ``train``, and of two others in ``validation``."""
    torch.manual_seed(0)
    model = build(VQVAE_CONFIG).eval()
    extract_codes(model, Noise(), range(20), folder / "train")
    extract_codes(model, Noise(), [20, 21], folder / "validation")
    return folder


def stage1(run_dir: Path, config: TrainConfig | None = None, **options: Any) -> Any:
    options = {"augment": Augment(1, True), **options}
    return train_vqvae(options.pop("dataset", Noise()), VQVAE_CONFIG, config or train_config(), run_dir, **options)


def stage2(codes: Path, run_dir: Path, config: TrainConfig | None = None, **options: Any) -> Any:
    options = {"validation_folder": codes / "validation", **options}
    return train_prior(codes / "train", 0, TOP_CONFIG, config or train_config(), run_dir, **options)


def metrics(run_dir: Path, split: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if split in (None, line["split"])]


def state_tensors(run_dir: Path) -> dict[str, bytes]:
    """The final model and all checkpoints, weights, optimiser, generators and sums alike, and the log."""
    return {
        name: data for name, data in files(run_dir).items() if name.split("/")[0] in ("model", "checkpoints", "logs")
    }
