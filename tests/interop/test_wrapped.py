"""Models inside what PyTorch wraps around modules: taken wherever the model itself is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import ForeignSnail
from helpers import refuses, snail
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastvq import PixelSNAIL
from fastvq._unwrap import unwrap
from fastvq.data import CodeDataset, Digits, extract_codes
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.evaluation import ClassifierFeatures, measure_images, sample_with_rejection
from fastvq.evaluation.features import as_extractor
from fastvq.evaluation.sources import Reconstructions
from fastvq.interop import convert, load, recognise
from fastvq.models import Classifier, ClassifierConfig
from fastvq.sampling import Pipeline, choose_engine, describe, sample

pytestmark = pytest.mark.usefixtures("steady")


def distributed(module: nn.Module) -> nn.Module:
    """DistributedDataParallel without a process group, which only its forward pass and its construction need."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = module
    return wrapped


WRAP: dict[str, Callable[[Any], Any]] = {
    "compile": torch.compile,
    "data-parallel": nn.DataParallel,
    "distributed": distributed,
    "averaged": AveragedModel,
    "nested": lambda module: AveragedModel(nn.DataParallel(torch.compile(module))),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)


@every_wrapper
def test_priors(wrap: Callable[[Any], Any]) -> None:
    prior = snail().train()
    wrapped = wrap(prior)
    assert torch.equal(sample(wrapped, 4, seed=1), sample(prior, 4, seed=1))
    assert describe(wrapped) == describe(prior)
    assert choose_engine("auto", unwrap(wrapped)) == choose_engine("auto", prior)  # type: ignore[arg-type]
    assert prior.training


def test_averaged_weights_are_those_sampled() -> None:
    prior: Any = snail()
    averaged = AveragedModel(prior)
    averaged.update_parameters(prior)
    sample(averaged, 4, seed=1)
    with torch.no_grad():
        prior.output.bias[2] = 1e4
    averaged.update_parameters(prior)  # the mean of two
    inner: Any = averaged.module
    assert float(inner.output.bias.detach()[2]) > 4e3
    assert sample(averaged, 4, seed=1).unique().tolist() == [2]


def test_what_is_not_a_wrapper_stays() -> None:
    prior = snail()
    for value in (prior, nn.Sequential(prior), nn.ModuleDict({"module": prior}), None, "module"):
        assert unwrap(value) is value
    with refuses(ArgumentError, "shape and num_codes: a Linear that fastvq does not know needs its grid and codes"):
        sample(nn.DataParallel(nn.Linear(2, 2)), 1)


@every_wrapper
def test_pipelines(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    digits = Pipeline.from_pretrained("digits")
    wrapped = Pipeline(wrap(digits.vqvae), [wrap(prior) for prior in digits.priors], class_names=digits.class_names)
    want, got = (pipeline.sample(2, label=3, seed=1) for pipeline in (digits, wrapped))
    assert torch.equal(got.images, want.images)
    assert [type(prior) for prior in wrapped.priors] == [PixelSNAIL, PixelSNAIL]
    again = Pipeline.from_pretrained(wrapped.save_pretrained(tmp_path / "saved"))
    assert torch.equal(again.sample(2, label=3, seed=1).images, want.images)
    data, rows = Digits(32), np.arange(6)
    assert measure_images(wrapped, data, rows) == measure_images(digits, data, rows)
    reconstructions = [Reconstructions(model, data) for model in (digits.vqvae, wrap(digits.vqvae))]
    assert reconstructions[0].fingerprint() == reconstructions[1].fingerprint()


def test_pipelines_of_something_else() -> None:
    digits = Pipeline.from_pretrained("digits")
    with refuses(
        ArgumentTypeError, "vqvae: expected a VQVAE, a VQVAE2, or an object with encode and decode, got Linear"
    ):
        Pipeline(nn.Linear(1, 1), digits.priors)
    with refuses(ArgumentTypeError, r"priors\[1\]: expected a Prior, got DataParallel"):
        Pipeline(digits.vqvae, [digits.priors[0], nn.DataParallel(digits.vqvae)])


@every_wrapper
def test_codes(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    vqvae, data, rows = Pipeline.from_pretrained("digits").vqvae, Digits(32), np.arange(5)
    for name, model in (("plain", vqvae), ("wrapped", wrap(vqvae))):
        extract_codes(model, data, rows, tmp_path / name)
    plain, wrapped = (CodeDataset(tmp_path / name) for name in ("plain", "wrapped"))
    assert torch.equal(plain.codes(0, torch.arange(5)), wrapped.codes(0, torch.arange(5)))
    # The same codes of the same model: going on finds them complete.
    extract_codes(wrap(vqvae), data, rows, tmp_path / "plain")


@every_wrapper
def test_classifiers(wrap: Callable[[Any], Any]) -> None:
    if wrap is distributed:
        pytest.skip("its forward pass needs a process group")
    classifier = Classifier(ClassifierConfig(in_channels=1, num_classes=10, channels=(4,), features=4)).eval()
    assert as_extractor(wrap(classifier)).title == ClassifierFeatures(classifier).title
    digits = Pipeline.from_pretrained("digits")
    # Compiling would take longer than everything else here.
    inner = wrap(classifier) if wrap is nn.DataParallel else classifier
    want, got = (sample_with_rejection(digits, 2, module, keep=0.5, label=7, seed=0) for module in (classifier, inner))
    assert torch.equal(got.images, want.images)


@every_wrapper
def test_models_of_other_projects(wrap: Callable[[Any], Any]) -> None:
    theirs = ForeignSnail(spelling="new")
    wrapped = wrap(theirs)
    assert recognise(wrapped) == "pixelsnail"
    assert convert(wrapped).config == convert(theirs).config
    for name, tensor in convert(theirs).state_dict().items():
        assert torch.equal(convert(wrapped).state_dict()[name], tensor)
        assert torch.equal(load(wrapped.state_dict(), heads=2).state_dict()[name], tensor)
