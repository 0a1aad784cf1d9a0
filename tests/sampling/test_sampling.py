"""The naive sampler against a chain computed by hand; its randomness, invariances, in-painting and refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TablePrior, pixelcnn, random_codes, refuses, snail
from scipy.stats import chi2, kstest
from torch import Tensor

import fastvq
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import Prior
from fastvq.ops.draw import draw, draw_margin
from fastvq.sampling import ENGINES, choose_engine, sample, uniforms
from fastvq.sampling.request import micro_batches, padded_micro_batches

pytestmark = pytest.mark.usefixtures("steady")

MASK64 = (1 << 64) - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10, from the paper (Salmon et al. 2011)."""
    key = list(key)
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (right >> 64) ^ counter[1] ^ key[0],
            right & MASK64,
            (left >> 64) ^ counter[3] ^ key[1],
            left & MASK64,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK64, (key[1] + 0xBB67AE8584CAA73B) & MASK64]
    return counter


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
@pytest.mark.parametrize("level", [0, 2])
def test_uniforms_are_those_of_philox(seed: int, level: int) -> None:
    found = uniforms(seed, 5, 3, (2, 5), level=level)
    assert found.dtype == torch.float32
    for row, index in enumerate(range(5, 8)):
        # NumPy counts up once before its first block.
        words = list(
            itertools.chain.from_iterable(philox([1 + block, 0, index, 0], [seed, level]) for block in range(3))
        )
        by_hand = torch.tensor([(word >> 40) * 2.0**-24 for word in words[:10]], dtype=torch.float64)
        assert torch.equal(found[row].flatten().double(), by_hand)
        counter, key = (np.array(value, dtype=np.uint64) for value in ([0, 0, index, 0], [seed, level]))
        theirs = np.random.Philox(counter=counter, key=key).random_raw(10) >> np.uint64(40)
        assert torch.equal(found[row].flatten(), torch.from_numpy(theirs.astype(np.float64) / 2**24).float())


def test_uniforms_of_a_sample_do_not_depend_on_the_others() -> None:
    whole = uniforms(3, 0, 40, (3, 4))
    assert whole.shape == (40, 3, 4)
    assert torch.equal(torch.cat([uniforms(3, 0, 7, (3, 4)), uniforms(3, 7, 33, (3, 4))]), whole)
    assert torch.equal(uniforms(3, 31, 1, (3, 4))[0], whole[31])
    assert uniforms(3, 31, 0, (3, 4)).shape == (0, 3, 4)
    # The same numbers in another shape: position in raster order is what counts.
    assert torch.equal(uniforms(3, 0, 40, (1, 12)).flatten(), whole.flatten())
    assert torch.equal(uniforms(3, 0, 40, (3, 5)).flatten(1)[:, :12], whole.flatten(1))


