"""The quantiser's gradients and its moving codebook."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refuses
from quantizer_helpers import BUFFERS, buffers, is_row_of, normal, same, squared_distances
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import VectorQuantizer
from fastvq.models.quantizer.update import lloyd

pytestmark = pytest.mark.usefixtures("steady")

NAN = math.nan


def test_output_in_evaluation() -> None:
    quantizer = VectorQuantizer(6, 4, commitment=0.4).eval()
    x = normal(2, 4, 3, 5)
    before = buffers(quantizer)
    out = quantizer(x)
    codes = squared_distances(x.movedim(1, -1).reshape(-1, 4), quantizer.embedding).argmin(1).view(2, 3, 5)
    vectors = quantizer.embedding[codes].movedim(-1, 1)
    assert torch.equal(out.codes, codes)
    assert torch.equal(out.quantized, vectors)
    assert torch.equal(quantizer.lookup(out.codes), vectors)
    torch.testing.assert_close(out.commitment_loss, 0.4 * (x - vectors).square().mean())
    assert same(buffers(quantizer), before)


@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 7), (2, 4, 3, 5), (1, 4, 2, 3, 2)], ids=lambda s: f"{len(s)}d")
def test_channels_first_equals_channels_last(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    first = VectorQuantizer(6, 4, init="data", revive_below=0.1)
    torch.manual_seed(0)
    last = VectorQuantizer(6, 4, init="data", revive_below=0.1, channels_last=True)
    for seed in range(3):
        x = normal(*shape, seed=seed)
        torch.manual_seed(seed)
        out = first(x)
        torch.manual_seed(seed)
        other = last(x.movedim(1, -1).contiguous())
        assert out.quantized.shape == shape
        assert out.codes.shape == (shape[0], *shape[2:])
        assert torch.equal(out.codes, other.codes)
        assert torch.equal(out.quantized, other.quantized.movedim(-1, 1))
        # A mean adds up in the order of memory.
        torch.testing.assert_close(out.commitment_loss, other.commitment_loss)
        assert torch.equal(first.lookup(out.codes), last.lookup(out.codes).movedim(-1, 1))
    assert same(buffers(first), buffers(last))


def test_straight_through_gradcheck() -> None:
    """Around x the codes stay the same, so adding x - x0 gives a function whose true gradient is the identity."""
    quantizer = VectorQuantizer(6, 4).double().eval()
    x = normal(2, 4, 3, dtype=torch.float64).requires_grad_()
    start = x.detach().clone()

    def surrogate(value: Tensor) -> Tensor:
        return quantizer(value).quantized + (value - start).detach()

    assert torch.autograd.gradcheck(surrogate, (x,))
    upstream = normal(2, 4, 3, seed=1, dtype=torch.float64)
    assert torch.equal(torch.autograd.grad(quantizer(x).quantized, x, upstream)[0], upstream)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_commitment_gradcheck(channels_last: bool) -> None:
    quantizer = VectorQuantizer(6, 4, commitment=0.3, channels_last=channels_last).double().eval()
    x = normal(3, 5, 4, dtype=torch.float64).movedim(-1, -1 if channels_last else 1).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda value: quantizer(value).commitment_loss, (x,))
    out = quantizer(x)
    want = 2 * 0.3 * (x - out.quantized).detach() / x.numel()
    torch.testing.assert_close(torch.autograd.grad(out.commitment_loss, x)[0], want, rtol=1e-12, atol=1e-15)


def test_nothing_but_the_input_has_a_gradient() -> None:
    quantizer = VectorQuantizer(6, 4)
    assert not list(quantizer.parameters())
    out = quantizer(normal(2, 4, 3).requires_grad_())
    assert out.quantized.requires_grad
    assert out.commitment_loss.requires_grad
    assert not out.perplexity.requires_grad
    assert not any(getattr(quantizer, name).requires_grad for name in BUFFERS)


def test_perplexity_by_hand() -> None:
    quantizer = VectorQuantizer(4, 1, channels_last=True).eval()
    quantizer.embedding.copy_(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    uses = torch.tensor([[0.0], [0.1], [1.0], [2.9]] * 2)  # half code 0, a quarter each code 1 and code 3
    expected = math.exp(0.5 * math.log(2) + 2 * 0.25 * math.log(4))
    assert quantizer(uses).perplexity.item() == pytest.approx(expected, rel=1e-6)
    assert quantizer(torch.zeros(5, 1)).perplexity.item() == pytest.approx(1)
    assert quantizer(torch.arange(4.0)[:, None]).perplexity.item() == pytest.approx(4)


def paper_update(
    state: dict[str, np.ndarray], x: np.ndarray, codes: np.ndarray, decay: float, eps: float
) -> dict[str, np.ndarray]:
    """N_i <- g N_i + (1 - g) n_i; m_i <- g m_i + (1 - g) sum_j z_ij; e_i = m_i / N_i with N smoothed after Laplace."""
    counts, sums = state["N"].copy(), state["m"].copy()
    num_codes = len(counts)
    for code in range(num_codes):
        mine = x[codes == code]
        counts[code] = decay * counts[code] + (1 - decay) * len(mine)
        sums[code] = decay * sums[code] + (1 - decay) * mine.sum(axis=0)
    total = counts.sum()
    smoothed = (counts + eps) / (total + num_codes * eps) * total
    return {"N": counts, "m": sums, "e": sums / smoothed[:, None]}


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["f64", "f32"])
def test_codebook_follows_the_paper(decay: float, eps: float, dtype: torch.dtype, tolerance: float) -> None:
    quantizer = VectorQuantizer(7, 3, decay=decay, eps=eps, channels_last=True).to(dtype)
    state = {
        "N": quantizer.cluster_size.double().numpy().copy(),
        "m": quantizer.embedding_sum.double().numpy().copy(),
        "e": quantizer.embedding.double().numpy().copy(),
    }
    for step in range(6):
        x = normal(4, 5, 3, seed=step, dtype=dtype)
        nearest = squared_distances(x.view(-1, 3), torch.from_numpy(state["e"])).argmin(1)
        out = quantizer(x)
        assert torch.equal(out.codes.flatten(), nearest)
        # The pass itself uses the codebook from before it moved.
        torch.testing.assert_close(
            out.quantized.double().view(-1, 3), torch.from_numpy(state["e"])[nearest], rtol=tolerance, atol=tolerance
        )
        state = paper_update(state, x.double().view(-1, 3).numpy(), nearest.numpy(), decay, eps)
        for name, key in (("cluster_size", "N"), ("embedding_sum", "m"), ("embedding", "e")):
            have = getattr(quantizer, name).double().numpy()
            np.testing.assert_allclose(have, state[key], rtol=tolerance, atol=tolerance, err_msg=f"{name} in {step}")
            assert np.isfinite(have).all()


@pytest.mark.parametrize(("rows", "repeats"), [(40, 0), (12, 0), (5, 2)], ids=["more", "as-many", "fewer"])
def test_data_initialisation_uses_vectors_of_the_batch(rows: int, repeats: int) -> None:
    # Without the update that follows, the codebook holds what initialisation chose.
    quantizer = VectorQuantizer(12, 3, init="data", channels_last=True)
    x = normal(rows, 3)
    quantizer.initialize(x)
    assert bool(quantizer.initialized)
    assert is_row_of(quantizer.embedding, x)
    uses = (quantizer.embedding[:, None] == x[None]).all(-1).sum(0)
    assert uses.max() - uses.min() <= 1
    assert uses.min() >= repeats
    assert torch.equal(quantizer.embedding_sum, quantizer.embedding)
    assert torch.equal(quantizer.cluster_size, torch.ones(12))


def test_initialisation_comes_with_the_first_training_batch_alone() -> None:
    quantizer = VectorQuantizer(4, 3, init="data", channels_last=True)
    random = quantizer.embedding.clone()
    quantizer.eval()(normal(20, 3))
    assert torch.equal(quantizer.embedding, random)
    assert not bool(quantizer.initialized)
    batch = 5 + normal(20, 3)
    out = quantizer.train()(batch)
    assert bool(quantizer.initialized)
    assert is_row_of(out.quantized, batch)
    after = quantizer.embedding.clone()
    quantizer(-5 + normal(20, 3))
    # One step of the average, not another start.
    assert (quantizer.embedding - after).abs().max() < 0.5 * (after.mean() + 5)


def test_initialisation_leaves_out_vectors_that_are_not_finite() -> None:
    quantizer = VectorQuantizer(6, 3, init="kmeans", channels_last=True)
    x = normal(20, 3)
    x[::2, 1] = NAN
    x[1, 0] = math.inf
    quantizer.initialize(x)
    assert quantizer.embedding.isfinite().all()
    quantizer = VectorQuantizer(6, 3, init="data", channels_last=True)
    with refuses(ArgumentError, "x: the first batch holds no finite vector"):
        quantizer(torch.full((4, 3), NAN))
    assert not bool(quantizer.initialized)


def test_kmeans_initialisation_lowers_the_error() -> None:
    centres = 10 * normal(8, 3, seed=1)
    x = centres.repeat(25, 1) + 0.1 * normal(200, 3)
    errors = {}
    for init in ("data", "kmeans"):
        torch.manual_seed(2)
        quantizer = VectorQuantizer(8, 3, init=init, channels_last=True)  # type: ignore[arg-type]
        quantizer.initialize(x)
        errors[init] = squared_distances(x, quantizer.embedding).amin(1).mean()
        if init == "kmeans":
            # Each centre is the mean of the vectors that have it as their nearest.
            nearest = squared_distances(x, quantizer.embedding).argmin(1)
            for code in nearest.unique():
                torch.testing.assert_close(quantizer.embedding[code], x[nearest == code].mean(0), rtol=1e-4, atol=1e-4)
    assert errors["kmeans"] < 0.9 * errors["data"]


def test_kmeans_keeps_the_centre_of_an_empty_cluster() -> None:
    start = torch.tensor([[0.0], [1.0], [50.0]])
    found = lloyd(torch.tensor([[0.0], [0.2], [1.0]]), start, 10)
    torch.testing.assert_close(found, torch.tensor([[0.1], [1.0], [50.0]]))


def test_dead_codes_are_revived() -> None:
    quantizer = VectorQuantizer(6, 2, decay=0.5, revive_below=0.3, channels_last=True)
    # Code 5 is far away from all data; its N falls from 1 to 0.5 to 0.25 < 0.3 in the second step.
    start = torch.cat([normal(5, 2), torch.full((1, 2), 100.0)])
    quantizer.embedding.copy_(start)
    quantizer.embedding_sum.copy_(start)
    batches = [normal(60, 2, seed=seed) for seed in (1, 2)]
    quantizer(batches[0])
    assert quantizer.cluster_size[5] == 0.5
    torch.testing.assert_close(quantizer.embedding_sum[5], torch.full((2,), 50.0))
    alive = quantizer.cluster_size[:5] * 0.5 > 0.3
    quantizer(batches[1])
    assert quantizer.cluster_size[5] == 1
    assert is_row_of(quantizer.embedding[5:], batches[1])
    assert torch.equal(quantizer.embedding_sum[5], quantizer.embedding[5])
    # Those in use went on with their averages.
    assert alive.any()
    assert not any(is_row_of(vector[None], batches[1]) for vector in quantizer.embedding[:5][alive])


def test_nothing_is_revived_by_default() -> None:
    quantizer = VectorQuantizer(3, 2, decay=0.5, channels_last=True)
    quantizer.embedding[2] = quantizer.embedding_sum[2] = 100
    for seed in range(12):
        quantizer(normal(30, 2, seed=seed))
    assert quantizer.cluster_size[2] == 0.5**12
    assert quantizer.embedding[2].norm() > 50


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_vectors_that_are_not_finite_are_left_out(bad: float) -> None:
    quantizer, other = (VectorQuantizer(6, 4, channels_last=True) for _ in range(2))
    other.load_state_dict(quantizer.state_dict())
    x = normal(9, 4)
    x[3, 2] = bad
    out = quantizer(x)
    want = other(torch.cat([x[:3], x[4:]]))
    assert same(buffers(quantizer), buffers(other))
    assert torch.equal(out.perplexity, want.perplexity)
    assert out.codes[3] == 0
    # The loss does not hide them.
    assert not out.commitment_loss.isfinite()


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("revive_below", [0.0, 0.5])
def test_a_batch_without_finite_vectors_leaves_the_codebook_alone(bad: float, revive_below: float) -> None:
    quantizer = VectorQuantizer(6, 4, revive_below=revive_below)
    quantizer(normal(2, 4, 9))
    before = buffers(quantizer)
    x = normal(2, 4, 9, seed=1)
    x[:, 2] = bad
    quantizer(x)
    assert same(buffers(quantizer), before)
    quantizer(normal(2, 4, 9, seed=1))
    assert not same(buffers(quantizer), before)


def test_dead_codes_are_not_revived_onto_vectors_that_are_not_finite() -> None:
    quantizer = VectorQuantizer(40, 4, decay=0.5, revive_below=1.3, channels_last=True)
    x = normal(30, 4)
    x[::2] = NAN
    for _ in range(3):
        quantizer(x)
        assert all(value.isfinite().all() for value in buffers(quantizer).values())
    # No count of vectors leads to just this size.
    revived = quantizer.cluster_size == torch.tensor(1.3)
    assert revived.any()
    assert is_row_of(quantizer.embedding[revived], x[1::2])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(training: bool) -> None:
    quantizer = VectorQuantizer(6, 4, revive_below=0.5).train(training)
    before = buffers(quantizer)
    out = quantizer(torch.zeros(0, 4, 3))
    assert out.codes.shape == (0, 3)
    assert out.quantized.shape == (0, 4, 3)
    assert out.perplexity.item() == 1
    assert same(buffers(quantizer), before)


def test_evaluation_changes_nothing() -> None:
    quantizer = VectorQuantizer(6, 4, init="kmeans", revive_below=0.5).eval()
    before, random = buffers(quantizer), torch.get_rng_state()
    quantizer(normal(2, 4, 9))
    assert same(buffers(quantizer), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_half_precision_input_under_autocast() -> None:
    wide, narrow = (VectorQuantizer(6, 4) for _ in range(2))
    narrow.load_state_dict(wide.state_dict())
    x = normal(2, 4, 9).bfloat16()
    want = wide(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = x.clone().requires_grad_()
        out = narrow(leaf)
    assert out.quantized.dtype == torch.bfloat16
    assert out.commitment_loss.dtype == torch.float32
    assert narrow.embedding.dtype == torch.float32
    assert torch.equal(out.codes, want.codes)
    assert torch.equal(out.quantized, want.quantized.bfloat16())
    assert torch.equal(out.commitment_loss, want.commitment_loss)
    # The averages are those of float32, not of rounded sums.
    assert same(buffers(narrow), buffers(wide))
    out.quantized.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_state_survives_a_state_dict() -> None:
    trained = VectorQuantizer(6, 4, init="data")
    trained(normal(2, 4, 9))
    fresh = VectorQuantizer(6, 4, init="data")
    fresh.load_state_dict(trained.state_dict())
    assert same(buffers(fresh), buffers(trained))
    fresh(normal(2, 4, 9, seed=1))
    trained(normal(2, 4, 9, seed=1))
    assert same(buffers(fresh), buffers(trained))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_codes": 0}, ArgumentError, "num_codes: must be at least 1, got 0"),
        ({"num_codes": 2.0}, ArgumentTypeError, "num_codes: expected an int, got float"),
        ({"code_dim": True}, ArgumentTypeError, "code_dim: expected an int, got bool"),
        ({"init": "random"}, ArgumentError, "init: expected one of 'normal', 'data', 'kmeans'"),
        ({"decay": 1.0}, ArgumentError, r"decay: must lie in \[0, 1\)"),
        ({"decay": NAN}, ArgumentError, r"decay: must lie in \[0, 1\)"),
        ({"eps": 0.0}, ArgumentError, "eps must be positive"),
        ({"commitment": -0.1}, ArgumentError, "eps must be positive, commitment and revive_below not negative"),
        ({"revive_below": -1.0}, ArgumentError, "eps must be positive, commitment and revive_below not negative"),
    ],
    ids=lambda value: f"{value}" if isinstance(value, dict) else None,
)
def test_refuses_settings(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with refuses(error, message):
        VectorQuantizer(**{"num_codes": 4, "code_dim": 3, **fields})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], ArgumentTypeError, "x: expected a torch.Tensor, got list"),
        (torch.zeros(2, 4, 3).long(), ArgumentTypeError, "x: expected a floating-point tensor"),
        (torch.zeros(2, 5, 3), ArgumentError, r"x: expected 4 channels along axis 1, got shape \[2, 5, 3\]"),
        (torch.zeros(4), ArgumentError, "x: expected 4 channels along axis 1"),
    ],
    ids=["list", "integers", "channels", "1d"],
)
def test_refuses_input(x: Any, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        VectorQuantizer(6, 4)(x)


def test_look_up_refuses() -> None:
    quantizer = VectorQuantizer(6, 4)
    with refuses(ArgumentError, "codes: values must lie in 0..5, got 6"):
        quantizer.lookup(torch.tensor([[6]]))
    with refuses(ArgumentTypeError, "codes: expected an integer tensor"):
        quantizer.lookup(torch.zeros(2, 3))
    with refuses(ArgumentTypeError, "codes: expected a torch.Tensor, got list"):
        quantizer.lookup([[1]])  # type: ignore[arg-type]
