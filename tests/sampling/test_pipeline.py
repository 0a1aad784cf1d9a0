"""Autoencoder and priors together: images, invariance, folders on disk, and models that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pixelcnn, refuses
from pipelines import GRIDS, pipeline_of, prior_of, vqvae_of

import fastvq
from fastvq._files import sealed
from fastvq.errors import ArgumentError, ArgumentTypeError, CorruptFileError, FileConflictError, MissingFileError
from fastvq.sampling import Pipeline, sample, shipped
from fastvq.sampling import pipeline as pipeline_module

pytestmark = pytest.mark.usefixtures("steady")


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 3])
def test_shapes_and_ranges(levels: int, n: int) -> None:
    pipeline = pipeline_of(levels)
    # Amplified, so that images leave the range they are clamped to.
    with torch.no_grad():
        pipeline.vqvae.decoder[-1].weight.mul_(50)
    found = pipeline.sample(n, label=1, seed=4, start=3)
    images, codes = found.images, found.codes
    rows, columns = GRIDS[levels - 1]
    assert images.shape == (n, 1, 2 * rows, 2 * columns)
    assert images.dtype == torch.float32
    assert not images.is_inference()
    assert [tuple(level.shape) for level in codes] == [(n, *grid) for grid in GRIDS[:levels]]
    assert all(level.dtype == torch.int64 for level in codes)
    assert (found.seed, found.micro_batch, len(found)) == (4, max(n, 1), n)
    if n:
        assert images.min() == -1
        assert images.max() == 1
        assert all(level.min() >= 0 and level.max() < 5 for level in codes)
        decoded = pipeline.vqvae.decode(codes).detach()
        torch.testing.assert_close(images, decoded.clamp(-1, 1), rtol=1e-5, atol=1e-5)


def test_a_single_level_with_a_pixelcnn() -> None:
    pipeline = Pipeline(vqvae_of(1), [pixelcnn(shape=(2, 3))])
    assert pipeline.num_classes is None
    assert pipeline.sample(2, seed=1).images.shape == (2, 1, 4, 6)


def test_levels_are_sampled_from_the_top_down() -> None:
    pipeline = pipeline_of(3)
    settings: dict[str, Any] = {"temperature": [0.5, 1.0, 1.5], "top_k": [None, 3, 2], "top_p": (0.9, None, 0.8)}
    label = torch.tensor([0, 1, 2, 1])
    drawn = pipeline.sample(4, label=label, seed=6, start=2, micro_batch=4, **settings)
    above: tuple[torch.Tensor, ...] = ()
    for level, prior in enumerate(pipeline.priors):
        chosen = {name: values[level] for name, values in settings.items()}
        codes = sample(prior, 4, condition=above, label=label, seed=6, start=2, micro_batch=4, **chosen)
        assert torch.equal(drawn.codes[level], codes)
        above = (*above, codes)


def test_one_setting_holds_for_all_levels() -> None:
    pipeline = pipeline_of(2)
    one = pipeline.sample(3, label=0, seed=6, temperature=0.7, top_k=3, top_p=0.9)
    each = pipeline.sample(3, label=0, seed=6, temperature=[0.7, 0.7], top_k=(3, 3), top_p=[0.9, 0.9])
    assert all(torch.equal(*pair) for pair in zip(one.codes, each.codes, strict=True))
    assert torch.equal(one.images, each.images)
    cold = pipeline.sample(3, label=0, seed=6, temperature=[0.7, 1e-4], top_k=3, top_p=0.9)
    assert torch.equal(cold.codes[0], one.codes[0])
    assert not torch.equal(cold.codes[1], one.codes[1])


def test_a_sample_does_not_depend_on_the_call() -> None:
    pipeline = pipeline_of(2)
    label = torch.arange(13) % 3
    whole = pipeline.sample(13, label=label, seed=2, micro_batch=4)
    for start, stop in [(0, 1), (0, 5), (4, 8), (5, 13), (12, 13)]:
        part = pipeline.sample(stop - start, label=label[start:stop], seed=2, start=start, micro_batch=3)
        # The decoder is a library's, which rounds differently for other batches.
        torch.testing.assert_close(part.images, whole.images[start:stop], rtol=1e-5, atol=1e-6)
        for mine, all_of_them in zip(part.codes, whole.codes, strict=True):
            assert torch.equal(mine, all_of_them[start:stop])
    assert not torch.equal(pipeline.sample(13, label=label, seed=3, micro_batch=4).images, whole.images)


def test_the_result_says_how_to_get_it_again() -> None:
    pipeline = pipeline_of(2)
    first = pipeline.sample(3, label=1, micro_batch=2)
    again = pipeline.sample(3, label=1, seed=first.seed, micro_batch=first.micro_batch)
    assert torch.equal(again.images, first.images)
    assert pipeline.sample(3, label=1).seed != first.seed


def test_models_in_training_mode_are_evaluated_and_put_back() -> None:
    pipeline = pipeline_of(2, dropout=0.5)
    want = pipeline.sample(3, label=1, seed=1)
    models = [pipeline.vqvae, *pipeline.priors]
    for model in models:
        model.train()
    kept = {name: value.clone() for name, value in pipeline.vqvae.state_dict().items()}
    found = pipeline.sample(3, label=1, seed=1)
    assert torch.equal(found.images, want.images)
    assert all(module.training for model in models for module in model.modules())
    assert all(torch.equal(value, kept[name]) for name, value in pipeline.vqvae.state_dict().items())


def test_moving_moves_every_model() -> None:
    pipeline = pipeline_of(2)
    assert pipeline.device == torch.device("cpu")
    assert pipeline.to("meta") is pipeline
    assert pipeline.device == torch.device("meta")
    assert all(value.is_meta for model in (pipeline.vqvae, *pipeline.priors) for value in model.parameters())


def test_progress_names_rows(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline_of(2).sample(1, label=1, seed=1, progress=True)
    assert "2/2" in capsys.readouterr().err


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "n-negative": ({"n": -1}, ArgumentError, "n: must be at least 0, got -1"),
    "n-float": ({"n": 2.5}, ArgumentTypeError, "n: expected an int, got float"),
    "start": ({"start": -1}, ArgumentError, "start: must be at least 0"),
    "micro-batch": ({"micro_batch": 0}, ArgumentError, "micro_batch: must be at least 1"),
    "label-missing": ({"label": None}, ArgumentError, "label: this prior is class-conditional"),
    "label-beyond": ({"label": 3}, ArgumentError, "label: must lie in 0..2, got 3"),
    "label-shape": ({"label": torch.zeros(2, 1).long()}, ArgumentTypeError, "label: expected a class's number"),
    "seed": ({"seed": "1"}, ArgumentTypeError, "seed: expected an int, a torch.Generator or None, got str '1'"),
    "seed-float": ({"seed": 0.5}, ArgumentTypeError, "seed: expected an int"),
    "temperatures": (
        {"temperature": [1.0]},
        ArgumentError,
        "temperature: expected one value or 2, one per level, got 1",
    ),
    "temperature-tensor": (
        {"temperature": torch.ones(3)},
        ArgumentError,
        "temperature: expected one value, or one for each of 2 samples, got 3",
    ),
    "bottom-temperature": ({"temperature": [1.0, -1.0]}, ArgumentError, "temperature: "),
    "bottom-temperatures": ({"temperature": [1.0, [1, 2, 3]]}, ArgumentError, "temperature: expected one value, or"),
    "callback": ({"callback": "x"}, ArgumentTypeError, "callback: expected a callable or None, got str"),
    "logprobs": ({"return_logprobs": None}, ArgumentTypeError, "return_logprobs: expected a bool"),
    "top-ks": ({"top_k": [1, 2, 3]}, ArgumentError, "top_k: expected one value or 2, one per level, got 3"),
    "bottom-top-k": ({"top_k": [None, 6]}, ArgumentError, "top_k: "),
    "top-ps": ({"top_p": ()}, ArgumentError, "top_p: expected one value or 2, one per level, got 0"),
    "bottom-top-p": ({"top_p": [0.5, 2.0]}, ArgumentError, "top_p: "),
    "engine": ({"engine": "warp"}, ArgumentError, "engine: expected 'auto' or one of .*'naive'"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_refuses_before_any_work(
    arguments: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(2)

    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was called")

    for model in (*pipeline.priors, pipeline.vqvae):
        for name in ("forward", "context", "logits", "decode"):
            if hasattr(model, name):
                monkeypatch.setattr(model, name, work)
    given = {"n": 2, "label": 1, **arguments}
    with refuses(error, message):
        pipeline.sample(given.pop("n"), **given)


MISFITS: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "one-prior": (lambda: [prior_of(0)], "priors: expected 2, one per level, got 1"),
    "three-priors": (lambda: [prior_of(0), prior_of(1), prior_of(2)], "priors: expected 2, one per level, got 3"),
    "bottom-first": (lambda: [prior_of(1), prior_of(0)], r"priors\[0\]: \(shape, num_codes, level\) is"),
    "shape": (
        lambda: [prior_of(0), prior_of(1, shape=(8, 6))],
        r"priors\[1\]: \(shape, num_codes, level\) is \(\(8, 6\), 5, 1\), expected \(\(4, 6\), 5, 1\)",
    ),
    "num-codes": (
        lambda: [prior_of(0, num_codes=6), prior_of(1)],
        r"priors\[0\]: \(shape, num_codes, level\) is \(\(2, 3\), 6, 0\), expected \(\(2, 3\), 5, 0\)",
    ),
    "level": (
        lambda: [prior_of(0), prior_of(1, level=2)],
        r"priors\[1\]: \(shape, num_codes, level\) is \(\(4, 6\), 5, 2\), expected \(\(4, 6\), 5, 1\)",
    ),
    "no-condition": (
        lambda: [prior_of(0), prior_of(1, condition_shapes=(), condition_num_codes=())],
        r"priors\[1\]: \(condition_shapes, condition_num_codes\) is \(\(\), \(\)\), expected",
    ),
    "condition-grid": (
        lambda: [prior_of(0), prior_of(1, condition_shapes=((1, 3),))],
        r"priors\[1\]: \(condition_shapes, condition_num_codes\) is \(\(\(1, 3\),\), \(5,\)\), expected",
    ),
    "condition-codes": (
        lambda: [prior_of(0), prior_of(1, condition_num_codes=(4,))],
        r"priors\[1\]: \(condition_shapes, condition_num_codes\) is \(\(\(2, 3\),\), \(4,\)\), expected",
    ),
    "classes": (
        lambda: [prior_of(0), prior_of(1, num_classes=4)],
        r"priors: all levels must have the same num_classes, got \['3', '4'\]",
    ),
    "classes-of-one-level": (
        lambda: [prior_of(0), prior_of(1, num_classes=None)],
        r"priors: all levels must have the same num_classes, got \['3', 'None'\]",
    ),
}


@pytest.mark.parametrize(("priors", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_refuses_priors_that_do_not_fit(priors: Callable[[], list[Any]], message: str) -> None:
    with refuses(ArgumentError, message):
        Pipeline(vqvae_of(2), priors())


def test_refuses_another_number_of_names() -> None:
    assert Pipeline(vqvae_of(1), [prior_of(0)], class_names=np.array(["a", "b", "c"])).class_names == ("a", "b", "c")
    with refuses(ArgumentError, "class_names: expected 3 names, got 2"):
        Pipeline(vqvae_of(1), [prior_of(0)], class_names=["a", "b"])
    with refuses(ArgumentError, "class_names: these priors know no classes, got 2 names"):
        Pipeline(vqvae_of(1), [prior_of(0, num_classes=None)], class_names=["a", "b"])


@pytest.mark.parametrize("names", ["abc", 3, ["a", "b", 3]], ids=["text", "number", "mixed"])
def test_refuses_names_that_are_none(names: Any) -> None:
    with refuses(ArgumentTypeError, "class_names: expected a sequence of names, one per class, got"):
        Pipeline(vqvae_of(1), [prior_of(0)], class_names=names)


def saved(folder: Path) -> Pipeline:
    pipeline = pipeline_of(2)
    pipeline.class_names = ("zero", "one", "two")
    assert pipeline.save_pretrained(folder) == folder
    return pipeline


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip(tmp_path: Path) -> None:
    pipeline = saved(tmp_path / "deep" / "pipeline")
    assert sorted(path.name for path in (tmp_path / "deep" / "pipeline").iterdir()) == [
        "pipeline.json",
        "prior0",
        "prior1",
        "vqvae",
    ]
    back = fastvq.Pipeline.from_pretrained(str(tmp_path / "deep" / "pipeline"))
    assert back.class_names == ("zero", "one", "two")
    for mine, theirs in zip((pipeline.vqvae, *pipeline.priors), (back.vqvae, *back.priors), strict=True):
        assert mine.config == theirs.config
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items())
    assert torch.equal(back.sample(2, label=1, seed=1).images, pipeline.sample(2, label=1, seed=1).images)


def test_saving_does_not_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    saved(folder)
    before = contents(tmp_path)
    other = Pipeline(vqvae_of(1), [prior_of(0)])
    with refuses(FileConflictError, ".*pipeline exists already"):
        other.save_pretrained(folder)
    assert contents(tmp_path) == before
    other.save_pretrained(folder, overwrite=True)
    assert not (folder / "prior1").exists()
    assert len(Pipeline.from_pretrained(folder).priors) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pipeline"
    saved(folder)
    before = contents(tmp_path)
    other = pipeline_of(2)

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(other.priors[1], "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(folder, overwrite=True)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "pipeline.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), **changes})))


def replace(folder: Path, name: str, model: Any) -> None:
    model.save_pretrained(folder / name, overwrite=True)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no-description": (
        lambda folder: (folder / "pipeline.json").unlink(),
        MissingFileError,
        "name: .*pipeline holds no pipeline.json, so it is not a saved pipeline",
    ),
    "half-json": (
        lambda folder: (folder / "pipeline.json").write_text("{"),
        CorruptFileError,
        ".*pipeline.json: not valid JSON",
    ),
    "format": (lambda folder: edit(folder, format=7), CorruptFileError, ".*: not a pipeline description of format 1"),
    "levels-text": (lambda folder: edit(folder, levels="2"), CorruptFileError, ".*: not a pipeline description"),
    "levels-fewer": (lambda folder: edit(folder, levels=1), CorruptFileError, ".*: the models do not fit together"),
    "levels-more": (lambda folder: edit(folder, levels=3), MissingFileError, "folder: .*prior2 does not exist"),
    "names-fewer": (
        lambda folder: edit(folder, class_names=["a"]),
        CorruptFileError,
        r".*: the models do not fit together \(class_names: expected 3 names, got 1\)",
    ),
    "names-number": (
        lambda folder: edit(folder, class_names=3),
        CorruptFileError,
        ".*: the models do not fit together",
    ),
    "no-prior": (
        lambda folder: (folder / "prior1").rename(folder / "elsewhere"),
        MissingFileError,
        "folder: .*prior1 does not exist",
    ),
    "flipped-byte": (
        lambda folder: flip_byte(folder / "prior1" / "model.safetensors"),
        CorruptFileError,
        ".*prior1/model.safetensors: checksum differs",
    ),
    "prior-as-autoencoder": (
        lambda folder: replace(folder, "vqvae", prior_of(0)),
        CorruptFileError,
        ".*: expected an autoencoder in vqvae/ and priors in prior0/",
    ),
    "autoencoder-as-prior": (
        lambda folder: replace(folder, "prior0", vqvae_of(2)),
        CorruptFileError,
        ".*: expected an autoencoder in vqvae/ and priors in prior0/",
    ),
    "prior-of-another-size": (
        lambda folder: replace(folder, "prior0", prior_of(0, num_codes=6)),
        CorruptFileError,
        r".*: the models do not fit together \(priors\[0\]: \(shape, num_codes, level\)",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found(
    damage: Callable[[Path], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "pipeline"
    saved(folder)
    damage(folder)
    with refuses(error, message):
        Pipeline.from_pretrained(folder)


def test_shipped_pipelines_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a package folder of our own in place of the installed one."""
    monkeypatch.setattr(pipeline_module.resources, "files", lambda package: tmp_path / package)
    assert shipped() == {}
    pipeline = saved(tmp_path / "fastvq" / "pretrained" / "toy")
    (tmp_path / "fastvq" / "pretrained" / "unfinished").mkdir()
    assert shipped() == {"toy": tmp_path / "fastvq" / "pretrained" / "toy"}
    found = Pipeline.from_pretrained("toy")
    assert torch.equal(found.sample(2, label=1, seed=1).images, pipeline.sample(2, label=1, seed=1).images)
    monkeypatch.chdir(tmp_path)
    with refuses(MissingFileError, r"name: 'toyy' is neither a local folder nor one of the shipped models \['toy'\]"):
        Pipeline.from_pretrained("toyy")


@pytest.mark.parametrize("name", ["digitz", "somebody/digits", "digits.json", ""])
def test_a_mistyped_name_is_an_error_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = "name: '.*' is neither a local folder nor one of the shipped models" if name else "name: . holds no"
    with refuses(MissingFileError, message):
        Pipeline.from_pretrained(name)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_pipeline_samples(name: str) -> None:
    pipeline = Pipeline.from_pretrained(name)
    images = pipeline.sample(2, label=0 if pipeline.num_classes else None, seed=0).images
    assert images.isfinite().all()
    assert images.std() > 0.1
    assert not torch.equal(images[0], images[1])
