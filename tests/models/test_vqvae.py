"""Autoencoders of one, two and three levels: shapes, what depends on what, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import refuses
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import VQVAE, VQVAE2, HierarchicalVQVAE, VQVAEConfig

pytestmark = pytest.mark.usefixtures("steady")

each_strides = pytest.mark.parametrize(
    "strides", [(2,), (4,), (8,), (2, 2), (4, 2), (2, 4), (2, 2, 2), (4, 2, 2)], ids=lambda s: "-".join(map(str, s))
)
each_depth = pytest.mark.parametrize("strides", [(4,), (2, 2), (2, 2, 2)], ids=["1-level", "2-levels", "3-levels"])


def model(strides: tuple[int, ...], **changes: Any) -> HierarchicalVQVAE:
    fields: dict[str, Any] = {
        "in_channels": 2,
        "channels": 8,
        "residual_channels": 4,
        "residual_layers": 1,
        "num_codes": 11,
        "code_dim": 3,
    }
    config = VQVAEConfig(strides=strides, **{**fields, **changes})
    return (VQVAE if len(strides) == 1 else VQVAE2)(config).eval()


def some_images(vqvae: HierarchicalVQVAE, batch: int = 2, rows: int = 2, columns: int = 3) -> Tensor:
    scale = vqvae.total_stride
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, vqvae.config.in_channels, rows * scale, columns * scale, generator=generator)


def spread_out(vqvae: HierarchicalVQVAE) -> HierarchicalVQVAE:
    """Codebooks made of vectors that some images lead to, so that images differ in their codes."""
    for quantizer in vqvae.quantizers:
        quantizer.init, quantizer.initialized = "data", torch.tensor(False)  # type: ignore[assignment]
    vqvae.train()(some_images(vqvae, batch=6))
    return vqvae.eval()


@each_strides
@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (1, 1), (3, 1)], ids=lambda n: str(n))
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes(strides: tuple[int, ...], rows: int, columns: int, batch: int) -> None:
    vqvae = model(strides)
    images = some_images(vqvae, batch, rows, columns)
    out = vqvae(images)
    grids = []
    height, width = rows, columns
    for stride in (*strides[:0:-1], None):
        grids.append((height, width))
        height, width = height * (stride or 1), width * (stride or 1)
    assert vqvae.code_shapes(images.shape[2:]) == tuple(grids)
    assert out.reconstruction.shape == images.shape
    assert [tuple(codes.shape) for codes in out.codes] == [(batch, *grid) for grid in grids]
    assert all(codes.dtype == torch.int64 and codes.min() >= 0 and codes.max() < 11 for codes in out.codes)
    assert out.commitment_loss.shape == ()
    assert out.perplexity.shape == (len(strides),)
    assert all(torch.equal(*pair) for pair in zip(vqvae.encode(images), out.codes, strict=True))
    assert vqvae.decode(out.codes).shape == images.shape


@each_strides
def test_decoding_the_codes_gives_the_reconstruction(strides: tuple[int, ...]) -> None:
    vqvae = spread_out(model(strides))
    images = some_images(vqvae)
    with torch.no_grad():
        assert torch.equal(vqvae.decode(vqvae.encode(images)), vqvae(images).reconstruction)
        assert torch.equal(vqvae.decode(list(vqvae.encode(images))), vqvae(images).reconstruction)
        assert torch.equal(vqvae.preview(vqvae.encode(images)), vqvae(images).reconstruction)


@each_depth
def test_losses_are_those_of_the_levels(strides: tuple[int, ...]) -> None:
    vqvae = spread_out(model(strides, commitment=0.4))
    heard = []
    for quantizer in vqvae.quantizers:
        quantizer.register_forward_hook(lambda _module, inputs, out: heard.append((inputs[0], out)))
    out = vqvae(some_images(vqvae))
    want = sum(0.4 * (x - quantized.quantized).square().mean() for x, quantized in heard)
    torch.testing.assert_close(out.commitment_loss, want)
    assert torch.equal(out.perplexity, torch.stack([quantized.perplexity for _, quantized in heard]))
    assert len(heard) == len(strides)


@each_depth
def test_the_decoder_reads_every_code_of_every_level(strides: tuple[int, ...]) -> None:
    vqvae = spread_out(model(strides))
    images = some_images(vqvae, batch=1)
    codes = vqvae.encode(images)
    with torch.no_grad():
        before = vqvae.decode(codes)
        for level, grid in enumerate(codes):
            scale = images.shape[2] // grid.shape[1]
            for row in range(grid.shape[1]):
                for column in range(grid.shape[2]):
                    changed = [other.clone() for other in codes]
                    changed[level][0, row, column] = (changed[level][0, row, column] + 1) % 11
                    moved = (vqvae.decode(changed) != before).any(dim=1)[0]
                    assert moved[row * scale : (row + 1) * scale, column * scale : (column + 1) * scale].any()


@pytest.mark.parametrize("strides", [(2, 2), (2, 2, 2)], ids=["2-levels", "3-levels"])
def test_lower_codes_are_conditioned_on_the_upper(strides: tuple[int, ...]) -> None:
    """With the same image, another top codebook leads to other codes below; the other way round nothing changes."""
    vqvae = spread_out(model(strides))
    images = some_images(vqvae, batch=6)
    before = vqvae.encode(images)
    top = vqvae.quantizers[0].embedding
    kept = top.clone()
    with torch.no_grad():
        top.mul_(-3)
        after = vqvae.encode(images)
        assert all((new != old).any() for new, old in zip(after[1:], before[1:], strict=True))
        top.copy_(kept)
        vqvae.quantizers[-1].embedding.mul_(-3)
        after = vqvae.encode(images)
    assert all(torch.equal(new, old) for new, old in zip(after[:-1], before[:-1], strict=True))
    assert (after[-1] != before[-1]).any()


@each_strides
def test_gradients_reach_every_parameter(strides: tuple[int, ...]) -> None:
    vqvae = model(strides, residual_layers=2).train()
    images = some_images(vqvae)
    out = vqvae(images)
    ((out.reconstruction - images).square().mean() + out.commitment_loss).backward()
    for name, parameter in vqvae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_the_reconstruction_alone_trains_the_encoder() -> None:
    vqvae = model((2, 2)).train()
    vqvae(some_images(vqvae)).reconstruction.square().mean().backward()
    # By the straight-through gradient; without it nothing would get past the codes.
    assert all((p.grad != 0).any() for p in vqvae.encoders.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in vqvae.encoders.parameters())


@each_depth
def test_training_moves_the_codebooks_and_evaluation_does_not(strides: tuple[int, ...]) -> None:
    vqvae = model(strides)
    images = some_images(vqvae)
    before = {name: value.clone() for name, value in vqvae.state_dict().items()}
    vqvae(images)
    vqvae.encode(images)
    vqvae.decode(vqvae.encode(images))
    assert all(torch.equal(value, before[name]) for name, value in vqvae.state_dict().items())
    vqvae.train()(images)
    changed = {name for name, value in vqvae.state_dict().items() if not torch.equal(value, before[name])}
    wanted = ("embedding", "embedding_sum", "cluster_size")
    assert changed == {f"quantizers.{level}.{name}" for level in range(len(strides)) for name in wanted}


def test_the_configuration_reaches_the_quantisers() -> None:
    vqvae = model((2, 2), commitment=0.7, decay=0.5, codebook_init="kmeans", revive_below=0.2)
    for quantizer in vqvae.quantizers:
        assert (quantizer.num_codes, quantizer.code_dim, quantizer.channels_last) == (11, 3, False)
        assert (quantizer.commitment, quantizer.decay, quantizer.init) == (0.7, 0.5, "kmeans")
        assert quantizer.revive_below == 0.2


def test_preview_puts_the_mean_in_place_of_missing_levels() -> None:
    vqvae = spread_out(model((2, 2, 2)))
    codes = vqvae.encode(some_images(vqvae))
    with torch.no_grad():
        for given in (1, 2):
            plain = vqvae.preview(codes[:given])
            assert plain.shape == (2, 2, 16, 24)
            # The same when the missing levels' codebooks hold nothing but their mean by use.
            kept = [quantizer.embedding.clone() for quantizer in vqvae.quantizers]
            for quantizer in vqvae.quantizers[given:]:
                share = quantizer.cluster_size / quantizer.cluster_size.sum()
                quantizer.embedding.copy_((share @ quantizer.embedding).expand_as(quantizer.embedding))
            torch.testing.assert_close(plain, vqvae.decode(codes), rtol=1e-5, atol=1e-5)
            for quantizer, embedding in zip(vqvae.quantizers, kept, strict=True):
                quantizer.embedding.copy_(embedding)
            assert not torch.allclose(plain, vqvae.decode(codes), atol=1e-4)


def test_preview_leaves_out_codes_that_are_never_used() -> None:
    vqvae = spread_out(model((2, 2)))
    codes = vqvae.encode(some_images(vqvae))[:1]
    with torch.no_grad():
        vqvae.quantizers[1].cluster_size[3] = 0
        plain = vqvae.preview(codes)
        vqvae.quantizers[1].embedding[3] = 1e6
        assert torch.equal(vqvae.preview(codes), plain)
        # Where no use is known every code counts alike.
        vqvae.quantizers[1].embedding[3] = 0
        vqvae.quantizers[1].cluster_size.fill_(2)
        plain = vqvae.preview(codes)
        vqvae.quantizers[1].cluster_size.fill_(0)
        torch.testing.assert_close(vqvae.preview(codes), plain)


def test_preview_puts_the_mean_in_place_of_missing_codes() -> None:
    vqvae = spread_out(model((2, 2)))
    codes = vqvae.encode(some_images(vqvae))
    generator = torch.Generator().manual_seed(0)
    known = [torch.rand(grid.shape, generator=generator) < 0.5 for grid in codes]
    with torch.no_grad():
        # A code that is never used, and so has no say in the mean, stands for the mean.
        for quantizer in vqvae.quantizers:
            quantizer.cluster_size[3] = 0
            share = quantizer.cluster_size / quantizer.cluster_size.sum()
            quantizer.embedding[3] = share @ quantizer.embedding
        mended = [torch.where(there, grid, 3) for there, grid in zip(known, codes, strict=True)]
        torch.testing.assert_close(vqvae.preview(codes, known), vqvae.decode(mended), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vqvae.preview(codes[:1], known[:1]), vqvae.preview(mended[:1]), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(vqvae.preview(codes, known), vqvae.decode(codes), atol=1e-4)
        everything = [torch.ones_like(there) for there in known]
        assert torch.equal(vqvae.preview(codes, everything), vqvae.decode(codes))


def test_encoding_keeps_no_graph_and_decoding_does() -> None:
    vqvae = model((2, 2))
    images = some_images(vqvae).requires_grad_()
    codes = vqvae.encode(images)
    assert not any(level.requires_grad for level in codes)
    assert vqvae.decode(codes).requires_grad


def test_images_in_half_precision_under_autocast() -> None:
    vqvae = model((2, 2)).train()
    images = some_images(vqvae)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vqvae(images)
        loss = (out.reconstruction.float() - images).square().mean() + out.commitment_loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in vqvae.parameters())
    assert vqvae.quantizers[0].embedding.dtype == torch.float32


@each_depth
def test_no_images(strides: tuple[int, ...]) -> None:
    vqvae = model(strides)
    codes = vqvae.encode(some_images(vqvae, batch=0))
    assert [len(level) for level in codes] == [0] * len(strides)
    assert vqvae.decode(codes).shape == some_images(vqvae, batch=0).shape


def test_codes_may_have_any_integer_type() -> None:
    vqvae = model((2, 2))
    codes = vqvae.encode(some_images(vqvae))
    want = vqvae.decode(codes)
    assert torch.equal(vqvae.decode([level.to(torch.uint8) for level in codes]), want)
    assert torch.equal(vqvae.decode([level.int() for level in codes]), want)


def test_encoding_is_refused_in_training_mode() -> None:
    vqvae = model((2, 2)).train()
    before = {name: value.clone() for name, value in vqvae.state_dict().items()}
    with refuses(ArgumentError, "encode: the model is in training mode"):
        vqvae.encode(some_images(vqvae))
    assert all(torch.equal(value, before[name]) for name, value in vqvae.state_dict().items())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([[0.0]], ArgumentTypeError, "images: expected a torch.Tensor, got list"),
        (
            torch.zeros(1, 2, 8, 8).byte(),
            ArgumentTypeError,
            "images: expected a floating-point tensor, got torch.uint8",
        ),
        (torch.zeros(2, 8, 8), ArgumentError, r"images: expected shape \[B, 2, H, W\], got \[2, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8), ArgumentError, r"images: expected shape \[B, 2, H, W\], got \[1, 3, 8, 8\]"),
        (
            torch.zeros(1, 2, 8, 10),
            ArgumentError,
            "images: height and width must be positive multiples of 4, got 8 x 10",
        ),
        (torch.zeros(1, 2, 6, 8), ArgumentError, "images: height and width must be positive multiples of 4, got 6 x 8"),
        (torch.zeros(1, 2, 0, 8), ArgumentError, "images: height and width must be positive multiples of 4, got 0 x 8"),
    ],
    ids=["list", "integers", "3d", "channels", "width", "height", "empty"],
)
@pytest.mark.parametrize("call", ["__call__", "encode"])
def test_refuses_images(call: str, images: Any, error: type[Exception], message: str) -> None:
    vqvae = model((2, 2))
    with refuses(error, message):
        getattr(vqvae, call)(images)


TOP, BOTTOM = torch.zeros(2, 2, 3).long(), torch.zeros(2, 4, 6).long()


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (TOP, ArgumentError, "codes: expected a sequence of 2 levels, top first, got a single tensor"),
        ([TOP], ArgumentError, "codes: expected a sequence of 2 levels, top first, got 1 levels"),
        ([TOP, BOTTOM, BOTTOM], ArgumentError, "codes: expected a sequence of 2 levels, top first, got 3 levels"),
        ([[0], BOTTOM], ArgumentTypeError, r"codes\[0\]: expected a torch.Tensor, got list"),
        ([TOP, None], ArgumentTypeError, r"codes\[1\]: expected a torch.Tensor, got NoneType"),
        ([TOP.float(), BOTTOM], ArgumentTypeError, r"codes\[0\]: expected an integer tensor, got torch.float32"),
        ([TOP, BOTTOM.bool()], ArgumentTypeError, r"codes\[1\]: expected an integer tensor, got torch.bool"),
        ([TOP[0], BOTTOM], ArgumentError, r"codes\[0\]: expected shape \[B, h, w\]"),
        ([BOTTOM, TOP], ArgumentError, r"codes\[1\]: expected shape \[2, 8, 12\], got \[2, 2, 3\]"),
        ([TOP, BOTTOM[:, :, :5]], ArgumentError, r"codes\[1\]: expected shape \[2, 4, 6\], got \[2, 4, 5\]"),
        ([TOP, BOTTOM[:1]], ArgumentError, r"codes\[1\]: expected shape \[2, 4, 6\], got \[1, 4, 6\]"),
        ([TOP + 11, BOTTOM], ArgumentError, r"codes\[0\]: values must lie in 0..10, got 11"),
        ([TOP, BOTTOM - 1], ArgumentError, r"codes\[1\]: values must lie in 0..10, got -1"),
        ([TOP[:, :0], BOTTOM[:, :0]], ArgumentError, r"codes\[0\]: expected at least one code along each axis"),
    ],
    ids=[
        "one-tensor",
        "one-level",
        "three-levels",
        "list-of-ints",
        "none",
        "float",
        "bool",
        "2d",
        "bottom-first",
        "grid",
        "batch",
        "too-large",
        "negative",
        "no-rows",
    ],
)
def test_refuses_codes(codes: Any, error: type[Exception], message: str) -> None:
    vqvae = model((2, 2))
    with refuses(error, message):
        vqvae.decode(codes)


@pytest.mark.parametrize("codes", [TOP, [], [TOP, BOTTOM, BOTTOM]], ids=["one-tensor", "none", "too-many"])
def test_preview_refuses(codes: Any) -> None:
    with refuses(ArgumentError, "codes: expected a sequence of 1 to 2 levels, top first"):
        model((2, 2)).preview(codes)


@pytest.mark.parametrize(
    ("known", "error", "message"),
    [
        ([], ArgumentError, "known: expected 1 masks, one for each level of codes, got 0"),
        ([TOP], ArgumentTypeError, r"known\[0\]: expected bool, got torch.int64"),
        ([TOP[:1] > 0], ArgumentError, r"known\[0\]: expected shape"),
    ],
    ids=["number", "type", "shape"],
)
def test_preview_refuses_masks(known: Any, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        model((2, 2)).preview([TOP], known)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-4, 4), (6, 8), (8, 7)], ids=str)
def test_code_shapes_refuse(size: tuple[int, int]) -> None:
    with refuses(ArgumentError, "image_size: expected positive multiples of 4"):
        model((2, 2)).code_shapes(size)


def test_classes_refuse_other_numbers_of_levels() -> None:
    with refuses(ArgumentError, r"config.strides: VQVAE has one level, got \(4, 2\); use VQVAE2"):
        VQVAE(VQVAEConfig(strides=(4, 2)))
    with refuses(ArgumentError, r"config.strides: VQVAE2 has two levels or more, got \(4,\); use VQVAE"):
        VQVAE2(VQVAEConfig(strides=(4,)))
