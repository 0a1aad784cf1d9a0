"""What a prior is told beforehand, in fixed order: the model's values, and the same bits in every batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_helpers import given_to, needs_extension, request_of, spread
from helpers import pixelcnn, refuses, snail
from torch import Tensor
from torch.nn.utils import parametrizations

from fastvq import _engine
from fastvq._evaluation import in_evaluation
from fastvq.models import Prior
from fastvq.models.prior import ContextEncoder
from fastvq.sampling.engines import context
from fastvq.sampling.engines.context import fixed_statics
from fastvq.sampling.engines.prepared import prepared
from fastvq.sampling.request import SampleRequest

pytestmark = [needs_extension, pytest.mark.usefixtures("steady")]

LEVEL: dict[str, Any] = {"condition_shapes": ((3, 4),), "condition_num_codes": (4,)}
LEVELS: dict[str, Any] = {"shape": (6, 20), "condition_shapes": ((1, 5), (3, 5)), "condition_num_codes": (4, 7)}
PRIORS: dict[str, Callable[[], Prior]] = {
    "alone": snail,
    "label": lambda: snail(num_classes=3),
    "level": lambda: snail(**LEVEL, condition_channels=20, condition_blocks=2),
    "levels": lambda: snail(**LEVELS, condition_channels=5, condition_blocks=3),
    "levels-label": lambda: snail(**LEVELS, num_classes=3, condition_blocks=2),
    "no-blocks": lambda: snail(**LEVELS, num_classes=3, condition_blocks=0),
    "pointwise": lambda: snail(**LEVELS, condition_kernel=1, condition_blocks=2),
    "wide-kernel": lambda: snail(**LEVELS, condition_kernel=5, condition_channels=9),
    "legacy": lambda: snail(**LEVELS, legacy_skip=True, condition_blocks=2),
    "concat-elu": lambda: snail(**LEVELS, activation="concat_elu", condition_blocks=2),
    "pixelcnn": lambda: pixelcnn(**LEVELS, num_classes=3, condition_blocks=2),
    "one-position": lambda: snail(shape=(1, 1), condition_shapes=((1, 1),), condition_num_codes=(4,)),
    # Enough for several threads.
    "large": lambda: snail(
        shape=(17, 26), condition_shapes=((17, 13),), condition_num_codes=(4,), condition_channels=64
    ),
}
each_prior = pytest.mark.parametrize("kind", PRIORS)


def hooked(prior: Prior) -> None:
    assert prior.context_encoder is not None
    prior.context_encoder.register_forward_hook(lambda module, given, features: -features)


class Doubled(ContextEncoder):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor | None:
        features = super().forward(*args, **kwargs)
        return None if features is None else 2 * features


def overridden(prior: Prior) -> None:
    assert prior.context_encoder is not None
    prior.context_encoder.__class__ = Doubled


def first_conv(prior: Any) -> Any:
    return prior.context_encoder.blocks[0].conv1


def circular(prior: Prior) -> None:
    first_conv(prior).padding_mode = "circular"
    first_conv(prior)._reversed_padding_repeated_twice = [1, 1, 1, 1]


def dilated(prior: Prior) -> None:
    first_conv(prior).padding, first_conv(prior).dilation = (2, 2), (2, 2)


def larger(prior: Prior) -> None:
    conv = first_conv(prior)
    prior.context_encoder.blocks[0].conv1 = torch.nn.Conv2d(  # type: ignore[union-attr, index]
        conv.in_channels, conv.out_channels, 5, padding=2
    )


def smaller_hidden(prior: Prior) -> None:
    block = prior.context_encoder.blocks[0]  # type: ignore[union-attr]
    width = block.conv1.in_channels  # type: ignore[union-attr]
    block.conv1 = torch.nn.Conv2d(width, 3, 3, padding=1)  # type: ignore[arg-type]
    block.conv2 = torch.nn.Conv2d(3, 2 * width, 3, padding=1)  # type: ignore[operator]


def other_activation(prior: Prior) -> None:
    block = prior.context_encoder.blocks[0]  # type: ignore[union-attr]
    width = block.conv1.in_channels  # type: ignore[union-attr]
    block.activation = "concat_elu"  # type: ignore[assignment]
    block.conv1 = torch.nn.Conv2d(2 * width, width, 3, padding=1)  # type: ignore[operator, arg-type]
    block.conv2 = torch.nn.Conv2d(2 * width, 2 * width, 3, padding=1)  # type: ignore[operator]


CHANGES = (hooked, overridden, circular, dilated, larger, smaller_hidden, other_activation)


def request(prior: Prior, n: int) -> SampleRequest:
    return request_of(prior, n, given_to(prior, n), seed=0)


@torch.inference_mode()
def fixed(prior: Prior, asked: SampleRequest, samples: slice = slice(None)) -> dict[str, Tensor]:
    index = torch.arange(len(asked.noise))[samples]
    return fixed_statics(prior, asked.rows(index))


@torch.inference_mode()
def library(prior: Prior, asked: SampleRequest) -> dict[str, Tensor]:
    return prior.statics(asked.condition, asked.label, batch=len(asked.noise))


def tolerance(prior: Prior) -> float:
    """Of sums in float32, relative to the largest feature: one rounding for each of the terms on the longest path."""
    config = prior.config
    area = config.condition_kernel**2
    terms = len(config.condition_shapes) * (area + 2) + 2 * config.condition_blocks * area * config.condition_channels
    return torch.finfo(torch.float32).eps * (terms + 8)


def require_values(prior: Prior, asked: SampleRequest) -> None:
    found, wanted = fixed(prior, asked), library(copy.deepcopy(prior).double(), asked)
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape[1:] == exact.shape[1:]
        assert len(found[name]) in (1, len(asked.noise))
        torch.testing.assert_close(
            found[name], exact.expand_as(found[name]), rtol=0, atol=tolerance(prior) * float(exact.abs().max())
        )


def require_bits(prior: Prior, asked: SampleRequest, together: dict[str, Tensor], samples: slice) -> None:
    found = fixed(prior, asked, samples)
    assert found.keys() == together.keys()
    for name, features in found.items():
        wanted = together[name][samples] if len(together[name]) > 1 else together[name]
        assert torch.equal(features, wanted.expand_as(features)), name


@each_prior
def test_values_of_the_model(kind: str) -> None:
    prior = spread(PRIORS[kind]())
    require_values(prior, request(prior, 5))


@each_prior
def test_bits_do_not_depend_on_the_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_POSITIONS", 45)  # three samples of most, then the rest
    prior = spread(PRIORS[kind]())
    asked = request(prior, 9)
    together = fixed(prior, asked)
    for n in range(1, 10):
        require_bits(prior, asked, together, slice(n))
        require_bits(prior, asked, together, slice(n - 1, n))


@pytest.mark.parametrize("kind", ["levels-label", "large"])
def test_bits_do_not_depend_on_threads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = spread(PRIORS[kind]())
    asked = request(prior, 4)
    together = fixed(prior, asked)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for positions in (1, 1024):
            monkeypatch.setattr(context, "_POSITIONS", positions)
            require_bits(prior, asked, together, slice(4))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_encoders_run_one_by_one(change: Callable[[Prior], None]) -> None:
    prior = spread(PRIORS["levels-label"]())
    change(prior)
    asked = request(prior, 4)
    require_values(prior, asked)
    wanted = [library(prior, asked.rows(torch.tensor([sample])))["context"] for sample in range(4)]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(fixed(prior, asked)["context"], torch.cat(wanted))
        assert torch.equal(fixed(prior, asked, slice(2, 3))["context"], wanted[2])
        assert torch.get_num_threads() == threads


@each_prior
def test_unchanged_encoders_do_not_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise AssertionError("the encoder ran")

    prior = spread(PRIORS[kind]())
    asked = request(prior, 2)
    monkeypatch.setattr(ContextEncoder, "forward", refuse)
    fixed(prior, asked)
    if prior.context_encoder is not None:
        with pytest.raises(AssertionError, match="the encoder ran"):
            library(prior, asked)


def test_weights_that_change_are_packed_again() -> None:
    prior: Any = spread(PRIORS["levels-label"]())
    asked = request(prior, 2)
    before = fixed(prior, asked)["context"]
    with torch.no_grad():
        prior.context_encoder.blocks[1].conv2.weight.mul_(2)
    assert not torch.equal(fixed(prior, asked)["context"], before)
    require_values(prior, asked)
    prior.context_encoder.blocks[0].legacy_skip = True
    require_values(prior, asked)


def test_weight_norm_is_folded() -> None:
    prior: Any = spread(PRIORS["levels-label"]())
    parametrizations.weight_norm(prior.context_encoder.blocks[0].conv1)
    asked = request(prior, 3)
    require_values(prior, asked)
    require_bits(prior, asked, fixed(prior, asked), slice(1, 2))


def test_a_copy_in_evaluation_mode_uses_what_is_kept() -> None:
    prior = spread(snail(**LEVEL, dropout=0.5)).train()
    asked = request(prior, 2)
    kept = prepared(prior)
    with torch.inference_mode():
        found = fixed_statics(in_evaluation(prior, only="context_encoder"), asked, kept)["context"]
    assert torch.equal(found, fixed(prior.eval(), asked)["context"])
    assert prepared(prior) is kept


def test_types_of_new_tensors_make_no_difference() -> None:
    prior = spread(PRIORS["levels-label"]())
    asked = request(prior, 2)
    wanted = fixed(prior, asked)
    torch.set_default_dtype(torch.float64)
    try:
        require_bits(prior, asked, wanted, slice(2))
    finally:
        torch.set_default_dtype(torch.float32)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "elu": F.elu,
    "elu_negated": lambda x: F.elu(-x),
    "relu": F.relu,
    "add": torch.add,
    "glu": lambda a, b: a * torch.sigmoid(b),
    "tanh": lambda a, b: torch.tanh(a) * torch.sigmoid(b),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_of_rows(kind: str, threads: int) -> None:
    torch.set_num_threads(threads)
    function, count = FUNCTIONS[kind], 2 if kind in ("add", "glu", "tanh") else 1
    for rows, channels in ((1, 1), (7, 13), (3, 40), (130, 400)):
        inputs = [3 * torch.randn(rows, channels + gap)[:, :channels] for gap in (0, 3)[:count]]
        wide = torch.full((rows, channels + 2), torch.nan)
        wanted = function(*(x.double() for x in inputs)).float()
        context._elementwise(kind, inputs, wide[:, 1:-1])
        torch.testing.assert_close(wide[:, 1:-1], wanted, rtol=1e-6, atol=1e-6)
        assert bool(wide[:, [0, -1]].isnan().all())
        context._elementwise(kind, inputs, inputs[0])
        assert torch.equal(inputs[0], wide[:, 1:-1])


def test_rows_that_are_refused() -> None:
    call = _engine.require().elementwise
    x = torch.zeros(2, 4)
    at = x.data_ptr()
    for what, given in {
        "kind": ("sigmoid", at, 4, 0, 0, at, 4, 2, 4, 1, "auto"),
        "first": ("elu", 0, 4, 0, 0, at, 4, 2, 4, 1, "auto"),
        "second": ("add", at, 4, 0, 4, at, 4, 2, 4, 1, "auto"),
        "out": ("elu", at, 4, 0, 0, at, 3, 2, 4, 1, "auto"),
        "channels": ("elu", at, 4, 0, 0, at, 4, 2, 0, 1, "auto"),
        "threads": ("elu", at, 4, 0, 0, at, 4, 2, 4, 0, "auto"),
        "kernels": ("elu", at, 4, 0, 0, at, 4, 2, 4, 1, "none"),
    }.items():
        with refuses(ValueError, f"{what}: expected"):
            call(*given)
