"""What a model says of real images: the likelihood of their codes, and what the codes keep of the pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._check import require_positive_int
from fastvq._evaluation import in_evaluation
from fastvq.data.base import ImageDataset, psnr
from fastvq.errors import ArgumentError
from fastvq.evaluation.statistics import image_batches
from fastvq.models.quantizer.vector import perplexity
from fastvq.sampling import Pipeline

PIXEL_BITS = 8


@dataclass(frozen=True)
class LevelMetrics:
    """Of the codes of one level.

    Attributes:
        shape, num_codes: grid, and size K of the codebook.
        nll: mean negative log-likelihood, in nats per code.
        bits: the same in bits per code.
        uniform_bits: log2 K, what a code costs without a prior.
        error: standard error of ``bits`` over images; nan for a single image.
        usage: share of the codebook that occurs.
        perplexity: exp of the entropy of the codes' frequencies, between 1 and K.
    """

    shape: tuple[int, int]
    num_codes: int
    nll: float
    bits: float
    uniform_bits: float
    error: float
    usage: float
    perplexity: float


@dataclass(frozen=True)
class ImageMetrics:
    """Of a set of real images.

    Attributes:
        images: how many.
        levels: top first.
        bits_per_image, bits_per_dimension: code length under the priors, of all levels together; a dimension is one
            channel of one pixel. The code is lossy: this is no likelihood of pixels.
        mse, psnr: of reconstructions, pixels in [-1, 1], and in dB.
        code_compression: 8-bit pixels over codes of log2 K bits each.
        prior_compression: 8-bit pixels over the code length under the priors.
    """

    images: int
    levels: tuple[LevelMetrics, ...]
    bits_per_image: float
    bits_per_dimension: float
    mse: float
    psnr: float
    code_compression: float
    prior_compression: float


@torch.no_grad()
def measure_images(
    pipeline: Pipeline,
    dataset: ImageDataset,
    indices: np.ndarray,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> ImageMetrics:
    """Encode, decode and score images, in one pass whose memory does not depend on their number.

    Args:
        pipeline: the autoencoder and the priors that are measured.
        dataset, indices: the images: all of them, and which, int [N].

    Raises:
        ArgumentError: no images, of other channels or another size than the models', or without the labels that the
            priors need.
    """
    require_positive_int("batch_size", batch_size)
    check_images(pipeline, dataset)
    if len(indices) == 0:
        raise ArgumentError("indices: expected at least one image, got none")
    vqvae, priors, device = in_evaluation(pipeline.vqvae), pipeline.priors, pipeline.device
    evaluated = [in_evaluation(prior) for prior in priors]
    counts = [torch.zeros(prior.config.num_codes, dtype=torch.int64) for prior in priors]
    nats = torch.zeros(len(priors), len(indices), dtype=torch.float64)  # 8 bytes per image and level
    squared, done = 0.0, 0
    for images in image_batches(dataset, indices, batch_size, "codes and reconstructions", progress=progress):
        images = images.to(device)
        rows = slice(done, done + len(images))
        codes = vqvae.encode(images)
        squared += float(F.mse_loss(vqvae.decode(codes), images)) * len(images)
        label = labels_of(pipeline, dataset, indices[rows])
        for level, prior in enumerate(evaluated):
            counts[level] += torch.bincount(codes[level].flatten(), minlength=len(counts[level])).cpu()
            nll = prior.nll(codes[level], codes[:level] or None, label)
            nats[level, rows] = nll.double().mean((1, 2)).cpu()
        done += len(images)
    levels = tuple(_level(prior.config.shape, n, c) for prior, n, c in zip(priors, nats, counts, strict=True))
    positions = [math.prod(level.shape) for level in levels]
    total = sum(level.bits * size for level, size in zip(levels, positions, strict=True))
    dimensions = dataset.channels * math.prod(dataset.size)
    mse = squared / len(indices)
    return ImageMetrics(
        images=len(indices),
        levels=levels,
        bits_per_image=total,
        bits_per_dimension=total / dimensions,
        mse=mse,
        psnr=psnr(mse),
        code_compression=PIXEL_BITS
        * dimensions
        / sum(level.uniform_bits * size for level, size in zip(levels, positions, strict=True)),
        prior_compression=PIXEL_BITS * dimensions / total,
    )


def _level(shape: tuple[int, int], nats: Tensor, counts: Tensor) -> LevelMetrics:
    """From nats per code of each image [N] and how often each code occurs [K]."""
    nll = float(nats.mean())
    return LevelMetrics(
        shape=shape,
        num_codes=len(counts),
        nll=nll,
        bits=nll / math.log(2),
        uniform_bits=math.log2(len(counts)),
        error=float(nats.std() / math.sqrt(len(nats)) / math.log(2)) if len(nats) > 1 else math.nan,
        usage=float((counts > 0).double().mean()),
        perplexity=float(perplexity(counts.double())),
    )


def check_images(pipeline: Pipeline, dataset: ImageDataset) -> None:
    """Find out that data and models do not fit before any work.

    Raises:
        ArgumentError: channels, size, number or names of classes, or missing labels.
    """
    channels, *size = pipeline.image_shape
    if dataset.channels != channels:
        raise ArgumentError(f"dataset: has {dataset.channels} channel(s), the model takes {channels}")
    if list(dataset.size) != size:
        raise ArgumentError(
            f"dataset: expected images of {size[0]} x {size[1]}, got {' x '.join(map(str, dataset.size))}"
        )
    if pipeline.num_classes is not None and dataset.num_classes != pipeline.num_classes:
        have = "no labels" if dataset.num_classes is None else f"{dataset.num_classes} classes"
        raise ArgumentError(f"dataset: the priors expect {pipeline.num_classes} classes, got {have}")
    wanted, names = pipeline.class_names, dataset.class_names
    if wanted and names and tuple(wanted) != tuple(names):
        first = next(index for index, pair in enumerate(zip(wanted, names, strict=True)) if pair[0] != pair[1])
        raise ArgumentError(
            f"dataset: label {first} is the class {wanted[first]!r} for the priors and {names[first]!r} in the images"
        )


def labels_of(pipeline: Pipeline, dataset: ImageDataset, indices: np.ndarray) -> Tensor | None:
    """Labels of images on the pipeline's device, int64 [B]; None for unconditional priors."""
    if pipeline.num_classes is None:
        return None
    assert dataset.labels is not None
    return dataset.labels[torch.from_numpy(np.asarray(indices))].to(pipeline.device)
