"""The Inception features of the FID's definition, from a local weights file.

The network is that of TensorFlow's ``inception-2015-12-05`` (Szegedy et al. 2015; used by Salimans et al. 2016 and
Heusel et al. 2017), whose weights circulate as a PyTorch state dict.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._evaluation import in_evaluation
from fastvq._files import reading, sha256
from fastvq._tensors import read_checkpoint
from fastvq.errors import ArgumentError, CorruptFileError, MissingFileError
from fastvq.evaluation.features import FeatureExtractor, Features

# The first digits of the SHA-256 of the state dict that all common implementations use; it is part of its file name.
KNOWN_WEIGHTS = "6726825d"
_SIDE, _FEATURES, _CLASSES = 299, 2048, 1008

# (name, output channels, kernel); a step whose last entry is 2 halves the grid.
_Layer = tuple[Any, ...]


class InceptionFeatures(FeatureExtractor):
    """Pooled features [B, 2048] and logits [B, 1008] without bias of images with 1 (shown as grey) or 3 channels.

    Images are rounded to 8 bits and resized to 299 x 299 as TensorFlow 1 did. The weights are read without unpickling
    code.

    Args:
        weights: a local file, a state dict as ``.pth``/``.pt`` or as ``.safetensors``. Nothing is downloaded. Scores
            are called FID without further name only where this is the known file (SHA-256 6726825d...).

    Raises:
        MissingFileError: no such file.
        CorruptFileError: not a state dict of this network.
    """

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        path = Path(weights)
        if not path.is_file():
            raise MissingFileError(
                f"weights: no file {path}; the Inception weights are not part of fastvq and are not downloaded. They "
                f"circulate as pt_inception-2015-12-05-{KNOWN_WEIGHTS}.pth"
            )
        known = sha256(path).startswith(KNOWN_WEIGHTS)
        # Without memory of its own: the file's tensors take the place of the parameters.
        with torch.device("meta"):
            network = InceptionNetwork()
        _load(network, path)
        super().__init__(
            network,
            name="Inception v3 (2015-12-05)" if known else "Inception v3, other weights",
            num_features=_FEATURES,
            is_inception=known,
        )
        self.num_classes = _CLASSES

    def _extract(self, images: Tensor) -> Features:
        if images.shape[1] not in (1, 3):
            raise ArgumentError(f"images: expected 1 or 3 channels, got {images.shape[1]}")
        assert isinstance(self.module, InceptionNetwork)
        pixels = images.add(1).mul(127.5).round().expand(-1, 3, -1, -1)
        vectors = in_evaluation(self.module)(pixels)
        return Features(vectors, vectors @ self.module.fc.weight.T)


def _load(network: nn.Module, path: Path) -> None:
    with reading(f"weights: {path} is not a state dict of Inception v3"):
        try:
            state = read_checkpoint("weights", path)
        except CorruptFileError as error:
            raise ValueError(str(error)) from error
        missing, unexpected = network.load_state_dict(state, strict=False, assign=True)
    # Counters of training batches, which older files do not hold and nothing here reads.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise CorruptFileError(
            f"weights: {path} is not a state dict of Inception v3 "
            f"(missing: {', '.join(missing[:3]) or 'nothing'}; unexpected: {', '.join(unexpected[:3]) or 'nothing'})"
        )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    network.float()


class _Convolution(nn.Module):
    def __init__(self, narrow: int, wide: int, kernel: tuple[int, int], stride: int, same: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(narrow, wide, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(wide, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Paths of convolutions side by side, and a pooled one; the channels of all are joined.

    Args:
        paths: layers of each path, ``(name, channels, kernel height, kernel width)``; a list in place of the last
            layer forks the path. The last layers of a block with ``pool="stride"`` halve the grid.
        pool: ``average`` and ``max`` (3 x 3, then a convolution), or ``stride`` (3 x 3, every second place, as it is).
        pooled: channels of the convolution after the pool.
    """

    def __init__(self, narrow: int, paths: Iterable[list[Any]], pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.paths: list[list[list[str]]] = []
        for path in paths:
            names, width = [], narrow
            for place, step in enumerate(path):
                fork = step if isinstance(step, list) else [step]
                halve = pool == "stride" and place == len(path) - 1
                for name, wide, *kernel in fork:
                    size = (kernel[0], kernel[1])
                    self.add_module(name, _Convolution(width, wide, size, 2 if halve else 1, not halve))
                names.append([layer[0] for layer in fork])
                width = fork[-1][1]
            self.paths.append(names)
        self.branch_pool = _Convolution(narrow, pooled, (1, 1), 1, True) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        joined = []
        for path in self.paths:
            h = x
            for names in path[:-1]:
                h = self.get_submodule(names[0])(h)
            joined += [self.get_submodule(name)(h) for name in path[-1]]
        if self.pool == "average":
            h = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            h = F.max_pool2d(x, 3, stride=2) if self.pool == "stride" else F.max_pool2d(x, 3, stride=1, padding=1)
        joined.append(h if self.branch_pool is None else self.branch_pool(h))
        return torch.cat(joined, 1)


def _grid35(narrow: int, pooled: int) -> _Mixed:
    double = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3)]
    paths: list[list[Any]] = [[("branch1x1", 64, 1, 1)], [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5)], double]
    return _Mixed(narrow, paths, "average", pooled)


