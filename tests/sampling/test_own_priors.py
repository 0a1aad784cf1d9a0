"""Networks of one's own: traced into plans that give the naive sampler's codes, or refused with the reason."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import own_networks as nets
import pytest
import torch
import torch.nn.functional as F
from engine_helpers import needs_extension
from foreign_pixelcnn import ForeignGatedLayer, ForeignPixelCNN
from helpers import random_codes, refuses
from torch import Tensor, nn

import fastvq
from fastvq.errors import ArgumentError, ArgumentTypeError, CausalityError, NaiveEngineWarning, TraceError
from fastvq.sampling import OwnPrior, choose_engine, describe
from fastvq.sampling.plan import compile_plan
from fastvq.sampling.plan.evaluate import plan_logits

pytestmark = pytest.mark.usefixtures("steady")

K, SHAPE = 7, (4, 3)
GRID: dict[str, Any] = {"shape": SHAPE, "num_codes": K}
every_engine = pytest.mark.parametrize("engine", ["torch", pytest.param("cpu", marks=needs_extension)])


class ChannelsLast(nn.Module):
    """Linear layers on channels last, SiLU, a start code outside of the grid, dilation, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(K + 1, 8)
        self.down = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=2)
        self.right = nn.Conv2d(8, 8, (1, 2), dilation=(1, 2))
        self.inner = nn.Linear(8, 8)
        self.output = nn.Linear(8, K)

    def forward(self, codes: Tensor) -> Tensor:
        above = F.pad(codes, (0, 0, 1, 0), value=K)[:, :-1]
        left = F.pad(codes[:, :, :-1], (1, 0), value=K)
        v = self.down(self.embedding(above).movedim(-1, 1))
        h = torch.tanh(self.right(F.pad(self.embedding(left).permute(0, 3, 1, 2), (2, 0))) + v)
        return self.output(F.silu(self.inner(h.permute(0, 2, 3, 1))) * 0.5 - 0.25).permute(0, 3, 1, 2)


