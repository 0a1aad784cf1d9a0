"""Priors whose weights of codes start from codebooks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import pixelcnn, random_codes, refuses, snail
from torch import Tensor, nn

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import VQVAE2, PixelCNN, Prior, build
from fastvq.models.blocks import CodeConv2d
from fastvq.models.code_tables import mixed_by_codebook

pytestmark = pytest.mark.usefixtures("steady")

NUM_CODES, ABOVE = 5, 3


def plain(**changes: Any) -> PixelCNN:
    fields: dict[str, Any] = {"num_codes": NUM_CODES, "channels": 6, "layers": 1, "kernel_size": 3, "dropout": 0.0}
    return PixelCNN(**(fields | {"condition_channels": 4, "condition_blocks": 1} | changes)).eval()


def codebook(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def conditioned(make: Any) -> Prior:
    prior: Prior = make(
        shape=(4, 4), num_classes=2, level=1, condition_shapes=((2, 2),), condition_num_codes=(ABOVE,)
    ).double()
    return prior


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("size", [(7, 3), (3, 7)], ids=["narrow", "wide"])
def test_mixes_by_the_square_root_of_the_gram_matrix(size: tuple[int, int], dim: int) -> None:
    vectors = codebook(*size)
    shape = [2, 4, 6]
    shape[dim] = size[0]
    weight = torch.randn(shape)
    scaled = vectors.double() - vectors.double().mean(0)
    lengths = (vectors - vectors.median(0).values).norm(dim=1)
    assert lengths.max() < 3 * lengths.median()
    scaled /= scaled.std(unbiased=False)
    values, axes = torch.linalg.eigh(scaled @ scaled.T / size[1])
    root = axes @ torch.diag(values.clamp(min=0).sqrt()) @ axes.T
    expected = torch.tensordot(root, weight.double(), dims=([1], [dim])).movedim(0, dim)
    mixed = mixed_by_codebook(weight, vectors, dim)
    assert mixed.dtype == torch.float32
    assert mixed.is_contiguous()
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=2e-6)


def test_keeps_the_variance() -> None:
    weight = torch.randn(64, 4000)
    mixed = mixed_by_codebook(weight, codebook(64, 8) * torch.tensor([3.0, *[1.0] * 7]) + 5, 0)
    assert abs(mixed.var().item() - 1) < 0.02
    similar = torch.corrcoef(mixed)
    assert similar[~torch.eye(64, dtype=torch.bool)].abs().mean() > 0.2


def test_codes_far_away_do_not_drown_the_others() -> None:
    vectors, weight = codebook(64, 8), torch.randn(64, 4000)
    far = vectors.clone()
    far[:16] *= 1000
    near, drowned = mixed_by_codebook(weight, vectors, 0)[16:], mixed_by_codebook(weight, far, 0)[16:]
    differences = torch.pdist(drowned).mean() / torch.pdist(near).mean()
    assert 0.4 < differences < 1
    assert torch.corrcoef(torch.stack([torch.pdist(near), torch.pdist(drowned)]))[0, 1] > 0.9


def test_a_codebook_of_equal_codes_changes_nothing() -> None:
    weight = torch.randn(6, 2)
    mixed = mixed_by_codebook(weight, torch.ones(6, 3), 0)
    assert torch.equal(mixed, weight)
    assert mixed is not weight


@pytest.mark.parametrize("make", [snail, pixelcnn, plain])
def test_equal_vectors_are_equal_codes(make: Any) -> None:
    """Whatever reads codes or predicts them cannot tell two codes of one vector apart."""
    prior = conditioned(make)
    books = [codebook(ABOVE, 2), codebook(NUM_CODES, 4)]
    books[0][2], books[1][3] = books[0][0], books[1][1]
    codes = random_codes(2, 4, 4, num_codes=NUM_CODES)
    above = random_codes(2, 2, 2, num_codes=ABOVE)
    given = {"label": torch.tensor([0, 1])}

    def change() -> list[float]:
        with torch.no_grad():
            before = prior(codes, above, **given)
            twins = prior(torch.where(codes == 1, 3, codes), torch.where(above == 0, 2, above), **given)
        assert isinstance(prior.output, nn.Module)
        bias = prior.output.bias
        assert isinstance(bias, Tensor)
        logits = before - bias.detach()[:, None, None]
        return [(before - twins).abs().max().item(), (logits[:, 1] - logits[:, 3]).abs().max().item()]

    assert min(change()) > 1e-3
    prior.start_from_codebooks(books)
    assert max(change()) < 1e-12


@pytest.mark.parametrize("make", [snail, pixelcnn, plain])
def test_other_weights_stay(make: Any) -> None:
    prior = conditioned(make)
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    prior.start_from_codebooks([codebook(ABOVE, 2), codebook(NUM_CODES, 4)])
    changed = {name for name, value in prior.state_dict().items() if not torch.equal(value, before[name])}
    layers = {f"{name}.weight" for name, layer in prior.named_modules() if isinstance(layer, CodeConv2d)}
    assert changed == layers | {"output.weight"}


def test_the_same_weights_every_time() -> None:
    books = [codebook(ABOVE, 2), codebook(NUM_CODES, 4)]
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        prior = conditioned(snail)
        prior.start_from_codebooks(books)
        found.append(prior.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_of_an_autoencoder() -> None:
    vqvae = build(VQVAE2.presets["tiny"])
    assert isinstance(vqvae, VQVAE2)
    assert [book.data_ptr() for book in vqvae.codebooks] == [q.embedding.data_ptr() for q in vqvae.quantizers]
    assert [list(book.shape) for book in vqvae.codebooks] == [[16, vqvae.config.code_dim]] * 2
    assert not any(book.requires_grad for book in vqvae.codebooks)


BAD: list[tuple[Any, type[Exception], str]] = [
    ([], ArgumentError, "codebooks: expected those of 1 level(s) above and of this one, got 0"),
    ([codebook(3, 2)], ArgumentError, "codebooks: expected those of 1 level(s) above and of this one, got 1"),
    ([codebook(3, 2), codebook(4, 2)], ArgumentError, "codebooks[1]: expected shape [5, D], got [4, 2]"),
    ([codebook(3, 2), torch.ones(5)], ArgumentError, "codebooks[1]: expected shape [5, D], got [5]"),
    ([torch.ones(3, 2).long(), codebook(5, 2)], ArgumentTypeError, "codebooks[0]: expected a floating-point tensor"),
    ([codebook(3, 2), codebook(5, 2) / 0], ArgumentError, "codebooks[1]: has values that are not finite"),
    ([[1.0], codebook(5, 2)], ArgumentTypeError, "codebooks[0]: expected a torch.Tensor, got list"),
]


@pytest.mark.parametrize(("books", "error", "message"), BAD)
def test_refuses(books: Any, error: type[Exception], message: str) -> None:
    prior = conditioned(snail)
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    with refuses(error, re.escape(message)):
        prior.start_from_codebooks(books)
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
