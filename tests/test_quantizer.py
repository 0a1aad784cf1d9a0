"""Nearest codes against brute force; the quantiser's gradients, its moving codebook, and two processes as one."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import refuses
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import VectorQuantizer
from fastvq.models import quantizer as quantizer_module
from fastvq.ops import nearest_code_reference
from fastvq.ops.nearest_code import nearest_code

pytestmark = pytest.mark.usefixtures("steady")

NAN = math.nan
BUFFERS = ("embedding", "cluster_size", "embedding_sum", "initialized")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def buffers(quantizer: VectorQuantizer) -> dict[str, Tensor]:
    return {name: getattr(quantizer, name).clone() for name in BUFFERS}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in BUFFERS)


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    return (x.double()[:, None] - codebook.double()).square().sum(-1)


def assert_nearest(x: Tensor, codebook: Tensor, found: Tensor, unit: float = 2.0**-24) -> None:
    """No code is nearer than the one found by more than rounding of vectors centred on the codebook explains."""
    distances = squared_distances(x, codebook)
    gap = distances.gather(1, found[:, None])[:, 0] - distances.amin(1)
    mean = codebook.double().mean(0)
    lengths = (x.double() - mean).norm(dim=1) + (codebook.double() - mean).norm(dim=1).amax()
    assert (gap <= 16 * unit * lengths**2).all()


@pytest.mark.parametrize("offset", [0.0, 10.0, -1000.0])
@pytest.mark.parametrize(("rows", "num_codes", "dim"), [(1, 1, 1), (7, 2, 3), (257, 33, 64), (500, 512, 5)])
def test_nearest_code_equals_brute_force(rows: int, num_codes: int, dim: int, offset: float) -> None:
    x, codebook = offset + normal(rows, dim), offset + normal(num_codes, dim, seed=1)
    found = nearest_code(x, codebook)
    assert found.shape == (rows,)
    assert found.dtype == torch.int64
    assert_nearest(x, codebook, found)
    # Almost every vector has one nearest code by a clear margin.
    assert (found == squared_distances(x, codebook).argmin(1)).double().mean() > 0.99


def test_nearest_code_in_float64() -> None:
    x, codebook = 1e6 + normal(200, 8, dtype=torch.float64), 1e6 + normal(64, 8, seed=1, dtype=torch.float64)
    found = nearest_code(x, codebook)
    assert torch.equal(found, squared_distances(x, codebook).argmin(1))
    assert_nearest(x, codebook, found, unit=2.0**-53)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nearest_code_of_half_precision_vectors(dtype: torch.dtype) -> None:
    x, codebook = normal(300, 16).to(dtype), normal(40, 16, seed=1)
    assert_nearest(x, codebook, nearest_code(x, codebook))
    assert_nearest(x, codebook.to(dtype), nearest_code(x, codebook.to(dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_nearest(x.float(), codebook, nearest_code(x.float(), codebook))


def test_nearest_code_takes_the_lowest_index_among_equals() -> None:
    # Small integers whose mean is one too: every score is exact.
    codebook = torch.tensor([[3.0, 0], [-3, 0], [0, 3], [0, -3], [3, 0], [-3, 0], [0, 3], [0, -3]])
    x = torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1], [0, 0], [2, 1], [-2, 1], [1, 2], [1, -2]])
    assert nearest_code(x, codebook).tolist() == [0, 1, 1, 0, 0, 0, 1, 2, 3]


def test_nearest_code_among_copies_is_one_of_the_copies() -> None:
    codebook = normal(50, 16, seed=1).repeat(3, 1)
    x = normal(200, 16)
    found = nearest_code(x, codebook)
    assert_nearest(x, codebook, found)
    assert torch.equal(found % 50, nearest_code(x, codebook[:50]))
    exact = nearest_code(codebook, codebook)
    assert torch.equal(codebook[exact], codebook)


def test_nearest_code_of_a_code_is_itself() -> None:
    codebook = 10 + normal(512, 64)
    assert torch.equal(nearest_code(codebook, codebook), torch.arange(512))


def test_nearest_code_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebook = normal(101, 4), normal(10, 4, seed=1)
    whole = nearest_code(x, codebook)
    monkeypatch.setattr(nearest_code_reference, "_CHUNK_SCORES", 70)
    assert torch.equal(nearest_code(x, codebook), whole)
    monkeypatch.setattr(nearest_code_reference, "_CHUNK_SCORES", 1)
    assert torch.equal(nearest_code(x, codebook), whole)


def test_nearest_code_of_nothing() -> None:
    found = nearest_code(torch.zeros(0, 4), normal(3, 4))
    assert found.shape == (0,)
    assert found.dtype == torch.int64


def test_nearest_code_of_strided_memory() -> None:
    x, codebook = normal(4, 50).T, normal(20, 8)[:, ::2]
    assert torch.equal(nearest_code(x, codebook), nearest_code(x.contiguous(), codebook.contiguous()))


@pytest.mark.parametrize(
    ("x", "codebook", "error", "message"),
    [
        ([[1.0]], torch.zeros(3, 1), ArgumentTypeError, "x: expected a torch.Tensor, got list"),
        (torch.zeros(4), torch.zeros(3, 4), ArgumentError, "x: expected shape"),
        (torch.zeros(2, 4), torch.zeros(3, 5), ArgumentError, "codebook: expected shape"),
        (torch.zeros(2, 4), torch.zeros(0, 4), ArgumentError, "codebook: expected at least one code"),
        (torch.zeros(2, 4).long(), torch.zeros(3, 4), ArgumentTypeError, "x: expected a floating-point tensor"),
        (torch.zeros(2, 4), torch.zeros(3, 4).int(), ArgumentTypeError, "codebook: expected a floating-point tensor"),
    ],
    ids=["list", "1d", "other-width", "no-codes", "integer-x", "integer-codebook"],
)
def test_nearest_code_refuses(x: Any, codebook: Tensor, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        nearest_code(x, codebook)


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


def is_row_of(vectors: Tensor, batch: Tensor) -> bool:
    return bool((vectors[:, None] == batch[None]).all(-1).any(1).all())


@pytest.mark.parametrize(("rows", "repeats"), [(40, 0), (12, 0), (5, 2)], ids=["more", "as-many", "fewer"])
def test_data_initialisation_uses_vectors_of_the_batch(rows: int, repeats: int) -> None:
    # Without the update that follows, the codebook holds what initialisation chose.
    quantizer = VectorQuantizer(12, 3, init="data", channels_last=True)
    x = normal(rows, 3)
    quantizer._initialize(x)
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
    quantizer._initialize(x)
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
        quantizer._initialize(x)
        errors[init] = squared_distances(x, quantizer.embedding).amin(1).mean()
        if init == "kmeans":
            # Each centre is the mean of the vectors that have it as their nearest.
            nearest = squared_distances(x, quantizer.embedding).argmin(1)
            for code in nearest.unique():
                torch.testing.assert_close(quantizer.embedding[code], x[nearest == code].mean(0), rtol=1e-4, atol=1e-4)
    assert errors["kmeans"] < 0.9 * errors["data"]


def test_kmeans_keeps_the_centre_of_an_empty_cluster() -> None:
    start = torch.tensor([[0.0], [1.0], [50.0]])
    found = quantizer_module._kmeans(torch.tensor([[0.0], [0.2], [1.0]]), start)
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
@pytest.mark.parametrize("revive_below", [0.0, 0.5])
def test_bad_input_leaves_the_codebook_alone(bad: float, revive_below: float) -> None:
    quantizer = VectorQuantizer(6, 4, revive_below=revive_below)
    quantizer(normal(2, 4, 9))
    before = buffers(quantizer)
    x = normal(2, 4, 9, seed=1)
    x[1, 2, 3] = bad
    quantizer(x)
    assert same(buffers(quantizer), before)
    quantizer(normal(2, 4, 9, seed=1))
    assert not same(buffers(quantizer), before)


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


# Each of two processes sees its share of every batch; what they end with goes to a file.
WORKER = """
import sys
import torch
import torch.distributed as dist
from fastvq.models import VectorQuantizer

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
batches = torch.load(f"{folder}/batches.pt", weights_only=True)
results = {}
for name, settings in torch.load(f"{folder}/settings.pt", weights_only=True).items():
    torch.manual_seed(rank)
    quantizer = VectorQuantizer(6, 3, channels_last=True, **settings)
    quantizer.load_state_dict(torch.load(f"{folder}/start.pt", weights_only=True), strict=False)
    outputs = []
    for batch in batches[name][rank]:
        out = quantizer(batch)
        outputs.append({"codes": out.codes, "perplexity": out.perplexity})
    results[name] = {"state": quantizer.state_dict(), "outputs": outputs}
