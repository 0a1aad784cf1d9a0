"""The two-level VQVAE of the port: what its state dict says, and where each tensor goes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastvq.interop.links import Link, copied, fill, plain, require_depth, shape_of, transposed
from fastvq.models import VQVAE2, VQVAEConfig
from fastvq.models.stored import outline

_DECAY = 0.99


def build(tensors: Mapping[str, Tensor], *, legacy: bool, decay: float | None) -> VQVAE2:
    """Our autoencoder with these weights; the arguments are those of :class:`fastvq.interop.layout.Options`."""
    config = infer(tensors, legacy=legacy, decay=decay)
    require_depth(config, tensors)
    model = outline(lambda: VQVAE2(config))
    fill(model, links(config), tensors, {})
    return model


def infer(tensors: Mapping[str, Tensor], *, legacy: bool, decay: float | None) -> VQVAEConfig:
    """The architecture, from names and shapes alone."""
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"dec\.blocks\.(\d{1,9})\.conv\.", name))}
    code_dim, num_codes = shape_of(tensors, "quantize_t.embed", 2)
    channels, in_channels = (
        shape_of(tensors, "dec_t.blocks.0.weight", 4)[0],
        shape_of(tensors, "enc_b.blocks.0.weight", 4)[1],
    )
    residual = channels
    if blocks:
        residual = shape_of(tensors, f"dec.blocks.{min(blocks)}.conv.1.weight", 4)[0]
    return VQVAEConfig(
        in_channels=in_channels,
        channels=channels,
        residual_channels=residual,
        residual_layers=len(blocks),
        num_codes=num_codes,
        code_dim=code_dim,
        strides=(4, 2),
        decay=_DECAY if decay is None else decay,
        legacy_skip=legacy,
    )


def links(config: VQVAEConfig) -> list[Link]:
    """Where every tensor of our autoencoder comes from."""
    found: list[Link] = []
    # Layers that lie before and after the residual blocks, by their place in the sequence; the latter count from there.
    for ours, theirs, before, after in (
        ("encoders.0", "enc_b", (0, 2, 4), ()),
        ("encoders.1", "enc_t", (0, 2), ()),
        ("conditioners.0", "dec_t", (0,), (1,)),
        ("decoder", "dec", (0,), (1, 3)),
    ):
        first = before[-1] + 1
        end = first + config.residual_layers
        for index in (*before, *(end + offset for offset in after)):
            found += plain(f"{ours}.{index}", f"{theirs}.blocks.{index}")
        for index in range(first, end):
            found += plain(f"{ours}.{index}.conv1", f"{theirs}.blocks.{index}.conv.1")
            found += plain(f"{ours}.{index}.conv2", f"{theirs}.blocks.{index}.conv.3")
    found += plain("upsamplers.0.0", "upsample_t")
    for level, suffix in enumerate("tb"):
        ours, theirs = f"quantizers.{level}", f"quantize_{suffix}"
        found += plain(f"to_code.{level}", f"quantize_conv_{suffix}")
        found.append(transposed(f"{ours}.embedding", f"{theirs}.embed"))
        found.append(transposed(f"{ours}.embedding_sum", f"{theirs}.embed_avg"))
        found.append(copied(f"{ours}.cluster_size", f"{theirs}.cluster_size"))
        found.append(_started(f"{ours}.initialized", f"{theirs}.cluster_size", config.num_codes))
    return found


def _started(target: str, source: str, num_codes: int) -> Link:
    """The flag of codes that are more than random numbers."""
    return Link(target, (source,), lambda shape: [(num_codes,)], lambda sizes: torch.ones(()))
