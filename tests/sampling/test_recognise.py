"""Priors whose logits something else than their weights decides: which engine runs them, and what is said of it."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_helpers import given_to, needs_extension, spread
from helpers import pixelcnn, refuses, snail
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from fastvq.errors import FastvqError, NaiveEngineWarning, UnavailableError
from fastvq.models import GatedPixelCNN, PixelSNAIL, Prior
from fastvq.models.blocks import CausalConv2d, GatedBlock
from fastvq.sampling import EngineOptions, Pipeline, choose_engine, describe, sample

pytestmark = pytest.mark.usefixtures("steady")


class Unchanged(PixelSNAIL):
    """Another loss and more parts, the same logits."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.head = nn.Linear(3, 3)
        self.seen = 0

    def nll(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().nll(*args, **kwargs)

    def training_step(self, codes: Tensor) -> Tensor:
        return self.nll(codes).mean()


class UnchangedPixelCNN(GatedPixelCNN):
    pass


class SharpMixin:
    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        return 2 * super().logits(codes, context)  # type: ignore[misc]


class Sharp(SharpMixin, PixelSNAIL):
    pass


class SharpForward(GatedPixelCNN):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


class Moved(PixelSNAIL):
    def check_codes(self, codes: Tensor) -> Tensor:
        return (super().check_codes(codes) + 1) % self.config.num_codes


class Told(PixelSNAIL):
    def context(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return super().context(*args, **kwargs)


class Named(nn.Module):
    """A block that keeps nothing of what it is given."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


class LoudBlock(GatedBlock):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return -super().forward(*args, **kwargs)


class QuietBlock(GatedBlock):
    pass


def like(cls: type[Prior], prior: Prior) -> Any:
    made: Any = cls(prior.config)
    made.load_state_dict(prior.state_dict(), strict=False)
    return made.eval()


def changed(change: Callable[[Any], object], kind: Callable[..., Any] = snail) -> Any:
    prior = spread(kind())
    change(prior)
    return prior


def replace_block(prior: Any) -> None:
    prior.blocks[0].layers[0] = Named()


def replace_by_subclass(prior: Any) -> None:
    prior.blocks[0].layers[0].__class__ = LoudBlock


def widen(prior: Any) -> None:
    prior.hidden.padding, prior.hidden.padding_mode = (0, 0), "circular"


CHANGED: dict[str, tuple[Callable[[], Any], str]] = {
    "logits": (lambda: like(Sharp, spread(snail())), "the Sharp has its own logits"),
    "forward": (lambda: like(SharpForward, spread(pixelcnn())), "the SharpForward has its own forward"),
    "check_codes": (lambda: like(Moved, spread(snail())), "the Moved has its own check_codes"),
    "context": (lambda: like(Told, spread(snail())), "the Told has its own context"),
    "own-logits-of-an-object": (
        lambda: changed(lambda p: setattr(p, "logits", lambda *a: 2 * PixelSNAIL.logits(p, *a))),
        "the PixelSNAIL has its own logits",
    ),
    "own-forward-of-a-block": (
        lambda: changed(lambda p: setattr(p.output_blocks[0], "forward", lambda x: -x), lambda: snail(output_blocks=1)),
        "output_blocks.0 (GatedBlock) has its own forward",
    ),
    "another-block": (lambda: changed(replace_block), "blocks.0.layers.0 is a Named"),
    "a-block-of-a-subclass": (
        lambda: changed(replace_by_subclass),
        "blocks.0.layers.0 (LoudBlock) has its own forward",
    ),
    "another-list": (
        lambda: changed(lambda p: setattr(p, "blocks", nn.Sequential(*p.blocks))),
        "blocks is a Sequential",
    ),
    "no-output": (
        lambda: changed(lambda p: p.blocks[0].attention.__setattr__("query", None)),
        "blocks.0.attention.query is missing",
    ),
    "another-convolution": (
        lambda: changed(lambda p: setattr(p, "output", nn.Sequential(p.output, nn.Hardtanh()))),
        "output is a Sequential",
    ),
    "padding-mode": (lambda: changed(widen, pixelcnn), "hidden (Conv2d) has padding_mode 'circular'"),
    "forward-hook": (
        lambda: changed(lambda p: p.blocks[0].layers[0].conv1.register_forward_hook(lambda m, x, y: -y)),
        "blocks.0.layers.0.conv1 (CausalConv2d) has forward hooks",
    ),
    "pre-hook": (
        lambda: changed(lambda p: p.layers[0].register_forward_pre_hook(lambda m, x: None), pixelcnn),
        "layers.0 (GatedLayer) has forward hooks",
    ),
    "older-weight-norm": (
        lambda: changed(lambda p: weight_norm(p.output)),
        "output (Conv2d) has forward hooks",
    ),
    "spectral-norm": (
        lambda: changed(lambda p: parametrizations.spectral_norm(p.output)),
        "output (Conv2d) has its weight parametrised by _SpectralNorm",
    ),
}
every_change = pytest.mark.parametrize(("make", "difference"), CHANGED.values(), ids=CHANGED)


@every_change
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_changed_priors_take_the_naive_engine(make: Callable[[], Any], difference: str) -> None:
    prior = make()
    reason = f"{difference}, which only the naive engine runs"
    assert choose_engine("auto", prior)[0] == "naive"
    assert reason in choose_engine("auto", prior)[1]
    with refuses(UnavailableError, "engine: 'torch' was asked for but cannot run here: ") as refused:
        choose_engine("torch", prior)
    assert reason in str(refused.value)
    with refuses(UnavailableError, "") as refused:
        describe(prior)
    assert str(refused.value) == reason


@pytest.mark.parametrize("name", ["logits", "own-forward-of-a-block", "another-convolution", "forward-hook"])
def test_one_warning_says_why(name: str) -> None:
    make, difference = CHANGED[name]
    prior = make()
    with pytest.warns(NaiveEngineWarning) as said:
        drawn = sample(prior, 10, seed=1)
    assert [str(warning.message) for warning in said] == [
        f"sampling without a cache, many times slower: {difference}, which only the naive engine runs. "
        "engine='naive' asks for this and is silent"
    ]
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sample(prior, 10, seed=1, engine="naive"), drawn)


def test_a_pipeline_warns_once() -> None:
    digits = Pipeline.from_pretrained("digits")
    mine = Pipeline(digits.vqvae, [like(Sharp, prior) for prior in digits.priors])
    with pytest.warns(NaiveEngineWarning) as said:
        mine.sample(1, label=0, seed=0, micro_batch=1)
    assert len(said) == 1
    assert said[0].filename == __file__
    image, mask = digits.sample(1, label=0, seed=0).images, torch.ones(32, 32, dtype=torch.bool)
    with pytest.warns(NaiveEngineWarning) as said:
        mine.inpaint(image, mask, label=0, seed=0, rounds=1)
    assert [warning.filename for warning in said] == [__file__]


def test_a_level_that_is_given_is_not_warned_of() -> None:
    digits = Pipeline.from_pretrained("digits")
    mine = Pipeline(digits.vqvae, [like(Sharp, digits.priors[0]), digits.priors[1]])
    top = digits.sample(1, label=0, seed=0).codes[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.sample(1, label=0, codes=top, seed=0)


def lists(prior: Any) -> None:
    prior.blocks.append(snail().blocks[0])


def renamed(prior: Any) -> None:
    prior.blocks[0].layers[0].__class__ = QuietBlock


def normed(prior: Any) -> None:
    for layer in list(prior.modules()):
        if isinstance(layer, (nn.Conv2d, CausalConv2d)):
            parametrizations.weight_norm(layer)
    with torch.no_grad():
        prior.output.parametrizations.weight.original0.mul_(1.5)


# They compute what their weights say, whatever their class is called.
KNOWN: dict[str, Callable[[], Any]] = {
    "pixelsnail": lambda: spread(snail()),
    "pixelcnn": lambda: spread(pixelcnn()),
    "subclass": lambda: like(Unchanged, spread(snail())),
    "subclass-of-pixelcnn": lambda: like(UnchangedPixelCNN, spread(pixelcnn(num_classes=3))),
    "more-blocks": lambda: changed(lists),
    "block-of-an-unchanged-subclass": lambda: changed(renamed),
    "weight-norm": lambda: changed(normed),
    "weight-norm-pixelcnn": lambda: changed(normed, pixelcnn),
    "compiled-in-place": lambda: changed(lambda p: p.compile()),
    "hook-of-the-context": lambda: changed(
        lambda p: p.context_encoder.register_forward_hook(lambda m, x, y: -y), lambda: snail(num_classes=3)
    ),
    "backward-hook": lambda: changed(lambda p: p.output.weight.register_hook(lambda g: g)),
}


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_what_plans_know_runs_cached_and_in_silence(make: Callable[[], Any]) -> None:
    prior = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = given_to(prior, 12)
        assert choose_engine("auto", prior)[0] != "naive"
        cached = sample(prior, 12, seed=1, **given)
    assert torch.equal(cached, sample(prior, 12, seed=1, engine="naive", **given))


def test_a_hook_counts_from_when_it_is_there_until_it_is_removed() -> None:
    prior: Any = spread(snail())
    before = sample(prior, 4, seed=1)
    hook = prior.output.register_forward_hook(lambda m, x, y: -y)
    with pytest.warns(NaiveEngineWarning):
        hooked = sample(prior, 4, seed=1)
    assert not torch.equal(hooked, before)
    hook.remove()
    assert choose_engine("auto", prior)[0] != "naive"
    assert torch.equal(sample(prior, 4, seed=1), before)


def test_weight_norm_that_changes_is_noticed() -> None:
    prior: Any = changed(normed)
    sample(prior, 8, seed=1)
    with torch.no_grad():
        prior.output.parametrizations.weight.original0.mul_(4)
    assert torch.equal(sample(prior, 8, seed=1), sample(prior, 8, seed=1, engine="naive"))


# What is promised, against what sampling does.

OPTIONS = {
    "plain": EngineOptions(),
    "bfloat16": EngineOptions("bfloat16"),
    "threads": EngineOptions(threads=2),
    "baseline": EngineOptions(kernels="baseline"),
    "avx512": EngineOptions(kernels="avx512"),
    "library": EngineOptions(row_kernel="library"),
    "graph": EngineOptions(cuda_graph=True),
}
KINDS: dict[str, Callable[[], Prior]] = {
    "pixelsnail": snail,
    "pixelcnn": pixelcnn,
    "subclass": lambda: like(Unchanged, snail()),
    "bfloat16": lambda: snail().bfloat16(),
    "double": lambda: pixelcnn().double(),
    "meta": lambda: snail().to("meta"),
    "meta-pixelcnn": lambda: pixelcnn().to("meta"),
}


@needs_extension
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_explained_is_what_sampling_does(kind: str, options: EngineOptions) -> None:
    prior = KINDS[kind]()
    kept = 0
    for engine in ("auto", "cuda", "cpu", "torch", "naive", "gpu"):
        promised: Any = None
        try:
            promised = describe(prior, engine=engine, options=options).engine
        except FastvqError as error:
            promised = error
        try:
            drawn: Any = sample(prior, 2, seed=0, engine=engine, options=options)
        except FastvqError as error:
            drawn = error
        if promised == "none":
            assert kind.startswith("meta")
            assert isinstance(drawn, FastvqError)
            continue
        if isinstance(promised, FastvqError):
            assert (type(drawn), str(drawn)) == (type(promised), str(promised))
            continue
        kept += 1
        assert torch.equal(drawn, sample(prior, 2, seed=0, engine=promised, options=options))
    # At least the engine asked for by name and "auto" for the plain options.
    assert kept >= (0 if kind.startswith("meta") else 4 if options == EngineOptions() else 0)


@pytest.mark.parametrize("kind", ["meta", "meta-pixelcnn"])
def test_a_prior_without_values_is_described_and_never_promised(kind: str) -> None:
    with_values = describe({"meta": snail, "meta-pixelcnn": pixelcnn}[kind]())
    prior = KINDS[kind]()
    reason = "the weights of the prior are on the meta device, which holds no values"
    for _ in range(2):
        found = describe(prior)
        assert (found.engine, found.reason) == ("none", reason)
        assert dataclasses.replace(found, engine=with_values.engine, reason=with_values.reason) == with_values
    for engine, start in itertools.product(["torch", "naive"], ["engine: "]):
        with refuses(UnavailableError, f"{start}'{engine}' was asked for but cannot run here: {reason}"):
            sample(prior, 1, engine=engine)
    with refuses(UnavailableError, f"engine: none can run here: {reason}"):
        sample(prior, 1)
