"""The draw: hand-computed cases, brute force in float64, margins, the distribution, and every refusal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvq import _engine
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.ops import explain_backend
from fastvq.ops.dispatch import select_backend
from fastvq.ops.draw import draw, draw_margin, draw_reference
from fastvq.ops.draw.backends import BACKENDS

INF = math.inf
NAN = math.nan
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
EPS = 1e-6

needs_extension = pytest.mark.skipif(not _engine.available(), reason=_engine.why_unavailable() or "")
each_backend = pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_extension)])

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 1.0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 3, "top_p": 0.999},
]


def log(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log()


def points(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def options_for(num_codes: int, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "top_k": min(options["top_k"], num_codes)} if "top_k" in options else options


def random_case(rows: int, num_codes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, num_codes, generator=generator)
    return logits, torch.rand(rows, generator=generator)


def brute_force(
    logits: np.ndarray, u: float, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> int:
    """The definition, one row at a time in float64."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    by_rank = sorted(range(len(p)), key=lambda k: (-logits[k], k))
    kept = by_rank[:top_k]
    if top_p is not None:
        sums = np.cumsum(p[kept]) / p[kept].sum()
        kept = kept[: int(np.searchsorted(sums, top_p)) + 1]
    q = np.zeros_like(p)
    q[kept] = p[kept]
    c = np.cumsum(q)
    return int(np.flatnonzero(c > u * c[-1])[0])


@each_backend
@pytest.mark.parametrize(
    ("u", "token"),
    [(0.0, 0), (0.24, 0), (0.25, 1), (0.5, 1), (0.74, 1), (0.75, 2), (0.9, 2), (BELOW_ONE, 2)],
)
def test_plain_draw_by_hand(backend: str, u: float, token: int) -> None:
    # Equal logits where boundaries matter: exp(0) is exact, so c = 1, 2, 3, 4 with codes 1 and 2 of the middle merged.
    four = draw(torch.zeros(4), torch.tensor(u), backend=backend)
    assert int(four) == int(4 * u)
    three = draw(log(0.25, 0.5, 0.25), torch.tensor(min(u + (1e-4 if 0 < u < 0.99 else 0), BELOW_ONE)), backend=backend)
    assert int(three) == token


@each_backend
@pytest.mark.parametrize(
    ("options", "u", "token"),
    [
        # Squared and renormalised: (1, 4, 9, 16) / 30.
        pytest.param({"temperature": 0.5}, 0.16, 1, id="temperature-low"),
        pytest.param({"temperature": 0.5}, 0.47, 3, id="temperature-high"),
        # Codes 2 and 3 stay: 3/7, 4/7.
        pytest.param({"top_k": 2}, 0.0, 2, id="top_k-start"),
        pytest.param({"top_k": 2}, 0.42, 2, id="top_k-below"),
        pytest.param({"top_k": 2}, 0.44, 3, id="top_k-above"),
        # Sums by rank 0.4, 0.7, 0.9: 0.75 is reached by three codes, 0.65 by two.
        pytest.param({"top_p": 0.75}, 0.0, 1, id="top_p-three"),
        pytest.param({"top_p": 0.65}, 0.0, 2, id="top_p-two"),
        pytest.param({"top_p": 1e-30}, 0.0, 3, id="top_p-tiny-keeps-one"),
        # Of codes 1, 2, 3 (2/9, 3/9, 4/9) the first two reach 7/9.
        pytest.param({"top_k": 3, "top_p": 0.7}, 0.0, 2, id="top_k-then-top_p"),
        pytest.param({"top_k": 3, "top_p": 0.8}, 0.0, 1, id="top_k-then-larger-top_p"),
    ],
)
def test_filters_by_hand(backend: str, options: dict[str, Any], u: float, token: int) -> None:
    assert int(draw(log(0.1, 0.2, 0.3, 0.4), torch.tensor(u), backend=backend, **options)) == token


