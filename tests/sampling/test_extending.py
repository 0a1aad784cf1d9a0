"""What is added from outside the package, a file each, is one of its own: a prior and an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import given_to, needs_extension, spread
from helpers import refuses, snail
from plan_priors import GIVEN
from torch import Tensor
from toys.engine import ToyEngine
from toys.prior import ToyConfig, ToyPrior

import fastvq
from fastvq import sampling
from fastvq.errors import ArgumentError, NaiveEngineWarning, UnavailableError
from fastvq.models import load_pretrained
from fastvq.sampling import EngineOptions, Pipeline, choose_engine, describe, engines, sample

pytestmark = pytest.mark.usefixtures("steady")
every_engine = pytest.mark.parametrize("engine", ["torch", pytest.param("cpu", marks=needs_extension)])


def toy(**changes: Any) -> ToyPrior:
    fields = {"shape": (3, 4), "num_codes": 5, "condition_channels": 4, "condition_blocks": 1, **changes}
    return spread(ToyPrior(ToyConfig(**fields)).eval())


# A prior.


@every_engine
@pytest.mark.parametrize("told", GIVEN)
def test_a_prior_samples_cached(engine: str, told: str) -> None:
    prior = toy(**GIVEN[told])
    given = given_to(prior, 12)
    wanted = sample(prior, 12, seed=1, engine="naive", **given)
    assert torch.equal(sample(prior, 12, seed=1, engine=engine, **given), wanted)
    with torch.no_grad():
        prior.columns.copy_(prior.columns.flip(2))
    changed = sample(prior, 12, seed=1, engine=engine, **given)
    assert torch.equal(changed, sample(prior, 12, seed=1, engine="naive", **given))
    assert not torch.equal(changed, wanted)


def test_a_prior_is_explained() -> None:
    found = describe(toy(), engine="torch")
    assert (found.name, found.engine) == ("ToyPrior", "torch")
    # The place's vector and its convolution; the look-up and the layers' convolutions; all else.
    assert (found.row_ops, found.left_ops, found.here_ops) == (1, 3, 6)
    assert found.saved > 1


def test_a_prior_is_saved_and_loaded(tmp_path: Path) -> None:
    prior = toy(num_classes=3)
    loaded = load_pretrained(prior.save_pretrained(tmp_path / "toy"))
    assert isinstance(loaded, ToyPrior)
    given = given_to(prior, 4)
    assert torch.equal(sample(loaded, 4, seed=1, **given), sample(prior, 4, seed=1, **given))


class Doubled(ToyPrior):
    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        return 2 * super().logits(codes, context)


def doubled(prior: Any) -> None:
    prior.__class__ = Doubled


def patched(prior: Any) -> None:
    prior.grid = lambda: -ToyPrior.grid(prior)


CHANGED: dict[str, tuple[Callable[[Any], object], str]] = {
    "hook": (
        lambda p: p.layers[0].conv.register_forward_hook(lambda m, x, y: -y),
        "layers.0.conv (CausalConv2d) has forward hooks",
    ),
    "subclass": (doubled, "the Doubled has its own logits"),
    "own-method": (patched, "the ToyPrior has its own grid"),
    "another-part": (lambda p: p.layers.append(torch.nn.Identity()), "layers.2 is a Identity"),
}


@pytest.mark.parametrize(("change", "difference"), CHANGED.values(), ids=CHANGED)
def test_a_changed_prior_has_no_plan(change: Callable[[Any], object], difference: str) -> None:
    prior = toy()
    change(prior)
    with refuses(UnavailableError, "") as refused:
        describe(prior)
    assert str(refused.value) == f"{difference}, which only the naive engine runs"
    assert choose_engine("auto", prior)[0] == "naive"
    if difference.startswith("the "):
        with pytest.warns(NaiveEngineWarning):
            drawn = sample(prior, 3, seed=1)
        assert torch.equal(drawn, sample(prior, 3, seed=1, engine="naive"))


# An engine.


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ENGINES", (ToyEngine(), *engines.ENGINES))


def test_an_engine_is_chosen(preferred: None, capsys: pytest.CaptureFixture[str]) -> None:
    prior = spread(snail())
    wanted = sample(prior, 10, seed=1, engine="naive")
    assert torch.equal(sample(prior, 10, seed=1, engine="toy"), wanted)
    assert choose_engine("auto", prior) == ("toy", "toy is the fastest that runs here")
    assert torch.equal(sample(prior, 10, seed=1, progress=True), wanted)
    assert "3/3" in capsys.readouterr().err
    fastvq.explain(prior)
    assert "  engine       toy (toy is the fastest that runs here)" in capsys.readouterr().out
    assert sampling.ENGINES == ("toy", "cuda", "cpu", "torch", "naive")


def test_what_an_engine_cannot_do_is_said(preferred: None, capsys: pytest.CaptureFixture[str]) -> None:
    digits = Pipeline.from_pretrained("digits")
    reason = "it fills grids of 3 rows, not of 2"
    with refuses(UnavailableError, f"engine: 'toy' was asked for but cannot run here: {reason}"):
        digits.sample(1, label=0, engine="toy")
    fastvq.explain(digits.priors[0])
    assert f"(toy: {reason}; cuda: " in capsys.readouterr().out
    prior = snail()
    with refuses(ArgumentError, "engine: expected 'auto' or one of 'toy', 'cuda', 'cpu', 'torch', 'naive', got 'warp'"):
        sample(prior, 1, engine="warp")
    for options, message in (
        (EngineOptions("bfloat16"), "precision: only the cuda and cpu engines have bfloat16 weights, the engine here"),
        (
            EngineOptions(row_kernel="library"),
            "row_kernel: only the cuda engine has a choice, the engine here is 'toy'",
        ),
        (EngineOptions(tile=1), "tile: the toy engine does not sample along a front, got 1"),
        (EngineOptions(cuda_graph=True), "cuda_graph: only the cuda engine has one, the engine here is 'toy'"),
    ):
        with refuses(ArgumentError, message):
            sample(prior, 1, engine="toy", options=options)
    with refuses(ArgumentError, "memory_limit: the toy engine cannot keep to one"):
        sample(prior, 1, engine="toy", memory_limit=2**40)


def test_an_engine_is_gone_when_it_is_taken_out() -> None:
    with refuses(ArgumentError, "engine: expected 'auto' or one of 'cuda', 'cpu', 'torch', 'naive', got 'toy'"):
        sample(snail(), 1, engine="toy")
