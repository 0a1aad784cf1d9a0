"""The gated PixelCNN that many VQ-VAE projects share: what its state dict says, and where each tensor goes.

Codes are embedded; the first gated layer has a kernel of its own and leaves the current position out by zeroing the
last row and column of its kernels; each layer adds an embedding of the label, if there are labels, to both stacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastvq.interop.links import Link, Shape, copied, fill, plain, require_depth, required_grid, shape_of
from fastvq.models import GatedPixelCNN, GatedPixelCNNConfig
from fastvq.models.stored import outline


def build(tensors: Mapping[str, Tensor], *, shape: tuple[int, int] | None) -> GatedPixelCNN:
    """Our prior with these weights, on a grid of ``shape``, which is not stored in this layout."""
    config = infer(tensors, shape=shape)
    require_depth(config, tensors)
    model = outline(lambda: GatedPixelCNN(config))
    fill(model, links(config), tensors, {})
    return model


def infer(tensors: Mapping[str, Tensor], *, shape: tuple[int, int] | None) -> GatedPixelCNNConfig:
    """The architecture, from names and shapes alone."""
    num_codes, channels = shape_of(tensors, "embedding.weight", 2)
    first = shape_of(tensors, "layers.0.vert_stack.weight", 4)[3]
    layers = max(int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d{1,9})\.", name)))
    kernel = shape_of(tensors, "layers.1.vert_stack.weight", 4)[3] if layers else first
    labelled = "layers.0.class_cond_embedding.weight" in tensors
    classes = shape_of(tensors, "layers.0.class_cond_embedding.weight", 2)[0] if labelled else None
    return GatedPixelCNNConfig.from_dict(
        {
            "shape": required_grid(shape),
            "num_codes": num_codes,
            "num_classes": classes,
            # A label's vector is its one-hot code; the layers' projections hold their embeddings.
            **({} if classes is None else {"condition_channels": classes}),
            "channels": channels,
            "layers": layers,
            "kernel_size": kernel,
            "input_kernel_size": first,
            "output_channels": shape_of(tensors, "output_conv.0.weight", 4)[0],
            "output_activation": False,
            "dropout": 0.0,
        }
    )


def links(config: GatedPixelCNNConfig) -> list[Link]:
    """Where every tensor of our prior comes from."""
    first = "layers.0"
    found = _embedded("input_vertical", f"{first}.vert_stack", vertical=True)
    found += _embedded("input_horizontal", f"{first}.horiz_stack", vertical=False)
    found += plain("input_link", f"{first}.vert_to_horiz") + plain("input_merge", f"{first}.horiz_resid")
    classes = config.num_classes
    if classes is not None:
        identity = Link("context_encoder.label.weight", (), lambda _: [], lambda: torch.eye(classes))
        found += [identity, _label("input_context", first)]
    for index in range(config.layers):
        ours, theirs = f"layers.{index}", f"layers.{index + 1}"
        for name, source in {
            "vertical": "vert_stack",
            "horizontal": "horiz_stack",
            "link": "vert_to_horiz",
            "merge": "horiz_resid",
        }.items():
            found += plain(f"{ours}.{name}", f"{theirs}.{source}")
        if classes is not None:
            found.append(_label(f"{ours}.context", theirs))
    return found + plain("hidden", "output_conv.0") + plain("output", "output_conv.2")


def _embedded(target: str, source: str, *, vertical: bool) -> list[Link]:
    """Embedding and convolution in one, as a table of the taps that come before the current position."""

    def shapes(shape: Shape) -> list[Shape]:
        taps, codes, outputs = shape
        reach = _reach(taps) if vertical else taps
        kernel = (reach + 1, 2 * reach + 1) if vertical else (1, reach + 1)
        return [(codes, outputs // 2), (outputs, outputs // 2, *kernel)]

    def make(embedding: Tensor, weight: Tensor) -> Tensor:
        read = weight[:, :, :-1] if vertical else weight[:, :, :, :-1]
        return torch.einsum("kd,odrc->rcko", embedding, read).flatten(0, 1)

    return [
        Link(f"{target}.weight", ("embedding.weight", f"{source}.weight"), shapes, make),
        copied(f"{target}.bias", f"{source}.bias"),
    ]


def _reach(taps: int) -> int:
    """r of r * (2 r + 1) taps."""
    return next(reach for reach in range(1, taps + 1) if reach * (2 * reach + 1) >= taps)


def _label(target: str, source: str) -> Link:
    """The projection of a one-hot label: the layer's embedding, for both stacks."""
    return Link(
        f"{target}.weight",
        (f"{source}.class_cond_embedding.weight",),
        lambda shape: [(shape[1], shape[0] // 2)],
        lambda embedding: torch.cat([embedding.T, embedding.T])[:, :, None, None],
    )
