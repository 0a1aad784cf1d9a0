"""What to do where an autoencoder uses few of its codes."""

from __future__ import annotations

import functools
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

    @functools.cached_property
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

    def advice(self, few: Sequence[CodeUse]) -> list[str]:
        """What to change in a new run so that these levels use more of their codes, the best first."""
        model, train, codes = self.model, self.train, self.model.num_codes
        found: list[str] = []
        revived = model.revive_below >= _REVIVE
        if not revived:
            found.append(
                f"--set revive_below=1 (now {model.revive_below:g}): codes that are not in use move onto vectors; "
                f"batch size {train.batch_size} and learning rate {train.learning_rate:g} can stay"
            )
        if revived or train.learning_rate > _RATE:
            found.append(f"--lr {train.learning_rate / 3:.1g} (now {train.learning_rate:g})")
        for use in few:
            grid = self.grids[use.level]
            batch, everything = train.batch_size * grid, (self.images - self.validated) * grid
            if batch < _PER_BATCH * codes:
                enough = math.ceil(_PER_BATCH * codes / grid)
                found.append(
                    f"--batch-size {enough} or --set num_codes={_below(batch / _PER_BATCH)}: a batch of "
                    f"{train.batch_size} has {batch} vectors of {use.name} for {codes} codes"
                )
            if everything < _PER_CODE * codes:
                found.append(
                    f"more images or --set num_codes={_below(everything / _PER_CODE)}: {self.images - self.validated} "
                    f"training images have {everything} vectors of {use.name} for {codes} codes"
                )
        return found


def _below(count: float) -> int:
    """The power of two next to a number from below, at least 2."""
    return 2 ** max(1, math.floor(math.log2(max(1.0, count))))


def few_codes(uses: Sequence[CodeUse], training: CodebookTraining | None, where: str) -> str | None:
    """What is wrong with the use of an autoencoder's codes, by the names of levels, and what to do; None if nothing is.

    Args:
        training: how it was trained, if that is known.
        where: what was counted, such as ``validation``.
    """
    few = [use for use in uses if use.few]
    if not few:
        return None
    advice = [] if training is None else training.advice(few)
    lines = [
        f"few codes in use in {where}; what codes cannot say is lost, and a prior over them learns nothing:",
        *(f"    {use}" for use in few),
        *(["  in a new run, unless the images are all alike:"] if advice else []),
        *(f"    {one}" for one in advice),
    ]
    return "\n".join(lines)