def _grid17(inner: int) -> _Mixed:
    single = [("branch7x7_1", inner, 1, 1), ("branch7x7_2", inner, 1, 7), ("branch7x7_3", 192, 7, 1)]
    kernels = [(inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7)]
    double = [(f"branch7x7dbl_{number}", *kernel) for number, kernel in enumerate(kernels, 1)]
    return _Mixed(768, [[("branch1x1", 192, 1, 1)], single, double], "average", 192)


def _grid8(narrow: int, pool: str) -> _Mixed:
    def fork(name: str) -> list[_Layer]:
        return [(f"{name}a", 384, 1, 3), (f"{name}b", 384, 3, 1)]

    single = [("branch3x3_1", 384, 1, 1), fork("branch3x3_2")]
    double = [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 3), fork("branch3x3dbl_3")]
    return _Mixed(narrow, [[("branch1x1", 320, 1, 1)], single, double], pool, 192)


class InceptionNetwork(nn.Module):
    """Pixels [B, 3, H, W] in 0..255 to pooled features [B, 2048]; layers are named as in the circulating weights."""

    def __init__(self) -> None:
        super().__init__()
        for name, narrow, wide, side, stride, same in (
            ("Conv2d_1a_3x3", 3, 32, 3, 2, False),
            ("Conv2d_2a_3x3", 32, 32, 3, 1, False),
            ("Conv2d_2b_3x3", 32, 64, 3, 1, True),
            ("Conv2d_3b_1x1", 64, 80, 1, 1, True),
            ("Conv2d_4a_3x3", 80, 192, 3, 1, False),
        ):
            self.add_module(name, _Convolution(narrow, wide, (side, side), stride, same))
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _grid35(192, 32), _grid35(256, 64), _grid35(288, 64)
        double = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3)]
        self.Mixed_6a = _Mixed(288, [[("branch3x3", 384, 3, 3)], double], "stride")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_grid17(c) for c in (128, 160, 160, 192))
        kernels = [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)]
        single = [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3)]
        paths = [single, [(f"branch7x7x3_{number}", *kernel) for number, kernel in enumerate(kernels, 1)]]
        self.Mixed_7a = _Mixed(768, paths, "stride")
        # TensorFlow's graph takes the maximum in the last block, and the mean in the one before.
        self.Mixed_7b, self.Mixed_7c = _grid8(1280, "average"), _grid8(2048, "max")
        self.fc = nn.Linear(_FEATURES, _CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (resize_as_tensorflow1(pixels, _SIDE) - 128) / 128
        for name, layer in self.named_children():
            if name == "fc":
                break
            x = layer(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, stride=2)
        return x.mean((2, 3))


def resize_as_tensorflow1(images: Tensor, side: int) -> Tensor:
    """Bilinear, with output pixel i at i * size / side: no half-pixel centres, no smoothing."""
    for axis in (2, 3):
        size = images.shape[axis]
        place = torch.arange(side, device=images.device, dtype=images.dtype) * (size / side)
        low = place.floor().long()
        high = (low + 1).clamp(max=size - 1)
        weight = (place - low).reshape([-1, 1] if axis == 2 else [-1])
        below, above = images.index_select(axis, low), images.index_select(axis, high)
        images = below + (above - below) * weight
    return images
