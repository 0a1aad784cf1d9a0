"""Autoencoders of other projects in a pipeline: the same results as ours, and what is said where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pixelcnn, refuses
from pipelines import pipeline_of
from torch import Tensor, nn

from fastvq.data import Shard
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.evaluation import measure_images
from fastvq.sampling import Autoencoder, Pipeline, merge_samples, sample_shard

pytestmark = pytest.mark.usefixtures("steady")
SHAPE = (1, 8, 12)


class Theirs(nn.Module):
    """Our autoencoder behind the two methods that are asked for; dropout shows the mode."""

    def __init__(self, model: nn.Module, *, alone: bool = False) -> None:
        super().__init__()
        self.model, self.alone, self.dropout = model, alone, nn.Dropout(0.5)

    def encode(self, images: Tensor) -> Any:
        found = self.model.encode(self.dropout(images))  # type: ignore[operator]
        return found[0].int() if self.alone else [grid.to(torch.int16) for grid in found]

    def decode(self, codes: Any) -> Tensor:
        assert isinstance(codes, Tensor if self.alone else tuple)
        return self.dropout(self.model.decode((codes,) if self.alone else codes))  # type: ignore[no-any-return,operator]


def both(levels: int = 2) -> tuple[Pipeline, Pipeline]:
    ours = pipeline_of(levels)
    theirs = Theirs(ours.vqvae, alone=levels == 1).train()
    rows, columns = (2 * side for side in ours.priors[-1].config.shape)
    return ours, Pipeline(theirs, ours.priors, class_names=["a", "b", "c"], image_shape=(1, rows, columns))


@pytest.mark.parametrize("levels", [1, 2])
def test_all_is_as_with_ours(levels: int) -> None:
    ours, theirs = both(levels)
    wanted, found = ours(3, label=1, seed=2), theirs(3, label="b", seed=2)
    assert torch.equal(found.images, wanted.images)
    assert all(torch.equal(*pair) for pair in zip(found.codes, wanted.codes, strict=True))
    assert theirs.image_shape == ours.image_shape
    images = wanted.images
    assert torch.equal(theirs.reconstruct(images), ours.reconstruct(images))
    assert all(grid.dtype == torch.int64 for grid in theirs.encode(images))
    mask = torch.zeros(images.shape[2:], dtype=torch.bool)
    mask[-2:] = True
    painted = theirs.inpaint(images[:1], mask, 3, label=0, seed=4).images
    assert torch.equal(painted, ours.inpaint(images[:1], mask, 3, label=0, seed=4).images)
    assert len(theirs(0, label=1).images) == 0
    assert theirs.vqvae.model.training
    again = Pipeline(theirs.vqvae, theirs.priors)(3, label=1, seed=2)
    assert torch.equal(again.images, found.images)


def test_what_is_missing_is_code_0() -> None:
    _, theirs = both()
    found = theirs(2, label=0, seed=1, callback=lambda rows, codes: rows < 4)
    assert [int((grid >= 0).sum()) for grid in found.codes] == [12, 0]
    wanted = theirs.decode([found.codes[0], torch.zeros_like(found.codes[1])])
    assert torch.equal(found.images, wanted)
    shown = [*theirs.frames(theirs(1, label=0, seed=1).codes, most=4)]
    assert len(shown) == 4
    assert torch.equal(shown[0], theirs.decode([torch.zeros(1, 2, 3).long(), torch.zeros(1, 4, 6).long()]))


def test_an_object_that_is_no_module_and_has_a_shape() -> None:
    class Table:
        image_shape = (1, 3, 4)

        def encode(self, images: Tensor) -> Tensor:
            return ((images[:, 0] + 1) * 2).round().long()

        def decode(self, codes: Tensor) -> Tensor:
            return codes[:, None].double() / 2 - 1

    assert isinstance(Table(), Autoencoder)
    pipeline = Pipeline(Table(), [pixelcnn()])
    found = pipeline.sample(5, seed=0)
    assert torch.equal(found.images, found.codes[0][:, None].float() / 2 - 1)
    assert torch.equal(pipeline.encode(found.images)[0], found.codes[0])
    assert pipeline.device == torch.device("cpu")
    assert pipeline.to("meta").device == torch.device("meta")


def test_levels_may_have_codebooks_of_their_own() -> None:
    class Two:
        def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(images), 3, 4).long(), torch.zeros(len(images), 6, 8).long()

        def decode(self, codes: tuple[Tensor, Tensor]) -> Tensor:
            return (codes[1] / 8)[:, None]

    top = pixelcnn(num_codes=3)
    bottom = pixelcnn(shape=(6, 8), num_codes=7, level=1, condition_shapes=((3, 4),), condition_num_codes=(3,))
    found = Pipeline(Two(), [top, bottom], image_shape=(1, 6, 8)).sample(9, seed=1)
    assert int(found.codes[0].max()) < 3 <= int(found.codes[1].max()) < 7


class Given:
    """Gives what it is told to."""

    def __init__(self, encode: Any, decode: Any = None) -> None:
        self._encode, self._decode = encode, decode

    def encode(self, images: Tensor) -> Any:
        return self._encode

    def decode(self, codes: Any) -> Any:
        return self._decode


CODES = torch.zeros(1, 3, 4).long()
ENCODED = "vqvae.encode: codes of level 0: expected"
IMAGES = torch.zeros(1, 1, 3, 4)
MISFITS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "floats": (
        lambda: Given(CODES.float()),
        ArgumentTypeError,
        rf"{ENCODED} integers of shape \[1, 3, 4\], got torch.float32 of shape \[1, 3, 4\]",
    ),
    "grid": (
        lambda: Given(CODES[:, :2]),
        ArgumentError,
        rf"{ENCODED} shape \[1, 3, 4\], as priors\[0\] has it, got \[1, 2, 4\]",
    ),
    "flat": (lambda: Given(CODES.flatten()), ArgumentError, rf"{ENCODED} shape .* got \[12\]"),
    "range": (lambda: Given(CODES + 5), ArgumentError, rf"{ENCODED} codes in 0..4, as priors\[0\] has them, got 5"),
    "negative": (lambda: Given(CODES - 1), ArgumentError, f"{ENCODED} codes in 0..4, .* got -1"),
    "levels": (
        lambda: Given((CODES, CODES)),
        ArgumentError,
        r"vqvae.encode: expected a sequence of 1 levels .* got a tuple of 2: torch.int64 of shape",
    ),
    "text": (lambda: Given("codes"), ArgumentError, "vqvae.encode: expected a sequence of 1 levels .* got str"),
    "none-inside": (lambda: Given([None]), ArgumentTypeError, f"{ENCODED} integers .* got NoneType"),
    "no-images": (
        lambda: Given(CODES, None),
        ArgumentTypeError,
        r"vqvae.decode: expected images, floating point of shape \[1, 1, 3, 4\], got NoneType",
    ),
    "bytes": (lambda: Given(CODES, IMAGES.byte()), ArgumentTypeError, "vqvae.decode: .* got torch.uint8 of"),
    "image-size": (
        lambda: Given(CODES, IMAGES[0]),
        ArgumentError,
        r"vqvae.decode: expected images of shape \[1, 1, 3, 4\], got \[1, 3, 4\]",
    ),
    "neither": (
        lambda: nn.Linear(1, 1),
        ArgumentTypeError,
        "vqvae: expected a VQVAE, .* got Linear without encode and decode",
    ),
}


@pytest.mark.parametrize(("model", "error", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_misfits_are_found_when_the_pipeline_is_made(
    model: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with refuses(error, message):
        Pipeline(model(), [pixelcnn()], image_shape=(1, 3, 4))


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        (None, ArgumentError, r"image_shape: expected \(C, H, W\) of the images that Given takes, got None"),
        ((3, 4), ArgumentError, r"image_shape: expected \(C, H, W\), got \(3, 4\)"),
        ((1, 3, 0), ArgumentError, "image_shape: must be at least 1, got 0"),
        ((1, 3, 4.0), ArgumentTypeError, "image_shape: expected an int, got float"),
    ],
    ids=str,
)
def test_image_shapes_that_are_none(shape: Any, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        Pipeline(Given(CODES, torch.zeros(1, 1, 3, 4)), [pixelcnn()], image_shape=shape)


def test_priors_that_do_not_fit_each_other() -> None:
    with refuses(ArgumentError, r"priors\[1\]: \(condition_shapes, condition_num_codes\) is"):
        Pipeline(Given(CODES), [pixelcnn(), pixelcnn(shape=(6, 8), level=1)], image_shape=(1, 6, 8))
    with refuses(ArgumentError, "priors: expected one per level, got none"):
        Pipeline(Given(CODES), [], image_shape=(1, 6, 8))
    ours = pipeline_of(1)
    with refuses(ArgumentError, r"image_shape: this autoencoder has \(1, 4, 6\), got \(1, 8, 8\)"):
        Pipeline(ours.vqvae, ours.priors, image_shape=(1, 8, 8))


def test_images_are_checked_and_codes_again() -> None:
    _, theirs = both()
    with refuses(ArgumentError, r"images: expected shape \[B, 1, 8, 12\], got \[2, 1, 8, 8\]"):
        theirs.encode(torch.zeros(2, 1, 8, 8))
    theirs.vqvae.model.encode = lambda images: [
        torch.full((len(images), 2, 3), 9),
        torch.zeros(len(images), 4, 6).long(),
    ]
    with refuses(ArgumentError, "vqvae.encode: codes of level 0: expected codes in 0..4, .* got 9"):
        theirs.encode(torch.zeros(2, 1, 8, 12))


def test_painting_needs_cells_of_one_size() -> None:
    pipeline = Pipeline(Given(CODES, torch.zeros(1, 1, 3, 6)), [pixelcnn()], image_shape=(1, 3, 6))
    with refuses(ArgumentError, r"inpaint: images of \(3, 6\) are no multiple of \(3, 4\), the grid of level 0"):
        pipeline.inpaint(torch.zeros(1, 1, 3, 6), torch.ones(3, 6, dtype=torch.bool))


def test_only_its_project_can_save_it(tmp_path: Path) -> None:
    _, theirs = both()
    with refuses(ArgumentError, "save_pretrained: the autoencoder is a Theirs, which only its own project can save"):
        theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_parts_and_measures(tmp_path: Path) -> None:
    ours, theirs = both()
    sample_shard(theirs, 4, Shard(0, 1), tmp_path, seed=3)
    merge_samples(tmp_path)
    drawn = theirs(4, label=torch.arange(4) % 3, seed=3)

    class Images:
        channels, size, num_classes, class_names = 1, (8, 12), 3, ("a", "b", "c")
        labels = torch.arange(4) % 3

        def __len__(self) -> int:
            return 4

        def image(self, index: int) -> Tensor:
            return drawn.images[index]

        def fingerprint(self) -> str:
            return "images"

    wanted, found = (measure_images(one, Images(), np.arange(4)) for one in (ours, theirs))
    assert found == wanted
