"""How much of a codebook lives under each of its settings: ``python -m bench.codebooks --data NAME=FOLDER --out DIR``.

The same autoencoder from the same seed under each setting, on the same batches of a folder of pictures; after each of
--at steps: perplexity and share of codes in use of each level on held-out pictures, and their mean squared error
(pixels in [-1, 1]). ``--data photographs`` stands for tiles of the photographs of scikit-image and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench.files import free_path
from bench.machine import describe_commit, describe_machine, describe_versions, now
from fastvq import VQVAE2, VectorQuantizer
from fastvq.data import ImageFolder, load_images, split_indices
from fastvq.data.usage import CodeUse
from fastvq.training.batches import StepBatches
from fastvq.training.recorded import Recorded

_LIVE = {"init": "kmeans", "revive_below": 1.0}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "EMA": {},
    "k-means": {"init": "kmeans"},
    "revival 1": {"revive_below": 1.0},
    "k-means, revival 0.1": {"init": "kmeans", "revive_below": 0.1},
    "k-means, revival 1": _LIVE,
    "k-means, revival 1, cosine": {**_LIVE, "metric": "cosine"},
    "k-means, revival 1, rotation": {**_LIVE, "gradient": "rotation"},
}
PHOTOGRAPHS = "photographs"
# Of scikit-image's, those that are colour photographs; tiles of these sides, at half that distance.
_PICTURES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")
_TILES = (64, 128)


def photographs(folder: Path) -> Path:
    """Write tiles of the photographs into a folder for each, which it returns."""
    import skimage
    from sklearn.datasets import load_sample_images

    shipped = Path(skimage.__file__).parent / "data"
    pictures = {Path(name).stem: np.asarray(Image.open(shipped / name).convert("RGB")) for name in _PICTURES}
    found = load_sample_images()
    pictures |= {Path(name).stem: image for name, image in zip(found.filenames, found.images, strict=True)}
    for name, pixels in pictures.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for side in _TILES:
            for top in range(0, pixels.shape[0] - side + 1, side // 2):
                for left in range(0, pixels.shape[1] - side + 1, side // 2):
                    tile = Image.fromarray(pixels[top : top + side, left : left + side])
                    tile.save(folder / name / f"{side}_{top:04d}_{left:04d}.png")
    return folder


def autoencoder(options: Mapping[str, Any], channels: int, seed: int = 0) -> VQVAE2:
    """That of the preset ``photos64`` with other codebooks."""
    torch.manual_seed(seed)
    model = VQVAE2.from_preset("photos64", channels=channels, residual_channels=channels // 2)
    config = model.config
    for level in range(model.num_levels):
        model.quantizers[level] = VectorQuantizer(
            config.num_codes, config.code_dim, decay=config.decay, commitment=config.commitment, **options
        )
    return model


@torch.no_grad()
def measure(model: VQVAE2, images: Tensor) -> dict[str, float]:
    """Of held-out images [N, C, H, W]."""
    model.eval()
    squared, used = 0.0, torch.zeros(model.num_levels, model.config.num_codes, dtype=torch.float64)
    for part in images.split(64):
        out = model(part)
        squared += float(F.mse_loss(out.reconstruction, part)) * len(part) / len(images)
        for level, codes in enumerate(out.codes):
            used[level] += torch.bincount(codes.flatten(), minlength=used.shape[1]).cpu()
    model.train()
    found = {"mse": squared}
    for level, counts in enumerate(used):
        use = CodeUse.of_counts(level, model.num_levels, counts)
        found |= {f"perplexity_{level}": use.perplexity, f"usage_{level}": use.share}
    return found


def train(
    images: Tensor,
    name: str,
    at: Sequence[int],
    *,
    batch: int,
    rate: float,
    channels: int,
    device: torch.device,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """What is found after each of ``at`` steps, in rising order; the seed is that of weights and batches."""
    training, held_out = split_indices(len(images), 0.1, seed=0)
    validation = images[held_out].to(device)
    model = autoencoder(SETTINGS[name], channels, seed).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)

    def passes(tensors: Sequence[Tensor]) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        out = model(tensors[0])
        loss = F.mse_loss(out.reconstruction, tensors[0]) + out.commitment_loss
        loss.backward()
        return loss.detach()

    step = Recorded(passes, device)
    step.recording = device.type == "cuda"
    batches = StepBatches(lambda rows, _: (images[training[rows]],), len(training), batch, seed=seed)
    began = time.perf_counter()
    for number in range(max(at)):
        loss = step(batches[number])
        optimizer.step()
        if number + 1 in at:
            if not torch.isfinite(loss):
                raise ArithmeticError(f"{name}: the loss of step {number + 1} is {float(loss)}")
            yield {"setting": name, "step": number + 1, **measure(model, validation)}
            print(f"{name}: {number + 1} steps in {time.perf_counter() - began:.0f} s", flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a line per setting and number of steps."""
    lines = [
        "| data | setting | steps | MSE | perplexity, top and bottom | codes in use |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        perplexity = ", ".join(f"{row[f'perplexity_{level}']:.0f}" for level in (0, 1))
        usage = ", ".join(f"{row[f'usage_{level}']:.0%}" for level in (0, 1))
        lines.append(
            f"| {row['data']} | {row['setting']} | {row['step']} | {row['mse']:.4f} | {perplexity} | {usage} |"
        )
    return "\n".join(lines)


def opened(given: str, size: int) -> tuple[str, Tensor]:
    """Name and images of what ``--data`` was given."""
    name, _, folder = given.partition("=")
    with tempfile.TemporaryDirectory() as scratch:
        path = photographs(Path(scratch)) if name == PHOTOGRAPHS and not folder else Path(folder or name)
        dataset = ImageFolder(path, size)
        return name, load_images(dataset, range(len(dataset)))


def main() -> None:
    """Print a table, and write it to a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.codebooks", description=__doc__)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FOLDER", help="repeatable")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--setting", action="append", choices=list(SETTINGS), help="repeatable (default: all)")
    parser.add_argument("--at", type=int, nargs="+", default=[200, 1000, 5000], metavar="STEPS")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for given in options.data:
        data, images = opened(given, options.size)
        for name in options.setting or SETTINGS:
            found = train(
                images,
                name,
                options.at,
                batch=options.batch_size,
                rate=options.lr,
                channels=options.channels,
                device=torch.device(options.device),
                seed=options.seed,
            )
            rows += ({"data": data, "images": len(images), **row} for row in found)
    path = free_path(options.out)
    names = ("size", "batch_size", "lr", "channels", "device", "seed")
    description = {
        "time": now(),
        "commit": describe_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "settings": {name: getattr(options, name) for name in names},
        "rows": rows,
    }
    path.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    print(table(rows), f"\n\nwritten to {path}")


if __name__ == "__main__":
    main()
