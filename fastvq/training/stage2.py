"""Stage 2: a prior over the codes of one level."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.data.codes import CodeDataset, add_tensors
from fastvq.data.usage import CodeUse
from fastvq.distributed import Group
from fastvq.errors import ArgumentError
from fastvq.models import Prior, PriorConfig, build
from fastvq.training.batches import Batch
from fastvq.training.config import TrainConfig
from fastvq.training.loop import train_in
from fastvq.training.progress import Show
from fastvq.training.task import Picture

# Rows from which is judged how much the codes vary.
_COUNTED = 4096


def train_prior(
    codes_folder: str | os.PathLike[str],
    level: int,
    model_config: PriorConfig,
    config: TrainConfig,
    run_dir: str | os.PathLike[str],
    *,
    validation_folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    init_from: str | os.PathLike[str] | None = None,
    notes: Mapping[str, Any] | None = None,
    progress: Show = False,
    sample_images: Callable[[Prior, int], Tensor | Picture] | None = None,
    codebooks: Sequence[Tensor] | None = None,
) -> Prior:
    """Train a prior on the codes of one level, minimising the cross entropy in nats per code.

    The prior is conditioned on all levels above and, if ``model_config.num_classes`` is set, on the labels. ``run_dir``
    is laid out as in :func:`train_vqvae`. Validation, when it is due there: ``nll`` in nats per code and ``bits``
    per code. Several processes train together as there.

    Args:
        codes_folder: written by :func:`fastvq.data.extract_codes` or :func:`fastvq.data.import_codes`.
        level: 0 for the top.
        model_config: what is trained; its grid, codes, classes and levels above are those of the codes.
        config: how.
        run_dir: a new or empty folder, or with ``resume`` that of a run.
        validation_folder: codes of held-out images, of the same stage-1 model; None: no validation.
        resume: go on with the run in ``run_dir`` from its newest checkpoint, to ``config.steps``; a run that has them
            (or more) and its model returns that at once.
        init_from: start from the weights of a saved model, a run or a checkpoint (:func:`load_weights`).
        notes: anything JSON can hold, to be kept in ``config.json``.
        progress: as of :func:`train_vqvae`.
        sample_images: given the prior with averaged weights and the step, returns images [N, C, H, W] in [-1, 1], or a
            :class:`Picture` of them, which are written to ``images/samples_*.png`` every ``config.image_every`` steps.
        codebooks: of the codes, [K, D] of each level from the top down to this one at least, such as
            ``vqvae.codebooks``: similar codes start alike (:meth:`fastvq.models.Prior.start_from_codebooks`), which
            spares training much. None: the prior starts from random weights, or from ``init_from``, which goes first.

    Returns:
        The prior with averaged weights, in evaluation mode.

    Raises:
        ArgumentError: codes, model, codebooks and settings do not fit together.
        MissingFileError, CorruptFileError: of the folders of codes, or as in :func:`train_vqvae`.
        FileConflictError, DivergedError, PeerError: as in :func:`train_vqvae`.
    """

    used = None if codebooks is None or init_from is not None else tuple(codebooks[: level + 1])

    def make() -> Prior:
        prior = build(model_config)
        assert isinstance(prior, Prior)
        if used is not None:
            prior.start_from_codebooks(used)
        return prior

    def prepare() -> tuple[_Likelihood, dict[str, Any]]:
        codes, validation = _opened(codes_folder, validation_folder, level, model_config)
        if used is not None:
            model_config.check_codebooks(used)
        description = _described(codes, validation, level, model_config, config)
        description["codebooks"] = None if used is None else _checksum(used)
        return _Likelihood(codes, validation, level, model_config, config, sample_images), description

    prior = train_in(
        run_dir,
        prepare,
        make,
        config,
        resume=resume,
        init_from=init_from,
        notes=notes,
        progress=progress,
    )
    assert isinstance(prior, Prior)
    return prior


def _opened(
    codes_folder: str | os.PathLike[str],
    validation_folder: str | os.PathLike[str] | None,
    level: int,
    model_config: PriorConfig,
) -> tuple[CodeDataset, CodeDataset | None]:
    """Codes to train and to validate on, which fit the model and each other, and are whole."""
    codes = CodeDataset(codes_folder)
    _check_fit("codes_folder", codes, level, model_config)
    validation = None
    if validation_folder is not None:
        validation = CodeDataset(validation_folder)
        _check_fit("validation_folder", validation, level, model_config)
        if validation.model != codes.model:
            raise ArgumentError(
                f"validation_folder: {validation_folder} and {codes_folder} hold codes of different stage-1 models"
            )
    for stored in (codes, validation):
        if stored is not None:
            stored.verify()
    return codes, validation


def _described(
    codes: CodeDataset, validation: CodeDataset | None, level: int, model_config: PriorConfig, config: TrainConfig
) -> dict[str, Any]:
    return {
        "format": 1,
        "stage": 2,
        "level": level,
        "model": {"class": type(model_config).__name__.removesuffix("Config"), **model_config.to_dict()},
        "train": config.to_dict(),
        "data": {
            "codes": codes.fingerprint(),
            "rows": len(codes),
            "validation": None if validation is None else validation.fingerprint(),
            "stage1_model": codes.model,
        },
    }


def _check_fit(name: str, codes: CodeDataset, level: int, config: PriorConfig) -> None:
    if not 0 <= level < codes.num_levels:
        raise ArgumentError(f"level: {codes.folder} holds levels 0..{codes.num_levels - 1}, got {level}")
    expected: dict[str, object] = {
        "level": level,
        "shape": codes.shapes[level],
        "num_codes": codes.num_codes[level],
        "condition_shapes": codes.shapes[:level],
        "condition_num_codes": codes.num_codes[:level],
    }
    if config.num_classes is not None:
        if codes.labels is None:
            raise ArgumentError(
                f"model_config.num_classes: {config.num_classes}, but the codes in {codes.folder} have no labels"
            )
        expected["num_classes"] = codes.num_classes
    for field, value in expected.items():
        if getattr(config, field) != value:
            raise ArgumentError(
                f"model_config.{field}: {getattr(config, field)}, but {name} {codes.folder} needs {value}"
            )


def _checksum(codebooks: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    add_tensors(digest, ((f"level{level}", codebook) for level, codebook in enumerate(codebooks)))
    return digest.hexdigest()


class _Likelihood:
    criterion = "nll"
    unit = "rows"

    def __init__(
        self,
        codes: CodeDataset,
        validation: CodeDataset | None,
        level: int,
        model_config: PriorConfig,
        config: TrainConfig,
        sample_images: Callable[[Prior, int], Tensor | Picture] | None,
    ) -> None:
        self.rows = len(codes)
        self._codes, self._validation, self._level = codes, validation, level
        self._num_codes, self._uniform_said = model_config.num_codes, False
        self._labelled = model_config.num_classes is not None
        self._part = config.batch_size // config.accumulate
        self._sample_images = sample_images

    @functools.cached_property
    def _use(self) -> CodeUse:
        return self._codes.use(self._level, most=_COUNTED)

    def load(self, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        return self._gather(self._codes, rows)

    def _gather(self, codes: CodeDataset, rows: np.ndarray) -> Batch:
        """Codes of this level, of each level above (top first) and, if they count, labels."""
        tensors = [codes.codes(level, rows) for level in (self._level, *range(self._level))]
        if self._labelled:
            assert codes.labels is not None
            tensors.append(codes.labels[torch.from_numpy(rows)])
        return tuple(tensors)

    def _nll(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        codes, *above = batch
        label = above.pop() if self._labelled else None
        logits = forward(codes, tuple(above) or None, label)
        return F.cross_entropy(logits.float(), codes)

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._nll(forward, batch), {}

    def accumulation(self, model: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        return contextlib.nullcontext({})

    def validate(self, model: nn.Module, device: torch.device, group: Group) -> dict[str, float]:
        if self._validation is None:
            return {}
        total, count = 0.0, len(self._validation)
        with group.together():
            for start in group.turns(range(0, count, self._part)):
                rows = np.arange(start, min(start + self._part, count))
                batch = tuple(tensor.to(device) for tensor in self._gather(self._validation, rows))
                total += float(self._nll(model, batch)) * len(rows)
        (total,) = group.sum([total])
        return {"nll": total / count, "bits": total / count / math.log(2)}

    def brief(self, metrics: Mapping[str, float]) -> str:
        return f"loss {metrics['loss']:.4f}, {metrics['loss'] / math.log(2):.3f} bits per code"

    def summary(self, values: Mapping[str, float]) -> str:
        uniform = "" if self._uniform_said else f" ({math.log2(self._num_codes):.3g} without a prior)"
        self._uniform_said = True
        return f"NLL {values['nll']:.4f} nats, {values['bits']:.3f} bits per code{uniform}"

    def concern(self, values: Mapping[str, float]) -> str | None:
        if not self._use.few:
            return None
        return (
            f"the codes hardly vary; in {self._codes.folder}\n    {self._use}\n"
            "  an NLL near 0 is no merit then: samples have as little in them as these codes. Before any prior the\n"
            "  autoencoder needs a new run, in general with --set revive_below=1"
        )

    def picture(self, model: nn.Module, device: torch.device, step: int) -> Picture | None:
        if self._sample_images is None:
            return None
        assert isinstance(model, Prior)
        drawn = self._sample_images(model, step)
        return drawn if isinstance(drawn, Picture) else Picture("samples", drawn)
