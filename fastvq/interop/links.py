"""How tensors of ours are made from tensors of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvq._config import Config
from fastvq.errors import ArgumentError
from fastvq.models.blocks import causal_taps
from fastvq.models.stored import assign

Shape = Sequence[int]
_LISTED = 8


@dataclass(frozen=True)
class Link:
    """One parameter or buffer of ours.

    Attributes:
        target: its name.
        sources: names of the tensors it is made from.
        shapes: their shapes, given the target's.
        make: the target from the sources, in float64, so that folding rounds once.
    """

    target: str
    sources: tuple[str, ...]
    shapes: Callable[[Shape], Sequence[Shape]]
    make: Callable[..., Tensor]


def copied(target: str, source: str) -> Link:
    return Link(target, (source,), lambda shape: [shape], lambda x: x)


def transposed(target: str, source: str) -> Link:
    return Link(target, (source,), lambda shape: [shape[::-1]], lambda x: x.T)


def plain(target: str, source: str) -> list[Link]:
    """A layer with weight and bias."""
    return [copied(f"{target}.{name}", f"{source}.{name}") for name in ("weight", "bias")]


def convolution(target: str, source: str, *, bias: bool = True, causal: bool = False) -> list[Link]:
    """A weight-normalised convolution."""
    links = [
        Link(
            f"{target}.weight",
            (f"{source}.weight_g", f"{source}.weight_v"),
            lambda shape: [(shape[0], 1, 1, 1), shape],
            fold_causal if causal else fold,
        )
    ]
    return [*links, copied(f"{target}.bias", f"{source}.bias")] if bias else links


def linear(target: str, source: str) -> list[Link]:
    """A weight-normalised linear layer as a 1 x 1 convolution."""
    weight = Link(
        f"{target}.weight",
        (f"{source}.weight_g", f"{source}.weight_v"),
        lambda shape: [(shape[0], 1), shape[:2]],
        lambda g, v: fold(g, v)[:, :, None, None],
    )
    return [weight, copied(f"{target}.bias", f"{source}.bias")]


def lookup(target: str, source: str) -> list[Link]:
    """A weight-normalised convolution over one-hot codes as a table of its taps."""

    def shapes(shape: Shape) -> list[Shape]:
        taps, codes, channels = shape
        return [(channels, 1, 1, 1), (channels, codes, math.isqrt(taps), math.isqrt(taps))]

    weight = Link(
        f"{target}.weight",
        (f"{source}.weight_g", f"{source}.weight_v"),
        shapes,
        lambda g, v: fold(g, v).permute(2, 3, 1, 0).flatten(0, 1),
    )
    return [weight, copied(f"{target}.bias", f"{source}.bias")]


def first_layer(target: str, above: str, left: str, kernel: int) -> list[Link]:
    """The sum of two shifted convolutions over one-hot codes, over the rows above and over the columns to the left.

    The shifts bring in zeros: the first has no bias in row 0, the second none in column 0. There the taps just above
    and just left of the current position fall outside the grid, and everywhere else they see exactly one code, so each
    bias goes into all vectors of its tap.
    """
    reach = kernel // 2

    def shapes(shape: Shape) -> list[Shape]:
        _, codes, channels = shape
        one, bias = (channels, 1, 1, 1), (channels,)
        above_shape, left_shape = (channels, codes, reach, kernel), (channels, codes, reach + 1, reach)
        return [one, above_shape, bias, one, left_shape, bias]

    def make(
        g_above: Tensor, v_above: Tensor, b_above: Tensor, g_left: Tensor, v_left: Tensor, b_left: Tensor
    ) -> Tensor:
        w_above, w_left = fold(g_above, v_above), fold(g_left, v_left)
        table = []
        for row, column in causal_taps(kernel):
            vectors = w_above.new_zeros(w_above.shape[:2])
            if row < 0:
                vectors = vectors + w_above[:, :, row + reach, column + reach]
            if column < 0:
                vectors = vectors + w_left[:, :, row + reach, column + reach]
            bias = {(-1, 0): b_above, (0, -1): b_left}.get((row, column))
            table.append((vectors if bias is None else vectors + bias[:, None]).T)
        return torch.stack(table)

    sources = tuple(f"{layer}.{name}" for layer in (above, left) for name in ("weight_g", "weight_v", "bias"))
    no_bias = Link(f"{target}.bias", (sources[2],), lambda shape: [shape], torch.zeros_like)
    return [Link(f"{target}.weight", sources, shapes, make), no_bias]


def fold(g: Tensor, v: Tensor) -> Tensor:
    """The weight that weight norm stands for: g * v / |v|, one norm for each output channel."""
    norm = torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)
    return v * (g / norm)


def fold_causal(g: Tensor, v: Tensor) -> Tensor:
    """The same for a causal kernel, the masked entries of which do not count towards the norm.

    They are zero in a forward pass, but the optimiser's momentum moves them after it, and so they are stored.
    """
    v = v.clone()
    v[:, :, -1, v.shape[-1] // 2 :] = 0
    return fold(g, v)


@torch.no_grad()
def fill(model: nn.Module, links: Iterable[Link], tensors: Mapping[str, Tensor], beside: Mapping[str, Shape]) -> None:
    """Give parameters and buffers to ``model``: float32, on the CPU.

    Args:
        model: an outline, see :func:`fastvq.models.stored.outline`.
        links: what to set, one for every parameter and buffer of the model's state dict.
        tensors: what to make it from, completely used up.
        beside: shapes of tensors that must be there too although nothing is made from them.

    Raises:
        ArgumentError: names or shapes that do not fit, or values that are not finite; the model is unchanged then.
    """
    links = list(links)
    own = model.state_dict()
    expected = dict(beside)
    for link in links:
        expected.update(zip(link.sources, link.shapes(own[link.target].shape), strict=True))
    _require_names(expected, tensors)
    bad = [
        f"{name} {list(tensors[name].shape)} (expected {list(shape)})"
        for name, shape in expected.items()
        if tuple(tensors[name].shape) != tuple(shape)
    ]
    if bad:
        raise ArgumentError(f"source: tensors of unexpected shape: {_listed(bad)}")
    made = {
        link.target: link.make(*(tensors[name].detach().double() for name in link.sources)).float().cpu()
        for link in links
    }
    broken = [link.sources[0] for link in links if not bool(made[link.target].isfinite().all())]
    if broken:
        raise ArgumentError(f"source: weights that are not finite, or whose norm is zero: {_listed(broken)}")
    assign(model, made)


def require_depth(config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Before anything is built: numbers in names may say more layers than there are."""
    if config.least_tensors > len(tensors):
        raise ArgumentError(
            f"source: keys do not fit the layout: their numbers say {config.least_tensors} tensors at least, got "
            f"{len(tensors)}"
        )


def required_grid(shape: tuple[int, int] | None) -> tuple[int, int]:
    """The grid of a prior whose layout does not store it."""
    if shape is None:
        raise ArgumentError(
            "shape: expected the grid (H, W) of this prior, which its state dict does not hold, got None"
        )
    return shape


def shape_of(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor from which the architecture is told."""
    if name not in tensors:
        raise ArgumentError(f"source: {name} is missing, so that the architecture cannot be told")
    found = tuple(tensors[name].shape)
    if len(found) != dimensions or 0 in found:
        raise ArgumentError(f"source: expected {dimensions} dimensions of {name}, none of them 0, got {list(found)}")
    return found


def _require_names(expected: Mapping[str, Shape], tensors: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    parts = [
        f"{len(names)} {word} ({_listed(names)})" for names, word in ((missing, "missing"), (extra, "unknown")) if names
    ]
    if parts:
        raise ArgumentError(f"source: keys do not fit the layout: {', '.join(parts)}")


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
