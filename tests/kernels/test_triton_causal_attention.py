"""The Triton kernels of causal attention: against float64 in the interpreter and on a GPU, and compiled for chips."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_helpers import (
    Check,
    Resources,
    assert_fits,
    checked_in_both,
    compile_kernel,
    needs_compiler,
    needs_triton,
    serve,
)

NAN, INF = math.nan, math.inf
MASKS = ("strict", "inclusive")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("query", "key", "value")

# Queries, keys, warps, stages; small, so that short sequences have several blocks.
SMALL = (32, 16, 4, 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(*shape: int, value_width: int | None = None, seed: int = 0) -> list[Tensor]:
    """Query, key, value, and a gradient of the output."""
    wide = [*shape[:-1], shape[-1] if value_width is None else value_width]
    return [normal(*size, seed=4 * seed + i) for i, size in enumerate((shape, shape, wide, wide))]


def plain(
    query: Tensor, key: Tensor, value: Tensor, mask: str, keep: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """The definition, in the type of its arguments; ``keep`` [B, heads, N, N] says which logits dropout keeps."""
    length = query.shape[2]
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if keep is not None:
        logits = torch.where(keep, logits / (1 - dropout) if dropout < 1 else logits, 0.0)
    seen = torch.ones(length, length, dtype=torch.bool).tril(0 if mask == "inclusive" else -1)
    logits = logits.masked_fill(~seen, -INF)
    if mask == "inclusive":
        return logits.softmax(-1) @ value
    rest = logits[:, :, 1:].softmax(-1) @ value
    return torch.cat([rest.new_zeros(*rest.shape[:2], 1, rest.shape[3]), rest], dim=2)


def with_gradients(tensors: list[Tensor], dtype: torch.dtype, *settings: Any) -> list[Tensor]:
    """Output of `plain` and gradients of query, key and value, computed in ``dtype`` on the CPU."""
    leaves = [tensor.detach().cpu().to(dtype).requires_grad_() for tensor in tensors[:3]]
    out = plain(*leaves, *settings)
    grads = torch.autograd.grad(out, leaves, tensors[3].cpu().to(dtype), materialize_grads=True)
    return [out.detach(), *grads]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated within begins as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(tensors: list[Tensor], *, tiles: tuple[int, ...] | None = SMALL, **settings: Any) -> list[Tensor]:
    """Output, the three gradients, and lse last."""
    from fastvq.kernels.attention_tiles import Tiles
    from fastvq.kernels.causal_attention import backward, forward

    given = None if tiles is None else Tiles(*tiles)
    with poisoned():
        out, lse = forward(*tensors[:3], **settings, tiles=given)
        pair = None if given is None else (given, given)
        return [out, *backward(tensors[3], *tensors[:3], out, lse, **settings, tiles=pair), lse]


def magnitudes(tensors: list[Tensor], mask: str, keep: Tensor | None = None, dropout: float = 0.0) -> list[float]:
    """Largest sums of magnitudes of the terms that are added up for query's, key's and value's gradient."""
    query, key, value, grad = (tensor.detach().cpu().double() for tensor in tensors)
    identity = torch.eye(query.shape[2], dtype=torch.float64).expand(*query.shape[:2], -1, -1)
    weights = plain(query, key, identity, mask, keep, dropout)
    slopes = grad.abs() @ value.abs().transpose(-2, -1)
    terms = weights * (slopes + (weights * slopes).sum(-1, keepdim=True)) / query.shape[-1] ** 0.5
    if keep is not None:
        terms = torch.where(keep, terms / (1 - dropout), 0.0) if dropout < 1 else torch.zeros_like(terms)
    products = (terms @ key.abs(), terms.transpose(-2, -1) @ query.abs(), weights.transpose(-2, -1) @ grad.abs())
    return [float(product.max()) for product in products]


