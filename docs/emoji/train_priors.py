#!/usr/bin/env python3
"""Priors for few pictures: they learn from changed copies as well, are told how each was changed, and see wrong codes.

A prior that sees few pictures learns them by heart. Changed copies are more to learn from, but samples would look like
them, unless the prior is told of every copy how it was changed and is asked for unchanged ones afterwards (distribution
augmentation, Jun et al. 2020, proceedings.mlr.press/v119/jun20a.html). Told means classes here: those of the pictures,
and the same again for each kind of change, which are cut off in the end. A prior that has only read right codes does
not find back after an unlucky one, so in training some of the codes that it reads are replaced by similar ones, or by
some that it would have drawn itself (in the spirit of scheduled sampling, Bengio et al. 2015, arXiv 1506.03099).

    python train_priors.py vary PROJECT PICTURES copies.npz    # after fastvq extract --run PROJECT
    python train_priors.py train PROJECT copies.npz 0 top.safetensors --steps 10000
    python train_priors.py train PROJECT copies.npz 1 bottom.safetensors --steps 10000 --batch-size 16
    python train_priors.py keep PROJECT 0 top.safetensors      # writes PROJECT/prior0/model
    python train_priors.py keep PROJECT 1 bottom.safetensors

``train --init FILE`` goes on from the weights of another call, with other settings. ``--help`` names them all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvq.cli.train import fit_to_codes
from fastvq.data import CodeDataset, ImageFolder
from fastvq.models import HierarchicalVQVAE, Prior, PriorConfig, build, load_pretrained, preset
from fastvq.training import WeightAverage

SMALL_CLASS = 400
# Copies of a picture of a class of at most that many pictures, and of one of a larger class.
KINDS = {"as it is": (1, 1), "mirrored": (1, 1), "moved": (12, 3), "recoloured": (14, 3), "turned": (8, 2)}
LABEL = "context_encoder.label.weight"
_CHANNELS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_ENCODED, _VALIDATED = 256, 128


# ---- Copies


def moved(images: Tensor, scale: float, degrees: float, shift: float, generator: torch.Generator) -> Tensor:
    """Images [N, C, H, W] zoomed, turned and shifted (share of the side) by up to that much; half of them mirrored."""

    def spread(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    zoom, angle = 1 / (1 + spread(scale)), spread(math.radians(degrees))
    side = 1 - 2 * torch.randint(2, (len(images),), generator=generator)
    rows = [
        torch.stack([zoom * angle.cos() * side, -zoom * angle.sin(), 2 * spread(shift)], dim=1),
        torch.stack([zoom * angle.sin() * side, zoom * angle.cos(), 2 * spread(shift)], dim=1),
    ]
    places = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


def changed(kind: str, images: Tensor, generator: torch.Generator) -> Tensor:
    """Copies of images [N, 3, H, W] in [-1, 1], changed in that way."""
    if kind == "as it is":
        return images
    if kind == "mirrored":
        return images.flip(3)
    if kind == "moved":
        return moved(images, 0.18, 12, 1 / 16, generator)
    images = moved(images, 0.15, 10, 3 / 64, generator)
    which = torch.randint(15, (len(images),), generator=generator).tolist()
    if kind == "recoloured":
        return torch.stack([image[list(_CHANNELS[i % 5])] for i, image in zip(which, images, strict=True)])
    return torch.stack([image.rot90(1 + i % 3, (1, 2)) for i, image in zip(which, images, strict=True)])


def autoencoder(project: Path) -> HierarchicalVQVAE:
    vqvae = load_pretrained(project / "vqvae" / "model")
    assert isinstance(vqvae, HierarchicalVQVAE)
    return vqvae


def vary(project: Path, pictures: Path, out: Path) -> None:
    """Write the codes of the project's training pictures and of their changed copies."""
    vqvae, codes = autoencoder(project), CodeDataset(project / "codes" / "train")
    size = json.loads((project / "data.json").read_text())["size"]
    images = ImageFolder(pictures, (2 * size[0], 2 * size[1]), check="header")
    generator = torch.Generator().manual_seed(0)
    assert codes.labels is not None
    small = torch.bincount(codes.labels)[codes.labels] <= SMALL_CLASS
    levels: list[list[Tensor]] = [[] for _ in codes.shapes]
    labels, kinds = [], []
    for number, (kind, (of_small, of_large)) in enumerate(KINDS.items()):
        rows = torch.arange(len(codes)).repeat_interleave(torch.where(small, of_small, of_large))
        labels.append(codes.labels[rows])
        kinds.append(torch.full_like(rows, number))
        for taken in rows.split(_ENCODED):
            if number == 0:
                found = [codes.codes(level, taken.numpy()) for level in range(len(levels))]
            else:
                large = torch.stack([images.image(int(codes.source[row])) for row in taken])
                copies = changed(kind, large, generator)
                with torch.no_grad():
                    scaled = F.interpolate(copies, size, mode="bilinear", antialias=True)
                    found = list(vqvae.encode(scaled.clamp(-1, 1)))
            for level, grids in zip(levels, found, strict=True):
                level.append(grids.to(torch.int16))
        print(f"{len(rows)} pictures {kind}", flush=True)
    stored: dict[str, Any] = {f"level{number}": torch.cat(parts).numpy() for number, parts in enumerate(levels)}
    np.savez(out, labels=torch.cat(labels).numpy(), kinds=torch.cat(kinds).numpy(), **stored)