def test_uniforms_are_uniform_and_independent() -> None:
    numbers = uniforms(11, 0, 2000, (4, 4)).double().flatten(1)
    count = numbers.numel()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs(numbers.var() - 1 / 12) < 5 * (1 / 180 / count) ** 0.5
    assert kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    others = {
        "next sample": uniforms(11, 1, 2000, (4, 4)),
        "next seed": uniforms(12, 0, 2000, (4, 4)),
        "next level": uniforms(11, 0, 2000, (4, 4), level=1),
        "next position": uniforms(11, 0, 2000, (1, 17))[:, :, 1:],
    }
    for name, other in others.items():
        pair = torch.stack([numbers.flatten(), other.double().flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 / count**0.5, name
    assert len(torch.unique(numbers, dim=0)) == 2000


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ArgumentError, r"seed: must lie in 0..2\*\*64-1, got -1"),
        (2**64, ArgumentError, r"seed: must lie in 0..2\*\*64-1"),
        (1.0, ArgumentTypeError, "seed: expected an int, got float 1.0"),
        (True, ArgumentTypeError, "seed: expected an int, got bool True"),
    ],
)
def test_uniforms_refuse(seed: Any, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        uniforms(seed, 0, 1, (2, 2))


def test_two_codes_by_hand() -> None:
    """A grid of two positions: P(0) = 1/4 first; then 1/2 after a 0 and 9/10 after a 1."""
    prior = TablePrior((1, 2), 2)
    with torch.no_grad():
        prior.position.copy_(torch.tensor([[0.25, 0.75], [1.0, 1.0]]).log())
        prior.follow.copy_(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log())
    points = torch.tensor([[0.0, 0.0], [0.24, 0.49], [0.24, 0.51], [0.26, 0.89], [0.26, 0.91], [0.99, 0.99]])
    codes = sample(prior, 6, noise=points[:, None], engine="naive")
    assert codes[:, 0].tolist() == [[0, 0], [0, 0], [0, 1], [1, 0], [1, 1], [1, 1]]
    # At temperature 1/2 probabilities are squared and normalised anew: 1/10, 1/2, 81/82.
    points = torch.tensor([[0.09, 0.49], [0.09, 0.51], [0.11, 0.98], [0.11, 0.99]])
    codes = sample(prior, 4, noise=points[:, None], temperature=0.5, engine="naive")
    assert codes[:, 0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1), (3, 4)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_tokens_equal_the_chain_by_hand(shape: tuple[int, int], temperature: float) -> None:
    prior = TablePrior(shape, 7, level=1)
    codes = sample(prior, 21, seed=4, temperature=temperature, engine="naive")
    assert codes.dtype == torch.int64
    want = prior.by_hand(uniforms(4, 0, 21, shape, level=1), temperature=temperature)
    assert np.array_equal(codes.numpy(), want)
    noise = torch.rand(21, *shape, generator=torch.Generator().manual_seed(1))
    codes = sample(prior, 21, noise=noise, temperature=temperature, engine="naive")
    assert np.array_equal(codes.numpy(), prior.by_hand(noise, temperature=temperature))


def conditioned(seed: int = 0, **changes: Any) -> tuple[Prior, Callable[[int, int], dict[str, Any]]]:
    """A prior with two levels above and labels, and the arguments for samples ``start .. start + n - 1``."""
    torch.manual_seed(seed)
    above = {"condition_shapes": ((1, 2), (3, 2)), "condition_num_codes": (3, 4)}
    # Weights of this size give probabilities far from uniform, so that a slip shows in the codes.
    prior = snail(**above, num_classes=3, level=2, **changes)
    with torch.no_grad():
        prior.output.weight.mul_(8)
    coarse, fine = random_codes(64, 1, 2, num_codes=3, seed=1), random_codes(64, 3, 2, num_codes=4, seed=2)

    def arguments(start: int, n: int) -> dict[str, Any]:
        stop = start + n
        return {"condition": [coarse[start:stop], fine[start:stop]], "label": torch.arange(start, stop) % 3}

    return prior, arguments


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
@pytest.mark.parametrize("mask", ["strict", "inclusive"])
def test_a_sample_does_not_depend_on_the_call(micro_batch: int, mask: str) -> None:
    prior, arguments = conditioned(mask=mask)

    def codes(start: int, n: int) -> Tensor:
        fields = {"seed": 9, "start": start, "micro_batch": micro_batch, "engine": "naive"}
        return sample(prior, n, **arguments(start, n), **fields)

    whole = codes(0, 19)
    assert whole.shape == (19, 3, 4)
    for n in (1, 5, 8, 16):
        assert torch.equal(codes(0, n), whole[:n])
    for cuts in ([0, 19], [0, 3, 19], [0, 8, 16, 19], [0, 1, 2, 11, 18, 19]):
        parts = [codes(first, last - first) for first, last in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(codes(17, 1)[0], whole[17])
    assert len(torch.unique(whole.flatten(1), dim=0)) == 19


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("start", [0, 3, 8, 13])
@pytest.mark.parametrize("n", [0, 1, 5, 19])
def test_a_sample_has_one_place_in_padded_micro_batches_of_one_size(size: int, start: int, n: int) -> None:
    found = []
    for index, new in padded_micro_batches(start, n, size):
        assert len(index) == size
        assert 0 <= int(index.min()) <= int(index.max()) < n
        for place in range(size)[new]:
            sample_index = start + int(index[place])
            assert sample_index % size == place
            found.append(sample_index)
    assert found == list(range(start, start + n))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 100, 129])
