"""Feature extractors, statistics gathered in one pass, their cache, and Inception's network."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import Flatten, Images, Ripples, gaussian
from helpers import refuses
from safetensors.torch import save_file
from torch import Tensor, nn

from fastvq.errors import ArgumentError, ArgumentTypeError, CorruptFileError, MissingFileError
from fastvq.evaluation import (
    ClassifierFeatures,
    FeatureExtractor,
    Features,
    FeatureStatistics,
    InceptionFeatures,
    compare,
    dataset_statistics,
    gather,
)
from fastvq.evaluation.features import as_extractor
from fastvq.evaluation.inception import InceptionNetwork, _grid35, resize_as_tensorflow1
from fastvq.models import load_pretrained
from fastvq.models.classifier import Classifier, ClassifierConfig


def classifier(seed: int = 0, **changes: object) -> Classifier:
    torch.manual_seed(seed)
    fields = {"in_channels": 1, "num_classes": 3, "channels": (4, 6), "features": 5, **changes}
    return Classifier(ClassifierConfig(**fields)).eval()  # type: ignore[arg-type]


def pictures(n: int, seed: int = 0) -> Tensor:
    return gaussian(n, 64, seed=seed, scale=0.3).clamp(-1, 1).reshape(n, 1, 8, 8)


def test_a_classifier_gives_features_and_logits_of_one_pass() -> None:
    model, images = classifier(), pictures(7)
    extractor = as_extractor(model)
    assert isinstance(extractor, ClassifierFeatures)
    found = extractor.extract(images)
    assert found.vectors.shape == (7, 5)
    torch.testing.assert_close(found.vectors, model.features(images))
    assert found.logits is not None
    torch.testing.assert_close(found.logits, model(images))
    assert torch.equal(extractor(images), found.vectors)
    assert (extractor.num_features, extractor.num_classes, extractor.num_channels) == (5, 3, 1)


def test_a_classifier_looks_at_each_image_alone() -> None:
    model, images = classifier(), pictures(7)
    torch.testing.assert_close(model(images)[3:4], model(images[3:4]))


def test_a_classifier_is_saved_and_loaded(tmp_path: Path) -> None:
    model, images = classifier(dropout=0.4), pictures(3)
    model.save_pretrained(tmp_path / "model")
    back = load_pretrained(tmp_path / "model")
    assert isinstance(back, Classifier)
    assert back.config == model.config
    assert torch.equal(back(images), model(images))


def test_digests_tell_extractors_apart() -> None:
    assert as_extractor(classifier()).digest == as_extractor(classifier()).digest
    others = [classifier(1), classifier(features=6), Flatten(), Flatten(2.0), nn.Flatten(), nn.Flatten(2)]
    digests = {as_extractor(module).digest for module in (classifier(), *others)}
    assert len(digests) == len(others) + 1
    assert as_extractor(classifier()).title == f"classifier {as_extractor(classifier()).digest[:12]}"


@pytest.mark.parametrize("batch", [1, 7, 23, 64])
def test_streaming_equals_one_shot(batch: int) -> None:
    images, extractor = pictures(64), as_extractor(classifier())
    whole = FeatureStatistics(5, num_classes=3, keep=20, seed=4)
    whole.update(extractor.extract(images))
    parts = gather(images.split(batch), extractor, keep=20, seed=4)
    assert parts.count == whole.count == 64
    assert parts.numbers.tolist() == whole.numbers.tolist()
    assert len(set(parts.numbers.tolist())) == 20
    torch.testing.assert_close(parts.vectors, whole.vectors, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.gaussian.covariance, whole.gaussian.covariance, rtol=1e-5, atol=1e-9)
    assert parts.inception is not None
    assert whole.inception is not None
    assert parts.inception.compute() == pytest.approx(whole.inception.compute(), rel=1e-6)


def test_the_selection_is_bounded_keyed_and_even() -> None:
    def kept(n: int, keep: int, seed: int) -> list[int]:
        statistics = FeatureStatistics(1, keep=keep, seed=seed)
        for part in torch.arange(float(n))[:, None].split(97):
            statistics.update(Features(part, None))
            assert len(statistics.vectors) <= keep
        assert statistics.vectors[:, 0].long().tolist() == statistics.numbers.tolist()
        return statistics.numbers.tolist()

    assert kept(30, 50, 0) == list(range(30))
    assert kept(2000, 200, 0) != kept(2000, 200, 1)
    quarters = np.bincount(np.array(kept(2000, 200, 0)) // 500, minlength=4)
    # Binomial with mean 50 and deviation 6.
    assert quarters.min() > 25
    assert quarters.max() < 75


def test_the_cache_is_used_and_invalidated(tmp_path: Path) -> None:
    data, module = Images(pictures(30), name="a"), Flatten()
    extractor = FeatureExtractor(module)

    def calls(data: Images, rows: int, extractor: FeatureExtractor, **options: int) -> int:
        before = module.calls
        dataset_statistics(data, np.arange(rows), extractor, batch_size=8, cache=tmp_path, **options)
        return module.calls - before

    assert calls(data, 30, extractor) == 4
    assert calls(data, 30, extractor) == 0
    assert calls(data, 29, extractor) == 4
    assert calls(Images(pictures(30, 1), name="b"), 30, extractor) == 4
    assert calls(data, 30, extractor, keep=5) == 4
    assert calls(data, 30, extractor, seed=1) == 4
    with torch.no_grad():
        module.scale.mul_(2)
    assert calls(data, 30, FeatureExtractor(module)) == 4
    assert calls(data, 30, extractor) == 0
    assert len(list(tmp_path.iterdir())) == 6


def test_what_the_cache_returns_is_what_was_gathered(tmp_path: Path) -> None:
    data, extractor = Images(pictures(50)), as_extractor(classifier())
    options = {"keep": 12, "seed": 3, "cache": tmp_path}
    first, second = (dataset_statistics(data, np.arange(50), extractor, **options) for _ in range(2))
    assert first is not second
    assert torch.equal(first.gaussian.mean, second.gaussian.mean)
    assert torch.equal(first.gaussian.scatter, second.gaussian.scatter)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.numbers, second.numbers)
    fake = gather([pictures(40, 5)], extractor, keep=12, seed=3)
    assert compare(first, fake) == compare(second, fake)
    assert compare(fake, first) == compare(fake, second)
    # A stream goes on where the file left off.
    for statistics in (first, second):
        statistics.update(extractor.extract(pictures(30, 6)))
    assert torch.equal(first.numbers, second.numbers)


def test_a_damaged_cache_is_written_anew(tmp_path: Path) -> None:
    data, module = Images(pictures(10)), Flatten()
    extractor = FeatureExtractor(module)
    first = dataset_statistics(data, np.arange(10), extractor, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="damaged and is written anew"):
        again = dataset_statistics(data, np.arange(10), extractor, cache=tmp_path)
    assert torch.equal(first.gaussian.scatter, again.gaussian.scatter)
    assert module.calls == 2


def test_scores_that_cannot_be_computed_are_left_out() -> None:
    extractor = as_extractor(classifier())
    real = gather([pictures(40)], extractor)
    few = compare(real, gather([pictures(5, 1)], extractor), neighbours=5)
    assert few == (5, None, None, None, None, (40, 5))
    enough = compare(real, gather([pictures(40, 1)], extractor), neighbours=5)
    assert None not in enough


def test_resizing_by_hand() -> None:
    image = gaussian(1, 15).reshape(1, 1, 5, 3)
    resized = resize_as_tensorflow1(image, 7)
    for y, x in ((0, 0), (3, 2), (6, 6), (5, 3)):
        row, column = y * 5 / 7, x * 3 / 7
        r, c = math.floor(row), math.floor(column)
        a, b = row - r, column - c
        corner = image[0, 0].double()
        r1, c1 = min(r + 1, 4), min(c + 1, 2)
        expected = (1 - a) * ((1 - b) * corner[r, c] + b * corner[r, c1])
        expected = expected + a * ((1 - b) * corner[r1, c] + b * corner[r1, c1])
        assert float(resized[0, 0, y, x]) == pytest.approx(float(expected), abs=1e-5)


def test_inception_blocks_pool_as_tensorflow_did() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 6, 1, 1).expand(1, 6, 7, 7).contiguous()
    with torch.no_grad():
        block = _grid35(6, 5).eval()
        pooled = block(image)[:, -5:]
        # Zeros beyond the border must not enter the mean: a constant stays one up to the corners.
        torch.testing.assert_close(pooled, pooled[:, :, 3:4, 3:4].expand_as(pooled))
        assert float(pooled.abs().sum()) > 0
    with torch.device("meta"):
        network = InceptionNetwork()
    pools = {name: block.pool for name, block in network.named_children() if name.startswith("Mixed")}
    assert [name for name, pool in pools.items() if pool == "stride"] == ["Mixed_6a", "Mixed_7a"]
    assert [name for name, pool in pools.items() if pool == "max"] == ["Mixed_7c"]


def test_inception_reads_plain_weights_and_says_what_they_are(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = InceptionNetwork()
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        # Numbers without a generator's cost, small enough for the sums of a hundred layers.
        parameter.data = torch.arange(parameter.numel()).mul(0.7).sin_().mul_(0.05).reshape(parameter.shape)
    for name, buffer in network.named_buffers():
        buffer.fill_(0 if "mean" in name or "num" in name else 1)
    # 23 834 568 of the classic network with 1000 classes, without its auxiliary head; 8 classes of 2049 more.
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_834_568 + 8 * 2049
    state = network.state_dict()
    torch.save(state, tmp_path / "w.pth")
    # Older files lack the counters of batches.
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "w.safetensors")
    images = pictures(1)
    first, second = (InceptionFeatures(tmp_path / name) for name in ("w.pth", "w.safetensors"))
    found = first.extract(images)
    assert found.vectors.shape == (1, 2048)
    assert found.logits is not None
    assert found.logits.shape == (1, 1008)
    assert torch.equal(found.vectors, second(images))
    assert torch.equal(found.vectors, first(images.expand(-1, 3, -1, -1)))
    assert not first.is_inception
    assert first.name == "Inception v3, other weights"
    with refuses(ArgumentError, "images: expected 1 or 3 channels, got 2"):
        first(images.expand(-1, 2, -1, -1))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("unpickled",))


def test_inception_weights_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with refuses(MissingFileError, "weights: no file .*; the Inception weights are not part of fastvq"):
        InceptionFeatures(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "part.pth")
    torch.save({"fc.bias": torch.zeros(7)}, tmp_path / "shape.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("text.pth", "evil.pth", "part.pth", "shape.pth", "text.safetensors"):
        with refuses(CorruptFileError, f"weights: .*{name} is not a "):
            InceptionFeatures(tmp_path / name)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FeatureExtractor(len), ArgumentTypeError, "module: expected a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: ClassifierFeatures(Flatten()), ArgumentTypeError, "classifier: expected a Classifier"),  # type: ignore[arg-type]
        (lambda: FeatureExtractor(Flatten()).num_features, ArgumentError, "num_features: not known before"),
        (lambda: as_extractor(classifier())(torch.zeros(2, 3, 8, 8)), ArgumentError, r"images: expected shape \[B, 1"),
        (
            lambda: as_extractor(classifier())(torch.zeros(2, 1, 8, 8).long()),
            ArgumentTypeError,
            "images: expected a fl",
        ),
        (lambda: FeatureExtractor(nn.Identity())(pictures(2)), ArgumentError, "module's result: expected shape"),
        (lambda: classifier()(torch.zeros(2, 3, 8, 8)), ArgumentError, r"images: expected shape \[B, 1, H, W\]"),
        (lambda: ClassifierConfig(channels=()), ArgumentError, "channels: expected the width"),
        (lambda: ClassifierConfig(channels=(4, 0)), ArgumentError, "channels: must be at least 1"),
        (lambda: gather([], as_extractor(classifier())), ArgumentError, "batches: expected at least one"),
        (
            lambda: compare(
                gather([pictures(9)], as_extractor(Ripples(3))), gather([pictures(9)], as_extractor(Flatten()))
            ),
            ArgumentError,
            "fake: expected features of size 3, got 64",
        ),
    ],
    ids=[
        "no-module",
        "no-classifier",
        "size-unknown",
        "channels",
        "integers",
        "not-vectors",
        "classifier-channels",
        "no-stage",
        "empty-stage",
        "no-images",
        "sizes",
    ],
)
def test_mistakes(call: object, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        call()  # type: ignore[operator]
