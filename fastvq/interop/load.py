"""Checkpoints of other projects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fastvq._check import require_bool, require_choice, require_positive_int
from fastvq.errors import ArgumentError
from fastvq.interop.layout import KINDS, Converted, Options, build, require_grid, require_kind
from fastvq.interop.state import read


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    kind: str | None = None,
    legacy: bool = False,
    shape: tuple[int, int] | None = None,
    heads: int = 8,
) -> Converted:
    """Our model with the weights of a checkpoint; see :mod:`fastvq.interop` for which.

    Args:
        source: path of a checkpoint (as ``torch.save`` writes it, or ``.safetensors``), or what it holds: a state dict,
            alone or under ``state_dict``, ``model_state_dict``, ``model`` or ``module``, perhaps with the training
            script's ``args``, an argparse.Namespace. Its names may all begin with ``module.``, ``_orig_mod.``,
            ``model.`` or ``net.``; weight norm may have its old or its new names. Files are read without unpickling
            anything but tensors, plain containers and the namespace.
        kind: ``"pixelsnail"``, ``"gated_pixelcnn"``, ``"pixelcnn"`` or ``"vqvae"``, to be sure of what comes;
            None takes any.
        legacy: whether the activations at the start of residual blocks worked in place when the model was trained.
        shape: grid (H, W) of a prior, for another one than it was trained on. A PixelCNN does not store its own, so
            that it is needed there.
        heads: number of attention heads of a PixelSNAIL, which shapes do not tell; 8 in that port.

    Returns:
        The model in float32, on the CPU, in evaluation mode. A PixelSNAIL whose layers are conditioned is of level 1,
        and its condition has half its height and width; any other prior is of level 0. Weight norm is folded;
        coordinates in the grid are computed anew, so that those of half-precision checkpoints are exact again.

    Raises:
        MissingFileError: no such file.
        CorruptFileError: the file is damaged, or loading it would run code that it names.
        ArgumentError, ArgumentTypeError: not one of the known layouts, with the names or shapes that do not fit.
    """
    if kind is not None:
        require_choice("kind", kind, KINDS)
    require_bool("legacy", legacy)
    require_positive_int("heads", heads)
    tensors, arguments = read(source)
    found = require_kind(tensors, kind)
    if shape is not None:
        if found == "vqvae":
            raise ArgumentError("shape: a VQVAE takes images of any size; only priors have a grid")
        shape = require_grid(shape)
    return build(tensors, found, Options(legacy, shape, heads, _dropout(arguments)))


def _dropout(arguments: Mapping[str, Any]) -> float | None:
    value = arguments.get("dropout")
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1 else None
