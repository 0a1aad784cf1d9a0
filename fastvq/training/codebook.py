"""What to do where an autoencoder uses few of its codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fastvq._files import reading
from fastvq._schema import integer, require_entries, several
from fastvq.data.base import held_out
from fastvq.data.usage import CodeUse
from fastvq.models import VQVAEConfig, build
from fastvq.models.stored import outline
from fastvq.models.vqvae import HierarchicalVQVAE
from fastvq.training.config import TrainConfig
from fastvq.training.run import RunFolder

# Vectors of a batch per code: with fewer, `revive_below` = 1 would move codes that are in use.
_PER_BATCH = 2
# Training vectors per code: with fewer, a codebook learns its vectors by heart.
_PER_CODE = 10
# What `revive_below` should be at least: a code starts with a size of 1 and loses a hundredth of it a step.
_REVIVE = 0.5
# Above this the encoder may run away from its codes.
_RATE = 1e-3


@dataclass(frozen=True)
class CodebookTraining:
    """On what the use of an autoencoder's codes depends.

    Attributes:
        model, train: settings of the run.
        images: how many images there are, to train on and held out.
        size: of an image, (H, W).
    """

    model: VQVAEConfig
    train: TrainConfig
    images: int
    size: tuple[int, int]

    @classmethod
    def of_run(cls, run: Path) -> Self:
        """From the record of a run of stage 1.

        Raises:
            MissingFileError, CorruptFileError: there is none, or it is damaged.
        """
        folder = RunFolder(run)
        record = folder.record()
        data = {"images": integer(1), "size": several(integer(1), least=2, most=2)}
        require_entries(folder.config, record["data"], data)
        with reading(f"{folder.config}: not a record of an autoencoder"):
            model = {name: value for name, value in record["model"].items() if name != "class"}
            height, width = record["data"]["size"]
            return cls(
                VQVAEConfig.from_dict(model),
                TrainConfig.from_dict(record["train"]),
                record["data"]["images"],
                (height, width),
            )

    @property
    def grids(self) -> list[int]:
        """Vectors of one image, of each level."""
        model = outline(lambda: build(self.model))
        assert isinstance(model, HierarchicalVQVAE)
        return [math.prod(shape) for shape in model.code_shapes(self.size)]

    @property
    def validated(self) -> int:
        """Images held out."""
        return held_out(self.images, self.train.validation_fraction)

    def use(self, values: Mapping[str, float], images: int) -> list[CodeUse]:
        """Of each level, from the metrics of a batch or a validation with so many images."""
        return CodeUse.of_metrics(values, self.model.num_codes, [images * grid for grid in self.grids])

    def advice(self, use: CodeUse) -> list[str]:
        """What to change in a new run so that a level uses more of its codes, with images as they are."""
        model, train, codes, grid = self.model, self.train, self.model.num_codes, self.grids[use.level]
        found: list[str] = []
        changes = []
        if model.codebook_init != "kmeans":
            changes.append(f"--set codebook_init=kmeans (now {model.codebook_init})")
        if model.revive_below < _REVIVE:
            changes.append(f"--set revive_below=1 (now {model.revive_below:g})")
        if changes:
            found.append(f"{' '.join(changes)}: codes start among the vectors, and unused ones are moved there")
        vectors = train.batch_size * grid
        if vectors < _PER_BATCH * codes:
            enough = math.ceil(_PER_BATCH * codes / grid)
            found.append(
                f"--batch-size {enough} (now {train.batch_size}), or fewer codes (--set num_codes=...): a batch has "
                f"{vectors} vectors of this level for {codes} codes"
            )
        vectors = (self.images - self.validated) * grid
        if vectors < _PER_CODE * codes:
            found.append(
                f"more images, or fewer codes (--set num_codes=...): all training images together have {vectors} "
                f"vectors of this level for {codes} codes"
            )
        if not changes or train.learning_rate > _RATE:
            found.append(f"--lr {train.learning_rate / 3:.1g} (now {train.learning_rate:g})")
        return found


def few_codes(uses: Sequence[CodeUse], training: CodebookTraining | None, where: str) -> str | None:
    """What is wrong with the use of an autoencoder's codes, by the names of levels, and what to do; None if nothing is.

    Args:
        training: how it was trained, if that is known.
        where: what was counted, such as ``validation``.
    """
    few = [use for use in uses if use.few]
    if not few:
        return None
    lines = [f"few codes in use ({where}): what is not in the codes is lost, and a prior learns nothing from these"]
    for use in few:
        lines.append(f"  {use}")
        lines += [f"    try {advice}" for advice in ([] if training is None else training.advice(use))]
    lines.append("  It takes a new run. Only where images are all alike are so few codes enough.")
    return "\n".join(lines)
