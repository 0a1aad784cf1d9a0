"""Models load in the types that they were stored in, whatever the default type is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from foreign_models import ForeignVQVAE, randomise
from helpers import pixelcnn, random_codes, snail
from interop_helpers import foreign_prior
from torch import Tensor, nn
from training_helpers import VQVAE_CONFIG, Noise, train_config

from fastvq import Pipeline
from fastvq.evaluation import ClassifierFeatures, FeatureStatistics
from fastvq.evaluation.features import Features
from fastvq.interop import convert, load
from fastvq.models import VQVAE, VQVAE2, Classifier, ClassifierConfig, PixelSNAIL, PretrainedModel, load_pretrained
from fastvq.models.stored import assign, load_in_place, outline
from fastvq.training import train_vqvae

pytestmark = [
    pytest.mark.usefixtures("steady"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated"),
]

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def other_default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Called, it makes another type the default one, until the test ends."""
    usual = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(usual)


def everything(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def require_same(found: nn.Module, wanted: nn.Module) -> None:
    mine, other = everything(found), everything(wanted)
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype, name
        assert mine[name].device == tensor.device, name
        assert mine[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(mine[name], tensor), name


IMAGES = torch.linspace(-1, 1, 2 * 16 * 16).view(2, 1, 16, 16)
CODES = random_codes(2, 3, 4)
LEVELS = (random_codes(2, 2, 2), random_codes(2, 4, 4))
MODELS: dict[str, tuple[Callable[[], PretrainedModel], Callable[[PretrainedModel], Tensor]]] = {
    "PixelSNAIL": (snail, lambda model: model(CODES)),
    "GatedPixelCNN": (pixelcnn, lambda model: model(CODES)),
    "VQVAE": (lambda: VQVAE.from_preset("tiny-single"), lambda model: model.decode(LEVELS[1:])),  # type: ignore[operator]
    "VQVAE2": (lambda: VQVAE2.from_preset("tiny"), lambda model: model.decode(LEVELS)),  # type: ignore[operator]
    "Classifier": (
        lambda: Classifier(ClassifierConfig(in_channels=1, num_classes=3, channels=(4,), features=5)),
        lambda model: model(IMAGES),
    ),
}


@pytest.mark.parametrize(("make", "output"), MODELS.values(), ids=MODELS.keys())
def test_a_saved_model(
    make: Callable[[], PretrainedModel],
    output: Callable[[PretrainedModel], Tensor],
    other_default: Callable[[], None],
    tmp_path: Path,
) -> None:
    make().save_pretrained(tmp_path / "model")
    usual = load_pretrained(tmp_path / "model")
    expected = output(usual)
    other_default()
    found = load_pretrained(tmp_path / "model")
    require_same(found, usual)
    assert {t.dtype for t in everything(found).values() if t.is_floating_point()} == {torch.float32}
    assert torch.equal(output(found), expected)


def test_a_shipped_pipeline(other_default: Callable[[], None]) -> None:
    usual = Pipeline.from_pretrained("digits")
    other_default()
    found = Pipeline.from_pretrained("digits")
    for mine, other in zip((found.vqvae, *found.priors), (usual.vqvae, *usual.priors), strict=True):
        require_same(mine, other)


def test_a_model_of_half_precision_stays_one(other_default: Callable[[], None], tmp_path: Path) -> None:
    prior = snail().half()
    prior.save_pretrained(tmp_path / "model")
    expected = prior(CODES)
    other_default()
    found = PixelSNAIL.from_pretrained(tmp_path / "model")
    assert {tensor.dtype for tensor in found.parameters()} == {torch.float16}
    assert found.background.dtype == torch.float32
    assert torch.equal(found(CODES), expected)


def test_foreign_models_become_float32(other_default: Callable[[], None]) -> None:
    prior, vqvae = foreign_prior(), randomise(ForeignVQVAE(), 0)
    usual = [load(prior.state_dict(), heads=2), load(vqvae.state_dict())]
    other_default()
    for mine, other in zip([load(prior.state_dict(), heads=2), load(vqvae.state_dict())], usual, strict=True):
        require_same(mine, other)
        assert {t.dtype for t in everything(mine).values() if t.is_floating_point()} == {torch.float32}
    for mine, other in zip([convert(prior), convert(vqvae)], usual, strict=True):
        require_same(mine, other)


def test_a_run_goes_on_in_its_types(other_default: Callable[[], None], tmp_path: Path) -> None:
    """The checkpoint is brought back whole, whatever type the model was built in."""
    from fastvq.training.checkpoint import checkpoints, load_checkpoint
    from fastvq.training.ema import WeightAverage
    from fastvq.training.loop import TrainingState, _optimizer

    config = train_config(steps=2)
    trained = train_vqvae(Noise(), VQVAE_CONFIG, config, tmp_path / "run")
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]

    def restored() -> TrainingState:
        model = type(trained)(VQVAE_CONFIG)
        state = TrainingState(
            model, WeightAverage(model, 0.9), _optimizer(model, config), torch.device("cpu"), 0, {}, 0
        )
        load_checkpoint(newest, state)
        return state

    usual = restored()
    other_default()
    found = restored()
    require_same(found.model, usual.model)
    assert found.average is not None
    assert usual.average is not None
    require_same(found.average.model, usual.average.model)
    for mine, other in zip(
        found.optimizer.state_dict()["state"].values(), usual.optimizer.state_dict()["state"].values(), strict=True
    ):
        for name, tensor in other.items():
            assert mine[name].dtype == tensor.dtype == torch.float32
            assert torch.equal(mine[name], tensor)
    for parameter in found.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found.optimizer.step()
    assert all(bool(p.isfinite().all()) and p.dtype == torch.float32 for p in found.model.parameters())


def test_features(other_default: Callable[[], None], tmp_path: Path) -> None:
    Classifier(ClassifierConfig(in_channels=1, num_classes=3, channels=(4,), features=5)).save_pretrained(
        tmp_path / "c"
    )
    expected = ClassifierFeatures(Classifier.from_pretrained(tmp_path / "c")).extract(IMAGES)
    other_default()
    extractor = ClassifierFeatures(Classifier.from_pretrained(tmp_path / "c"))
    found = extractor.extract(IMAGES)
    assert torch.equal(found.vectors, expected.vectors)
    statistics = FeatureStatistics(5)
    statistics.update(Features(found.vectors, None))
    assert statistics.vectors.dtype == torch.float32
    assert torch.equal(statistics.vectors, expected.vectors)


class Flags(nn.Module):
    """A flag, a weight and a buffer that is not stored."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("flag", torch.ones((), dtype=dtype))
        self.register_buffer("scratch", torch.ones(1), persistent=False)


@pytest.mark.parametrize("declared", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.bool, torch.float32], ids=str)
def test_flags_have_the_type_that_the_model_declares(
    stored: torch.dtype, declared: torch.dtype, other_default: Callable[[], None]
) -> None:
    tensors = {"weight": torch.tensor([1.5, 2.0]), "flag": torch.zeros((), dtype=stored)}
    other_default()
    filled, living = outline(lambda: Flags(declared)), Flags(declared)
    parameter = living.weight
    assign(filled, tensors)
    load_in_place(living, tensors)
    assert living.weight is parameter
    for module in (filled, living):
        assert module.flag.dtype == declared
        assert not module.flag
        assert module.weight.dtype == torch.float32
        assert module.weight.tolist() == [1.5, 2.0]
    assert living.scratch.dtype == torch.float32
    assert filled.scratch.is_meta


def test_an_outline_takes_neither_memory_nor_random_numbers() -> None:
    before = torch.get_rng_state()
    config = dataclasses.replace(VQVAE2.from_preset("tiny").config, num_codes=2**24, code_dim=4096)
    torch.set_rng_state(before)
    model = outline(lambda: VQVAE2(config))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(tensor.is_meta for tensor in everything(model).values())
    assert model.state_dict()["quantizers.0.embedding"].shape == (2**24, 4096)
