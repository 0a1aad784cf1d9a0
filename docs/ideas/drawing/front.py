"""The skewed front of a prior without attention, beside raster order."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from PIL import Image, ImageDraw, ImageFont

from drawing.style import BLUE, INK, LINE, PALE, RED, SKY, bare, cell, figure, frame
from fastvq import PixelSNAIL
from fastvq.sampling.plan import Front, compile_plan

Place = tuple[int, int]
SHOWN, ANIMATED = (8, 12), (12, 16)  # grids of the picture and of the animation
TARGET = (5, 4)
CELL, GAP, TOP, MARGIN = 20, 40, 46, 12  # pixels
FRAME_TIME, LAST_TIME = 70, 3000  # milliseconds


def example(shape: tuple[int, int]) -> PixelSNAIL:
    """A strict prior with kernels of 5, as in the paper's bottom priors, and few channels."""
    return PixelSNAIL(
        shape=shape,
        num_codes=8,
        channels=4,
        residual_channels=4,
        kernel_size=5,
        blocks=1,
        layers_per_block=2,
        attention=False,
    )


def numbers(front: Front) -> dict[Place, int]:
    """The step, from 0, in which each position is drawn; of a front with tiles of one column."""
    return {
        (row, column): step for step in range(front.steps) for row, columns in front.active(step) for column in columns
    }


def raster_numbers(shape: tuple[int, int]) -> dict[Place, int]:
    return {(row, column): row * shape[1] + column for row in range(shape[0]) for column in range(shape[1])}


def direct(prior: PixelSNAIL, target: Place) -> set[Place]:
    """What one masked convolution reads at a position."""
    layer = prior.blocks[0].layers[0].conv1  # type: ignore[union-attr, index]
    return _moved({target}, layer.taps, prior.config.shape)  # type: ignore[union-attr, arg-type]


def reach(prior: PixelSNAIL, target: Place) -> set[Place]:
    """The codes on which the logits at a position depend, through all layers: read off the taps, backwards."""
    shape, places = prior.config.shape, {target}
    for block in reversed(prior.blocks):
        for layer in reversed(block.layers):  # type: ignore[arg-type, union-attr]
            # Around both convolutions of a layer goes a residual connection, which keeps the position itself.
            places |= _moved(_moved(places, layer.conv2.taps, shape), layer.conv1.taps, shape)
    return _moved(places, prior.input.taps, shape)


def _moved(places: set[Place], taps: tuple[Place, ...], shape: tuple[int, int]) -> set[Place]:
    moved = {(row + dr, column + dc) for row, column in places for dr, dc in taps}
    return {(row, column) for row, column in moved if 0 <= row < shape[0] and 0 <= column < shape[1]}


def draw(path: Path) -> None:
    prior = example(SHOWN)
    front = compile_plan(prior).front(1)
    with figure(path, 2.75) as drawn:
        axes = drawn.subplots(1, 2)
        drawn.subplots_adjust(left=0.01, right=0.99, top=0.91, bottom=0.01, wspace=0.04)
        step = numbers(front)
        now = step[TARGET]
        axes[0].set_title(f"the step of each code: {front.steps} in place of {len(step)}")
        colours = {place: RED if at == now else PALE if at < now else "white" for place, at in step.items()}
        _numbered(axes[0], step, colours)
        axes[1].set_title("what the framed code depends on")
        near, far = direct(prior, TARGET), reach(prior, TARGET)
        colours = {place: BLUE if place in near else SKY if place in far else "white" for place in step}
        _numbered(axes[1], step, colours)
        for both in axes:
            both.set_aspect("equal")
            frame(both, *TARGET)


def _numbered(axes: Axes, step: dict[Place, int], colours: dict[Place, str]) -> None:
    bare(axes, *SHOWN)
    for (row, column), at in step.items():
        colour = colours[row, column]
        cell(axes, row, column, colour)
        ink = "white" if colour in (BLUE, RED) else INK
        axes.text(column + 0.5, row + 0.54, str(at + 1), ha="center", va="center", color=ink, fontsize=7.5)


def animate(path: Path) -> None:
    """Both orders on the same grid, until raster order has ended too."""
    shape = ANIMATED
    orders = (
        ("raster order", raster_numbers(shape)),
        ("along the front", numbers(compile_plan(example(shape)).front(1))),
    )
    last = max(max(step.values()) for _, step in orders)
    palette = _palette()
    frames = [_frame(orders, at).quantize(palette=palette, dither=Image.Dither.NONE) for at in range(-1, last + 1)]
    times = [FRAME_TIME] * (len(frames) - 1) + [LAST_TIME]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)


def _frame(orders: tuple[tuple[str, dict[Place, int]], ...], at: int) -> Image.Image:
    """The state after step ``at``, -1 being before the first."""
    rows, columns = ANIMATED
    picture = Image.new(
        "RGB", (2 * MARGIN + GAP + 2 * columns * CELL + 1, TOP + rows * CELL + MARGIN + 1), color="white"
    )
    pen = ImageDraw.Draw(picture)
    for index, (title, step) in enumerate(orders):
        left = MARGIN + index * (columns * CELL + GAP)
        end = max(step.values()) + 1
        pen.text((left, 6), title, fill=INK, font=ImageFont.load_default(16))
        counted = f"{min(at + 1, end)} of {end} steps"
        pen.text((left + columns * CELL, 6), counted, fill=INK, font=ImageFont.load_default(16), anchor="ra")
        for (row, column), when in step.items():
            x, y = left + column * CELL, TOP + row * CELL
            colour = RED if when == at else SKY if when < at else "white"
            pen.rectangle((x, y, x + CELL, y + CELL), fill=colour, outline=LINE)
    return picture


def _palette() -> Image.Image:
    """The colours of a frame, and greys for the edges of letters."""
    colours = [INK, LINE, RED, SKY, *(f"#{grey:02x}{grey:02x}{grey:02x}" for grey in range(0x44, 0x100, 0x11))]
    assert len(colours) <= 16  # four bits a pixel
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for colour in colours for value in bytes.fromhex(colour[1:])])
    return palette