@pytest.mark.parametrize("size", [1, 8, 64])
def test_micro_batches_are_few_and_even(n: int, size: int) -> None:
    parts = list(micro_batches(n, size))
    assert len(parts) == -(-n // size)
    assert [i for part in parts for i in range(n)[part]] == list(range(n))
    sizes = [part.stop - part.start for part in parts]
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_micro_batches_give_the_same_codes_up_to_rounding() -> None:
    prior, arguments = conditioned()
    grids = {size: sample(prior, 12, **arguments(0, 12), seed=9, micro_batch=size) for size in (1, 8, 64)}
    noise = uniforms(9, 0, 12, (3, 4), level=2)
    with torch.no_grad():
        for codes in grids.values():
            logits = prior(codes, **arguments(0, 12)).movedim(1, -1)
            assert draw_margin(logits, noise, codes).min() >= -1e-6


def test_other_seeds_and_levels_give_other_samples() -> None:
    prior = TablePrior((3, 4), 7)
    below = TablePrior((3, 4), 7, level=1)
    codes = sample(prior, 6, seed=1)
    assert torch.equal(sample(prior, 6, seed=1), codes)
    assert not torch.equal(sample(prior, 6, seed=2), codes)
    assert not torch.equal(sample(below, 6, seed=1), codes)
    assert torch.equal(sample(below, 6, noise=uniforms(1, 0, 6, (3, 4))), codes)


def test_without_a_seed_the_global_generator_decides() -> None:
    prior = TablePrior((3, 4), 7)
    torch.manual_seed(5)
    first, second = sample(prior, 6), sample(prior, 6)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(sample(prior, 6), first)
    random = torch.get_rng_state()
    sample(prior, 2, seed=1)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("kind", ["strict", "inclusive", "no-attention", "pixelcnn"])
def test_one_full_pass_leads_to_the_same_tokens(kind: str) -> None:
    """Logits of the drawn grid, all positions at once, drawn at the same numbers."""
    fields: dict[str, Any] = {"num_classes": 3, "condition_shapes": ((3, 2),), "condition_num_codes": (4,), "level": 1}
    prior: Any = {
        "strict": lambda: snail(blocks=2, **fields),
        "inclusive": lambda: snail(mask="inclusive", activation="concat_elu", form="symmetric", **fields),
        "no-attention": lambda: snail(attention=False, kernel_size=5, output_blocks=1, **fields),
        "pixelcnn": lambda: pixelcnn(layers=2, **fields),
    }[kind]()
    with torch.no_grad():
        prior.output.weight.mul_(8)
    given = {"condition": random_codes(24, 3, 2, num_codes=4), "label": torch.arange(24) % 3}
    codes = sample(prior, 24, **given, seed=3, temperature=0.9, top_k=4, top_p=0.95, engine="naive")
    noise = uniforms(3, 0, 24, (3, 4), level=1)
    with torch.no_grad():
        logits = prior(codes, **given).movedim(1, -1)
    settings: dict[str, Any] = {"temperature": 0.9, "top_k": 4, "top_p": 0.95}
    again = draw(logits, noise, **settings)
    margins = draw_margin(logits, noise, codes, **settings)
    assert (margins[again != codes] >= -1e-6).all()
    assert (again == codes).double().mean() > 0.99
    assert margins.min() >= -1e-6
    assert (codes.flatten() != codes.flatten()[0]).any()


@pytest.mark.parametrize("broadcast", [False, True], ids=["mask-each", "mask-all"])
def test_in_painting_keeps_what_is_known(broadcast: bool) -> None:
    prior = TablePrior((3, 4), 7)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(3, 4, generator=generator) < 0.4 if broadcast else torch.rand(11, 3, 4, generator=generator) < 0.4
    init = random_codes(11, 3, 4, num_codes=7)
    known = mask.expand(11, 3, 4)
    # What stands at unknown positions is never read, be it no code at all.
    init = torch.where(known, init, torch.tensor([-5, 1000])[torch.arange(11) % 2][:, None, None])
    codes = sample(prior, 11, seed=3, init_codes=init, mask=mask, engine="naive")
    assert torch.equal(codes[known], init[known])
    want = prior.by_hand(uniforms(3, 0, 11, (3, 4)), torch.where(known, init, -1))
    assert np.array_equal(codes.numpy(), want)
    free = sample(prior, 11, seed=3, engine="naive")
    # Before the first known code nothing changes; after it known codes lead to other choices.
    for i in range(11):
        first = int(known[i].flatten().nonzero()[0])
        assert torch.equal(codes[i].flatten()[:first], free[i].flatten()[:first])
    assert (codes != free)[~known].any()


def test_in_painting_of_all_and_of_nothing() -> None:
    prior = TablePrior((3, 4), 7)
    init = random_codes(5, 3, 4, num_codes=7)
    everything = torch.ones(3, 4, dtype=torch.bool)
    codes = sample(prior, 5, seed=3, init_codes=init.to(torch.int16), mask=everything, engine="naive")
    assert torch.equal(codes, init)
    assert prior.passes == 0
    assert torch.equal(sample(prior, 5, seed=3, init_codes=init, mask=~everything), sample(prior, 5, seed=3))


def test_in_painting_does_not_write_into_the_arguments() -> None:
    prior = TablePrior((3, 4), 7)
    init, mask = random_codes(5, 3, 4, num_codes=7), torch.rand(5, 3, 4) < 0.5
    noise = torch.rand(5, 3, 4)
    kept = [tensor.clone() for tensor in (init, mask, noise)]
    sample(prior, 5, noise=noise, init_codes=init, mask=mask)
    assert all(torch.equal(*pair) for pair in zip((init, mask, noise), kept, strict=True))


def test_top_k_of_one_takes_the_likeliest_code() -> None:
    prior = TablePrior((3, 4), 7)
    position, follow = prior.position.detach(), prior.follow.detach()
    chain = [int(position[0].argmax())]
    for p in range(1, 12):
        chain.append(int((position[p] + follow[chain[-1]]).argmax()))
    want = torch.tensor(chain).view(3, 4).expand(6, -1, -1)
    assert torch.equal(sample(prior, 6, seed=1, top_k=1), want)
    assert torch.equal(sample(prior, 6, seed=1, temperature=1e-4), want)
    assert torch.equal(sample(prior, 6, seed=1, top_p=1e-6), want)


def test_filters_leave_unlikely_codes_out() -> None:
    prior = TablePrior((3, 4), 7)
    plain = sample(prior, 200, seed=1, micro_batch=200)
    ranks: dict[str, Tensor] = {}
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "k": {"top_k": 2},
        "p": {"top_p": 0.6},
        "both": {"top_k": 2, "top_p": 0.6},
    }
    for name, fields in settings.items():
        codes = sample(prior, 200, seed=1, micro_batch=200, **fields)
        with torch.no_grad():
            logits = prior(codes).movedim(1, -1)
        order = logits.argsort(-1, descending=True)
        rank = order.argsort(-1).gather(-1, codes[..., None])[..., 0]
        before = logits.softmax(-1).gather(-1, order).cumsum(-1).gather(-1, (rank - 1).clamp_min(0)[..., None])[..., 0]
        ranks[name] = rank
        if "top_k" in fields:
            assert rank.max() == 1
        elif "top_p" in fields:
            assert (before[rank > 0] < 0.6 + 1e-6).all()
            assert 0 < rank.max() < 6
        else:
            assert rank.max() == 6
    assert (ranks["both"] <= 1).all()
    assert torch.equal(sample(prior, 200, seed=1, micro_batch=200, top_k=7, top_p=1.0), plain)