def scaled_logits(
    tensors: list[Tensor], out: Tensor, mask: str, keep: Tensor | None = None, dropout: float = 0.0
) -> float:
    """How far logits that are off by a unit of float32, half for the factor and half for the product, move the output:
    at most that times sum_j p_j |v_j - out|, largest over positions.
    """
    query, key, value = (tensor.detach().cpu().double() for tensor in tensors[:3])
    identity = torch.eye(query.shape[2], dtype=torch.float64).expand(*query.shape[:2], -1, -1)
    weights = plain(query, key, identity, mask, keep, dropout)
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if keep is not None and dropout < 1:
        logits = logits / (1 - dropout)
    largest = torch.where(weights > 0, logits.abs(), 0).amax(-1, keepdim=True)
    gaps = (value[:, :, None] - out[:, :, :, None]).abs()  # [B, heads, N, N, E]
    moved = (weights[..., None] * gaps).sum(-2)
    return torch.finfo(torch.float32).eps * float((largest * moved).max())


def assert_accurate(tensors: list[Tensor], found: list[Tensor], *settings: Any) -> str:
    """Errors at most twice those of `plain` in the same type, plus what the kernels round where it may not.

    `plain` errs by nothing at all where few positions are seen or a weight is 1. The output is a sum of weighted values
    divided by the sum of weights. A weight that is all of the sum need not be 1: the maximum that logits are measured
    from is rounded, while a GPU subtracts it from an unrounded product. It cancels, but for half a unit of float32 when
    the value is multiplied by it and half a unit when the product is divided by it. Half a unit of a shorter type
    follows when it is stored; and what two more roundings of the logits, in base 2, do to it where weights are not 0 or
    1 (`scaled_logits`). Gradients: a float32 unit of
    the terms added up, times the largest lse beyond 1, for the two rounded sums, dp and delta, and for weights that are
    recomputed from a rounded lse.
    """
    dtype = tensors[0].dtype
    exact, usual = with_gradients(tensors, torch.float64, *settings), with_gradients(tensors, dtype, *settings)
    lse = found[4][found[4].isfinite()].abs().max() if found[4].isfinite().any() else torch.zeros(())
    growth = torch.finfo(torch.float32).eps * max(1.0, float(lse))
    half, unit32 = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps
    rounding = [float(want.abs().max()) * half for want in exact]
    rounding[0] = float(exact[0].abs().max()) * (unit32 if dtype == torch.float32 else unit32 + half)
    rounding[0] += scaled_logits(tensors, exact[0], *settings)
    for i, terms in enumerate(magnitudes(tensors, *settings), start=1):
        rounding[i] += growth * terms
    said = []
    for name, mine, want, theirs, unit in zip(("out", *NAMES), found, exact, usual, rounding, strict=False):
        assert mine.shape == want.shape
        assert mine.dtype == dtype
        error = (mine.cpu().double() - want).abs().max()
        usual_error = (theirs.double() - want).abs().max()
        allowed = 2 * usual_error + unit
        assert error <= allowed, f"{name}: error {error:.3g}, PyTorch's {usual_error:.3g}, allowed {allowed:.3g}"
        said.append(f"{name} {error:.2g} (PyTorch {usual_error:.2g})")
    return ", ".join(said)


def assert_logarithms(tensors: list[Tensor], found: Tensor, mask: str, block: int) -> None:
    """The logarithms of the sums of exponentials differ from the exact ones by what float32 rounds, u = 2^-24 a time.

    A logit is a product of D terms, min(D, 4 sqrt(D)) u of the sum of their magnitudes, as in a random walk for wide
    ones; lse takes on the largest such error. Scaled into base 2 and back it is rounded six times (both factors, their
    products, the exponent, the sum). Weights, at most 1 each, are added up in blocks: ``block`` + N / block additions,
    and four units for exp2 and log2.
    """
    query, key = (tensor.detach().cpu().double() for tensor in tensors[:2])
    width, length = query.shape[-1], query.shape[-2]
    seen = torch.ones(length, length, dtype=torch.bool).tril(0 if mask == "inclusive" else -1)
    logits = (query @ key.transpose(-2, -1) / width**0.5).masked_fill(~seen, -INF)
    terms = (query.abs() @ key.abs().transpose(-2, -1) / width**0.5).masked_fill(~seen, 0).amax(-1)
    lse, u = logits.logsumexp(-1), torch.finfo(torch.float32).eps / 2
    largest = logits.masked_fill(~seen, 0).abs().amax(-1)
    allowed = u * (min(width, 4 * width**0.5) * terms + 6 * largest + block + length / block + 4)
    error = (found.cpu().double() - lse).abs()
    # Where nothing is seen both are -inf.
    error = torch.where(lse == found.cpu(), 0, error)
    worst = (error / allowed).max()
    assert worst <= 1, f"lse: {worst:.3g} times the rounding allowed"


