"""Samples of which something is known: codes of upper levels, classes that take turns, a picture around a region."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_codes, refuses
from pipelines import GRIDS, pipeline_of, vqvae_of
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.sampling import Pipeline, sample
from fastvq.sampling.known import known_cells, without_region

pytestmark = pytest.mark.usefixtures("steady")


def pictures(count: int, seed: int = 0) -> Tensor:
    """As the two-level pipeline samples them: [count, 1, 8, 12]."""
    return torch.rand(count, 1, 8, 12, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def painter() -> Pipeline:
    """A pipeline of two levels whose codebooks are vectors of pictures, so that pictures have various codes."""
    pipeline = pipeline_of(2)
    pipeline.vqvae = vqvae_of(2, codebook_init="data")
    pipeline.vqvae.train()(pictures(16, seed=9))
    pipeline.vqvae.eval()
    assert all(len(grid.unique()) > 2 for grid in pipeline.encode(pictures(3)))
    return pipeline


def box(top: int, left: int, height: int, width: int) -> Tensor:
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


# ---- Codes of upper levels


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("each", [True, False], ids=["each", "one-for-all"])
def test_only_levels_below_are_drawn(count: int, each: bool) -> None:
    pipeline = pipeline_of(3)
    above = [random_codes(4 if each else 1, *shape, seed=level) for level, shape in enumerate(GRIDS[:count])]
    drawn = pipeline.sample(4, label=1, codes=above, seed=5, start=2)
    whole = [grid.expand(4, -1, -1) for grid in above]
    for prior in pipeline.priors[count:]:
        whole.append(sample(prior, 4, condition=whole, label=1, seed=5, start=2))
    assert all(torch.equal(*pair) for pair in zip(drawn.codes, whole, strict=True))
    torch.testing.assert_close(drawn.images, pipeline.decode(whole))


def test_what_is_given_draws_what_sampling_drew() -> None:
    pipeline = pipeline_of(2)
    first = pipeline.sample(3, label=2, seed=1)
    again = pipeline.sample(3, label=2, codes=first.codes[:1], seed=1)
    assert torch.equal(again.images, first.images)
    assert not torch.equal(pipeline.sample(3, label=2, codes=first.codes[:1], seed=2).codes[1], first.codes[1])


TOP = random_codes(2, 2, 3)
BAD_CODES: dict[str, tuple[Any, type[Exception], str]] = {
    "a-tensor": (TOP, ArgumentError, "codes: expected a sequence of at most 1 of 2 levels, top first, got a single"),
    "all-levels": ([TOP, TOP], ArgumentError, "codes: expected a sequence of at most 1 of 2 levels, .* got 2 levels"),
    "count": ([random_codes(3, 2, 3)], ArgumentError, r"codes\[0\]: expected shape \[2, 2, 3\], got \[3, 2, 3\]"),
    "grid": ([random_codes(1, 3, 2)], ArgumentError, r"codes\[0\]: expected shape \[2, 2, 3\], got \[1, 3, 2\]"),
    "values": ([TOP + 5], ArgumentError, r"codes\[0\]: values must lie in 0..4"),
    "floats": ([TOP.float()], ArgumentTypeError, r"codes\[0\]: expected an integer tensor, got torch.float32"),
}


@pytest.mark.parametrize(("codes", "error", "message"), BAD_CODES.values(), ids=BAD_CODES)
def test_refuses_codes(codes: Any, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        pipeline_of(2).sample(2, label=0, codes=codes)


# ---- Classes


@pytest.fixture
def named() -> Pipeline:
    pipeline = pipeline_of(1)
    pipeline.class_names = ("ant", "bee", "cow")
    return pipeline


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (2, [2, 2, 2, 2]),
        ("bee", [1, 1, 1, 1]),
        (["cow", 0], [0, 2, 0, 2]),
        ((1,), [1, 1, 1, 1]),
        ([2, 1, 0], [2, 1, 0, 2]),
        (torch.tensor([0, 2, 2, 1]), [0, 2, 2, 1]),
        (None, [0, 1, 2, 0]),
    ],
    ids=str,
)
def test_classes_take_turns_by_the_index_of_the_sample(label: Any, expected: list[int], named: Pipeline) -> None:
    labels = named.labels(range(3, 7), label)
    assert labels is not None
    assert labels.tolist() == expected
    if label is not None:
        found = named.sample(4, label=label, seed=1, start=3)
        assert torch.equal(found.codes[0], named.sample(4, label=labels, seed=1, start=3).codes[0])


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        (3, ArgumentError, "label: must lie in 0..2, got 3"),
        ([0, -1], ArgumentError, "label: must lie in 0..2, got -1"),
        ("dog", ArgumentError, "label: expected one of the names cow, ant, bee; got 'dog'"),
        ([], ArgumentError, "label: expected at least one class, got none"),
        ([True], ArgumentTypeError, "label: expected a class's number or name, got bool True"),
        (True, ArgumentTypeError, "label: expected a class's number or name, got bool True"),
        (1.5, ArgumentTypeError, "label: expected a class's number or name, got float 1.5"),
        (None, ArgumentError, "label: this prior is class-conditional"),
    ],
    ids=str,
)
def test_refuses_classes(label: Any, error: type[Exception], message: str, named: Pipeline) -> None:
    with refuses(error, message):
        named.sample(2, label=label)


def test_without_classes_there_is_none_to_name() -> None:
    pipeline = pipeline_of(1, num_classes=None)
    assert pipeline.classes() is pipeline.labels(range(3)) is None
    with refuses(ArgumentError, "label: these priors are not class-conditional, got 'ant'"):
        pipeline.sample(1, label="ant")


# ---- A picture around a region


def test_a_code_is_drawn_where_its_cell_meets_the_region() -> None:
    mask = box(3, 4, 1, 1)[None]  # one pixel
    assert (~known_cells(mask, (2, 3), 0)[0]).nonzero().tolist() == [[0, 1]]
    assert (~known_cells(mask, (4, 6), 0)[0]).nonzero().tolist() == [[1, 2]]
    around = [[row, column] for row in (0, 1, 2) for column in (1, 2, 3)]
    assert (~known_cells(mask, (4, 6), 1)[0]).nonzero().tolist() == around
    assert not known_cells(mask, (2, 3), 1).any()
    wide = box(0, 3, 2, 2)[None]
    assert (~known_cells(wide, (4, 6), 0)[0]).nonzero().tolist() == [[0, 1], [0, 2]]


def test_a_region_is_filled_smoothly() -> None:
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    slope = torch.stack([rows / 8 - 1, columns / 12 - 1])[None]
    region = torch.zeros(1, 1, 16, 24, dtype=torch.bool)
    region[:, :, 5:10, 8:14] = True
    # A plane is its own smooth continuation, whatever lies in the region.
    filled = without_region(slope.masked_fill(region, 7.0), region)
    torch.testing.assert_close(filled, slope, atol=1e-3, rtol=0)
    assert torch.equal(filled[~region.expand_as(filled)], slope[~region.expand_as(slope)])
    everything = torch.ones_like(region)
    assert torch.equal(without_region(slope, everything), torch.zeros_like(slope))


def test_one_round_draws_what_the_priors_draw_around_known_codes() -> None:
    pipeline, images, mask = painter(), pictures(3), box(2, 4, 4, 5)
    found = pipeline.inpaint(images, mask, label=1, seed=4, start=5, rounds=1, paste=False, temperature=[0.7, 1.2])
    codes = pipeline.encode(without_region(images, mask[None, None]))
    above: tuple[Tensor, ...] = ()
    for prior, grids, temperature in zip(pipeline.priors, codes, (0.7, 1.2), strict=True):
        kept = known_cells(mask[None], prior.config.shape, 0).expand_as(grids)
        assert kept.any()
        known = {"init_codes": grids, "mask": kept}
        drawn = sample(prior, 3, condition=above, label=1, seed=4, start=5, temperature=temperature, **known)
        above = (*above, drawn)
    assert all(torch.equal(*pair) for pair in zip(found.codes, above, strict=True))
    torch.testing.assert_close(found.images, pipeline.decode(above))


def test_a_second_round_goes_on_from_the_first() -> None:
    pipeline, images, mask = painter(), pictures(2), box(2, 4, 4, 5)
    settings: dict[str, Any] = {"label": 1, "seed": 4, "paste": False}
    first = pipeline.inpaint(images, mask, rounds=1, **settings)
    second = pipeline.inpaint(images, mask, **settings)
    codes = pipeline.encode(torch.where(mask, first.images, images))
    for prior, grids, drawn in zip(pipeline.priors, codes, second.codes, strict=True):
        kept = known_cells(mask[None], prior.config.shape, 0).expand_as(grids)
        assert torch.equal(drawn[kept], grids[kept])
    assert not torch.equal(first.images, second.images)


def test_the_rest_of_an_image_stays_and_what_was_in_the_region_has_no_say() -> None:
    pipeline, images, mask = painter(), pictures(2), box(2, 4, 4, 5)
    found = pipeline.inpaint(images, mask, label=1, seed=4)
    assert torch.equal(found.images[:, :, ~mask], images[:, :, ~mask])
    assert not torch.equal(found.images, images)
    other = torch.where(mask, pictures(2, seed=1), images)
    assert torch.equal(pipeline.inpaint(other, mask, label=1, seed=4).images, found.images)
    decoded = pipeline.inpaint(images, mask, label=1, seed=4, paste=False).images
    assert torch.equal(decoded[:, :, mask], found.images[:, :, mask])
    torch.testing.assert_close(decoded, pipeline.decode(found.codes))


def test_a_region_of_everything_is_sampling() -> None:
    pipeline = painter()
    found = pipeline.inpaint(pictures(1), torch.ones(8, 12, dtype=torch.bool), 3, label=1, seed=4, start=1)
    assert torch.equal(found.images, pipeline.sample(3, label=1, seed=4, start=1).images)


def test_samples_of_one_image_do_not_depend_on_the_call() -> None:
    pipeline, image = painter(), pictures(1)
    masks = torch.stack([box(row, 2, 3, 6) for row in range(5)])
    whole = pipeline.inpaint(image, masks, 5, label=[0, 2], seed=3)
    assert len({tuple(grid.flatten().tolist()) for grid in whole.codes[1]}) == 5
    for first, last in [(0, 2), (2, 5)]:
        part = pipeline.inpaint(image, masks[first:last], last - first, label=[0, 2], seed=3, start=first)
        for mine, all_of_them in zip(part.codes, whole.codes, strict=True):
            assert torch.equal(mine, all_of_them[first:last])
    again = pipeline.inpaint(image.expand(5, -1, -1, -1), masks, label=[0, 2], seed=3)
    assert torch.equal(again.codes[1], whole.codes[1])


def test_a_margin_draws_more() -> None:
    pipeline, image, mask = painter(), pictures(1), box(0, 0, 2, 2)
    near, wide = (pipeline.inpaint(image, mask, 20, label=1, seed=3, margin=margin, rounds=1) for margin in (0, 1))
    varies = [(level != level[0]).any(0) for level in (near.codes[1], wide.codes[1])]
    assert varies[0].nonzero().tolist() == [[0, 0]]
    assert varies[1].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


HOLE = box(0, 0, 2, 2)
BAD_PICTURES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "images-size": ({"images": torch.zeros(2, 1, 8, 8)}, ArgumentError, r"images: expected shape \[B, 1, 8, 12\]"),
    "images-uint8": ({"images": torch.zeros(2, 1, 8, 12).byte()}, ArgumentTypeError, "images: expected a floating"),
    "images-255": (
        {"images": torch.full_like(pictures(2), 255)},
        ArgumentError,
        r"images: values must lie in \[-1, 1\], got 255.0",
    ),
    "images-nan": (
        {"images": pictures(2) * torch.nan},
        ArgumentError,
        r"images: values must lie in \[-1, 1\], got nan",
    ),
    "images-count": ({"n": 3}, ArgumentError, "images: expected 1, or one for each of the 3 samples, got 2"),
    "mask-float": ({"mask": HOLE.float()}, ArgumentTypeError, r"mask: expected bool \(True where the image is painted"),
    "mask-size": ({"mask": HOLE[:4]}, ArgumentError, r"mask: expected shape \[8, 12\], got \[4, 12\]"),
    "mask-count": (
        {"mask": HOLE.expand(3, -1, -1)},
        ArgumentError,
        r"mask: expected \[H, W\], or one for each",
    ),
    "mask-empty": ({"mask": HOLE & ~HOLE}, ArgumentError, "mask: nothing is to be painted"),
    "one-mask-empty": ({"mask": torch.stack([HOLE, ~HOLE & HOLE])}, ArgumentError, "mask: nothing is to be painted"),
    "n": ({"n": 0}, ArgumentError, "images: expected 1, or one for each of the 0 samples, got 2"),
    "margin": ({"margin": -1}, ArgumentError, "margin: must be at least 0, got -1"),
    "rounds": ({"rounds": 0}, ArgumentError, "rounds: must be at least 1, got 0"),
    "label": ({"label": 3}, ArgumentError, "label: must lie in 0..2, got 3"),
    "temperature": ({"temperature": [1.0]}, ArgumentError, "temperature: expected one value or 2"),
    "engine": ({"engine": "warp"}, ArgumentError, "engine: expected"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_inpainting_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"images": pictures(2), "mask": HOLE, "label": 1, **changes}
    with refuses(error, message):
        painter().inpaint(given.pop("images"), given.pop("mask"), **given)