def test_temperature_changes_the_entropy() -> None:
    prior = TablePrior((1, 1), 7)

    def entropy(temperature: float) -> float:
        codes = sample(prior, 2000, seed=1, temperature=temperature, micro_batch=2000)
        share = torch.bincount(codes.flatten(), minlength=7) / 2000
        return float(-torch.xlogy(share, share).sum())

    assert entropy(0.3) < entropy(1.0) < entropy(3.0) < np.log(7)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_follow_the_distribution(temperature: float) -> None:
    prior = TablePrior((1, 2), 4)
    n = 8000
    codes = sample(prior, n, seed=2, temperature=temperature, micro_batch=1000, engine="naive")
    first = (prior.position[0].double() / temperature).softmax(0)
    second = ((prior.position[1] + prior.follow).double() / temperature).softmax(1)
    expected = (n * first[:, None] * second).detach().flatten()
    found = torch.bincount(codes[:, 0, 0] * 4 + codes[:, 0, 1], minlength=16).double()
    large = expected >= 5
    statistic = ((found - expected)[large].square() / expected[large]).sum()
    rest = expected[~large].sum()
    degrees = int(large.sum()) - 1
    if rest > 0:
        statistic += (found[~large].sum() - rest).square() / rest
        degrees += 1
    assert chi2.sf(float(statistic), degrees) > 1e-3


