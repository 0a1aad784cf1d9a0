"""A VQ-VAE of two levels: its parts at 256 x 256 pixels, and what the levels of the shipped emoji model hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from drawing.style import BLUE, GREEN, INK, LINE, ORANGE, PALE, SKY, figure
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from fastvq import VQVAE2, Pipeline
from fastvq.models import VectorQuantizer

SIDE = 256
SAMPLES = (("smileys-emotion", 3), ("flags", 1), ("people-body", 2))  # class and seed
TEMPERATURE = 0.7


def grids() -> tuple[tuple[tuple[int, ...], ...], int, int]:
    """Grids of codes at 256 x 256 (top first), codes of each level, and channels of the features, of the preset."""
    model = VQVAE2.from_preset("imagenet256")
    return model.code_shapes((SIDE, SIDE)), model.config.num_codes, model.config.channels


def draw_model(path: Path) -> None:
    (top, bottom), num_codes, _ = grids()
    with figure(path, 3.5) as drawn:
        axes = drawn.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, 14)
        axes.set_ylim(0, 7)
        axes.set_axis_off()
        image, low, high = f"{SIDE} x {SIDE}", f"{bottom[0]} x {bottom[1]}", f"{top[0]} x {top[1]}"
        _box(axes, 1.1, 2.6, f"image\n{image}", PALE)
        _box(axes, 3.7, 2.6, f"encoder\n{low} features", SKY)
        _box(axes, 3.7, 5.2, f"encoder\n{high} features", SKY)
        _box(axes, 6.5, 5.2, f"nearest of\n{num_codes} codes", ORANGE)
        _box(axes, 6.5, 2.6, f"nearest of\n{num_codes} codes", ORANGE)
        _box(axes, 9.2, 5.2, f"top codes\n{high}", PALE)
        _box(axes, 9.2, 2.6, f"bottom codes\n{low}", PALE)
        _box(axes, 12.4, 3.9, f"decoder\nimage {image}", SKY)
        _box(axes, 12.4, 6.3, "top prior", GREEN)
        _box(axes, 12.4, 1.0, "bottom prior", GREEN)
        _arrow(axes, (2.1, 2.6), (2.6, 2.6))
        _arrow(axes, (3.7, 3.2), (3.7, 4.6))
        _arrow(axes, (4.8, 5.2), (5.5, 5.2))
        _arrow(axes, (4.8, 2.6), (5.5, 2.6))
        _arrow(axes, (7.5, 5.2), (8.2, 5.2))
        _arrow(axes, (7.5, 2.6), (8.2, 2.6))
        _arrow(axes, (8.6, 4.6), (6.9, 3.2))
        axes.text(7.0, 4.0, "decoded", ha="right", va="center", fontsize=8)
        _arrow(axes, (10.2, 5.0), (11.3, 4.25))
        _arrow(axes, (10.2, 2.8), (11.3, 3.55))
        _arrow(axes, (11.3, 6.2), (10.0, 5.8), GREEN)
        _arrow(axes, (11.3, 1.1), (10.0, 2.0), GREEN)
        _arrow(axes, (9.7, 4.6), (12.0, 1.55), GREEN, bend=-0.32)
        axes.text(12.4, 0.22, "drawn given the top", ha="center", va="center", fontsize=8)


def _box(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    wide, high = 2.0, 1.1
    box = (x - wide / 2, y - high / 2)
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(box, wide, high, boxstyle=style, facecolor=colour, edgecolor=INK, linewidth=0.8))
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if colour in (BLUE, GREEN) else INK)


def _arrow(
    axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str = INK, bend: float = 0.0
) -> None:
    shape = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(begin, end, arrowstyle="->", mutation_scale=11, color=colour, connectionstyle=shape, linewidth=1)
    )


def emoji() -> tuple[Pipeline, tuple[torch.Tensor, ...]]:
    """The shipped model, and codes of a sample of each of SAMPLES, top first."""
    pipeline = Pipeline.from_pretrained("emoji")
    drawn = [
        pipeline.sample(1, label=label, temperature=TEMPERATURE, seed=seed).codes for label, seed in SAMPLES
    ]
    return pipeline, tuple(torch.cat(level) for level in zip(*drawn, strict=True))


def places(quantizer: VectorQuantizer) -> np.ndarray:
    """A number in [0, 1] for each code, near where vectors are: their order along their first principal component."""
    vectors = quantizer.embedding.double().numpy()
    centred = vectors - vectors.mean(0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    # Its sign is a matter of chance.
    along = centred @ (axis if axis[np.abs(axis).argmax()] > 0 else -axis)
    return along.argsort().argsort() / (len(along) - 1)


def draw_emoji(path: Path) -> None:
    pipeline, codes = emoji()
    model = pipeline.vqvae
    with torch.no_grad():
        pictures = [model.preview(codes[:1]), model.decode(codes)]
    names = [f"{name} codes, {grid.shape[1]} x {grid.shape[2]}" for name, grid in zip(("top", "bottom"), codes, strict=True)]
    titles = (names[0], "decoded from the top alone", names[1], "decoded from both")
    with figure(path, 5.35) as drawn:
        axes = drawn.subplots(len(SAMPLES), 4)
        drawn.subplots_adjust(left=0.005, right=0.995, top=0.95, bottom=0.005, wspace=0.03, hspace=0.03)
        for index, row in enumerate(axes):
            for level, quantizer in enumerate(model.quantizers):
                row[2 * level].imshow(places(quantizer)[codes[level][index]], cmap="cividis", vmin=0, vmax=1)
                image = pictures[level][index].clamp(-1, 1).add(1).div(2).permute(1, 2, 0)
                row[2 * level + 1].imshow(image.numpy())
            for axis in row:
                axis.set_xticks([])
                axis.set_yticks([])
                for spine in axis.spines.values():
                    spine.set(visible=True, color=LINE)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=8.5)