def compare(tensors: list[Tensor], mask: str, *, tiles: tuple[int, ...] | None = SMALL) -> str:
    found = run(tensors, mask=mask, tiles=tiles)
    said = assert_accurate(tensors, found, mask)
    assert_logarithms(tensors, found[4], mask, 16 if tiles is None else tiles[1])
    if mask == "strict":
        assert (found[0][:, :, 0] == 0).all()
        assert (found[1][:, :, 0] == 0).all()
        assert (found[2][:, :, -1] == 0).all()
        assert (found[3][:, :, -1] == 0).all()
    return said


# The interpreter multiplies bfloat16 as if it were integers, so that type is left to a GPU.
# Batch, heads, length, width of queries and keys, width of values, type.
SHAPES = {
    "one-position": (2, 1, 1, 16, 16, "fp32"),
    "two-positions": (1, 2, 2, 16, 32, "fp32"),
    "ragged-33": (2, 2, 33, 40, 24, "fp32"),
    "ragged-130": (1, 2, 130, 16, 48, "fp32"),
    "narrow": (1, 1, 40, 3, 5, "fp32"),
    "whole-blocks": (1, 1, 64, 32, 16, "fp32"),
    "wide": (1, 1, 20, 256, 130, "fp32"),
    "float16": (1, 2, 70, 20, 32, "fp16"),
}


def check_shape(name: str, mask: str, device: str) -> str:
    *shape, value_width, dtype = SHAPES[name]
    tensors = inputs(*shape, value_width=value_width)
    return compare([tensor.to(device, TYPES[dtype]) for tensor in tensors], mask)


def check_chosen_tiles(device: str) -> str:
    tensors = [tensor.to(device) for tensor in inputs(1, 1, 150, 16, value_width=20)]
    return compare([tensor.half() for tensor in tensors], "strict", tiles=None)


def check_channels_first(device: str) -> None:
    """As the priors pass them: positions lie side by side, heads are slices of channels."""
    wide = normal(2, 90, 37).to(device)
    parts = [part.unflatten(1, (2, -1)).transpose(2, 3) for part in wide.split([32, 32, 26], dim=1)]
    tensors = [*parts, normal(2, 2, 13, 37, seed=1).to(device).transpose(2, 3)]
    assert not any(tensor.is_contiguous() for tensor in tensors)
    compare(tensors, "strict")
    found = run(tensors, mask="strict")
    # The output and the gradients go back to channels without a copy.
    for result in found[:4]:
        assert result.transpose(2, 3).is_contiguous()


def check_other_strides(device: str) -> None:
    query, key, value, grad = (tensor.to(device) for tensor in inputs(2, 3, 35, 32, value_width=36))
    every_other, swapped = query[..., ::2], key[..., 8:24].transpose(1, 2).contiguous().transpose(1, 2)
    shared = value[:, :1].expand(-1, 3, -1, -1)
    compare([every_other, swapped, shared, grad], "inclusive")
    compare(
        [query[:, :, :, 5:21], swapped, value[..., ::3], grad.sum(-1, keepdim=True).expand(-1, -1, -1, 12)], "strict"
    )


def check_large_logits(device: str) -> str:
    query, key, value, grad = inputs(1, 2, 50, 16)
    said = [compare([(query * size).to(device), (key * size).to(device), value.to(device), grad.to(device)], mask)
            for size in (30.0, 1e4) for mask in MASKS]  # fmt: skip
    return "; ".join(said)


def check_float16_logits_beyond_its_range(device: str) -> None:
    tensors = [tensor.to(device, torch.float16) for tensor in inputs(1, 1, 40, 32)]
    tensors[0], tensors[1] = tensors[0] * 150, tensors[1] * 150
    assert (tensors[0].cpu().double() @ tensors[1].cpu().double().transpose(-2, -1)).abs().max() > 65504
    out, *_ = run(tensors, mask="inclusive")
    torch.testing.assert_close(
        out.cpu().double(), with_gradients(tensors, torch.float64, "inclusive")[0], rtol=1e-3, atol=1e-3
    )