def test_a_label_for_all_or_for_each() -> None:
    prior, arguments = conditioned()
    given = {**arguments(0, 6), "seed": 1}
    each = sample(prior, 6, **{**given, "label": torch.full((6,), 2)})
    assert torch.equal(sample(prior, 6, **{**given, "label": 2}), each)
    assert torch.equal(sample(prior, 6, **{**given, "label": torch.full((6,), 2, dtype=torch.uint8)}), each)
    assert not torch.equal(sample(prior, 6, **{**given, "label": 1}), each)


def test_a_condition_may_come_as_one_tensor() -> None:
    prior = snail(condition_shapes=((1, 2),), condition_num_codes=(3,))
    above = random_codes(4, 1, 2, num_codes=3)
    assert torch.equal(sample(prior, 4, condition=above, seed=1), sample(prior, 4, condition=(above.int(),), seed=1))


@pytest.mark.parametrize("start", [0, 3, 8, 2**40 + 5])
@pytest.mark.parametrize("n", [0, 1, 9])
def test_any_number_from_any_index(start: int, n: int) -> None:
    codes = sample(TablePrior((2, 3), 7), n, seed=1, start=start)
    assert codes.shape == (n, 2, 3)
    assert codes.dtype == torch.int64
    assert np.array_equal(codes.numpy(), TablePrior((2, 3), 7).by_hand(uniforms(1, start, n, (2, 3))))


def test_nothing_is_computed_for_no_samples() -> None:
    prior = TablePrior((2, 3), 7)
    assert sample(prior, 0, start=5, noise=torch.zeros(0, 2, 3)).shape == (0, 2, 3)
    assert prior.passes == 0


def test_work_is_one_pass_per_position_and_micro_batch() -> None:
    prior = TablePrior((2, 3), 7)
    sample(prior, 9, seed=1, micro_batch=4, engine="naive")
    assert prior.passes == 6 * 3


def modes(prior: Prior) -> dict[str, bool]:
    return {name: module.training for name, module in prior.named_modules()}


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    torch.manual_seed(0)
    prior = snail(dropout=0.5, attention_dropout=0.5)
    want = sample(prior, 6, seed=1)
    prior.train()
    prior.blocks[0].layers.eval()
    before = modes(prior)
    assert len(set(before.values())) == 2
    assert torch.equal(sample(prior, 6, seed=1), want)
    assert modes(prior) == before


