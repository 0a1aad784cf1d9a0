"""Priors of every kind that a plan is known for, and what they may be given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers import pixelcnn, snail

from fastvq.models import Prior

GIVEN: dict[str, dict[str, Any]] = {
    "alone": {},
    "labels": {"num_classes": 3},
    "condition": {"condition_shapes": ((3, 2),), "condition_num_codes": (4,)},
    "both": {"num_classes": 3, "condition_shapes": ((1, 2), (3, 2)), "condition_num_codes": (4, 3)},
}
PRIORS: dict[str, Callable[..., Prior]] = {
    "strict": lambda **c: snail(blocks=2, layers_per_block=2, kernel_size=5, **c),
    "strict-no-attention": lambda **c: snail(blocks=2, layers_per_block=2, attention=False, **c),
    "strict-even": lambda **c: snail(kernel_size=4, layers_per_block=2, attention=False, **c),
    "strict-output": lambda **c: snail(output_blocks=2, activation="concat_elu", **c),
    "no-layers": lambda **c: snail(blocks=2, layers_per_block=0, **c),
    "inclusive": lambda **c: snail(mask="inclusive", layers_per_block=3, form="symmetric", **c),
    "inclusive-no-attention": lambda **c: snail(mask="inclusive", blocks=2, attention=False, **c),
    "legacy": lambda **c: snail(legacy_skip=True, layers_per_block=2, output_blocks=1, **c),
    "pixelcnn": lambda **c: pixelcnn(layers=3, **c),
    "pixelcnn-wide": lambda **c: pixelcnn(layers=2, kernel_size=5, **c),
    "pixelcnn-no-layers": lambda **c: pixelcnn(layers=0, **c),
}
every_prior = pytest.mark.parametrize("kind", PRIORS)
every_given = pytest.mark.parametrize("told", GIVEN)
