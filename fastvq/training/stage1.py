"""Stage 1: an autoencoder with discrete codes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.data.augment import Augment
from fastvq.data.base import ImageDataset, load_images, psnr, split_indices, spread_over_classes
from fastvq.data.usage import CodeUse
from fastvq.distributed import Group
from fastvq.errors import ArgumentError
from fastvq.models import HierarchicalVQVAE, VectorQuantizer, VQVAEConfig, build
from fastvq.models.repeated_pass import is_repetition
from fastvq.models.stored import outline
from fastvq.training.batches import Batch
from fastvq.training.codebook import CodebookTraining, few_codes
from fastvq.training.config import TrainConfig
from fastvq.training.loop import train_in
from fastvq.training.progress import Show
from fastvq.training.task import Picture

_PICTURES = 10


def train_vqvae(
    dataset: ImageDataset,
    model_config: VQVAEConfig,
    config: TrainConfig,
    run_dir: str | os.PathLike[str],
    *,
    augment: Augment | None = None,
    resume: bool = False,
    init_from: str | os.PathLike[str] | None = None,
    notes: Mapping[str, Any] | None = None,
    progress: Show = False,
) -> HierarchicalVQVAE:
    """Train an autoencoder on images, minimising the mean squared error plus the commitment loss.

    ``run_dir`` receives ``config.json``, ``checkpoints/``, ``logs/metrics.jsonl`` (and TensorBoard's files),
    ``images/reconstructions_*.png`` (originals above, reconstructions below), ``best/`` (the model whose validation
    ``mse`` was lowest, and in ``validation.json`` when that was) and, at the end, ``model/``. Validation, after every
    epoch or as ``config.validate_every`` says, and at the end: ``mse`` (images in [-1, 1]), ``psnr`` in dB,
    ``commitment``, and for each level (0 = top) the ``perplexity`` of the codes of the whole validation set and their
    ``usage``, the share of the codebook that occurs.

    Under torchrun, and whatever else describes a group of processes (:mod:`fastvq.distributed`), each computes its
    share of every batch; the first writes, into a folder that all of them see. The result is that of one process up to
    the rounding of sums, as long as the model has no dropout, whose masks differ.

    Args:
        dataset: images of the model's channels, of a size that it takes.
        model_config: what is trained.
        config: how.
        run_dir: a new or empty folder, or with ``resume`` that of a run.
        augment: changes of the training images, drawn anew each epoch.
        resume: go on with the run in ``run_dir`` from its newest checkpoint, to ``config.steps``; a run that has them
            (or more) and its model returns that at once.
        init_from: start from the weights of a saved model, a run or a checkpoint (:func:`load_weights`).
        notes: anything JSON can hold, to be kept in ``config.json``.
        progress: say on stderr how it goes, what each validation finds and what is wrong: with a bar in a terminal and
            lines elsewhere, or with lines in any case (``"plain"``).

    Returns:
        The model with averaged weights, in evaluation mode.

    Raises:
        ArgumentError: data, model and settings do not fit together.
        FileConflictError: ``run_dir`` is not empty, holds a run with other settings, or is in use by another process.
        MissingFileError: ``resume`` without a run to resume.
        CorruptFileError: the newest checkpoint is damaged.
        DivergedError: the loss is not finite.
        PeerError: another process of the group has failed.
    """
    model = train_in(
        run_dir,
        lambda: _prepared(dataset, model_config, config, augment),
        lambda: build(model_config),
        config,
        resume=resume,
        init_from=init_from,
        notes=notes,
        progress=progress,
    )
    assert isinstance(model, HierarchicalVQVAE)
    return model


def _prepared(
    dataset: ImageDataset, model_config: VQVAEConfig, config: TrainConfig, augment: Augment | None
) -> tuple[_Reconstruction, dict[str, Any]]:
    """What the loop needs, and the description of the run, of arguments that fit together."""
    if model_config.in_channels != dataset.channels:
        raise ArgumentError(f"model_config.in_channels: {model_config.in_channels}, the data have {dataset.channels}")
    training, validation = split_indices(len(dataset), config.validation_fraction, config.seed)
    probe = outline(lambda: build(model_config))
    assert isinstance(probe, HierarchicalVQVAE)
    probe.code_shapes(dataset.size)  # raises if the size cannot be divided
    description: dict[str, Any] = {
        "format": 1,
        "stage": 1,
        "model": {"class": type(probe).__name__, **model_config.to_dict()},
        "train": config.to_dict(),
        "data": {
            "fingerprint": dataset.fingerprint(),
            "images": len(dataset),
            "size": list(dataset.size),
            "augment": None if augment is None else dataclasses.asdict(augment),
        },
    }
    return _Reconstruction(dataset, training, validation, model_config, config, augment), description


class _Reconstruction:
    criterion = "mse"
    unit = "images"

    def __init__(
        self,
        dataset: ImageDataset,
        training: np.ndarray,
        validation: np.ndarray,
        model_config: VQVAEConfig,
        config: TrainConfig,
        augment: Augment | None,
    ) -> None:
        self.rows = len(training)
        self._dataset, self._training, self._validation = dataset, training, validation
        self._codebooks = CodebookTraining(model_config, config, len(training) + len(validation), dataset.size)
        self._part = config.batch_size // config.accumulate
        self._seed, self._augment = config.seed, augment

    def load(self, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        indices = self._training[rows]
        images = load_images(self._dataset, indices)
        if self._augment is not None:
            # Variant 0 is the unchanged image, so the first epoch takes variant 1.
            images = self._augment.batch(images, seed=self._seed, indices=indices, variants=epochs + 1)
        return (images,)

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (images,) = batch
        out = forward(images)
        mse = F.mse_loss(out.reconstruction.float(), images)
        usage = 1 - out.dead_codes / self._codebooks.model.num_codes
        of_levels = {f"perplexity_{level}": value for level, value in enumerate(out.perplexity.unbind())}
        of_levels |= {f"usage_{level}": value for level, value in enumerate(usage.unbind())}
        return mse + out.commitment_loss, {"mse": mse, "commitment": out.commitment_loss, **of_levels}

    @contextlib.contextmanager
    def accumulation(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Codebooks move once per step, by all of its vectors, as they would if the batch were whole.

        Until then the quantisers stay in evaluation mode and what goes into them is set aside. Only the step that
        initialises a codebook from data differs: its passes still see the codebook from before.

        Perplexities and the shares of codes in use are of the whole batch: a mean over parts would depend on how it is
        cut.
        """
        of_step: dict[str, Tensor] = {}
        quantizers = [module for module in model.modules() if isinstance(module, VectorQuantizer)]
        seen: list[list[Tensor]] = [[] for _ in quantizers]

        def keeper(vectors: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            # Kept out of a compiled forward pass, which would be compiled anew for every length of the list.
            @torch.compiler.disable
            def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                # A repetition brings the same vectors once more.
                if not is_repetition():
                    vectors.append(inputs[0].detach())

            return keep

        hooks = [q.register_forward_pre_hook(keeper(s)) for q, s in zip(quantizers, seen, strict=True)]
        try:
            for quantizer in quantizers:
                quantizer.eval()
            yield of_step
        finally:
            for hook in hooks:
                hook.remove()
            for quantizer in quantizers:
                quantizer.train()
        with torch.no_grad():
            for level, (quantizer, vectors) in enumerate(zip(quantizers, seen, strict=True)):
                found = quantizer(torch.cat(vectors))
                of_step[f"perplexity_{level}"] = found.perplexity
                of_step[f"usage_{level}"] = 1 - found.dead_codes / quantizer.num_codes

    def validate(self, model: nn.Module, device: torch.device, group: Group) -> dict[str, float]:
        count = len(self._validation)
        if count == 0:
            return {}
        assert isinstance(model, HierarchicalVQVAE)
        squared, commitment = 0.0, 0.0
        used = torch.zeros(model.num_levels, model.config.num_codes, dtype=torch.float64)
        with group.together():
            for start in group.turns(range(0, count, self._part)):
                images = load_images(self._dataset, self._validation[start : start + self._part]).to(device)
                out = model(images)
                squared += float(F.mse_loss(out.reconstruction, images)) * len(images)
                commitment += float(out.commitment_loss) * len(images)
                for level, codes in enumerate(out.codes):
                    used[level] += torch.bincount(codes.flatten(), minlength=used.shape[1]).cpu()
        squared, commitment, *counts = group.sum([squared, commitment, *used.flatten().tolist()])
        used = torch.tensor(counts, dtype=torch.float64).view_as(used)
        mse = squared / count
        values = {"mse": mse, "psnr": psnr(mse), "commitment": commitment / count}
        for level, level_counts in enumerate(used):
            use = CodeUse.of_counts(level, len(used), level_counts)
            values |= {f"perplexity_{level}": use.perplexity, f"usage_{level}": use.share}
        return values

    def brief(self, metrics: Mapping[str, float]) -> str:
        uses = self._codebooks.use(metrics, self._codebooks.train.batch_size)
        perplexity = "/".join(f"{use.perplexity:.3g}" for use in uses)
        used = "/".join(str(use.used) for use in uses)
        return f"loss {metrics['loss']:.4f}, perplexity {perplexity}, in use {used} of {uses[0].num_codes}"

    def summary(self, values: Mapping[str, float]) -> str:
        uses = self._codebooks.use(values, len(self._validation))
        return "; ".join([f"MSE {values['mse']:.4f}, PSNR {values['psnr']:.1f} dB", *map(str, uses)])

    def concern(self, values: Mapping[str, float]) -> str | None:
        if not values:
            return None
        held_out = len(self._validation)
        uses = self._codebooks.use(values, held_out or self._codebooks.train.batch_size)
        return few_codes(uses, self._codebooks, "validation" if held_out else "the last steps")

    def picture(self, model: nn.Module, device: torch.device, step: int) -> Picture:
        source = self._validation if len(self._validation) else self._training
        labels, names = self._dataset.labels, self._dataset.class_names
        of_source = None if labels is None else labels[torch.from_numpy(source)]
        shown = source[spread_over_classes(of_source, len(source), _PICTURES)]
        originals = load_images(self._dataset, shown)
        reconstructions = model(originals.to(device)).reconstruction.cpu()
        captions = None if labels is None else [names[int(labels[index])] for index in shown]
        return Picture("reconstructions", torch.cat([originals, reconstructions]), len(originals), captions)
