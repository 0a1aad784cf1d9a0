"""Models are evaluated without dropout whatever mode they are in, and their modes are nobody else's concern."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_helpers import CACHED, grids, needs_extension, request_of, spread
from evaluation_helpers import readable_pipeline
from helpers import TablePrior, pixelcnn, random_codes, snail
from torch import Tensor, nn

from fastvq import Pipeline, sample
from fastvq._evaluation import in_evaluation
from fastvq.evaluation.features import ClassifierFeatures, FeatureExtractor
from fastvq.evaluation.rejection import class_scores
from fastvq.models import Classifier, ClassifierConfig, Prior, VQVAEConfig
from fastvq.models.vqvae import VQVAE2
from fastvq.sampling.engines import fill

ENGINES = ("naive", "torch", pytest.param("cpu", marks=needs_extension))


class Net(nn.Module):
    """Shares a module, and has every kind of thing that a copy could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = self.layer
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        self.register_module("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.drop(self.norm(self.layer(x))))


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def test_tensors_are_shared_and_modules_are_not() -> None:
    torch.manual_seed(0)
    net = Net().train()
    seen = in_evaluation(net)
    assert type(seen) is Net
    assert not any(modes(seen))
    assert all(modes(net))
    assert seen.layer is seen.again
    assert seen.layer is not net.layer
    for (name, mine), (_, theirs) in zip(seen.state_dict().items(), net.state_dict().items(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr(), name
    x = torch.randn(6, 4)
    want = copy.deepcopy(net).eval()(x)
    torch.testing.assert_close(seen(x), want, rtol=0, atol=0)
    with torch.no_grad():
        net.layer.weight.mul_(2)
    assert not torch.allclose(seen(x), want)


def test_hooks_and_own_forward_methods_see_the_copy() -> None:
    net = Net().train()
    seen: list[bool] = []
    net.drop.register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    net.drop.forward = net.drop.forward  # type: ignore[method-assign]
    x = torch.randn(6, 4)
    assert torch.equal(in_evaluation(net)(x), in_evaluation(net)(x))
    assert seen == [False, False]


@pytest.mark.parametrize("wrap", ["module.compile()", "torch.compile", "parametrized", "script"])
def test_wrapped_modules(wrap: str) -> None:
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    x = torch.randn(3, 4)
    want = copy.deepcopy(net).eval()(x)
    if wrap == "module.compile()":
        net.compile(backend="eager")
    elif wrap == "torch.compile":
        net = torch.compile(net, backend="eager")  # type: ignore[assignment]
    elif wrap == "script":
        net = torch.jit.script(net)
    else:
        nn.utils.parametrizations.weight_norm(net[0])  # type: ignore[index]
    found = in_evaluation(net)(x)
    torch.testing.assert_close(found, want)
    assert all(modes(net))


class Watched(TablePrior):
    """Calls ``meanwhile`` in every pass, as another thread might, and keeps the modes that it meets."""

    def __init__(self, meanwhile: Callable[[Prior], object]) -> None:
        super().__init__((2, 3), 4)
        self.meanwhile, self.met, self.original = [meanwhile], list[bool](), [self]

    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        self.meanwhile[0](self.original[0])
        self.met.append(self.training)
        return super().logits(codes, context)


@pytest.mark.parametrize("training", [True, False])
def test_modes_changed_during_a_call(training: bool) -> None:
    prior = Watched(lambda prior: prior.train()).train(training)
    want = TablePrior((2, 3), 4)
    assert torch.equal(sample(prior, 3, seed=1), sample(want, 3, seed=1))
    assert prior.met
    assert not any(prior.met)
    assert prior.training


def test_calls_inside_each_other_leave_the_mode() -> None:
    """The call that ends first must not end the other one's evaluation."""
    inner: list[Tensor] = []

    def once(prior: Prior) -> None:
        if not inner:
            inner.append(torch.empty(0))
            inner[0] = sample(prior, 2, seed=2)

    prior = Watched(once).train()
    assert torch.equal(sample(prior, 3, seed=1), sample(TablePrior((2, 3), 4), 3, seed=1))
    assert torch.equal(inner[0], sample(TablePrior((2, 3), 4), 2, seed=2))
    assert not any(prior.met)
    assert prior.training


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [snail, pixelcnn])
def test_threads_share_a_prior_in_training(engine: str, make: Callable[..., Prior]) -> None:
    conditioned = {"condition_shapes": ((3, 2),), "condition_num_codes": (3,), "dropout": 0.5}
    prior = spread(make(**conditioned)).train()
    condition = random_codes(9, 3, 2, num_codes=3)
    want = {n: sample(prior, n, condition=condition[:n], seed=n, engine=engine) for n in (1, 9)}
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(6):
            found = sample(prior, n, condition=condition[:n], seed=n, engine=engine)
            wrong.extend([n] * (not torch.equal(found, want[n])))

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 9, 1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(modes(prior))


@pytest.mark.parametrize("engine", ["naive", *CACHED])
def test_fill_evaluates_by_itself(engine: str) -> None:
    if engine == "cpu":
        pytest.importorskip("fastvq._ext")
    prior = spread(snail(num_classes=3, dropout=0.5))
    _, given = grids(prior, 2)
    request = request_of(prior, 2, given)
    want = fill(engine, prior.eval(), request, lambda *_: None)
    assert torch.equal(fill(engine, prior.train(), request, lambda *_: None), want)
    assert all(modes(prior))


class Noisy(VQVAE2):
    """Its decoder has dropout."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        self.drop = nn.Dropout(0.5)

    def decode(self, codes: object) -> Tensor:
        return self.drop(super().decode(codes))  # type: ignore[arg-type]


def test_pipelines_decode_without_dropout() -> None:
    shipped = Pipeline.from_pretrained("digits")
    noisy = Noisy(shipped.vqvae.config)
    noisy.load_state_dict(shipped.vqvae.state_dict())
    pipeline = Pipeline(noisy.train(), shipped.priors)
    want = shipped.sample(3, label=2, seed=4)
    torch.testing.assert_close(pipeline.sample(3, label=2, seed=4).images, want.images, rtol=0, atol=0)
    assert all(modes(noisy))


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(in_channels=1, num_classes=2, channels=(4,), features=8, dropout=0.5)).train()


def test_classifiers_score_without_dropout() -> None:
    model, images = classifier(), torch.randn(5, 1, 8, 8).clamp(-1, 1)
    logits = copy.deepcopy(model).eval()(images)
    want = logits.double().softmax(1)
    torch.testing.assert_close(class_scores(model, images, None, 2), want.amax(1))
    for extractor in (FeatureExtractor(model), ClassifierFeatures(model)):
        found = extractor.extract(images)
        torch.testing.assert_close(found.vectors if found.logits is None else found.logits, logits)
    assert all(modes(model))


def test_images_are_measured_without_dropout() -> None:
    from evaluation_helpers import Images, all_grids

    from fastvq.evaluation.likelihood import measure_images

    pipeline = readable_pipeline()
    images = Images(all_grids())
    indices = np.arange(len(images))
    want = measure_images(pipeline, images, indices)
    for model in (pipeline.vqvae, *pipeline.priors):
        model.train()
    assert measure_images(pipeline, images, indices) == want
    assert all(all(modes(model)) for model in (pipeline.vqvae, *pipeline.priors))


def test_dropout_of_users_modules() -> None:
    """Functional dropout that asks the module's own flag."""

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    own = Own().train()
    x = torch.ones(100)
    assert torch.equal(in_evaluation(own)(x), x)
    assert own.training