def check_empty(device: str) -> None:
    for shape in ((0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16)):
        tensors = [tensor.to(device) for tensor in inputs(*shape, value_width=3)]
        out, dq, dk, dv, lse = run(tensors, mask="strict")
        assert out.shape == dv.shape == tensors[2].shape
        assert dq.shape == dk.shape == tensors[0].shape
        assert lse.shape == tensors[0].shape[:3]


def check_tiles_do_not_matter(device: str) -> None:
    tensors = [tensor.to(device) for tensor in inputs(1, 2, 75, 16)]
    settings = {"mask": "strict", "dropout": 0.4, "seed": 5}
    want = run(tensors, **settings)
    for tiles in ((16, 16, 4, 1), (16, 64, 4, 1), (64, 32, 4, 1), (128, 128, 4, 1)):
        for mine, other in zip(run(tensors, **settings, tiles=tiles), want, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, mask: str, keep: Tensor | None, dropout: float) -> Tensor:
    """Each position from what it sees alone, so that nothing else can reach it."""
    rows = []
    for i in range(query.shape[2]):
        seen = i + (mask == "inclusive")
        logits = (query[:, :, i : i + 1] * key[:, :, :seen]).sum(-1) / query.shape[-1] ** 0.5
        if keep is not None:
            logits = torch.where(keep[:, :, i, :seen], logits / (1 - dropout), 0.0)
        rows.append((logits.softmax(-1)[..., None] * value[:, :, :seen]).sum(2))
    return torch.stack(rows, dim=2)


def check_later_positions_never_reach_earlier(mask: str, dropout: float, device: str) -> None:
    from fastvq.kernels.causal_attention import forward

    clean = [tensor.to(device) for tensor in inputs(1, 2, 40, 16, value_width=20)[:3]]
    settings = {"mask": mask, "dropout": dropout, "seed": 3}
    before = run([*clean, clean[2]], **settings)[0]
    keep = philox_keep(3, 2, 40, dropout).unsqueeze(0) if dropout else None
    for position in (16, 37):
        for poison in (NAN, INF):
            query, key, value = (tensor.clone() for tensor in clean)
            key[:, :, position] = NAN if poison == NAN else key[:, :, position]
            value[:, 0, position, ::2] = poison
            value[:, 1, position] = -poison
            with poisoned():
                out, _ = forward(query, key, value, **settings)
            free = position + (mask == "strict")
            torch.testing.assert_close(out[:, :, :free], before[:, :, :free], rtol=1e-5, atol=2e-6)
            want = one_by_one(*(tensor.cpu().double() for tensor in (query, key, value)), mask, keep, dropout)
            torch.testing.assert_close(out.cpu().double(), want, rtol=1e-5, atol=2e-6, equal_nan=True)


