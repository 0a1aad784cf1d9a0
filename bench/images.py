"""Starting with a folder of images and loading them: ``python -m bench.images --out bench/results/images``.

Files per second that a start takes: every file decoded, headers alone, and a second start with what the first one has
found out. Images per second that are loaded: as torchvision's ImageFolder with Resize and CenterCrop does it (Pillow
alone, without torchvision), and by fastvq: whole files, JPEG files decoded at a reduced size, images that were stored
decoded, and processes that load whole files. What is compared takes turns, and medians count. The files are in the
system's memory.

The pictures are noise with the spectrum of photographs. How far reduced decoding is from whole decoding is in levels of
255.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.files import free_path
from bench.machine import describe_commit, describe_machine, describe_versions, load_average, now
from fastvq.data import ImageFolder, load_images
from fastvq.training.batches import Batch, StepBatches

_DIFFERENT = 12
_ROUNDS = 5


@dataclass(frozen=True)
class Pictures:
    """A folder of pictures, (W, H) in pixels, that are loaded as squares of ``size``."""

    name: str
    kind: str
    sides: tuple[int, int]
    size: int
    files: int
    loaded: int

    def make(self, folder: Path) -> None:
        """Write the files; a few pictures many times, in ten classes."""
        written: list[bytes] = []
        for seed in range(min(_DIFFERENT, self.files)):
            path = folder / f"one.{self.kind}"
            noise(*self.sides, seed).save(path, quality=90)
            written.append(path.read_bytes())
            path.unlink()
        for index in range(self.files):
            place = folder / f"class{index % 10}"
            place.mkdir(exist_ok=True)
            (place / f"{index:06d}.{self.kind}").write_bytes(written[index % len(written)])


CASES = (
    Pictures("tiles-png-128-to-64", "png", (128, 128), 64, 5000, 1000),
    Pictures("tiles-jpg-128-to-64", "jpg", (128, 128), 64, 5000, 1000),
    Pictures("photos-jpg-500x375-to-64", "jpg", (500, 375), 64, 1500, 500),
    Pictures("photos-jpg-500x375-to-256", "jpg", (500, 375), 256, 1500, 500),
    Pictures("camera-jpg-4032x3024-to-256", "jpg", (4032, 3024), 256, 24, 24),
)


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Layers of noise from coarse to fine, each with less contrast."""
    generator = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for side in (2**power for power in range(2, 11)):
        if side > max(width, height):
            break
        for channel in range(3):
            layer = Image.fromarray(generator.normal(size=(side, side)).astype(np.float32))
            scaled = np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
            total[..., channel] += scaled / side**0.9
    pixels = 128 + 50 * (total - total.mean()) / total.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def with_pillow(path: Path, size: int) -> Tensor:
    """What torchvision's ImageFolder does with Resize, CenterCrop and ToTensor."""
    with path.open("rb") as file:
        image = Image.open(file).convert("RGB")
    short = min(image.size)
    width, height = (side * size // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def measure(case: Pictures, workers: int, rounds: int) -> dict[str, Any]:
    """Rates of all ways; the images of those that promise the same are compared."""
    with TemporaryDirectory() as place:
        folder, known = Path(place, "images"), Path(place, "known")
        folder.mkdir()
        case.make(folder)

        def start(**options: Any) -> ImageFolder:
            return ImageFolder(folder, case.size, **options)

        def first() -> None:
            known.unlink(missing_ok=True)
            start(check="header", known=known).remember()

        starts = _rates(
            {
                "decode": lambda: start(check="decode"),
                "headers": first,
                "second": lambda: start(check="header", known=known),
            },
            case.files,
            rounds,
        )
        whole, draft, stored = start(check="header"), start(check="header", draft=True), start(check="header")
        began = perf_counter()
        stored.keep_pixels(place)
        storing = case.files / (perf_counter() - began)
        rows = range(case.loaded)
        expected = load_images(whole, rows)
        assert torch.equal(load_images(stored, rows), expected)
        assert torch.equal(torch.cat([batch[0] for batch in _batches(whole, rows, workers)]), expected)
        apart = (load_images(draft, rows) - expected).abs() * 127.5
        loads = _rates(
            {
                "pillow": lambda: [with_pillow(path, case.size) for path in whole.paths[: case.loaded]],
                "whole": lambda: load_images(whole, rows),
                "draft": lambda: load_images(draft, rows),
                "stored": lambda: load_images(stored, rows),
                f"whole, {workers} processes": lambda: list(_batches(whole, rows, workers)),
            },
            case.loaded,
            rounds,
        )
    return {
        "case": case.name,
        "files": case.files,
        "files_per_s": starts,
        "images": case.loaded,
        "images_per_s": loads,
        "stored_per_s": storing,
        "draft_difference": {"mean": float(apart.mean()), "largest": float(apart.max())},
    }


def _batches(data: ImageFolder, rows: range, workers: int) -> Any:
    """The images in order, in batches, as training has them loaded."""
    size = 20

    class InOrder(StepBatches):
        def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
            found = np.arange(step * size, min((step + 1) * size, len(rows)))
            return found, np.zeros_like(found)

    def load(found: np.ndarray, epochs: np.ndarray) -> Batch:
        return (load_images(data, found),)

    return InOrder(load, len(rows), size, 0).iterate(
        range(-(-len(rows) // size)), num_workers=workers, pin_memory=False
    )


def _rates(ways: dict[str, Callable[[], object]], count: int, rounds: int) -> dict[str, float]:
    """Items per second of each way: the median over rounds in which all take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            began = perf_counter()
            run()
            seconds[name].append(perf_counter() - began)
    return {name: count / statistics.median(found) for name, found in seconds.items()}


def main() -> None:
    """Print a line for each folder, and write all to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that load (default: cores)")
    arguments = parser.parse_args()
    load, found = load_average(), []
    for case in CASES:
        found.append(measure(case, arguments.workers, _ROUNDS))
        print(json.dumps(found[-1]), flush=True)
    source = {"date": now(), "machine": describe_machine(), "versions": describe_versions(), **describe_commit()}
    path = free_path(arguments.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**source, "load_before": load, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
