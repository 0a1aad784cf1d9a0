"""Copies and state dicts of quantisers, and what their settings, masks and codes may not be."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from helpers import refuses
from quantizer_helpers import EACH_LAYOUT, buffers, is_row_of, normal, same

from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.models import VectorQuantizer

pytestmark = pytest.mark.usefixtures("steady")

NAN = math.nan


@EACH_LAYOUT
def test_copies_and_pickles_go_on_alike(options: dict[str, Any]) -> None:
    quantizer = VectorQuantizer(6, 4, init="kmeans", revive_below=0.3, **options)
    x = [normal(2, 4 * quantizer.heads, 9, seed=seed) for seed in range(3)]

    def others(first: VectorQuantizer) -> list[VectorQuantizer]:
        saved = io.BytesIO()
        torch.save(first.state_dict(), saved)
        saved.seek(0)
        loaded = VectorQuantizer(6, 4, init="kmeans", revive_below=0.3, **options)
        loaded.load_state_dict(torch.load(saved, weights_only=True))
        return [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), loaded]

    for step in x:
        copies = others(quantizer)
        for one in (quantizer, *copies):
            torch.manual_seed(1)
            one(step)
        assert all(same(buffers(one), buffers(quantizer)) for one in copies)
    # A state from before initialisation brings back the need for it.
    late = copies[0]
    late.load_state_dict(VectorQuantizer(6, 4, init="kmeans", **options).state_dict())
    assert not bool(late.initialized)
    late(x[0])
    assert bool(late.initialized)


def test_setting_init_starts_anew() -> None:
    quantizer = VectorQuantizer(6, 4, channels_last=True)
    quantizer(normal(9, 4))
    quantizer.init, quantizer.initialized = "data", torch.tensor(False)
    x = 5 + normal(9, 4, seed=1)
    assert is_row_of(quantizer(x).quantized, x)
    with refuses(ArgumentError, "init: expected one of 'normal', 'data', 'kmeans'"):
        quantizer.init = "zeros"  # type: ignore[assignment]


def test_a_state_dict_of_the_plain_quantiser_has_these_names() -> None:
    state = {
        "embedding": normal(6, 4),
        "cluster_size": torch.arange(6.0),
        "embedding_sum": normal(6, 4, seed=1),
        "initialized": torch.tensor(1.0),
    }
    quantizer = VectorQuantizer(6, 4, init="data")
    quantizer.load_state_dict(state)
    assert list(quantizer.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in quantizer.state_dict().items())
    after = quantizer(normal(2, 4, 9, seed=2)).codes
    distances = (normal(2, 4, 9, seed=2).movedim(1, -1)[..., None, :] - state["embedding"]).square().sum(-1)
    assert torch.equal(after, distances.argmin(-1))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"metric": "l2"}, ArgumentError, "metric: expected one of 'euclidean', 'cosine', got 'l2'"),
        ({"mode": "quick"}, ArgumentError, "mode: expected one of 'exact', 'fast', got 'quick'"),
        ({"heads": 0}, ArgumentError, "heads: must be at least 1, got 0"),
        ({"heads": 2.0}, ArgumentTypeError, "heads: expected an int, got float"),
        (
            {"separate_codebook_per_head": True},
            ArgumentError,
            "separate_codebook_per_head: expected heads of 2 or more",
        ),
        (
            {"separate_codebook_per_head": 1, "heads": 2},
            ArgumentTypeError,
            "separate_codebook_per_head: expected a bool",
        ),
        ({"kmeans_iters": 0}, ArgumentError, "kmeans_iters: must be at least 1, got 0"),
        ({"learnable_codebook": None}, ArgumentTypeError, "learnable_codebook: expected a bool, got NoneType"),
        ({"freeze_codebook": 1}, ArgumentTypeError, "freeze_codebook: expected a bool, got int 1"),
        ({"sync_codebook": "auto"}, ArgumentTypeError, "sync_codebook: expected a bool or None, got str 'auto'"),
        ({"deterministic": 1}, ArgumentTypeError, "deterministic: expected a bool or None, got int 1"),
        ({"check_finite": None}, ArgumentTypeError, "check_finite: expected a bool, got NoneType"),
        ({"channels_last": "yes"}, ArgumentTypeError, "channels_last: expected a bool, got str 'yes'"),
        ({"eps": NAN}, ArgumentError, "eps must be positive"),
    ],
    ids=lambda value: f"{value}" if isinstance(value, dict) else None,
)
def test_refuses_settings(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with refuses(error, message):
        VectorQuantizer(**{"num_codes": 4, "code_dim": 3, **fields})


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True], ArgumentTypeError, "mask: expected a torch.Tensor, got list"),
        (torch.ones(2, 5), ArgumentTypeError, "mask: expected torch.bool, got torch.float32"),
        (torch.ones(2, 4, dtype=torch.bool), ArgumentError, r"mask: expected shape \[2, 5\], got \[2, 4\]"),
        (torch.ones(10, dtype=torch.bool), ArgumentError, r"mask: expected shape \[2, 5\], got \[10\]"),
        (
            torch.ones(2, 5, dtype=torch.bool, device="meta"),
            ArgumentError,
            "mask: expected device cpu as for x, got meta",
        ),
    ],
    ids=["list", "float", "length", "flat", "device"],
)
def test_refuses_masks(mask: Any, error: type[Exception], message: str) -> None:
    quantizer = VectorQuantizer(6, 4, init="data")
    for call in (quantizer, quantizer.encode, quantizer.initialize):
        with refuses(error, message):
            call(normal(2, 4, 5), mask)


def test_refuses_codes_and_channels_of_other_heads() -> None:
    quantizer = VectorQuantizer(6, 4, heads=3)
    with refuses(ArgumentError, "x: expected 12 channels along axis 1, got shape"):
        quantizer(normal(2, 4, 5))
    with refuses(ArgumentError, r"codes: expected a last axis of 3 heads, got shape \[2, 5\]"):
        quantizer.lookup(torch.zeros(2, 5, dtype=torch.int64))
    with refuses(ArgumentError, "codes: values must lie in 0..5, got -2"):
        quantizer.lookup(torch.full((2, 3), -2))


def test_initialize_needs_a_way_to_do_it() -> None:
    with refuses(ArgumentError, "init: expected 'data' or 'kmeans' to initialise from vectors, got 'normal'"):
        VectorQuantizer(6, 4).initialize(normal(2, 4, 5))


def test_synchronising_needs_processes() -> None:
    with refuses(UnavailableError, "sync_codebook: torch.distributed has no process group"):
        VectorQuantizer(6, 4, sync_codebook=True)(normal(2, 4, 5))
    VectorQuantizer(6, 4, sync_codebook=False)(normal(2, 4, 5))