@each_backend
def test_ties_keep_the_lower_index(backend: str) -> None:
    logits = torch.zeros(6, 4)
    u = points(0, 0.49, 0.5, 0.75, 0.99, BELOW_ONE)
    assert draw(logits, u, top_k=2, backend=backend).tolist() == [0, 0, 1, 1, 1, 1]
    # Each code has 1/4: two reach 0.5, three reach 0.51.
    assert draw(logits, u, top_p=0.5, backend=backend).tolist() == [0, 0, 1, 1, 1, 1]
    assert draw(logits, u, top_p=0.51, backend=backend).tolist() == [0, 1, 1, 2, 2, 2]
    later = torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(6, 4)
    assert draw(later, u, top_k=2, backend=backend).tolist() == [1, 1, 2, 2, 2, 2]


@each_backend
@pytest.mark.parametrize("u", [0.0, 0.5, BELOW_ONE])
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.9}, {"temperature": 1e-3}], ids=str)
def test_excluded_codes_are_never_drawn(backend: str, u: float, options: dict[str, Any]) -> None:
    logits = torch.tensor([-INF, -INF, 0.0, -INF, 0.0, -INF, -INF])
    assert int(draw(logits, torch.tensor(u), backend=backend, **options)) == (2 if u < 0.5 else 4)


@each_backend
@pytest.mark.parametrize("u", [0.0, BELOW_ONE])
def test_codes_whose_probability_underflows_are_never_drawn(backend: str, u: float) -> None:
    logits = torch.tensor([-3e38, -200.0, 5.0, -200.0, -3e38])
    assert int(draw(logits, torch.tensor(u), backend=backend)) == 2
    assert int(draw(torch.tensor([3e38, -3e38, 3.1e38]), torch.tensor(u), temperature=2e-38, backend=backend)) == 2
    assert int(draw(torch.tensor([1.0, 2.0, 1.5]), torch.tensor(u), temperature=1e-4, backend=backend)) == 1


@each_backend
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("num_codes", [1, 2, 7, 512])
def test_equals_brute_force(backend: str, num_codes: int, options: dict[str, Any]) -> None:
    options = options_for(num_codes, options)
    logits, u = random_case(400, num_codes, seed=num_codes)
    tokens = draw(logits, u, backend=backend, **options)
    expected = torch.tensor([brute_force(row.numpy(), float(x), **options) for row, x in zip(logits, u, strict=True)])
    margin = draw_margin(logits, u, tokens, **options)
    assert margin.min() >= -EPS
    assert draw_margin(logits, u, expected, **options).min() >= -EPS
    differing = tokens != expected
    # A difference needs u within EPS of a boundary: at most a few of 400 even if every row had 512 boundaries.
    assert differing.sum() <= 2
    assert (margin[differing].abs() <= EPS).all()


@needs_extension
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_backends_agree(options: dict[str, Any]) -> None:
    logits, u = random_case(20_000, 64, seed=3)
    first = draw(logits, u, backend="cpp", **options)
    second = draw(logits, u, backend="torch", **options)
    differing = first != second
    assert differing.sum() <= 20
    for tokens in (first, second):
        assert (draw_margin(logits, u, tokens, **options) >= -EPS).all()


@needs_extension
def test_backends_agree_exactly_where_exp_is_exact() -> None:
    u = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(50_000, 300)
    assert torch.equal(draw(logits, u, backend="cpp"), draw(logits, u, backend="torch"))


@each_backend
@pytest.mark.parametrize("options", [{}, {"temperature": 1.7}, {"top_k": 9}, {"top_p": 0.7}], ids=str)
def test_distribution_is_the_softmax(backend: str, options: dict[str, Any]) -> None:
    count, num_codes = 200_000, 24
    logits = torch.randn(num_codes, generator=torch.Generator().manual_seed(5))
    p = (logits.double() / options.get("temperature", 1.0)).softmax(0)
    order = p.argsort(descending=True)
    kept = options.get("top_k", num_codes)
    if "top_p" in options:
        kept = int((p[order].cumsum(0) < options["top_p"]).sum()) + 1
    p[order[kept:]] = 0
    p /= p.sum()
    u = torch.rand(count, generator=torch.Generator().manual_seed(6))
    tokens = draw(logits.expand(count, num_codes), u, backend=backend, **options)
    observed = torch.bincount(tokens, minlength=num_codes).double()
    assert observed[p == 0].sum() == 0
    expected = count * p[p > 0]
    statistic = float(((observed[p > 0] - expected).square() / expected).sum())
    assert chi2.sf(statistic, kept - 1) > 1e-3


