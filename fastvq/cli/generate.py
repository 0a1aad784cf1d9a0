"""The commands that use a trained model: ``sample``, ``reconstruct``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._files import remove_leftovers, replacing_folder, save_tensors, write_json
from fastvq._shards import description_of
from fastvq._version import __version__
from fastvq.cli.images import open_data
from fastvq.cli.project import Project, choose_device, is_one_model, load_pipeline
from fastvq.data import load_images, psnr, save_grid
from fastvq.data.grid import PICTURES, grid_size, require_picture
from fastvq.data.pictures import picture_types
from fastvq.errors import ArgumentError, FileConflictError
from fastvq.models import HierarchicalVQVAE
from fastvq.sampling import Pipeline, Samples, Shard, sample_shard
from fastvq.sampling.parts import CODES_FILE, PREFIX, SETTINGS_FILE
from fastvq.training import load_weights


def sample(arguments: argparse.Namespace) -> None:
    if arguments.shard is not None:
        _sample_part(arguments)
        return
    if arguments.images is not None:
        raise ArgumentError(
            "--images: for parts; without --shard a folder holds PNGs anyway. For all samples in one tar: --shard 0/1"
        )
    picture = _is_picture(arguments.out)
    check_free(arguments.out, arguments.overwrite, picture)
    if arguments.n < 1:
        raise ArgumentError(f"-n: must be at least 1, got {arguments.n}")
    pipeline = load_pipeline(
        arguments.checkpoint, arguments.pretrained, choose_device(arguments.device), arguments.weights
    )
    if picture:
        height, width = (side * pipeline.vqvae.total_stride for side in pipeline.priors[0].config.shape)
        require_picture("--out", arguments.out, *grid_size(arguments.n, height, width)[:2])
    labels = pipeline.labels(range(arguments.n), _class(pipeline, arguments.label))
    samples = pipeline.sample(arguments.n, label=labels, **_settings(arguments))
    settings = {
        "n": arguments.n,
        "labels": None if labels is None else labels.tolist(),
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": samples.seed,
        "micro_batch": samples.micro_batch,
        "engine": arguments.engine,
        "precision": arguments.precision,
        "fastvq_version": __version__,
    }
    if picture:
        save_grid(arguments.out, samples.images, overwrite=arguments.overwrite)
    else:
        _write_folder(arguments.out, samples, settings, arguments.overwrite)
    print(f"{arguments.n} samples in {arguments.out} (seed {samples.seed})")


def _sample_part(arguments: argparse.Namespace) -> None:
    shard = Shard.parse(arguments.shard)
    if arguments.seed is None:
        raise ArgumentError("--seed: --shard needs one, the same for all parts")
    if arguments.overwrite:
        raise ArgumentError("--overwrite: finished parts are kept; remove them, or choose another folder")
    if _is_picture(arguments.out):
        raise ArgumentError(f"--out: --shard writes to a folder, got {arguments.out}")
    pipeline = load_pipeline(
        arguments.checkpoint, arguments.pretrained, choose_device(arguments.device), arguments.weights
    )
    path = shard.path(arguments.out, PREFIX)
    there = description_of(path).is_file()
    sample_shard(
        pipeline,
        arguments.n,
        shard,
        arguments.out,
        label=_class(pipeline, arguments.label),
        images=arguments.images,
        **_settings(arguments),
    )
    indices = shard.range(arguments.n)
    what = f"samples {indices.start}..{indices.stop - 1} of {arguments.n}" if indices else "no samples"
    print(f"part {shard}: {what} {'were finished before' if there else 'are'} in {path} (seed {arguments.seed})")


def reconstruct(arguments: argparse.Namespace) -> None:
    require_picture("--out", arguments.out)
    check_free(arguments.out, arguments.overwrite, picture=True)
    if arguments.n < 1:
        raise ArgumentError(f"-n: must be at least 1, got {arguments.n}")
    device = choose_device(arguments.device)
    model, description = _autoencoder(arguments, device)
    dataset = open_data(
        arguments.data,
        arguments.size or description["size"],
        model.config.in_channels,
        skip_broken=arguments.skip_broken or description["skip_broken"],
        exclude=[] if arguments.checkpoint is None else [arguments.checkpoint],
        leave_out_empty=True,
        quiet=arguments.quiet,
    )
    model.code_shapes(dataset.size)
    count = min(arguments.n, len(dataset))
    require_picture("--out", arguments.out, *grid_size(2 * count, *dataset.size, count)[:2])
    originals = load_images(dataset, range(count))
    reconstructions, mse = reconstruction(model, originals)
    save_grid(arguments.out, torch.cat([originals, reconstructions]), len(originals), overwrite=arguments.overwrite)
    print(f"{len(originals)} images and reconstructions in {arguments.out}: MSE {mse:.5f}, PSNR {psnr(mse):.2f} dB")


def reconstruction(model: HierarchicalVQVAE, originals: Tensor) -> tuple[Tensor, float]:
    """Decoded codes of images, on the CPU, and the mean squared error."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        parts = [model.decode(model.encode(part.to(device))).cpu() for part in originals.split(16)]
    reconstructions = torch.cat(parts)
    return reconstructions, float(F.mse_loss(reconstructions, originals))


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What samples are drawn with, as sampling is told."""
    temperature = arguments.temperature
    return {
        "temperature": temperature[0] if len(temperature) == 1 else temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "progress": not arguments.quiet,
        "engine": arguments.engine,
        "micro_batch": arguments.micro_batch,
        "precision": arguments.precision,
    }


def _class(pipeline: Pipeline, text: str | None) -> int | None:
    """The class asked for, if any."""
    classes = pipeline.num_classes
    if text is None:
        return None
    if classes is None:
        raise ArgumentError(f"--label: this model knows no classes, got {text}")
    names = pipeline.class_names or ()
    if text in names:
        return names.index(text)
    if not text.isdecimal() or int(text) >= classes:
        known = f", or a name: {', '.join(names)}" if names else ""
        raise ArgumentError(f"--label: expected a number in 0..{classes - 1}{known}; got {text!r}")
    return int(text)


def _autoencoder(arguments: argparse.Namespace, device: str) -> tuple[HierarchicalVQVAE, dict[str, Any]]:
    """The model, and what is known of the images it was trained on: ``size`` (perhaps None) and ``skip_broken``."""
    checkpoint = arguments.checkpoint
    if checkpoint is not None and is_one_model(checkpoint):
        model = load_weights(checkpoint, weights=arguments.weights, device=device)
        if not isinstance(model, HierarchicalVQVAE):
            raise ArgumentError(f"--checkpoint: {checkpoint} holds a {type(model).__name__}, expected an autoencoder")
        return model, {"size": None, "skip_broken": False}
    if checkpoint is not None and Project(checkpoint).vqvae.is_dir():
        project = Project(checkpoint)
        return project.load_vqvae(device), project.read_data()
    pipeline = load_pipeline(checkpoint, arguments.pretrained, device, arguments.weights)
    size = [side * pipeline.vqvae.total_stride for side in pipeline.priors[0].config.shape]
    return pipeline.vqvae, {"size": size, "skip_broken": False}


def _is_picture(out: Path) -> bool:
    """Whether samples become one picture or a folder.

    Raises:
        ArgumentError: the name ends like a picture's of a type that is not written.
    """
    suffix = out.suffix.lower()
    if suffix in PICTURES:
        return True
    if not out.is_dir() and (suffix[1:].isalpha() or suffix in picture_types()):
        raise ArgumentError(
            f"--out: expected a picture's name that ends in {', '.join(PICTURES)}, or a folder's without an ending, "
            f"got {out}"
        )
    return False


def check_free(out: Path, overwrite: bool, picture: bool) -> None:
    """Find out that the result cannot be written before computing it."""
    remove_leftovers(out)
    taken = out.exists() and (picture or not out.is_dir() or any(out.iterdir()))
    if taken and not overwrite:
        raise FileConflictError(f"--out: {out} exists already; pass --overwrite or another name")
    if out.exists() and out.is_dir() == picture:
        raise FileConflictError(f"--out: {out} is a {'folder' if picture else 'file'} and stays as it is")
    if out.is_dir() and taken and not (out / SETTINGS_FILE).is_file():
        raise FileConflictError(f"--out: {out} holds other things than samples and stays as it is")


def _write_folder(out: Path, samples: Samples, settings: dict[str, object], overwrite: bool) -> None:
    with replacing_folder(out, overwrite=overwrite) as folder:
        for index, image in enumerate(samples.images):
            save_grid(folder / f"{index:06d}.png", image[None], padding=0)
        codes = {f"level{level}": grid.cpu().contiguous() for level, grid in enumerate(samples.codes)}
        save_tensors(codes, folder / CODES_FILE)
        write_json(folder / SETTINGS_FILE, settings)
