"""The PixelSNAIL prior of the port: what its state dict says, and where each tensor goes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.interop.links import Link, convolution, fill, first_layer, linear, lookup, require_depth, shape_of
from fastvq.models import PixelSNAIL, PixelSNAILConfig
from fastvq.models.stored import outline

# Stored coordinates may have been through bfloat16; transposed or otherwise scaled ones are further away than this.
_COORDINATE_ERROR = 4e-3
_DROPOUT = 0.1


def build(
    tensors: Mapping[str, Tensor], *, legacy: bool, shape: tuple[int, int] | None, heads: int, dropout: float | None
) -> PixelSNAIL:
    """Our prior with these weights; the arguments are those of :class:`fastvq.interop.layout.Options`.

    Dropout matters to further training alone. Ours drops logits of the attention and not, like the port, its weights,
    so that attention starts without.
    """
    config = infer(tensors, legacy=legacy, shape=shape, heads=heads, dropout=dropout)
    require_depth(config, tensors)
    model = outline(lambda: PixelSNAIL(config))
    model.fill_unstored()
    stored = tensors.get("background")
    if shape is None:
        assert stored is not None
        fill(model, links(config), tensors, {"background": model.background.shape})
        _check_background(stored, model.background)
    else:
        fill(model, links(config), tensors, {} if stored is None else {"background": stored.shape})
    return model


def infer(
    tensors: Mapping[str, Tensor], *, legacy: bool, shape: tuple[int, int] | None, heads: int, dropout: float | None
) -> PixelSNAILConfig:
    """The architecture, from names and shapes alone."""
    channels, num_codes, _, first_kernel = shape_of(tensors, "horizontal.conv.conv.weight_v", 4)
    grid = shape
    if grid is None:
        _, _, height, width = shape_of(tensors, "background", 4)
        grid = (height, width)
    conditioned = any(name.startswith("cond_resnet.") or ".condition." in name for name in tensors)
    attention = any(".causal_attention." in name or "_resblock." in name for name in tensors)
    layers = _count(tensors, r"blocks\.\d+\.resblocks\.(\d{1,9})\.")
    output_blocks = _count(tensors, r"out\.(\d{1,9})\.conv1\.")
    kernel, residual = first_kernel, channels
    if output_blocks:
        residual = shape_of(tensors, "out.0.conv1.conv.weight_v", 4)[0]
    if layers:
        residual, _, _, kernel = shape_of(tensors, "blocks.0.resblocks.0.conv1.conv.conv.weight_v", 4)
    if kernel % 2 == 0 or kernel < 3 or kernel != first_kernel:
        raise ArgumentError(
            "source: expected an odd kernel size from 3, the same in the first layer and the residual blocks, "
            f"got {first_kernel} and {kernel}"
        )
    condition: dict[str, object] = {}
    if conditioned:
        if grid[0] % 2 or grid[1] % 2:
            raise ArgumentError(f"shape: the condition's grid is half of the prior's, which is odd: {grid}")
        width, condition_codes, _, condition_kernel = shape_of(tensors, "cond_resnet.blocks.0.conv.weight_v", 4)
        condition = {
            "level": 1,
            "condition_shapes": ((grid[0] // 2, grid[1] // 2),),
            "condition_num_codes": (condition_codes,),
            "condition_channels": width,
            "condition_kernel": condition_kernel,
            "condition_blocks": _count(tensors, r"cond_resnet\.blocks\.(\d{1,9})\.") - 1,
        }
    attended: dict[str, object] = {}
    if attention:
        inner = shape_of(tensors, "blocks.0.causal_attention.query.weight_v", 2)[0]
        if inner % heads:
            raise ArgumentError(f"heads: expected a divisor of the attention's {inner} channels, got {heads}")
        attended = {"attention_heads": heads, "attention_channels": inner}
    fields: dict[str, object] = {
        "shape": grid,
        "num_codes": num_codes,
        "channels": channels,
        "residual_channels": residual,
        "kernel_size": kernel,
        "blocks": _count(tensors, r"blocks\.(\d{1,9})\."),
        "layers_per_block": layers,
        "output_blocks": output_blocks,
        "attention": attention,
        "dropout": _DROPOUT if dropout is None else dropout,
        "legacy_skip": legacy,
    }
    return PixelSNAILConfig.from_dict(fields | condition | attended)


def links(config: PixelSNAILConfig) -> list[Link]:
    """Where every tensor of our prior comes from."""
    found = first_layer("input", "horizontal.conv.conv", "vertical.conv.conv", config.kernel_size)
    conditioned = bool(config.condition_shapes)
    if conditioned:
        found += lookup("context_encoder.inputs.0", "cond_resnet.blocks.0.conv")
        for index in range(config.condition_blocks):
            found += _gated(f"context_encoder.blocks.{index}", f"cond_resnet.blocks.{index + 1}")
    for block in range(config.blocks):
        ours = theirs = f"blocks.{block}"
        for index in range(config.layers_per_block):
            found += _gated(
                f"{ours}.layers.{index}", f"{theirs}.resblocks.{index}", causal=True, conditioned=conditioned
            )
        if config.attention:
            found += _gated(f"{ours}.attention.key_block", f"{theirs}.key_resblock")
            found += _gated(f"{ours}.attention.query_block", f"{theirs}.query_resblock")
            found += _gated(f"{ours}.attention.out_block", f"{theirs}.out_resblock", auxiliary=True)
            for name in ("query", "key", "value"):
                found += linear(f"{ours}.attention.{name}", f"{theirs}.causal_attention.{name}")
        else:
            found += convolution(f"{ours}.mix", f"{theirs}.out.conv")
    for index in range(config.output_blocks):
        found += _gated(f"output_blocks.{index}", f"out.{index}")
    # The activation between the last block and the logits takes a number but has no tensors.
    return found + convolution("output", f"out.{config.output_blocks + 1}.conv")


def _gated(
    target: str, source: str, *, causal: bool = False, conditioned: bool = False, auxiliary: bool = False
) -> list[Link]:
    inner = "conv.conv" if causal else "conv"
    found = convolution(f"{target}.conv1", f"{source}.conv1.{inner}", causal=causal)
    found += convolution(f"{target}.conv2", f"{source}.conv2.{inner}", causal=causal)
    if auxiliary:
        found += convolution(f"{target}.aux", f"{source}.aux_conv.conv")
    if conditioned:
        found += convolution(f"{target}.context", f"{source}.condition.conv", bias=False)
    return found


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1)


def _check_background(stored: Tensor, ours: Tensor) -> None:
    error = float((stored.float().to(ours.device) - ours).abs().max())
    if not error <= _COORDINATE_ERROR:
        raise ArgumentError(
            f"source: expected in background the coordinates (row - H/2) / H and (column - W/2) / W of a grid of "
            f"{list(ours.shape[2:])}, got others, off by up to {error:.3g}"
        )