def test_the_mode_comes_back_after_a_failure() -> None:
    prior = TablePrior((2, 3), 7).train()
    prior.fail_at = 2
    with pytest.raises(RuntimeError, match="told to fail"):
        sample(prior, 2, seed=1)
    assert prior.training


def test_samples_are_ordinary_tensors() -> None:
    prior = snail()
    codes = sample(prior, 2, seed=1)
    assert not codes.is_inference()
    assert not codes.requires_grad
    codes.add_(0)
    prior.nll(codes).mean().backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())


def test_logits_that_are_not_finite_are_reported() -> None:
    prior = TablePrior((2, 3), 7)
    with torch.no_grad():
        prior.position[4, 2] = float("nan")
    with refuses(ArgumentError, "logits: .*NaN"):
        sample(prior, 2, seed=1)


@pytest.mark.parametrize("progress", [False, True])
def test_progress_counts_rows(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    sample(TablePrior((2, 3), 7), 9, seed=1, progress=progress, micro_batch=4, engine="naive")
    out, err = capsys.readouterr()
    assert out == ""
    assert ("6/6" in err) == progress
    assert (err == "") != progress


def test_engines() -> None:
    prior = TablePrior((2, 3), 7)
    assert "naive" in ENGINES
    for engine in ("auto", "naive"):
        name, reason = choose_engine(engine, prior)
        assert name in ENGINES
        assert reason
    assert torch.equal(sample(prior, 3, seed=1, engine="naive"), sample(prior, 3, seed=1))
    assert fastvq.sample is sample


CONDITION = [torch.zeros(2, 1, 2).long(), torch.zeros(2, 3, 2).long()]
LABEL = torch.zeros(2).long()
INIT, KNOWN = torch.zeros(2, 3, 4).long(), torch.ones(2, 3, 4, dtype=torch.bool)
BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "n-negative": ({"n": -1}, ArgumentError, "n: must be at least 0, got -1"),
    "n-float": ({"n": 2.0}, ArgumentTypeError, "n: expected an int, got float"),
    "n-bool": ({"n": True}, ArgumentTypeError, "n: expected an int, got bool"),
    "start-negative": ({"start": -1}, ArgumentError, "start: must be at least 0, got -1"),
    "start-huge": ({"start": 2**62 + 1}, ArgumentError, r"start: must be at most 2\*\*62"),
    "micro-batch-zero": ({"micro_batch": 0}, ArgumentError, "micro_batch: must be at least 1, got 0"),
    "micro-batch-float": ({"micro_batch": 8.0}, ArgumentTypeError, "micro_batch: expected an int"),
    "temperature-negative": ({"temperature": -1}, ArgumentError, "temperature: "),
    "temperature-nan": ({"temperature": float("nan")}, ArgumentError, "temperature: "),
    "temperature-infinite": ({"temperature": float("inf")}, ArgumentError, "temperature: "),
    "temperature-beyond-float32": ({"temperature": 1e300}, ArgumentError, "temperature: "),
    "temperature-below-float32": ({"temperature": 1e-40}, ArgumentError, "temperature: "),
    "temperature-huge-int": ({"temperature": 10**400}, ArgumentError, "temperature: "),
    "temperature-none": ({"temperature": None}, ArgumentTypeError, "temperature: expected a number, got NoneType"),
    "temperature-text": ({"temperature": "1"}, ArgumentTypeError, "temperature: expected a number, got str"),
    "temperature-tensor": (
        {"temperature": torch.ones(3)},
        ArgumentError,
        "temperature: expected one value, or",
    ),
    "temperature-bool": ({"temperature": True}, ArgumentTypeError, "temperature: expected a number, got bool"),
    "top-k-zero": ({"top_k": 0}, ArgumentError, "top_k: "),
    "top-k-beyond": ({"top_k": 6}, ArgumentError, "top_k: "),
    "top-k-float": ({"top_k": 2.0}, ArgumentTypeError, "top_k: expected an int"),
    "top-p-zero": ({"top_p": 0.0}, ArgumentError, "top_p: "),
    "top-p-beyond": ({"top_p": 1.1}, ArgumentError, "top_p: "),
    "top-p-nan": ({"top_p": float("nan")}, ArgumentError, "top_p: "),
    "top-p-text": ({"top_p": "0.9"}, ArgumentTypeError, "top_p: expected a number"),
    "temperatures-negative": ({"temperature": [1, -1]}, ArgumentError, "temperature: expected 0, or a finite"),
    "temperatures-text": (
        {"temperature": [1, "2"]},
        ArgumentTypeError,
        r"temperature\[1\]: expected a number",
    ),
    "seed-bool": ({"seed": True}, ArgumentTypeError, "seed: expected an int, a torch.Generator or None, got bool"),
    "seed-float": ({"seed": 1.0}, ArgumentTypeError, "seed: expected an int, a torch.Generator or None, got float"),
    "callback": ({"callback": 3}, ArgumentTypeError, "callback: expected a callable or None, got int 3"),
    "logprobs": ({"return_logprobs": 1}, ArgumentTypeError, "return_logprobs: expected a bool, got int"),
    "seed-and-noise": (
        {"seed": 1, "noise": torch.zeros(2, 3, 4)},
        ArgumentError,
        "noise and seed: give one or the other",
    ),
    "noise-list": ({"noise": [[0.5]]}, ArgumentTypeError, "noise: expected a torch.Tensor, got list"),
    "noise-shape": (
        {"noise": torch.zeros(2, 4, 3)},
        ArgumentError,
        r"noise: expected shape \[2, 3, 4\], got \[2, 4, 3\]",
    ),
    "noise-float64": ({"noise": torch.zeros(2, 3, 4).double()}, ArgumentTypeError, "noise: expected float32"),
    "noise-one": ({"noise": torch.ones(2, 3, 4)}, ArgumentError, r"noise: values must lie in \[0, 1\), got 1.0"),
    "noise-negative": ({"noise": torch.full((2, 3, 4), -0.1)}, ArgumentError, "noise: values must lie in"),
    "noise-nan": ({"noise": torch.full((2, 3, 4), float("nan"))}, ArgumentError, "noise: values must lie in"),
    "condition-missing": ({"condition": None}, ArgumentError, "condition: this prior expects codes of 2 level"),
    "condition-one": ({"condition": CONDITION[0]}, ArgumentError, "condition: this prior expects codes of 2 level"),
    "condition-number": (
        {"condition": 3},
        ArgumentTypeError,
        "condition: expected a tensor, a sequence of tensors or None",
    ),
    "condition-batch": (
        {"condition": [CONDITION[0], CONDITION[1][[0, 0, 0]]]},
        ArgumentError,
        r"condition\[1\]: expected shape \[2, 3, 2\], got \[3, 3, 2\]",
    ),
    "condition-order": ({"condition": CONDITION[::-1]}, ArgumentError, r"condition\[0\]: expected shape \[2, 1, 2\]"),
    "condition-float": (
        {"condition": [CONDITION[0].float(), CONDITION[1]]},
        ArgumentTypeError,
        r"condition\[0\]: expected an integer tensor",
    ),
    "condition-range": (
        {"condition": [CONDITION[0] + 3, CONDITION[1]]},
        ArgumentError,
        r"condition\[0\]: values must lie in 0..2, got 3",
    ),
    "condition-numbers": (
        {"condition": [0, 1]},
        ArgumentTypeError,
        r"condition\[0\]: expected a torch.Tensor, got int",
    ),
    "label-missing": ({"label": None}, ArgumentError, "label: this prior is class-conditional"),
    "label-beyond": ({"label": 3}, ArgumentError, "label: must lie in 0..2, got 3"),
    "label-negative": ({"label": -1}, ArgumentError, "label: must lie in 0..2, got -1"),
    "label-huge": ({"label": 2**70}, ArgumentError, "label: must lie in 0..2"),
    "label-bool": ({"label": True}, ArgumentTypeError, "label: expected an int, or 2 of them in a sequence"),
    "label-text": ({"label": "cat"}, ArgumentTypeError, "label: expected an int, or 2 .*, got str 'cat'"),
    "label-texts": ({"label": ["cat", 1]}, ArgumentTypeError, "label: expected an int, or 2 .* got one that is str"),
    "label-list": ({"label": [1]}, ArgumentError, r"label: expected shape \[2\], got \[1\]"),
    "label-list-beyond": ({"label": [1, 2**70]}, ArgumentError, "label: values must lie in 0..2"),
    "label-array": ({"label": LABEL.numpy() * 1.0}, ArgumentTypeError, "label: expected .* an array of float64"),
    "label-float": ({"label": LABEL.float()}, ArgumentTypeError, "label: expected an integer tensor"),
    "label-shape": ({"label": LABEL[:1]}, ArgumentError, r"label: expected shape \[2\], got \[1\]"),
    "label-tensor-beyond": ({"label": LABEL + 3}, ArgumentError, "label: values must lie in 0..2, got 3"),
    "init-alone": ({"init_codes": INIT}, ArgumentError, "init_codes and mask: known positions need both"),
    "mask-alone": ({"mask": KNOWN}, ArgumentError, "init_codes and mask: known positions need both"),
    "mask-integer": ({"init_codes": INIT, "mask": KNOWN.int()}, ArgumentTypeError, "mask: expected bool"),
    "mask-list": ({"init_codes": INIT, "mask": [True]}, ArgumentTypeError, "mask: expected a torch.Tensor, got list"),
    "mask-shape": ({"init_codes": INIT, "mask": KNOWN[:, :2]}, ArgumentError, r"mask: expected shape \[2, 3, 4\]"),
    "mask-2d-shape": ({"init_codes": INIT, "mask": KNOWN[0].T}, ArgumentError, r"mask: expected shape \[3, 4\]"),
    "init-list": ({"init_codes": [[0]], "mask": KNOWN}, ArgumentTypeError, "init_codes: expected a torch.Tensor"),
    "init-float": (
        {"init_codes": INIT.float(), "mask": KNOWN},
        ArgumentTypeError,
        "init_codes: expected an integer tensor",
    ),
    "init-bool": ({"init_codes": KNOWN, "mask": KNOWN}, ArgumentTypeError, "init_codes: expected an integer tensor"),
    "init-shape": ({"init_codes": INIT[0].T, "mask": KNOWN}, ArgumentError, r"init_codes: expected shape \[2, 3, 4\]"),
    "init-range": (
        {"init_codes": INIT + 5, "mask": KNOWN},
        ArgumentError,
        "init_codes: values must lie in 0..4, got 5",
    ),
    "engine": ({"engine": "warp"}, ArgumentError, "engine: expected 'auto' or one of .*'naive', got 'warp'"),
    "engine-none": ({"engine": None}, ArgumentError, "engine: expected 'auto' or one of"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_refuses_before_any_work(
    arguments: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = conditioned()[0].train()

    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("the prior was called")

    for name in ("forward", "context", "logits"):
        monkeypatch.setattr(prior, name, work)
    given = {"n": 2, "condition": CONDITION, "label": LABEL, **arguments}
    with refuses(error, message):
        sample(prior, given.pop("n"), **given)
    assert prior.training


def test_refuses_what_is_no_prior() -> None:
    with refuses(ArgumentError, "shape and num_codes: a Linear that fastvq does not know needs its grid and codes"):
        sample(torch.nn.Linear(2, 2), 1)  # type: ignore[arg-type]


def test_refuses_what_the_prior_was_not_made_for() -> None:
    prior = TablePrior((2, 3), 7)
    with refuses(ArgumentError, "label: this prior is not class-conditional"):
        sample(prior, 2, label=1)
    with refuses(ArgumentError, r"condition: this prior expects None, got 1 tensor"):
        sample(prior, 2, condition=torch.zeros(2, 1, 1).long())
    assert prior.passes == 0