@each_backend
def test_shapes_dtypes_and_layouts(backend: str) -> None:
    logits, u = random_case(24, 7, seed=1)
    flat = draw(logits, u, backend=backend)
    assert flat.dtype == torch.int64
    assert not flat.requires_grad
    assert torch.equal(draw(logits.view(2, 3, 4, 7), u.view(2, 3, 4), backend=backend), flat.view(2, 3, 4))
    transposed = logits.T.contiguous().T
    assert torch.equal(draw(transposed, u.repeat_interleave(2)[::2], backend=backend), flat)
    assert torch.equal(draw(logits.clone().requires_grad_(), u, backend=backend), flat)
    assert torch.equal(draw(logits.double(), u, backend=backend), flat)
    assert draw(logits[0], u[0], backend=backend).shape == ()
    for dtype in (torch.bfloat16, torch.float16):
        narrow = logits.to(dtype)
        assert torch.equal(draw(narrow, u, backend=backend), draw(narrow.float(), u, backend=backend))


@each_backend
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)], ids=str)
def test_empty_batch(backend: str, shape: tuple[int, ...]) -> None:
    tokens = draw(torch.empty(*shape, 5), torch.empty(shape), top_k=2, top_p=0.5, backend=backend)
    assert tokens.shape == shape
    assert tokens.dtype == torch.int64
    assert draw_margin(torch.empty(*shape, 5), torch.empty(shape), tokens, top_k=2, top_p=0.5).shape == shape


def test_reference_is_the_torch_backend() -> None:
    logits, u = random_case(100, 9, seed=2)
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 6, "top_p": 0.9}
    assert torch.equal(draw_reference(logits, u, **options), draw(logits, u, backend="torch", **options))


@each_backend
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [[0.0]]}, ArgumentTypeError, r"logits: expected a torch.Tensor, got list"),
        ({"logits": torch.zeros(2, 4, dtype=torch.int64)}, ArgumentTypeError, r"logits: .*floating.*torch.int64"),
        ({"logits": torch.tensor(0.0)}, ArgumentError, r"logits: expected shape \[\.\.\., K\].* got \[\]"),
        ({"logits": torch.zeros(2, 0)}, ArgumentError, r"logits: expected shape .* got \[2, 0\]"),
        ({"logits": torch.tensor([[0.0] * 4, [0, NAN, 0, 0]])}, ArgumentError, r"logits: .* got NaN at index \[1\]"),
        ({"logits": torch.tensor([[0.0] * 4, [0, INF, 0, 0]])}, ArgumentError, r"logits: .* got \+inf at index \[1\]"),
        ({"logits": torch.tensor([[-INF] * 4, [0.0] * 4])}, ArgumentError, r"-inf for every code at index \[0\]"),
        ({"logits": torch.full((2, 4), 1e39, dtype=torch.float64)}, ArgumentError, r"logits: .* got \+inf"),
        ({"uniforms": 0.5}, ArgumentTypeError, r"uniforms: expected a torch.Tensor, got float"),
        ({"uniforms": torch.zeros(2, dtype=torch.float64)}, ArgumentTypeError, r"uniforms: expected torch.float32"),
        ({"uniforms": torch.zeros(3)}, ArgumentError, r"uniforms: expected shape \[2\], got \[3\]"),
        ({"uniforms": torch.zeros(2, 1)}, ArgumentError, r"uniforms: expected shape \[2\], got \[2, 1\]"),
        ({"uniforms": torch.zeros(2, device="meta")}, ArgumentError, r"uniforms: expected device cpu"),
        ({"uniforms": points(0.5, 1.0)}, ArgumentError, r"uniforms: .*\[0, 1\), got 1.0 at index \[1\]"),
        ({"uniforms": points(-1e-9, 0)}, ArgumentError, r"uniforms: .*\[0, 1\), got -.* at index \[0\]"),
        ({"uniforms": points(0, NAN)}, ArgumentError, r"uniforms: .*\[0, 1\), got nan at index \[1\]"),
        ({"temperature": -1}, ArgumentError, r"temperature: expected 0, or a finite number > 0 .* got -1"),
        ({"temperature": -1.0}, ArgumentError, r"temperature: .* got -1.0"),
        ({"temperature": NAN}, ArgumentError, r"temperature: .* got nan"),
        ({"temperature": INF}, ArgumentError, r"temperature: .* got inf"),
        ({"temperature": 1e-39}, ArgumentError, r"temperature: .* got 1e-39"),
        ({"temperature": 10**400}, ArgumentError, r"temperature: expected 0, or a finite number"),
        ({"temperature": "1"}, ArgumentTypeError, r"temperature: expected a number, got str '1'"),
        ({"temperature": True}, ArgumentTypeError, r"temperature: expected a number, got bool"),
        ({"temperature": None}, ArgumentTypeError, r"temperature: expected a number, got NoneType"),
        ({"top_k": 0}, ArgumentError, r"top_k: expected 1..4, the number of codes, got 0"),
        ({"top_k": 5}, ArgumentError, r"top_k: expected 1..4, the number of codes, got 5"),
        ({"top_k": 2.0}, ArgumentTypeError, r"top_k: expected an int or None, got float"),
        ({"top_k": True}, ArgumentTypeError, r"top_k: expected an int or None, got bool"),
        ({"top_p": 0.0}, ArgumentError, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, ArgumentError, r"top_p: expected a number in \(0, 1\], got 1.01"),
        ({"top_p": NAN}, ArgumentError, r"top_p: expected a number in \(0, 1\], got nan"),
        ({"top_p": "0.5"}, ArgumentTypeError, r"top_p: expected a number, got str"),
    ],
)
def test_refuses(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(2, 4), "uniforms": torch.zeros(2), **changes}
    with pytest.raises(error, match=message):
        draw(**arguments, backend=backend)