torch.save(results, f"{folder}/results{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes on shares of the same batches: settings, batches and results by scenario."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch is built without gloo")
    folder = tmp_path_factory.mktemp("processes")
    settings: dict[str, dict[str, Any]] = {
        "average": {"decay": 0.7},
        "uneven": {"decay": 0.7, "revive_below": 0.05},
        "not-finite": {"decay": 0.7},
        "revival": {"decay": 0.5, "revive_below": 0.1},
        "data": {"init": "data"},
        "kmeans": {"init": "kmeans"},
    }
    shares = {name: [[normal(20, 3, seed=10 * s + r) for s in range(4)] for r in range(2)] for name in settings}
    # A process may get no vectors, or others than its peer.
    shares["uneven"][0][1], shares["uneven"][1][2] = torch.zeros(0, 3), torch.zeros(0, 3)
    shares["not-finite"][1][1][3, 0] = NAN
    # Code 5 is far away from all data; in the scenario of revival its N falls below 0.1 in the last of four steps.
    start = {"embedding": torch.cat([normal(5, 3, seed=99), torch.full((1, 3), 100.0)]), "cluster_size": torch.ones(6)}
    start["embedding_sum"] = start["embedding"].clone()
    for name, value in (("settings", settings), ("batches", shares), ("start", start)):
        torch.save(value, folder / f"{name}.pt")
    script = folder / "worker.py"
    script.write_text(WORKER)
    workers = [
        subprocess.Popen([sys.executable, script, str(rank), folder], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, complaint = worker.communicate(timeout=90)
            assert worker.returncode == 0, complaint
    finally:
        for worker in workers:
            worker.kill()
    return {
        "settings": settings,
        "shares": shares,
        "start": start,
        "results": [torch.load(folder / f"results{rank}.pt", weights_only=True) for rank in range(2)],
    }


@pytest.mark.parametrize("scenario", ["average", "uneven", "not-finite", "revival", "data", "kmeans"])
def test_two_processes_have_one_codebook(two_processes: dict[str, Any], scenario: str) -> None:
    first, second = (result[scenario] for result in two_processes["results"])
    assert same(first["state"], second["state"])
    for left, right in zip(first["outputs"], second["outputs"], strict=True):
        assert torch.equal(left["perplexity"], right["perplexity"])


@pytest.mark.parametrize("scenario", ["average", "not-finite"])
def test_two_processes_equal_one_on_all_vectors(two_processes: dict[str, Any], scenario: str) -> None:
    quantizer = VectorQuantizer(6, 3, channels_last=True, **two_processes["settings"][scenario])
    quantizer.load_state_dict(two_processes["start"], strict=False)
    results = [result[scenario] for result in two_processes["results"]]
    for step, batch in enumerate(zip(*two_processes["shares"][scenario], strict=True)):
        out = quantizer(torch.cat(batch))
        theirs = [result["outputs"][step] for result in results]
        assert torch.equal(out.codes, torch.cat([other["codes"] for other in theirs]))
        torch.testing.assert_close(out.perplexity, theirs[0]["perplexity"])
    for name in ("embedding", "embedding_sum", "cluster_size"):
        torch.testing.assert_close(results[0]["state"][name], getattr(quantizer, name), rtol=1e-6, atol=1e-6)


def test_two_processes_start_from_vectors_of_the_first(two_processes: dict[str, Any]) -> None:
    result = two_processes["results"][0]["data"]
    # The first batch moves the codebook once after the start; replay that on the vectors of both.
    shares = [share[0] for share in two_processes["shares"]["data"]]
    codes = torch.cat([r["data"]["outputs"][0]["codes"] for r in two_processes["results"]])
    assert bool(result["state"]["initialized"])
    torch.manual_seed(0)
    alone = VectorQuantizer(6, 3, init="data", channels_last=True)
    alone._initialize(shares[0])
    assert torch.equal(codes, squared_distances(torch.cat(shares), alone.embedding).argmin(1))


def test_two_processes_revive_alike(two_processes: dict[str, Any]) -> None:
    result = two_processes["results"][1]["revival"]["state"]
    assert result["cluster_size"][5] == 1
    # It lies on a vector that the first process saw last, in the second process too.
    assert is_row_of(result["embedding"][5:], two_processes["shares"]["revival"][0][-1])
