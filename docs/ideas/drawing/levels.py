"""A VQ-VAE of two levels: its parts at 256 x 256 pixels, and what the levels of the shipped emoji model hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from drawing.style import BLUE, GREEN, INK, LINE, ORANGE, PALE, SKY, figure
from fastvq import VQVAE2, Pipeline
from fastvq.models import VectorQuantizer

SIDE = 256
SAMPLES = (("smileys-emotion", 1), ("people-body", 0), ("flags", 0))  # class and seed
OTHERS = 100  # what is added to the seed for the bottoms drawn anew
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
        axes.set_ylim(-0.1, 8)
        axes.set_axis_off()
        image, low, high = f"{SIDE} x {SIDE}", f"{bottom[0]} x {bottom[1]}", f"{top[0]} x {top[1]}"
        _box(axes, 1.2, 2.6, f"image\n{image}", PALE)
        _box(axes, 3.7, 2.6, f"encoder\n{low} features", SKY)
        _box(axes, 3.7, 5.2, f"encoder\n{high} features", SKY)
        _box(axes, 6.5, 5.2, f"nearest of\n{num_codes} codes", ORANGE)
        _box(axes, 6.5, 2.6, f"nearest of\n{num_codes} codes", ORANGE)
        _box(axes, 9.2, 5.2, f"top codes\n{high}", PALE)
        _box(axes, 9.2, 2.6, f"bottom codes\n{low}", PALE)
        _box(axes, 12.6, 3.9, f"decoder\nimage {image}", SKY)
        _box(axes, 9.2, 7.3, "top prior\ngiven the class", GREEN)
        _box(axes, 9.2, 0.6, "bottom prior\ngiven class, top", GREEN)
        _arrow(axes, (2.3, 2.6), (2.6, 2.6))
        _arrow(axes, (3.7, 3.2), (3.7, 4.6))
        _arrow(axes, (4.8, 5.2), (5.4, 5.2))
        _arrow(axes, (4.8, 2.6), (5.4, 2.6))
        _arrow(axes, (7.6, 5.2), (8.1, 5.2))
        _arrow(axes, (7.6, 2.6), (8.1, 2.6))
        _arrow(axes, (8.6, 4.6), (6.9, 3.2))
        axes.text(7.5, 4.0, "decoded", ha="right", va="center", fontsize=8)
        _arrow(axes, (10.3, 5.0), (11.45, 4.3))
        _arrow(axes, (10.3, 2.8), (11.45, 3.5))
        _arrow(axes, (9.2, 6.7), (9.2, 5.8), GREEN)
        _arrow(axes, (9.2, 1.2), (9.2, 2.0), GREEN)


def _box(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    wide, high = 2.2, 1.1
    box = (x - wide / 2, y - high / 2)
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(box, wide, high, boxstyle=style, facecolor=colour, edgecolor=INK, linewidth=0.8))
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if colour in (BLUE, GREEN) else INK)


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="->", mutation_scale=11, color=colour, linewidth=1))


def columns(pipeline: Pipeline, label: str, seed: int) -> list[np.ndarray]:
    """A row of the picture: top codes, the top decoded alone, bottom codes, both decoded, and two more bottoms.

    Codes [h, w] as numbers in [0, 1], images [H, W, 3] likewise.
    """
    model = pipeline.vqvae
    assert isinstance(model, VQVAE2)
    drawn = pipeline.sample(1, label=label, temperature=TEMPERATURE, seed=seed)
    top, bottom = drawn.codes
    others = pipeline.sample(2, label=label, codes=(top,), temperature=TEMPERATURE, seed=seed + OTHERS)
    with torch.no_grad():
        alone = model.preview((top,))
    images = torch.cat([alone, drawn.images, others.images]).clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1).numpy()
    of_top, of_bottom = (places(quantizer) for quantizer in model.quantizers)
    return [of_top[top[0]], images[0], of_bottom[bottom[0]], *images[1:]]


def places(quantizer: VectorQuantizer) -> np.ndarray:
    """A number in [0, 1] for each code, near where vectors are: their order along their first principal component."""
    vectors = quantizer.embedding.double().numpy()
    centred = vectors - vectors.mean(0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    # Its sign is a matter of chance.
    along = centred @ (axis if axis[np.abs(axis).argmax()] > 0 else -axis)
    return along.argsort().argsort() / (len(along) - 1)


def draw_emoji(path: Path) -> None:
    pipeline = Pipeline.from_pretrained("emoji")
    (top, bottom) = (f"{prior.config.shape[0]} x {prior.config.shape[1]}" for prior in pipeline.priors)
    titles = (f"top codes\n{top}", "the top alone,\ndecoded", f"bottom codes\n{bottom}", "both,\ndecoded")
    with figure(path, 3.9) as drawn:
        axes = drawn.subplots(len(SAMPLES), 6)
        drawn.subplots_adjust(left=0.005, right=0.995, top=0.89, bottom=0.005, wspace=0.05, hspace=0.05)
        for row, (label, seed) in zip(axes, SAMPLES, strict=True):
            for axis, shown in zip(row, columns(pipeline, label, seed), strict=True):
                axis.imshow(shown, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                for spine in axis.spines.values():
                    spine.set(visible=True, color=LINE)
        for axis, title in zip(axes[0], titles, strict=False):
            axis.set_title(title, fontsize=8.5)
        drawn.text(0.835, 0.9, "under the same top,\nbottoms drawn anew", ha="center", va="bottom", fontsize=8.5)
