"""``fastvq inpaint``: a region of an image painted anew."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvq.cli.generate import (
    classes_asked,
    columns_by_class,
    draw_settings,
    record,
    require_free_outputs,
)
from fastvq.cli.project import choose_device, load_pipeline
from fastvq.data import box_region, load_picture, mask_region, save_grid
from fastvq.data.grid import grid_size, require_picture
from fastvq.sampling import Pipeline
from fastvq.sampling.samples import write_samples

_COLUMNS = 8


def inpaint(arguments: argparse.Namespace) -> None:
    picture = require_free_outputs(arguments)
    pipeline = load_pipeline(
        arguments.checkpoint, arguments.pretrained, choose_device(arguments.device), arguments.weights
    )
    classes = classes_asked(pipeline, arguments.label)
    channels, height, width = pipeline.image_shape
    captions = _captions(pipeline, arguments.n, classes)
    columns = len(captions)
    if picture:
        count = columns * -(-arguments.n // (columns - 2))
        require_picture("--out", arguments.out, *grid_size(count, height, width, columns, captions=captions)[:2])
    image = load_picture(arguments.image, (height, width), channels=channels)
    if arguments.box is not None:
        mask = box_region(arguments.image, arguments.box, (height, width))
    else:
        mask = mask_region(arguments.image, arguments.mask, (height, width))
    labels = pipeline.labels(range(arguments.n), classes)
    samples = pipeline.inpaint(
        image,
        mask,
        arguments.n,
        label=labels,
        margin=arguments.margin,
        rounds=arguments.rounds,
        paste=arguments.paste,
        **draw_settings(arguments),
    )
    if picture:
        grid = _beside(image, mask, samples.images.cpu(), columns)
        save_grid(arguments.out, grid, columns, captions=captions, overwrite=arguments.overwrite)
    else:
        settings = record(arguments)
        settings |= {
            "image": str(arguments.image),
            "margin": arguments.margin,
            "rounds": arguments.rounds,
            "paste": arguments.paste,
        }
        settings |= {"box": arguments.box} if arguments.mask is None else {"mask": str(arguments.mask)}
        write_samples(arguments.out, samples, settings, overwrite=arguments.overwrite)
    print(f"{arguments.n} results in {arguments.out} (seed {samples.seed})")


def _captions(pipeline: Pipeline, n: int, classes: Sequence[int] | None) -> list[str]:
    """Of the columns: the image, what is kept, and the results, by class if several take turns."""
    _, names = columns_by_class(pipeline, n, classes)
    return ["image", "kept", *(names or ["painted"] * min(n, _COLUMNS))]


def _beside(image: Tensor, mask: Tensor, results: Tensor, columns: int) -> Tensor:
    """Before the results the image and what is kept of it, grey elsewhere; before further rows of them nothing."""
    rows = []
    beside = torch.cat([image, image.masked_fill(mask, 0)])
    for row in results.split(columns - 2):
        rows += [beside, row]
        beside = torch.ones_like(beside)
    return torch.cat(rows)