@each_backend
def test_refusal_names_the_index_in_a_batch(backend: str) -> None:
    logits = torch.zeros(2, 3, 4)
    logits[1, 2, 0] = NAN
    with pytest.raises(ArgumentError, match=r"NaN at index \[1, 2\]"):
        draw(logits, torch.zeros(2, 3), backend=backend)
    with pytest.raises(ArgumentError, match=r"got NaN$"):
        draw(logits[1, 2], torch.tensor(0.0), backend=backend)


def test_margin_by_hand() -> None:
    logits = log(0.25, 0.5, 0.25).expand(6, 3)
    u = points(0.125, 0.125, 0.5, 0.75, 0.9, 0.0)
    tokens = torch.tensor([0, 1, 1, 1, 2, 0])
    expected = torch.tensor([0.125, -0.125, 0.25, 0.0, 0.1, 0.0], dtype=torch.float64)
    torch.testing.assert_close(draw_margin(logits, u, tokens), expected, atol=1e-7, rtol=0)


def test_margin_of_codes_that_cannot_be_drawn() -> None:
    logits = torch.tensor([0.0, -INF, 0.0])
    # u lies on the very point where the excluded code would be.
    assert float(draw_margin(logits, torch.tensor(0.5), torch.tensor(1))) == -INF
    assert float(draw_margin(log(0.5, 0.2, 0.3), torch.tensor(0.6), torch.tensor(1), top_k=2)) == pytest.approx(-0.125)


