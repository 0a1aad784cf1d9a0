"""What pipelines take and give: labels by name, temperatures, callbacks, pictures and files of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refuses
from PIL import Image
from pipelines import GRIDS, pipeline_of, prior_of, vqvae_of
from safetensors.torch import load_file
from torch import Tensor

from fastvq.data import image_grid
from fastvq.errors import ArgumentError, ArgumentTypeError, FileConflictError
from fastvq.sampling import Pipeline, Samples, sample

pytestmark = pytest.mark.usefixtures("steady")


@pytest.fixture(scope="module")
def named() -> Pipeline:
    plain = pipeline_of(2)
    return Pipeline(plain.vqvae, plain.priors, class_names=["ant", "bee", "cat"])


def test_a_pipeline_is_called(named: Pipeline) -> None:
    assert torch.equal(named(2, label="bee", seed=1).images, named.sample(2, label=1, seed=1).images)


@pytest.mark.parametrize(
    "label",
    [
        np.array([1, 2, 1]),
        np.array(["bee", "cat"]),
        ["bee", np.int64(2)],
        torch.tensor([1, 2, 1]),
        np.array([1, 2]),
        torch.tensor([1, 2]),
    ],
    ids=["array", "names", "mixed", "tensor", "short-array", "short-tensor"],
)
def test_labels_come_in_any_form(label: Any, named: Pipeline) -> None:
    found, wanted = named(3, label=label, seed=1), named(3, label=[1, 2], seed=1)
    assert torch.equal(found.codes[1], wanted.codes[1])
    assert found.labels is not None
    assert found.labels.tolist() == [1, 2, 1]
    assert found.class_names == ("ant", "bee", "cat")


@pytest.mark.parametrize("label", [torch.tensor(1), np.array(1), np.int64(1)], ids=["tensor", "array", "number"])
def test_a_label_without_axes_is_of_all(label: Any, named: Pipeline) -> None:
    assert named(2, label=label, seed=1).labels.tolist() == [1, 1]  # type: ignore[union-attr]
    prior = named.priors[0]
    assert torch.equal(sample(prior, 2, label=label, seed=1), sample(prior, 2, label=1, seed=1))


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["array", "tensor"])
def test_labels_of_samples_from_a_start_on(kind: Any, named: Pipeline) -> None:
    """One for each sample is of that sample; as many as there are not take turns by the index."""
    assert named.labels(range(1, 4), kind([0, 1, 2])).tolist() == [0, 1, 2]  # type: ignore[union-attr]
    assert named.labels(range(1, 4), kind([0, 1])).tolist() == [1, 0, 1]  # type: ignore[union-attr]


def test_numbers_of_numpy_are_numbers(named: Pipeline) -> None:
    found = named(np.int64(2), label=1, seed=1, start=np.int32(1), micro_batch=np.uint8(2))  # type: ignore[arg-type]
    assert torch.equal(found.images, named(2, label=1, seed=1, start=1).images)
    assert type(found.micro_batch) is int


def test_a_name_that_there_is_not_shows_the_nearest_first(named: Pipeline) -> None:
    with refuses(ArgumentError, "label: expected one of the names cat, ant, bee; got 'catt'"):
        named(1, label="catt")
    many = Pipeline(vqvae_of(1), [prior_of(0, num_classes=40)], class_names=[f"class {i}" for i in range(40)])
    with refuses(ArgumentError, r"label: expected one of the names class 31, .*, \.\.\. \(40 in all\); got 'clas 31'"):
        many(1, label="clas 31")


@pytest.mark.parametrize(("label", "error"), [(np.array([0.5, 1]), ArgumentTypeError), ({1}, ArgumentTypeError)])
def test_labels_that_are_none(label: Any, error: type[Exception], named: Pipeline) -> None:
    with refuses(error, "label: expected a class"):
        named(2, label=label)


@pytest.mark.parametrize("name", ["x.gif", "x.bmp", "x.tif", "x.xyz", "x.PGN"])
def test_other_endings_are_no_folders(name: str, named: Pipeline, tmp_path: Path) -> None:
    with refuses(
        ArgumentError, f"path: expected a picture's name that ends in .png, .jpg, .jpeg, .webp, .*, got .*{name}"
    ):
        named(1, label=1).save(tmp_path / name)
    assert [*tmp_path.iterdir()] == []


def test_temperatures_of_levels_and_of_samples(named: Pipeline) -> None:
    drawn = named(3, label=1, seed=2, temperature=torch.tensor([0.0, 1.0, 0.5]), micro_batch=2)
    for row, one in enumerate([0.0, 1.0, 0.5]):
        alone = named(3, label=1, seed=2, temperature=one, micro_batch=2)
        assert all(torch.equal(a[row], b[row]) for a, b in zip(drawn.codes, alone.codes, strict=True))
    mixed = named(3, label=1, seed=2, temperature=[0.0, [1.0, 2.0, 1.0]])
    top = named(3, label=1, seed=2, temperature=0)
    assert torch.equal(mixed.codes[0], top.codes[0])
    for row, one in enumerate([1.0, 2.0, 1.0]):
        assert torch.equal(mixed.codes[1][row], named(3, label=1, seed=2, temperature=[0.0, one]).codes[1][row])


def test_seeds_of_a_generator_are_told(named: Pipeline) -> None:
    drawn = named(2, label=0, seed=torch.Generator().manual_seed(3))
    assert torch.equal(named(2, label=0, seed=drawn.seed).images, drawn.images)
    assert named(2, label=0, seed=-2).seed == 2**64 - 2


def test_a_callback_is_told_of_all_levels(named: Pipeline) -> None:
    told: list[tuple[int, list[int]]] = []

    def tell(rows: int, codes: tuple[Tensor, ...]) -> None:
        told.append((rows, [int((grid >= 0).sum()) for grid in codes]))

    found = named(3, label=0, seed=1, callback=tell, return_logprobs=True)
    assert told == [(3, [9]), (6, [18]), (9, [18, 18]), (12, [18, 36]), (15, [18, 54]), (18, [18, 72])]
    assert found.logprobs is not None
    label = torch.zeros(3, dtype=torch.int64)
    for level, prior in enumerate(named.priors):
        wanted = -prior.nll(found.codes[level], found.codes[:level] or None, label).detach()
        torch.testing.assert_close(found.logprobs[level], wanted, rtol=1e-5, atol=1e-5)
    assert named(3, label=0, seed=1).logprobs is None


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_callback_ends_sampling_of_all_levels(calls: int, named: Pipeline) -> None:
    whole, count = named(2, label=0, seed=1), 0

    def stop(rows: int, codes: tuple[Tensor, ...]) -> bool:
        nonlocal count
        count += 1
        return count < calls

    found = named(2, label=0, seed=1, callback=stop, return_logprobs=True)
    assert count == calls
    rows = (min(calls, 2), max(0, calls - 2))
    for level, done in enumerate(rows):
        wanted = torch.full((2, *GRIDS[level]), -1)
        wanted[:, :done] = whole.codes[level][:, :done]
        assert torch.equal(found.codes[level], wanted)
        assert torch.equal(found.logprobs[level].isnan(), wanted < 0)  # type: ignore[index]
    known = [grid >= 0 for grid in found.codes]
    wanted = named.vqvae.preview([grid.clamp(min=0) for grid in found.codes], known).detach().clamp(-1, 1)
    torch.testing.assert_close(found.images, wanted, rtol=1e-5, atol=1e-5)


def test_samples_as_pictures(named: Pipeline, tmp_path: Path) -> None:
    drawn = named(3, label=0, seed=1)
    pictures = drawn.pil()
    assert [picture.size for picture in pictures] == [(12, 8)] * 3
    for picture, image in zip(pictures, drawn.images, strict=True):
        assert np.array_equal(np.asarray(picture), ((image[0] + 1) * 127.5).round().byte().numpy())
    path = drawn.save(tmp_path / "all.png", columns=3)
    assert np.array_equal(np.asarray(Image.open(path)), image_grid(drawn.images, 3))
    with refuses(FileConflictError, "path: .*all.png exists already"):
        drawn.save(path)
    drawn.save(path, overwrite=True)
    shown = drawn._repr_png_()
    assert shown is not None
    assert np.array_equal(np.asarray(Image.open(path)), image_grid(drawn.images))
    assert shown == path.read_bytes()


def test_samples_as_a_folder(named: Pipeline, tmp_path: Path) -> None:
    drawn = named(2, label=["bee", "cat"], seed=1)
    folder = drawn.save(tmp_path / "mine")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000000.png", "000001.png", "codes.safetensors", "samples.json"]
    for level, grid in load_file(folder / "codes.safetensors").items():
        assert torch.equal(grid, drawn.codes[int(level[-1])])
    told = json.loads((folder / "samples.json").read_text())
    del told["fastvq_version"]
    names = ["ant", "bee", "cat"]
    assert told == {"n": 2, "labels": [1, 2], "class_names": names, "seed": 1, "micro_batch": drawn.micro_batch}
    with pytest.raises(FileConflictError):
        drawn.save(folder)


def test_samples_that_make_no_picture(named: Pipeline, tmp_path: Path) -> None:
    with refuses(ArgumentError, r"images: expected at least one of 1 or 3 channels, got \[0, 1, 8, 12\]"):
        named(0, label=1).save(tmp_path / "none.png")
    two = Samples(torch.zeros(1, 2, 4, 4), (), 0, 1)
    with refuses(ArgumentError, r"images: expected at least one of 1 or 3 channels, got \[1, 2, 4, 4\]"):
        two.save(tmp_path / "folder")
    assert two._repr_png_() is None
    with refuses(ArgumentError, "columns: .*folder becomes a folder"):
        named(1, label=1).save(tmp_path / "folder", columns=2)
    assert list(tmp_path.iterdir()) == []


def test_what_is_shown(named: Pipeline) -> None:
    drawn = named(3, label=0, seed=1)
    assert repr(drawn) == "Samples(3 images 1 x 8 x 12, codes 2 x 3, 4 x 6, seed 1, on cpu)"
    sizes = [sum(weight.numel() for weight in prior.parameters()) for prior in named.priors]
    assert repr(named).splitlines() == [
        "Pipeline(",
        "  images 1 x 8 x 12 on cpu",
        "  vqvae  VQVAE2",
        f"  prior0 PixelSNAIL, 2 x 3 of 5 codes, {sizes[0]:,} parameters",
        f"  prior1 PixelSNAIL, 4 x 6 of 5 codes, {sizes[1]:,} parameters",
        "  labels 0..2: 'ant', 'bee', 'cat'",
        ")",
    ]
    assert "labels 0..2\n" in repr(pipeline_of(1))
