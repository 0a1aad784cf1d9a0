"""Which layouts are known, and the models they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvq._check import require_positive_int, require_tensor
from fastvq._unwrap import WRAPPERS, unwrap
from fastvq.errors import ArgumentError
from fastvq.interop import gated, masked, snail, vqvae
from fastvq.interop.state import PREFIXES, normalise
from fastvq.models import VQVAE2, GatedPixelCNN, PixelCNN, PixelSNAIL

# Every model of a layout has names that begin so.
_MARKERS = {
    "pixelsnail": ("horizontal.conv.", "vertical.conv."),
    "gated_pixelcnn": ("embedding.weight", "layers.0.vert_stack.", "layers.0.vert_to_horiz."),
    "pixelcnn": ("0.weight", "0.mask"),
    "vqvae": ("enc_b.blocks.", "quantize_t."),
}
Converted = PixelSNAIL | GatedPixelCNN | PixelCNN | VQVAE2
KINDS = tuple(_MARKERS)


@dataclass(frozen=True)
class Options:
    """What shapes cannot tell; None where the layout's own default holds.

    Attributes:
        legacy: residual blocks add their activated input.
        shape: grid of a prior, if other than the stored one; a PixelCNN stores none.
        heads: of attention.
        dropout: of a prior.
        decay: of a VQVAE's codebooks.
    """

    legacy: bool = False
    shape: tuple[int, int] | None = None
    heads: int = 8
    dropout: float | None = None
    decay: float | None = None


def recognise(source: nn.Module | Mapping[str, Tensor]) -> str | None:
    """The layout of a module or state dict, or None if it is none that :func:`load` and :func:`convert` know.

    Args:
        source: a module, or names and tensors.

    Returns:
        ``"pixelsnail"``, ``"gated_pixelcnn"``, ``"pixelcnn"``, ``"vqvae"`` or None.
    """
    inner = unwrap(source)
    live = isinstance(inner, nn.Module)
    tensors = inner.state_dict() if isinstance(inner, nn.Module) else source
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        return None
    try:
        return kind_of(normalise(tensors, WRAPPERS if live else PREFIXES))
    except ArgumentError:
        return None


def kind_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The layout of a normalised state dict."""

    def present(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    return next((kind for kind, prefixes in _MARKERS.items() if all(map(present, prefixes))), None)


def require_kind(tensors: Mapping[str, Tensor], wanted: str | None = None) -> str:
    """The layout of a normalised state dict, which must be known and the one wanted."""
    kind = kind_of(tensors)
    if kind is None:
        known = "; ".join(f"{', '.join(f'{p}*' for p in prefixes)} ({kind})" for kind, prefixes in _MARKERS.items())
        raise ArgumentError(
            f"source: unknown layout: expected keys such as {known}, got {', '.join(sorted(tensors)[:4])}, ..."
        )
    if wanted is not None and kind != wanted:
        raise ArgumentError(f"kind: expected {wanted!r}, but this is the state dict of a {kind!r}")
    return kind


def require_grid(shape: object) -> tuple[int, int]:
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ArgumentError(f"shape: expected (height, width), got {shape!r}")
    return require_positive_int("shape", shape[0]), require_positive_int("shape", shape[1])


def build(tensors: Mapping[str, Tensor], kind: str, options: Options) -> Converted:
    """Our model of a normalised state dict: float32, on the CPU, in evaluation mode."""
    # Batch norm counts its batches; nothing is made of that.
    tensors = {name: value for name, value in tensors.items() if not name.endswith(".num_batches_tracked")}
    for name, value in tensors.items():
        if not require_tensor(name, value).dtype.is_floating_point:
            raise ArgumentError(f"source: expected floating-point tensors, got {value.dtype} for {name}")
        if value.layout != torch.strided:
            raise ArgumentError(f"source: expected dense tensors, got {value.layout} for {name}")
        if value.is_meta:
            raise ArgumentError(f"source: expected tensors with values, got {name} on the meta device")
    model: Converted
    if kind == "pixelsnail":
        model = snail.build(
            tensors, legacy=options.legacy, shape=options.shape, heads=options.heads, dropout=options.dropout
        )
    elif kind == "gated_pixelcnn":
        model = gated.build(tensors, shape=options.shape)
    elif kind == "pixelcnn":
        model = masked.build(tensors, shape=options.shape)
    else:
        model = vqvae.build(tensors, legacy=options.legacy, decay=options.decay)
    return model.eval()