# ---- Training


class Rows(NamedTuple):
    """Codes of each level [N, h, w], and what the prior is told, [N]."""

    levels: list[Tensor]
    labels: Tensor

    def taken(self, rows: Tensor) -> Rows:
        return Rows([level[rows] for level in self.levels], self.labels[rows])


class Neighbours:
    """Codes that stand for others: the nearer in the codebook, the likelier."""

    def __init__(self, codebook: Tensor) -> None:
        distances = torch.cdist(codebook.double(), codebook.double()).square()
        nearest = distances.topk(2, largest=False).values[:, 1].median()
        self.chances = torch.softmax(-distances / nearest, dim=1).float()

    def __call__(self, codes: Tensor) -> Tensor:
        return torch.multinomial(self.chances[codes.flatten()], 1).view_as(codes)


def replaced(codes: Tensor, others: Tensor, share: float) -> Tensor:
    return torch.where(torch.rand(codes.shape) < share, others, codes)


class Draw:
    """Rows of a batch: kinds by weights that go from the first to the second, classes by a power of their size."""

    def __init__(self, labels: Tensor, kinds: Tensor, weights: tuple[Tensor, Tensor], balance: float) -> None:
        self.rows = [torch.nonzero(kinds == kind)[:, 0] for kind in range(len(KINDS))]
        self.weights = weights
        self.chances = [torch.bincount(labels[rows]).double().pow(balance - 1)[labels[rows]] for rows in self.rows]

    def __call__(self, count: int, progress: float) -> Tensor:
        weights = torch.lerp(*self.weights, progress)
        counts = torch.bincount(torch.multinomial(weights, count, True), minlength=len(KINDS)).tolist()
        return torch.cat(
            [
                rows[torch.multinomial(chances, n, True)]
                for rows, chances, n in zip(self.rows, self.chances, counts, strict=True)
                if n
            ]
        )


def bits(prior: Prior, level: int, rows: Rows) -> float:
    """Mean bits per code."""
    total = 0.0
    for part in torch.arange(len(rows.labels)).split(_VALIDATED):
        codes, labels = rows.taken(part)
        with torch.no_grad():
            total += float(prior.nll(codes[level], codes[:level] or None, labels).mean()) * len(part)
    return total / len(rows.labels) / math.log(2)


