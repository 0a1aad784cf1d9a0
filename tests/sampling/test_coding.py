"""Images to codes and back, and grids of codes as they are filled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_codes, refuses
from pipelines import GRIDS, pipeline_of, vqvae_of
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.sampling import frames
from fastvq.sampling.coding import decode

pytestmark = pytest.mark.usefixtures("steady")


def all_codes(n: int, levels: int = 2, seed: int = 0) -> list[Tensor]:
    return [random_codes(n, *shape, seed=seed + level) for level, shape in enumerate(GRIDS[:levels])]


@pytest.mark.parametrize("count", [0, 1, 11])
def test_reconstructions_are_decoded_codes(count: int) -> None:
    pipeline = pipeline_of(2)
    with torch.no_grad():
        pipeline.vqvae.decoder[-1].weight.mul_(50)
    images = torch.rand(count, 1, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = pipeline.reconstruct(images)
    codes = pipeline.vqvae.encode(images)
    assert all(torch.equal(*pair) for pair in zip(pipeline.encode(images), codes, strict=True))
    assert (found.shape, found.dtype, found.requires_grad) == (images.shape, torch.float32, False)
    torch.testing.assert_close(found, pipeline.vqvae.decode(codes).detach().clamp(-1, 1), rtol=1e-5, atol=1e-5)
    pipeline.vqvae.train()
    assert torch.equal(pipeline.reconstruct(images), found)
    assert pipeline.vqvae.training


def test_codes_of_a_single_level_may_be_a_tensor() -> None:
    pipeline, (codes,) = pipeline_of(1), all_codes(3, 1)
    assert torch.equal(pipeline.decode(codes), pipeline.decode([codes]))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.zeros(2, 2, 3).long(), ArgumentError, r"expected a sequence of 2 .* got a tensor of shape \[2, 2, 3\]"),
        ((), ArgumentError, "expected a sequence of 2 tensors, one per level, got 0 of them"),
        (all_codes(2)[:1], ArgumentError, "expected a sequence of 2 tensors, one per level, got 1 of them"),
        (
            [grid[level:] for level, grid in enumerate(all_codes(3))],
            ArgumentError,
            r"\[1\]: expected shape \[3, h, w\]",
        ),
        (
            [grid[1 - level :] for level, grid in enumerate(all_codes(3))],
            ArgumentError,
            r"\[1\]: expected shape \[2, h",
        ),
        ([0, 1], ArgumentTypeError, r"\[0\]: expected a torch.Tensor, got int"),
    ],
    ids=["tensor", "none", "too-few", "fewer-rows", "more-rows", "numbers"],
)
def test_refuses_other_codes(given: Any, error: type[Exception], message: str) -> None:
    with refuses(error, f"codes.*{message}"):
        pipeline_of(2).decode(given)
    with refuses(error, f"codes.*{message}"):
        next(pipeline_of(2).frames(given))


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (1, 8, 12), ()], ids=["channels", "no-batch", "number"])
def test_refuses_images_of_another_shape(shape: tuple[int, ...]) -> None:
    pipeline = pipeline_of(2)
    for call in (pipeline.encode, pipeline.reconstruct):
        with refuses(ArgumentError, rf"images: expected shape \[B, 1, H, W\], got \[{', '.join(map(str, shape))}\]"):
            call(torch.zeros(shape))


@pytest.mark.parametrize(
    ("levels", "most", "count"),
    [
        (1, 60, 6),  # a position each
        (2, 60, 6 + 24),
        (2, 30, 6 + 24),
        (2, 29, 2 + 4),  # a row each
        (2, 5, 1 + 2),
        (2, 2, 1 + 1),
        (3, 60, 2 + 4 + 8),
    ],
)
def test_frames_fill_the_grids_in_raster_order(levels: int, most: int, count: int) -> None:
    vqvae, codes = vqvae_of(levels), all_codes(9, levels)
    shown = [*frames(vqvae, codes, most=most)]
    assert len(shown) == count + 1 <= most + 1
    nothing = [torch.zeros_like(level, dtype=torch.bool) for level in codes]
    assert torch.equal(shown[0], decode(vqvae, codes, nothing))
    assert torch.equal(shown[-1], decode(vqvae, codes))
    top = GRIDS[0][0] * GRIDS[0][1]
    if most >= 30 and levels < 3:
        for drawn in (1, 4):
            known = [(torch.arange(top) < drawn).view(1, *GRIDS[0]).expand(9, -1, -1), *nothing[1:]]
            assert torch.equal(shown[drawn], decode(vqvae, codes, known))


def test_a_frame_shows_no_code_that_is_not_drawn() -> None:
    vqvae, codes = vqvae_of(2), all_codes(2)
    first = [*frames(vqvae, codes)]
    bottom = codes[1].clone()
    bottom[:, 2, 3] = (bottom[:, 2, 3] + 1) % 5
    second = [*frames(vqvae, [codes[0], bottom])]
    alike = [torch.equal(*pair) for pair in zip(first, second, strict=True)]
    place = 1 + 6 + (2 * 6 + 3)  # the frame before anything, the top, and the positions before this one
    assert alike == [True] * place + [False] * (31 - place)


def test_what_is_known_is_there_from_the_beginning() -> None:
    pipeline, codes = pipeline_of(2), all_codes(2)
    known = [torch.ones_like(codes[0], dtype=torch.bool), torch.zeros_like(codes[1], dtype=torch.bool)]
    shown = [*pipeline.frames(codes, known=known)]
    assert len(shown) == 1 + 24
    torch.testing.assert_close(shown[0], pipeline.vqvae.preview(codes[:1]).detach().clamp(-1, 1))
    known[1][:, 1] = True
    kept = [*pipeline.frames(codes, known=known)]
    assert torch.equal(kept[0], decode(pipeline.vqvae, codes, known))
    assert torch.equal(kept[6], kept[12])
    assert torch.equal(kept[-1], shown[-1])


def test_frames_for_each_level_at_least() -> None:
    with refuses(ArgumentError, "most: must be at least 2, got 1"):
        next(frames(vqvae_of(2), all_codes(1), most=1))