class Values(nn.Module):
    """Codes as numbers; batch norm before the cut; a map of biases; features of the label joined to the codes'."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, (2, 3), padding=(1, 1))
        self.norm = nn.BatchNorm2d(8)
        self.places = nn.Parameter(torch.randn(8, *SHAPE))
        self.label = nn.Embedding(3, 2)
        self.second = nets.MaskedConv2d("B", 10, 8, 3, padding=1)
        self.output = nn.Conv2d(8, K, 1)

    def forward(self, codes: Tensor, label: Tensor) -> Tensor:
        x = 2 * codes.float().unsqueeze(1) / (K - 1) - 1
        x = F.pad(x[:, :, :-1], (0, 0, 1, 0))
        x = torch.sigmoid(self.norm(self.first(x))[:, :, : codes.shape[1]]) - self.places
        told = self.label(label)[:, :, None, None].repeat(1, 1, *SHAPE)
        return self.output(F.leaky_relu_(self.second(torch.cat([x, told], 1)) - told.sum(1, keepdim=True)))


class Library(nn.Module):
    """PyTorch's own attention layer, sequence first, whose averaged weights nobody reads; log-probabilities."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(K, 8)
        self.conv = nets.MaskedConv2d("A", 8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.output = nn.Conv2d(8, K, 1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.conv(self.embedding(codes).permute(0, 3, 1, 2))
        mask = torch.ones(12, 12, dtype=torch.bool).triu(1)
        if self.batch_first:
            tokens = x.flatten(2).transpose(1, 2)
            found, _ = self.attention(tokens, tokens, tokens, attn_mask=mask, need_weights=False)
            return self.output(x + found.transpose(1, 2).view_as(x))
        tokens = x.flatten(2).permute(2, 0, 1)
        found, _ = self.attention(tokens, tokens, tokens, attn_mask=mask.float() * -1e9)
        return self.output(x + found.permute(1, 2, 0).reshape(x.shape)).log_softmax(1)


LABELS: dict[str, Any] = {"num_classes": 3}
ABOVE: dict[str, Any] = {"condition_shapes": [(2, 3)], "condition_num_codes": [4]}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "masked-weights-and-batch-norm": (lambda: nets.Masked(K), {}),
    "residual": (lambda: nets.Residual(K), {}),
    "two-stacks-and-labels": (lambda: ForeignPixelCNN(K, classes=3, kernels=(5, 3)), LABELS),
    "shifts-and-a-level-above": (lambda: nets.Shifted(K, scale=(2, 1)), ABOVE),
    "channels-last": (ChannelsLast, {}),
    "numbers-and-labels": (Values, LABELS),
    "attention-layer": (lambda: Library(True), {}),
    "attention-layer-sequence-first": (lambda: Library(False), {}),
    **{f"attention-{form}": (lambda form=form: nets.Attending(K, form), {}) for form in nets.FORMS},
}
every_network = pytest.mark.parametrize("name", NETWORKS)


@torch.no_grad()
def network(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """With weights at which every layer matters, in training mode."""
    torch.manual_seed(0)
    make, config = NETWORKS[name]
    module = make()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    for parameter in module.parameters():
        parameter.mul_(2 if parameter.ndim > 1 else 1)
    return module, config


def given(config: dict[str, Any], n: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "num_classes" in config:
        found["label"] = torch.arange(n) % 3
    if "condition_shapes" in config:
        found["condition"] = random_codes(n, 2, 3, num_codes=4)
    return found


@every_network
def test_codes_are_those_of_the_naive_sampler(name: str) -> None:
    module, config = network(name)
    prior, told = fastvq.trace(module, **GRID, **config), given(config, 6)
    wanted = fastvq.sample(prior, 6, seed=1, engine="naive", **told)
    assert len(wanted.unique()) > K // 2
    for engine in ["torch", *(["cpu"] if choose_engine("auto", prior)[0] == "cpu" else [])]:
        assert torch.equal(fastvq.sample(prior, 6, seed=1, engine=engine, **told), wanted), engine
    assert all(part.training for part in module.modules())
    assert fastvq.check_causal(prior).ok


@every_network
def test_a_plan_gives_the_logits_of_the_network(name: str) -> None:
    module, config = network(name)
    prior, told = fastvq.trace(module, **GRID, **config), given(config, 5)
    codes = random_codes(5, *SHAPE, num_codes=K, seed=3)
    with torch.no_grad():
        wanted = copy.deepcopy(module).eval()(codes, *told.values())
        statics = prior.statics(told.get("condition"), told.get("label"), batch=5)
        found = plan_logits(compile_plan(prior), codes, statics)
    if name.endswith("sequence-first"):
        found = found.log_softmax(1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["two-stacks-and-labels", "residual"])
def test_nothing_behind_a_position_counts(name: str) -> None:
    """Codes at and behind a position are NaN for the plan: their vectors in its tables are."""
    module, config = network(name)
    prior, told = fastvq.trace(module, **GRID, **config), given(config, 1)
    plan = compile_plan(prior)
    statics = prior.statics(None, told.get("label"), batch=1)
    codes = random_codes(1, *SHAPE, num_codes=K - 1)
    for op in plan.ops:
        if op.weight is not None:
            op.weight[:, K - 1] = float("nan")
    for position in range(SHAPE[0] * SHAPE[1]):
        poisoned = codes.flatten(1).clone()
        poisoned[:, position:] = K - 1
        logits = plan_logits(plan, poisoned.view(1, *SHAPE), statics).flatten(2)
        assert logits[:, :, : position + 1].isfinite().all()
        assert logits[:, :, position + 1 :].isnan().any() or position == SHAPE[0] * SHAPE[1] - 1


@every_engine
def test_changed_weights_are_noticed(engine: str) -> None:
    module, _ = network("residual")
    before = fastvq.sample(module, 4, seed=1, engine=engine, **GRID)
    with torch.no_grad():
        module.get_parameter("last.weight").neg_()
    after = fastvq.sample(module, 4, seed=1, engine=engine, **GRID)
    assert not torch.equal(before, after)
    assert torch.equal(after, fastvq.sample(module, 4, seed=1, engine="naive", **GRID))


def test_sample_traces_a_module_once() -> None:
    module, _ = network("masked-weights-and-batch-norm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = fastvq.sample(module, 3, seed=1, **GRID)
        prior = module.__dict__["_fastvq_prior"].made[1]
        two = fastvq.sample(module, 3, seed=1, **GRID)
    assert torch.equal(one, two)
    assert module.__dict__["_fastvq_prior"].made[1] is prior
    assert "_fastvq_prior" not in str(module.state_dict().keys())
    assert copy.deepcopy(module).__dict__["_fastvq_prior"].made is None
    assert pickle.loads(pickle.dumps(module)).__dict__["_fastvq_prior"].made is None


def test_labels_and_conditions_do_not_depend_on_the_batch() -> None:
    for name in ("two-stacks-and-labels", "shifts-and-a-level-above"):
        module, config = network(name)
        prior, told = fastvq.trace(module, **GRID, **config), given(config, 6)
        whole = fastvq.sample(prior, 6, seed=1, **told)
        parts = [
            fastvq.sample(prior, 2, seed=1, start=first, **{key: x[first : first + 2] for key, x in told.items()})
            for first in (0, 2, 4)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_a_traced_prior_is_explained() -> None:
    module, _ = network("residual")
    prior = fastvq.trace(module, **GRID)
    found = describe(prior, engine="torch")
    assert (found.name, found.engine, found.shape) == ("OwnPrior", "torch", SHAPE)
    with refuses(ArgumentError, "save_pretrained: this prior is a module of your own"):
        prior.save_pretrained("anywhere")


# What cannot be traced.


class Leaking(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(K, 4)
        if kind == "itself":
            self.conv: nn.Module = nets.MaskedConv2d("B", 4, K, 3, padding=1)
        else:
            self.conv = nets.MaskedConv2d("A", 4, K, 3, padding=1)
            self.conv.mask[:, :, 1, 2] = 1

    def forward(self, codes: Tensor) -> Tensor:
        return self.conv(self.embedding(codes).permute(0, 3, 1, 2))


class Deciding(nets.Residual):
    def forward(self, codes: Tensor) -> Tensor:
        found = super().forward(codes)
        return found if int(codes[0, 0, 0]) < 0 else 2 * found


class Normed(nets.Residual):
    def forward(self, codes: Tensor) -> Tensor:
        return F.softmax(super().forward(codes), dim=1)


class Counting(nets.Residual):
    """Reads its own state, which no plan knows."""

    def __init__(self) -> None:
        super().__init__(K)
        self.calls = 0

    def forward(self, codes: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(codes) * self.calls


LEAKS = {
    "itself": "logits at row 0, column 0 depend on the code at that position itself",
    "right": "logits at row 0, column 0 depend on the code at row 0, column 1, which comes later",
}


@pytest.mark.parametrize(("kind", "words"), LEAKS.items(), ids=LEAKS)
def test_leaks_are_refused(kind: str, words: str) -> None:
    module = Leaking(kind)
    for call in (
        lambda: fastvq.trace(module, **GRID),
        lambda: fastvq.sample(module, 1, **GRID),
        lambda: fastvq.sample(lambda codes: module(codes), 1, engine="naive", **GRID),
        lambda: fastvq.check_causal(module, **GRID).require(),
    ):
        with refuses(CausalityError, f"prior: not causal: {words}"):
            call()
    report = fastvq.check_causal(module, **GRID)
    assert not report.ok
    assert report.checked == report.positions == 12
    gone = [(leak.code[0] * 3 + leak.code[1]) - (leak.logits[0] * 3 + leak.logits[1]) for leak in report.leaks]
    assert gone == ([0] * 12 if kind == "itself" else [1] * 8)


UNTRACEABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "control-flow": (
        lambda: Deciding(K),
        r"_local_scalar_dense in the Deciding, test_own_priors\.py:\d+ `return found if int\(codes\[0, 0, 0\]\) < 0 "
        r"else 2 \* found`: the network looks at the value of a code or feature",
    ),
    "softmax": (lambda: Normed(K), r"operation at _softmax in the Normed, .*: a softmax of features"),
    "state": (Counting, "its plan gives other logits"),
}


@pytest.mark.parametrize(("make", "words"), UNTRACEABLE.values(), ids=UNTRACEABLE)
def test_what_stands_in_the_way_is_said(make: Callable[[], nn.Module], words: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(TraceError, match=words):
        fastvq.trace(make(), **GRID)


def test_an_untraceable_module_is_sampled_slowly() -> None:
    torch.manual_seed(0)
    module = Normed(K)
    with pytest.warns(NaiveEngineWarning, match="a softmax of features") as found:
        codes = fastvq.sample(module, 2, seed=1, **GRID)
    assert len(found) == 1
    assert torch.equal(codes, fastvq.sample(module, 2, seed=1, engine="naive", **GRID))
    with pytest.raises(fastvq.errors.UnavailableError, match="'torch' was asked for but cannot run here: cannot be"):
        fastvq.sample(module, 2, engine="torch", **GRID)


def test_a_function_is_sampled_slowly_or_traced() -> None:
    module, config = network("two-stacks-and-labels")
    module.eval()
    labels = torch.tensor([2, 0])

    def logits(codes: Tensor, label: Tensor) -> Tensor:
        return 1.5 * module(codes, label)

    with pytest.warns(NaiveEngineWarning, match="fastvq.trace"):
        codes = fastvq.sample(logits, 2, seed=1, label=labels, num_classes=3, **GRID)
    traced = fastvq.trace(logits, **GRID, **config)
    assert torch.equal(fastvq.sample(traced, 2, seed=1, label=labels, engine="torch"), codes)


BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "no-shape": (
        ArgumentError,
        "shape: a Residual that fastvq does not know needs its grid and codes: shape=(H, W), num_codes=K",
        lambda: fastvq.sample(nets.Residual(K), 1, num_codes=K),
    ),
    "nothing": (
        ArgumentError,
        "shape and num_codes: a function that fastvq does not know needs",
        lambda: fastvq.check_causal(lambda codes: codes),
    ),
    "no-callable": (
        ArgumentTypeError,
        "prior: expected a prior, a module or a function, got int",
        lambda: fastvq.sample(3, 1, **GRID),  # type: ignore[arg-type]
    ),
    "another-grid": (
        ArgumentError,
        "shape: this prior has (4, 3), got (3, 3); leave it out",
        lambda: fastvq.sample(OwnPrior(nets.Residual(K), nets.config(SHAPE, K)), 1, shape=(3, 3)),
    ),
    "a-flat-grid": (
        ArgumentError,
        "shape: expected (height, width), got (3,)",
        lambda: fastvq.trace(nets.Residual(K), shape=(3,), num_codes=K),  # type: ignore[arg-type]
    ),
    "channels-last": (
        ArgumentError,
        "prior: logits: expected shape [2, 7, 4, 3], got [2, 4, 3, 7]",
        lambda: fastvq.trace(lambda codes: nets.Residual(K)(codes).permute(0, 2, 3, 1), **GRID),
    ),
    "no-tensor": (
        ArgumentError,
        "prior: expected logits as a tensor, got tuple",
        lambda: fastvq.trace(lambda codes: (codes, codes), **GRID),
    ),
    "no-label": (
        ArgumentError,
        "label: this prior is not class-conditional",
        lambda: fastvq.sample(nets.Residual(K), 1, label=0, **GRID),
    ),
    "positions": (
        ArgumentError,
        "positions:",
        lambda: fastvq.check_causal(nets.Residual(K), positions=0, **GRID),
    ),
}


@pytest.mark.parametrize(("error", "message", "call"), BAD.values(), ids=BAD)
def test_bad_arguments(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with refuses(error, re.escape(message)):
        call()


def test_a_few_positions_of_a_large_grid() -> None:
    torch.manual_seed(0)
    report = fastvq.check_causal(nets.Residual(K), shape=(20, 20), num_codes=K)
    assert (report.ok, report.checked, report.positions) == (True, 64, 400)
    assert str(report) == "causal: 64 of 400 codes changed, no logits moved that come before or at them"


# Plans written by hand.


def gated_plan(module: ForeignPixelCNN, build: fastvq.PlanBuilder) -> Any:
    """The operations of the two stacks, without a trace."""
    v = h = build.embedding(module.embedding.weight)
    for layer in module.layers:
        assert isinstance(layer, ForeignGatedLayer)
        rows, columns = layer.vert_stack.kernel_size
        above = layer.vert_stack.weight.clone()
        left = layer.horiz_stack.weight.clone()
        if layer.first:
            above[:, :, -1], left[:, :, :, -1] = 0, 0
        vectors = layer.class_cond_embedding
        told = build.given(
            lambda condition, label, vectors=vectors: vectors(label)[:, :, None, None],
            vectors.embedding_dim,
            everywhere=True,
        )
        seen = build.conv(v, above, layer.vert_stack.bias, at=(rows - 1, columns // 2))
        before = build.conv(h, left, layer.horiz_stack.bias, at=(0, left.shape[3] - 1))
        link = build.conv(seen, layer.vert_to_horiz.weight, layer.vert_to_horiz.bias)
        half = vectors.embedding_dim // 2

        def gated(x: Any, half: int = half) -> Any:
            return build.gate(build.channels(x, 0, half), build.channels(x, half, 2 * half))

        inner = gated(build.add(build.add(link, before), told))
        out = build.conv(inner, layer.horiz_resid.weight, layer.horiz_resid.bias)
        v, h = gated(build.add(seen, told)), out if layer.first else build.add(out, h)
    first_layer, _, second_layer = module.output_conv
    hidden = build.activation(build.conv(h, first_layer.weight, first_layer.bias), "relu")
    return build.linear(hidden, second_layer.weight[:, :, 0, 0], second_layer.bias)


def test_a_plan_by_hand_gives_the_naive_samplers_codes() -> None:
    module, config = network("two-stacks-and-labels")
    assert isinstance(module, ForeignPixelCNN)
    prior = fastvq.with_plan(module, lambda build: gated_plan(module, build), **GRID, **config)
    told = given(config, 5)
    for _ in range(2):
        wanted = fastvq.sample(prior, 5, seed=1, engine="naive", **told)
        assert torch.equal(fastvq.sample(prior, 5, seed=1, engine="torch", **told), wanted)
        with torch.no_grad():
            module.embedding.weight.mul_(-1)
            module.layers[1].get_parameter("class_cond_embedding.weight").mul_(-1)


def test_a_wrong_plan_is_refused() -> None:
    module, config = network("two-stacks-and-labels")
    assert isinstance(module, ForeignPixelCNN)

    def write(build: fastvq.PlanBuilder) -> Any:
        return build.activation(gated_plan(module, build), "relu")

    with refuses(TraceError, "module: its plan gives other logits"):
        fastvq.with_plan(module, write, **GRID, **config)


def builder() -> tuple[fastvq.PlanBuilder, Any, Any]:
    build = fastvq.PlanBuilder(SHAPE, K)
    codes = build.embedding(torch.randn(K, 4))
    return build, codes, build.conv(codes, torch.randn(6, 4, 2, 3), at=(2 - 1, 1), mask=ABOVE_ONLY)


ABOVE_ONLY = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
MISUSED: dict[str, tuple[str, Callable[[Any, Any, Any], Any]]] = {
    "the-code-itself": (
        "x: logits of a position would depend on codes at the position itself",
        lambda build, codes, x: build.conv(codes, torch.ones(3, 4, 1, 1)),
    ),
    "below": (
        "x: logits of a position would depend on features 1 row below",
        lambda build, codes, x: build.conv(x, torch.ones(3, 6, 3, 1)),
    ),
    "embedding-added": (
        "x: the embedding of codes is read by convolutions alone",
        lambda build, codes, x: build.add(codes, x),
    ),
    "channels": (
        "weight: expected shape [?, 6, ?, ?], got [3, 5, 1, 1]",
        lambda build, codes, x: build.conv(x, torch.ones(3, 5, 1, 1)),
    ),
    "kernel": (
        "at: expected an entry of a kernel of 1 x 2, got (1, 0)",
        lambda build, codes, x: build.conv(x, torch.ones(3, 6, 1, 2), at=(1, 0)),
    ),
    "activation": ("name: expected", lambda build, codes, x: build.activation(x, "gelu")),
    "heads": (
        "query, key, value: expected channels of query and key alike, and all divisible by 4 heads, got 6, 6 and 6",
        lambda build, codes, x: build.attention(x, x, x, heads=4, mask="strict"),
    ),
    "logits": ("logits: expected 7 channels, one for each code, got 6", lambda build, codes, x: build.output(x)),
    "another-builder": (
        "x: expected a feature of this builder, got one of another builder",
        lambda build, codes, x: builder()[0].activation(x, "relu"),
    ),
}


@pytest.mark.parametrize(("message", "call"), MISUSED.values(), ids=MISUSED)
def test_a_builder_refuses(message: str, call: Callable[[Any, Any, Any], Any]) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match="^" + re.escape(message)):
        call(*builder())
