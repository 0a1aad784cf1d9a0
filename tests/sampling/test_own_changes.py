"""Networks of one's own that change: whatever decides their logits is noticed, and copies are priors of their own."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import refuses
from torch import Tensor, nn

import fastvq
from fastvq.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("steady")
GRID: dict[str, Any] = {"shape": (4, 4), "num_codes": 6}


class Net(nn.Module):
    """Reads two codes to the left; attributes, a dictionary and a plain tensor take part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.left = nn.Conv2d(8, 8, (1, 2))
        self.act = nn.LeakyReLU(0.1)
        self.output = nn.Conv2d(8, 6, 1)
        self.scale, self.options, self.factor, self.calls = 1.0, {"sign": 1}, torch.ones(1), 0

    def forward(self, codes: Tensor) -> Tensor:
        self.calls += 1
        x = F.pad(self.embedding(codes).permute(0, 3, 1, 2), (2, 0))
        x = self.output(self.act(self.left(x)[..., :-1]))
        return self.scale * self.options["sign"] * self.factor * x


def negated(layer: nn.Conv2d, inputs: Any, output: Tensor) -> Tensor:
    return -output


def patch(net: Net) -> None:
    net.output.forward = lambda x: 5 * nn.Conv2d.forward(net.output, x)  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Net], object]] = {
    "attribute": lambda net: setattr(net, "scale", 40.0),
    "attribute-of-a-layer": lambda net: setattr(net.act, "negative_slope", 9.0),
    "dictionary": lambda net: net.options.update(sign=-1),
    "plain-tensor": lambda net: net.factor.fill_(-30),
    "hook": lambda net: net.output.register_forward_hook(negated),
    "patched-forward": patch,
}


@pytest.mark.parametrize("traced", [False, True], ids=["module", "traced"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_logits_is_noticed(change: str, traced: bool) -> None:
    net = Net()
    prior = fastvq.trace(net, **GRID) if traced else net
    grid = {} if traced else GRID
    before = fastvq.sample(prior, 6, seed=0, engine="torch", **grid)
    CHANGES[change](net)
    after = fastvq.sample(prior, 6, seed=0, engine="torch", **grid)
    assert not torch.equal(after, before)
    assert torch.equal(after, fastvq.sample(prior, 6, seed=0, engine="naive", **grid))


def test_what_decides_nothing_costs_no_new_trace() -> None:
    net = Net()
    prior = fastvq.trace(net, **GRID)
    first = prior.traced()
    net.calls, net.unused = 1000, object()  # type: ignore[assignment]
    fastvq.sample(prior, 2, seed=0, engine="torch")
    assert prior.traced() is first


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda prior: pickle.loads(pickle.dumps(prior))])
def test_traced_priors_are_copied(copied: Callable[[Any], Any]) -> None:
    prior = fastvq.trace(Net(), **GRID)
    other = copied(prior)
    assert torch.equal(fastvq.sample(other, 4, seed=0), fastvq.sample(prior, 4, seed=0))
    with torch.no_grad():
        other.module.output.bias[0] += 50
    assert bool((fastvq.sample(other, 4, seed=0) == 0).all())
    assert not bool((fastvq.sample(prior, 4, seed=0) == 0).all())


class Joined(nn.Module):
    """The label joined with the codes' features before a padded convolution, and tanh before another."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.label = nn.Embedding(6, 4), nn.Embedding(3, 2)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        mask = torch.zeros(3, 3)
        mask[0], mask[1, 0] = 1, 1
        self.register_buffer("mask", mask)

    def forward(self, codes: Tensor, label: Tensor) -> Tensor:
        told = self.label(label)[:, :, None, None].expand(-1, -1, *codes.shape[1:])
        x = torch.cat([self.embedding(codes).permute(0, 3, 1, 2), told], 1)
        x = torch.tanh(F.conv2d(x, self.first.weight * self.mask, self.first.bias, padding=1))
        return F.conv2d(x, self.second.weight * self.mask, self.second.bias, padding=1)


def test_padding_after_joining_and_after_tanh_is_traced() -> None:
    prior = fastvq.trace(Joined(), **GRID, num_classes=3)
    want = fastvq.sample(prior, 3, seed=0, label=[0, 1, 2], engine="naive")
    assert torch.equal(fastvq.sample(prior, 3, seed=0, label=[0, 1, 2], engine="torch"), want)


@pytest.mark.filterwarnings("ignore:.*jit.trace", "ignore:sampling without a cache")
def test_torchscript_is_sampled_slowly() -> None:
    net = Net().eval()
    want = fastvq.sample(net, 2, seed=0, **GRID)
    script = torch.jit.trace(net, torch.zeros(1, 4, 4, dtype=torch.int64))
    assert torch.equal(fastvq.sample(script, 2, seed=0, **GRID), want)


def test_a_network_that_moves_no_logits_is_named() -> None:
    net = Net()
    net.scale = 0.0
    assert str(fastvq.check_causal(net, **GRID)).startswith("no logits depend on any code")


def test_a_call_that_fails_says_how_it_was_made() -> None:
    def with_label(codes: Tensor, label: Tensor) -> Tensor:
        return torch.zeros(len(codes), 6, 4, 4)

    message = "prior: calling it with codes [2, 4, 4] in 0..5 failed: "
    with refuses(ArgumentError, re.escape(message)):
        fastvq.sample(with_label, 1, **GRID)
    with refuses(ArgumentError, "prior: calling it with codes .* in 0..8 failed: index out of range"):
        fastvq.sample(Net(), 1, shape=(4, 4), num_codes=9)