@pytest.mark.parametrize(
    ("options", "token"),
    [
        pytest.param({"top_k": 1}, 1, id="top_k-swap"),
        pytest.param({"top_k": 2}, 2, id="top_k-swap-of-the-last"),
        pytest.param({"top_p": 0.3 + 2e-7}, 0, id="top_p-one-fewer"),
        pytest.param({"top_p": 0.6 - 2e-7}, 2, id="top_p-one-more"),
    ],
)
def test_margin_allows_for_rounding_at_the_cut(options: dict[str, Any], token: int) -> None:
    # Three codes of nearly 0.3: rounding may rank them in any order and cut at either side.
    logits = torch.tensor([0.3, 0.3 - 1e-7, 0.3 - 2e-7, 0.1], dtype=torch.float64).log().float()
    u = torch.tensor(BELOW_ONE)
    assert float(draw_margin(logits, u, torch.tensor(token), **options)) >= -EPS
    assert float(draw_margin(logits, u, torch.tensor(3), **options)) < -0.05


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (torch.zeros(2), ArgumentTypeError),
        (torch.zeros(3, dtype=torch.int64), ArgumentError),
        (torch.tensor([0, 4]), ArgumentError),
        (torch.tensor([-1, 0]), ArgumentError),
        ([0, 0], ArgumentTypeError),
    ],
    ids=["float", "shape", "too-large", "negative", "list"],
)
def test_margin_refuses(tokens: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="^tokens: "):
        draw_margin(torch.zeros(2, 4), torch.zeros(2), tokens)


def test_dispatch_gives_reasons() -> None:
    assert [name for name, _ in BACKENDS.candidates(torch.zeros(1, 2))] == ["cpp", "torch"]
    elsewhere = dict(BACKENDS.candidates(torch.zeros(1, 2, device="meta")))
    assert elsewhere["torch"] is None
    assert "meta" in str(elsewhere["cpp"])
    with FakeTensorMode():
        assert "FakeTensor" in str(dict(BACKENDS.candidates(torch.zeros(1, 2)))["cpp"])
    with pytest.raises(UnavailableError, match="'cpp' was asked for but cannot run draw here: it reads CPU memory"):
        draw(torch.zeros(1, 2, device="meta"), torch.zeros(1, device="meta"), backend="cpp")
    with pytest.raises(ArgumentError, match="backend: expected None or one of 'cpp', 'torch' for draw, got 'cuda'"):
        draw(torch.zeros(1, 2), torch.zeros(1), backend="cuda")


def test_explain_backend() -> None:
    lines = explain_backend("draw", torch.zeros(1, 2, device="meta")).splitlines()
    assert lines[0].startswith("cpp: it reads CPU memory")
    assert lines[1] == "torch: chosen: the first that can run"
    assert "torch: chosen: asked for" in explain_backend("draw", torch.zeros(1, 2), backend="torch")
    with pytest.raises(ArgumentError, match="op: expected one of .*'draw'"):
        explain_backend("paint", torch.zeros(1))


def test_select_backend_without_any() -> None:
    assert select_backend("op", [("a", "why"), ("b", None)], None) == "b"
    with pytest.raises(UnavailableError, match="none can run op here: 'a': why; 'b': because"):
        select_backend("op", [("a", "why"), ("b", "because")], None)


@needs_extension
@pytest.mark.parametrize(
    "changes",
    [
        {"logits": 0},
        {"uniforms": 0},
        {"tokens": 0},
        {"tokens": 12},
        {"rows": -1},
        {"rows": 2**62},
        {"num_codes": 0},
        {"num_codes": 2**31},
        {"temperature": 0.0},
        {"temperature": NAN},
        {"top_k": 0},
        {"top_k": 5},
        {"top_p": 0.0},
        {"top_p": NAN},
    ],
    ids=str,
)
def test_extension_refuses_what_would_crash(changes: dict[str, Any]) -> None:
    logits, u, tokens = torch.zeros(1, 4), torch.zeros(1), torch.full((1,), -7)
    arguments: dict[str, Any] = {
        "logits": logits.data_ptr(),
        "uniforms": u.data_ptr(),
        "tokens": tokens.data_ptr(),
        "rows": 1,
        "num_codes": 4,
        "temperature": 1.0,
        "top_k": 4,
        "top_p": 1.0,
    }
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}: expected"):
        _engine.require().draw(**{**arguments, **changes})
    assert tokens.item() == -7
    assert _engine.require().draw(**arguments) == -1
    assert tokens.item() == 0


@needs_extension
def test_build_info() -> None:
    info = _engine.require().build_info()
    assert info["compiler"]
    assert info["cxx_standard"] >= 201703
    assert isinstance(info["instruction_sets"], list)
