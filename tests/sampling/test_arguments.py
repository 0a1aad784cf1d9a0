"""Arguments as people give them: labels, seeds, temperatures, callbacks, what one grid stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import TablePrior, pixelcnn, random_codes, refuses, snail
from torch import Tensor

import fastvq
from fastvq.errors import ArgumentTypeError
from fastvq.evaluation import EvaluationConfig, Features, FeatureStatistics
from fastvq.ops.draw import draw, draw_margin
from fastvq.sampling import EngineOptions, engines, sample
from fastvq.sampling.request import Settings

pytestmark = pytest.mark.usefixtures("steady")
ENGINES = ["cpu", "torch", "naive"]
every_engine = pytest.mark.parametrize("engine", ENGINES)


def prior_with_classes() -> Any:
    torch.manual_seed(0)
    prior = snail(num_classes=3)
    with torch.no_grad():
        prior.output.weight.mul_(8)
    return prior


LABELS: dict[str, Any] = {
    "list": [0, 2, 1, 1],
    "tuple": (0, 2, 1, 1),
    "numpy-numbers": [np.int64(0), np.uint8(2), 1, 1],
    "array": np.array([0, 2, 1, 1], dtype=np.uint8),
    "tensor": torch.tensor([0, 2, 1, 1], dtype=torch.int32),
}


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS.keys())
def test_labels_come_in_any_form(label: Any) -> None:
    prior = prior_with_classes()
    found = sample(prior, 4, label=label, seed=1)
    for row, one in enumerate([0, 2, 1, 1]):
        assert torch.equal(found[row], sample(prior, 4, label=one, seed=1)[row])


def test_a_number_of_numpy_is_a_label() -> None:
    prior = prior_with_classes()
    assert torch.equal(sample(prior, 2, label=np.int32(2), seed=1), sample(prior, 2, label=2, seed=1))


@pytest.mark.parametrize(
    ("seed", "same"),
    [(-1, 2**64 - 1), (2**64, 0), (-(2**64) - 5, 2**64 - 5), (3 + 7 * 2**64, 3), (np.int64(5), 5)],
    ids=["minus-one", "two-to-64", "far-below", "far-above", "numpy"],
)
def test_seeds_are_taken_modulo_two_to_64(seed: Any, same: int) -> None:
    prior = snail()
    assert torch.equal(sample(prior, 2, seed=seed), sample(prior, 2, seed=same))


def test_evaluation_knows_the_same_seeds() -> None:
    assert [EvaluationConfig(seed=seed).seed for seed in (-1, 2**64 + 7, 2**63)] == [2**64 - 1, 7, 2**63]
    kept = []
    for seed in (0, 2**63, 2**63 + 1, 2**64 - 1, -1):
        statistics = FeatureStatistics(1, keep=8, seed=seed)
        statistics.update(Features(torch.arange(64.0)[:, None], None))
        kept.append(tuple(statistics.numbers.tolist()))
    assert len({*kept}) == 4
    assert kept[3] == kept[4]
    with refuses(ArgumentTypeError, "seed: expected an int, got float"):
        EvaluationConfig(seed=0.5)  # type: ignore[arg-type]


def test_a_generator_gives_a_seed_with_each_call() -> None:
    prior, generator = snail(), torch.Generator().manual_seed(9)
    first, second = sample(prior, 4, seed=generator), sample(prior, 4, seed=generator)
    assert not torch.equal(first, second)
    assert torch.equal(sample(prior, 4, seed=generator.manual_seed(9)), first)


def test_one_grid_stands_for_all_samples() -> None:
    prior = snail(condition_shapes=((1, 2), (3, 2)), condition_num_codes=(4, 5))
    above = [random_codes(1, 1, 2, num_codes=4), random_codes(1, 3, 2)]
    init, mask = random_codes(1, 3, 4, seed=1), random_codes(1, 3, 4, num_codes=2, seed=2).bool()
    found = sample(prior, 3, condition=above, init_codes=init, mask=mask, seed=5)
    each = [level.expand(3, -1, -1) for level in above]
    wanted = sample(prior, 3, condition=each, init_codes=init.expand(3, -1, -1), mask=mask.expand(3, -1, -1), seed=5)
    assert torch.equal(found, wanted)
    assert torch.equal(found[:, mask[0]], init[0][mask[0]].expand(3, -1))
    assert torch.equal(sample(prior, 3, condition=above, init_codes=init[0], mask=mask[0], seed=5), wanted)
    assert len(sample(prior, 0, condition=above, init_codes=init, mask=mask)) == 0


@every_engine
@pytest.mark.parametrize("chosen", [{}, {"top_k": 3}, {"top_p": 0.4, "seed": 8}], ids=["plain", "top-k", "top-p"])
def test_temperature_0_is_greedy(engine: str, chosen: dict[str, Any]) -> None:
    prior = pixelcnn()
    with torch.no_grad():
        prior.output.weight.mul_(8)
    found = sample(prior, 2, temperature=0, engine=engine, **chosen)
    assert torch.equal(found[0], found[1])
    logits = prior(found).detach()
    # Up to rounding between engines: no code is likelier than the one that was drawn.
    best = logits.amax(1) - logits.gather(1, found[:, None])[:, 0]
    assert best.max() < 1e-4


@every_engine
def test_greedy_takes_the_lowest_of_equals(engine: str) -> None:
    prior = pixelcnn(layers=0)
    with torch.no_grad():
        prior.output.weight.zero_()
        prior.output.bias.copy_(torch.tensor([0.0, 2.0, 1.0, 2.0, -1.0]))
    assert bool((sample(prior, 3, temperature=0.0, engine=engine, seed=1) == 1).all())


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_draw_is_greedy_at_0(backend: str) -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [-torch.inf, -torch.inf, -5.0], [1.0, 0.5, -2.0]])
    points = torch.tensor([0.999, 0.0, 0.999])
    codes = draw(logits, points, temperature=0, backend=backend)
    assert codes.tolist() == [1, 2, 0]
    assert bool((draw_margin(logits, points, codes, temperature=0) >= 0).all())


TEMPERATURES: dict[str, Any] = {
    "list": [0.5, 1.0, 0.5, 0.0, 2.0],
    "array": np.array([0.5, 1.0, 0.5, 0.0, 2.0]),
    "tensor": torch.tensor([0.5, 1.0, 0.5, 0.0, 2.0]),
}


@every_engine
@pytest.mark.parametrize("temperature", TEMPERATURES.values(), ids=TEMPERATURES.keys())
def test_each_sample_has_its_temperature(engine: str, temperature: Any) -> None:
    prior = prior_with_classes()
    settings: dict[str, Any] = {"label": [0, 1, 2, 0, 1], "seed": 4, "start": 3, "engine": engine, "micro_batch": 2}
    found = sample(prior, 5, temperature=temperature, **settings)
    for row, one in enumerate([0.5, 1.0, 0.5, 0.0, 2.0]):
        assert torch.equal(found[row], sample(prior, 5, temperature=one, **settings)[row])


def test_padded_micro_batches_of_several_temperatures_keep_places() -> None:
    prior = snail()
    request = fastvq.sampling.request.build_request(
        prior, 5, condition=None, label=None, settings=Settings.of([1, 2, 1, 2, 2], None, None, 5), seed=0, noise=None,
        init_codes=None, mask=None, start=6,
    )  # fmt: skip
    parts = request.parts(size=4, start=6, padded=True)
    told = [(part.settings.temperature, part.chosen.tolist(), part.new.tolist(), part.place.tolist()) for part in parts]
    assert told == [
        (1, [0, 0, 0, 1], [2], [0]),
        (1, [2, 3, 4, 4], [0], [2]),
        (2, [0, 0, 0, 1], [3], [1]),
        (2, [2, 3, 4, 4], [1, 2], [3, 4]),
    ]


class Told:
    """A callback that keeps what it was told, and says False after so many calls."""

    def __init__(self, most: int = 100) -> None:
        self.most, self.rows, self.seen = most, [], []  # type: ignore[var-annotated]

    def __call__(self, rows: int, codes: Tensor) -> bool:
        assert not torch.is_inference_mode_enabled()
        self.rows.append(rows)
        self.seen.append(codes.clone())
        return len(self.rows) < self.most


@every_engine
def test_a_callback_is_told_of_rows(engine: str) -> None:
    prior, told = prior_with_classes(), Told()
    settings: dict[str, Any] = {"label": 1, "seed": 2, "engine": engine, "micro_batch": 2}
    wanted = sample(prior, 4, **settings)
    assert torch.equal(sample(prior, 4, callback=told, **settings), wanted)
    assert told.rows == [2, 4, 6, 8, 10, 12]
    for call, seen in enumerate(told.seen):
        expected = torch.full_like(wanted, -1)
        rows = call % 3 + 1
        expected[: 2 * (call // 3)] = wanted[: 2 * (call // 3)]
        expected[2 * (call // 3) : 2 * (call // 3) + 2, :rows] = wanted[2 * (call // 3) : 2 * (call // 3) + 2, :rows]
        assert torch.equal(seen, expected)


@every_engine
def test_a_callback_ends_sampling(engine: str) -> None:
    prior, told = prior_with_classes(), Told(4)
    init, mask = random_codes(4, 3, 4), torch.zeros(3, 4, dtype=torch.bool)
    mask[2, 3] = True
    settings: dict[str, Any] = {"label": 1, "seed": 2, "engine": engine, "micro_batch": 2}
    settings |= {"init_codes": init, "mask": mask}
    wanted = sample(prior, 4, **settings)
    found, logprobs = sample(prior, 4, callback=told, return_logprobs=True, **settings)
    assert len(told.rows) == 4
    there = torch.zeros(4, 3, 4, dtype=torch.bool)
    there[:2], there[2:, :1], there[2:, 2, 3] = True, True, True
    assert torch.equal(found, torch.where(there, wanted, -1))
    assert torch.equal(logprobs.isnan(), ~there)
    assert torch.equal(sample(prior, 4, **settings), wanted)  # what was ended leaves nothing behind


@every_engine
def test_what_a_callback_raises_passes_through(engine: str) -> None:
    prior = snail()

    def fail(rows: int, codes: Tensor) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        sample(prior, 2, seed=1, engine=engine, callback=fail)
    assert sample(prior, 2, seed=1, engine=engine, callback=lambda rows, codes: None).min() >= 0


@pytest.mark.parametrize(
    ("answer", "calls"),
    [(False, 1), (np.False_, 1), (torch.tensor(False), 1), (None, 3), (True, 3)],
    ids=["false", "numpy", "tensor", "none", "true"],
)
def test_answers_of_a_callback(answer: Any, calls: int) -> None:
    rows: list[int] = []

    def tell(done: int, codes: Tensor) -> Any:
        rows.append(done)
        return answer

    sample(snail(), 1, seed=0, callback=tell)
    assert rows == [1, 2, 3][:calls]


def test_a_callback_splits_a_graph_of_the_whole_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(engines.TorchEngine, "cuda_graphs", True)
    fill = engines.TorchEngine.prepare

    def prepare(self: Any, prior: Any, batch: int, options: EngineOptions) -> Any:
        seen.append(options.cuda_graph)
        return fill(self, prior, batch, options)

    monkeypatch.setattr(engines.TorchEngine, "prepare", prepare)
    options = EngineOptions(cuda_graph=True)
    for callback in (None, Told()):
        sample(snail(), 1, seed=0, engine="torch", options=options, callback=callback)
    assert seen == [True, False]


def test_logprobs_are_those_of_the_prior() -> None:
    prior = TablePrior((3, 4), 5)
    codes, found = sample(prior, 9, seed=0, temperature=0.5, top_k=2, return_logprobs=True, engine="naive")
    assert found.shape == codes.shape
    assert found.dtype == torch.float32
    exact = torch.log_softmax(prior(codes).detach().double(), 1).gather(1, codes[:, None])[:, 0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad


@every_engine
def test_logprobs_of_conditional_priors(engine: str) -> None:
    prior = snail(num_classes=3, condition_shapes=((1, 2),), condition_num_codes=(4,))
    told: dict[str, Any] = {"condition": random_codes(1, 1, 2, num_codes=4), "label": [i % 3 for i in range(10)]}
    codes, found = sample(prior, 10, seed=0, return_logprobs=True, engine=engine, **told)
    wanted = -prior.nll(codes, told["condition"].expand(10, -1, -1), torch.tensor(told["label"])).detach()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_subpackages_are_there_after_the_import() -> None:
    for name in ("ops", "models", "interop", "data", "sampling", "training", "evaluation", "errors", "distributed"):
        assert name in dir(fastvq)
        assert getattr(fastvq, name).__name__ == f"fastvq.{name}"
    with pytest.raises(AttributeError, match="module 'fastvq' has no attribute 'samples'"):
        fastvq.samples  # noqa: B018


def test_a_seed_says_what_it_may_be() -> None:
    with refuses(ArgumentTypeError, "seed: expected an int, a torch.Generator or None, got Tensor"):
        sample(snail(), 1, seed=torch.tensor(1.5))  # type: ignore[arg-type]