def prior_config(codes: CodeDataset, options: argparse.Namespace, classes: int | None) -> PriorConfig:
    """Of ``--preset``, for the grids of the level and those above."""
    _, template = preset(f"{options.preset}-{('top', 'bottom')[options.level]}")
    assert isinstance(template, PriorConfig)
    return dataclasses.replace(fit_to_codes(template, codes, options.level, classes), dropout=options.dropout)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    level, vqvae = options.level, autoencoder(options.project)
    known, held_out = (CodeDataset(options.project / "codes" / part) for part in ("train", "validation"))
    assert held_out.labels is not None
    assert known.num_classes is not None
    stored = np.load(options.copies)
    labels, kinds = torch.from_numpy(stored["labels"]), torch.from_numpy(stored["kinds"])
    grids = [torch.from_numpy(stored[f"level{number}"]).long() for number in range(level + 1)]
    rows = Rows(grids, labels + known.num_classes * kinds)
    everything = np.arange(len(held_out))
    validation = Rows([held_out.codes(number, everything) for number in range(level + 1)], held_out.labels)
    classes = known.num_classes * len(KINDS)
    prior = build(prior_config(known, options, classes))
    assert isinstance(prior, Prior)
    prior.start_from_codebooks(vqvae.codebooks[: level + 1])
    if options.init is not None:
        prior.load_state_dict(load_file(options.init))
    weights = (torch.tensor(options.kinds).double(), torch.tensor(options.kinds_at_end or options.kinds).double())
    draw = Draw(labels, kinds, weights, options.balance)
    similar = [Neighbours(codebook) for codebook in vqvae.codebooks[: level + 1]]
    average = WeightAverage(prior, options.ema)
    decayed = [[p for p in prior.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed[0], "weight_decay": options.weight_decay}, {"params": decayed[1], "weight_decay": 0.0}]
    )
    prior.train()
    for step in range(options.steps):
        progress = step / options.steps
        for group in optimizer.param_groups:
            rise = min(1.0, (step + 1) / 200)
            group["lr"] = options.lr * rise * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))
        codes, told = rows.taken(draw(options.batch_size, progress))
        read = replaced(codes[level], similar[level](codes[level]), options.similar)
        above = [
            replaced(grid, near(grid), options.similar_above)
            for grid, near in zip(codes[:level], similar[:level], strict=True)
        ] or None
        if options.own and step % 2 == 0:
            with torch.no_grad():
                chances = torch.softmax(prior(read, above, told).movedim(1, -1) / 0.9, dim=-1)
            read = replaced(read, torch.multinomial(chances.flatten(0, -2), 1).view_as(read), options.own)
        loss = F.cross_entropy(prior(read, above, told), codes[level])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        average.update(prior, step)
        if (step + 1) % options.validate_every == 0 or step + 1 == options.steps:
            assert isinstance(average.model, Prior)
            held = bits(average.model, level, validation)
            print(f"step {step + 1}: {loss.item() / math.log(2):.2f} bits per code, held out {held:.3f}", flush=True)
            save_file(average.model.state_dict(), options.out)


def keep(options: argparse.Namespace) -> None:
    """Write the model of the project's classes, without those of changed copies."""
    codes = CodeDataset(options.project / "codes" / "train")
    prior = build(prior_config(codes, options, codes.num_classes))
    state = load_file(options.weights)
    state[LABEL] = state[LABEL][: codes.num_classes].clone()
    prior.load_state_dict(state)
    prior.save_pretrained(options.project / f"prior{options.level}" / "model")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    varying = commands.add_parser("vary")
    for name in ("project", "pictures", "out"):
        varying.add_argument(name, type=Path)
    training = commands.add_parser("train", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name in ("project", "copies"):
        training.add_argument(name, type=Path)
    training.add_argument("level", type=int, choices=(0, 1))
    training.add_argument("out", type=Path)
    training.add_argument("--steps", type=int, required=True)
    training.add_argument("--init", type=Path, help="weights that another call wrote")
    training.add_argument("--batch-size", type=int, default=32)
    training.add_argument("--lr", type=float, default=2e-3, help="learning rate at its peak")
    training.add_argument("--weight-decay", type=float, default=0.05)
    training.add_argument("--ema", type=float, default=0.999, help="decay of the average of the weights")
    training.add_argument(
        "--kinds", type=float, nargs=len(KINDS), default=[4, 1, 2, 2, 2], help="how often: " + ", ".join(KINDS)
    )
    training.add_argument("--kinds-at-end", type=float, nargs=len(KINDS), help="the same for the last step")
    training.add_argument(
        "--balance", type=float, default=0.7, help="classes as often as this power of their size; 0: all alike"
    )
    training.add_argument("--similar", type=float, default=0.0, help="share of codes read as similar ones")
    training.add_argument("--similar-above", type=float, default=0.0, help="the same for codes of levels above")
    training.add_argument("--own", type=float, default=0.0, help="share read as the prior's own, in every other step")
    training.add_argument("--validate-every", type=int, default=500)
    training.add_argument("--seed", type=int, default=0)
    keeping = commands.add_parser("keep")
    keeping.add_argument("project", type=Path)
    keeping.add_argument("level", type=int, choices=(0, 1))
    keeping.add_argument("weights", type=Path)
    for command in (training, keeping):
        command.add_argument("--preset", default="emoji", help="whose -top and -bottom the priors are")
        command.add_argument("--dropout", type=float, default=0.1)
    options = parser.parse_args(arguments)
    if options.command == "vary":
        vary(options.project, options.pictures, options.out)
    elif options.command == "train":
        train(options)
    else:
        keep(options)


if __name__ == "__main__":
    main()