def philox(seed: int, *counter: np.ndarray) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (part.astype(np.uint64) for part in np.broadcast_arrays(*counter))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def philox_keep(seed: int, heads: int, length: int, dropout: float) -> Tensor:
    """Which logits the kernels keep, [heads, N, N], from the documented counters."""
    head, i, j = np.ogrid[:heads, :length, :length]
    words = philox(seed, i // 16 * 8 + i % 8, j // 16 * 8 + j % 8, head, np.zeros_like(head))
    word = np.choose(np.broadcast_to(i // 8 % 2 * 2 + j // 8 % 2, words[0].shape), words)
    # Triton folds negative numbers onto positive ones, and multiplies by a little less than 2^-31.
    signed = word.astype(np.uint32).view(np.int32).astype(np.int64)
    uniform = np.where(signed < 0, -signed - 1, signed).astype(np.float32) * np.float32(4.6566127342e-10)
    return torch.from_numpy(uniform >= np.float32(dropout))


def check_dropout(dropout: float, seed: int, mask: str, device: str) -> str:
    tensors = [tensor.to(device) for tensor in inputs(2, 2, 70, 16, value_width=24)]
    keep = philox_keep(seed, 4, 70, dropout).unflatten(0, (2, 2))
    found = run(tensors, mask=mask, dropout=dropout, seed=seed)
    return assert_accurate(tensors, found, mask, keep, dropout)


def check_dropout_of_the_chosen_tiles(device: str) -> str:
    tensors = [tensor.to(device, torch.float16) for tensor in inputs(1, 2, 150, 16)]
    keep = philox_keep(9, 2, 150, 0.1).unsqueeze(0)
    found = run(tensors, mask="inclusive", dropout=0.1, seed=9, tiles=None)
    return assert_accurate(tensors, found, "inclusive", keep, 0.1)


def check_seeds(device: str) -> None:
    tensors = [tensor.to(device) for tensor in inputs(1, 2, 40, 16)]
    first, again, other = (run(tensors, mask="strict", dropout=0.5, seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    # Batch entries and heads are dropped differently: the same inputs give other outputs.
    same = [tensor[:, :1].expand(2, 3, -1, -1) for tensor in tensors]
    outs = run(same, mask="strict", dropout=0.5, seed=1)[0].flatten(0, 1)
    for i in range(6):
        assert not any(torch.equal(outs[i], outs[j]) for j in range(i))


def check_refusals(device: str) -> None:
    from fastvq.errors import ArgumentError, ArgumentTypeError
    from fastvq.kernels.causal_attention import backward, forward

    query = torch.zeros(1, 2, 5, 16, device=device)
    for arguments, settings, error, message in (
        ((query, query, query), {"mask": "none"}, ArgumentError, "mask: expected one of 'strict', 'inclusive'"),
        ((query, query, query), {"dropout": 1.5}, ArgumentError, "dropout: expected a probability, got 1.5"),
        ((query, query, query), {"precision": "half"}, ArgumentError, "precision: expected one of 'ieee'"),
        ((query, query[:, :1], query), {}, ArgumentError, "query, key, value: expected shapes"),
        ((query, query, query[:, :, :4]), {}, ArgumentError, "query, key, value: expected shapes"),
        ((query, query, query.repeat(1, 1, 1, 17)), {}, ArgumentError, "query, value: expected"),
        ((query, query, query.half()), {}, ArgumentTypeError, "query, key, value: expected one type"),
        ((query.double(),) * 3, {}, ArgumentTypeError, "query: expected float32"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            forward(*arguments, **{"mask": "strict", **settings})
    lse = torch.zeros(1, 2, 5, device=device)
    with pytest.raises(ArgumentError, match="grad, out: expected the shape of value"):
        backward(query[:, :, :4], query, query, query, query, lse, mask="strict")
    with pytest.raises(ArgumentError, match="lse: expected float32"):
        backward(query, query, query, query, query, lse[:, :1], mask="strict")


GROUPS: dict[str, dict[str, Check]] = {
    "attention": {
        **{f"{name}-{mask}": partial(check_shape, name, mask) for name in SHAPES for mask in MASKS},
        "chosen-tiles": check_chosen_tiles,
        "channels-first": check_channels_first,
        "other-strides": check_other_strides,
        "large-logits": check_large_logits,
        "float16-logits-beyond-its-range": check_float16_logits_beyond_its_range,
        "empty": check_empty,
        "refusals": check_refusals,
    },
    "dropout": {
        "inclusive": partial(check_dropout, 0.3, 7, "inclusive"),
        "strict": partial(check_dropout, 0.1, 7, "strict"),
        "long-seed": partial(check_dropout, 0.5, (5 << 40) + 11, "strict"),
        "everything": partial(check_dropout, 1.0, 0, "inclusive"),
        "chosen-tiles": check_dropout_of_the_chosen_tiles,
        "seeds": check_seeds,
        "tiles-do-not-matter": check_tiles_do_not_matter,
    },
    "causality": {
        f"{mask}-{dropout}": partial(check_later_positions_never_reach_earlier, mask, dropout)
        for mask in MASKS
        for dropout in (0.0, 0.4)
    },
}


test_interpreted, test_on_a_gpu = checked_in_both(__file__, GROUPS)


def test_generator_of_this_file_is_philox() -> None:
    zero = np.zeros(1, np.int64)
    assert [int(word[0]) for word in philox(0, zero, zero, zero, zero)] == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_rate(dropout: float) -> None:
    keep = philox_keep(1, 4, 256, dropout)
    deviation = (dropout * (1 - dropout)) ** 0.5
    # Overall, for each of the four words of a call, and for each head.
    for part in (keep, keep[:, :8, :8], keep[:, :8, 8:16], keep[:, 8:16, :8], keep[:, 8:16, 8:16], *keep):
        assert abs(part.double().mean() - (1 - dropout)) < 4.5 * deviation / part.numel() ** 0.5
    # Words of one call, and neighbours, agree as often as independent ones.
    for a, b in ((keep[:, :, :-8], keep[:, :, 8:]), (keep[:, :-8], keep[:, 8:]), (keep[:, :, 1:], keep[:, :, :-1])):
        agreeing = dropout**2 + (1 - dropout) ** 2
        assert abs((a == b).double().mean() - agreeing) < 6 * (agreeing * (1 - agreeing) / a.numel()) ** 0.5


def compile_attention(
    kind: str,
    capability: int,
    width: int,
    value_width: int,
    dtype: str,
    dropout: bool,
    precision: str,
    channels_first: bool,
) -> Resources:
    from fastvq.kernels import causal_attention, causal_attention_backward
    from fastvq.kernels.attention_tiles import block_width

    kernel, choose = {
        "forward": (causal_attention._forward_kernel, causal_attention.forward_tiles),
        "query": (causal_attention_backward._query_gradient_kernel, causal_attention_backward.query_tiles),
        "key": (causal_attention_backward._key_value_gradient_kernel, causal_attention_backward.key_tiles),
    }[kind]
    tiles = choose(width, value_width, TYPES[dtype], capability, precision, dropout)
    sums = ("lse_ptr", "delta_ptr")
    types = {name: "fp32" if name in sums else dtype for name in kernel.arg_names if name.endswith("_ptr")}
    strides = [name for name in kernel.arg_names if "_stride_" in name]
    unit = [name for name in strides if name.endswith("_n" if channels_first else ("_d", "_e"))]
    constants = {
        "D": width, "E": value_width, "STRICT": True, "DROPOUT": dropout, "PRECISION": precision,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "BLOCK_D": block_width(width), "BLOCK_E": block_width(value_width), **dict.fromkeys(unit, 1),
    }  # fmt: skip
    divisible = ("length", *(name for name in strides if name not in unit))
    return compile_kernel(
        kernel, capability, types, constants, warps=tiles.warps, stages=tiles.stages, divisible=divisible
    )


# Capability, widths, type, dropout, precision of float32, positions side by side in memory.
COMPILED = [
    (90, 64, 64, "bf16", False, "ieee", True),
    (90, 96, 128, "bf16", True, "ieee", True),
    (90, 128, 128, "bf16", False, "ieee", False),
    (90, 256, 256, "bf16", True, "ieee", False),
    (90, 64, 64, "fp32", True, "tf32", True),
    (90, 128, 128, "fp32", False, "ieee", False),
    (80, 128, 128, "bf16", True, "ieee", True),
    (100, 128, 128, "bf16", True, "ieee", False),
    (80, 128, 128, "fp32", False, "ieee", False),
    (90, 128, 128, "fp32", True, "tf32", False),
    (100, 64, 64, "fp32", True, "tf32", False),
    (100, 128, 128, "fp32", False, "ieee", False),
]


@needs_triton
@needs_compiler
@pytest.mark.parametrize("kind", ["forward", "query", "key"])
@pytest.mark.parametrize(
    ("capability", "width", "value_width", "dtype", "dropout", "precision", "channels_first"),
    COMPILED,
    ids=[
        f"sm{c}-{d}-{e}-{t}-{p if t == 'fp32' else 'half'}{'-dropout' * r}{'-channels' * f}"
        for c, d, e, t, r, p, f in COMPILED
    ],
)
def test_compiled_kernel_fits_the_chip(
    kind: str,
    capability: int,
    width: int,
    value_width: int,
    dtype: str,
    dropout: bool,
    precision: str,
    channels_first: bool,
) -> None:
    resources = compile_attention(kind, capability, width, value_width, dtype, dropout, precision, channels_first)
    assert_fits(resources, capability)


if __name__ == "__main__":
    serve(GROUPS)
