"""Autoencoders of signals and volumes, against those of images; stored forms that know no number of axes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refuses
from quantizer_helpers import normal
from torch import Tensor, nn
from training_helpers import VQVAE_CONFIG, Noise, train_config

from fastvq import Pipeline
from fastvq.data import model_checksum
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import PRESETS, HierarchicalVQVAE, VQVAEConfig, build, load_pretrained
from fastvq.training import train_vqvae

pytestmark = pytest.mark.usefixtures("steady")

EACH_DIMS = pytest.mark.parametrize("dims", [1, 2, 3])
EACH_DEPTH = pytest.mark.parametrize("strides", [(4,), (2, 2), (2, 4)], ids=["4", "2-2", "2-4"])


def model(strides: tuple[int, ...], dims: int, **changes: Any) -> HierarchicalVQVAE:
    fields = {"channels": 6, "residual_channels": 4, "residual_layers": 1, "num_codes": 11, "code_dim": 3, **changes}
    found = build(VQVAEConfig(in_channels=2, strides=strides, spatial_dims=dims, **fields))
    assert isinstance(found, HierarchicalVQVAE)
    return found.eval()


def along_a_new_axis(weight: Tensor, layer: nn.Module) -> Tensor:
    """A kernel that does to each slice along a new first axis of the grid what ``weight`` does.

    One tap is not 0: the middle one of three, and of four one that stays inside; transposed layers of stride 2 need
    one for each of the two slices they make.
    """
    taps = layer.kernel_size[0]  # type: ignore[index]
    lifted = weight.new_zeros(*weight.shape[:2], taps, *weight.shape[2:])
    places = {1: [0], 3: [1], 4: [1, 2] if "Transpose" in type(layer).__name__ else [1]}[taps]  # type: ignore[index]
    for place in places:
        lifted[:, :, place] = weight
    return lifted


@pytest.mark.parametrize("dims", [1, 2], ids=["signals-as-images", "images-as-volumes"])
@EACH_DEPTH
def test_more_axes_do_the_same_along_each(strides: tuple[int, ...], dims: int) -> None:
    small, large = model(strides, dims, codebook_init="data"), model(strides, dims + 1)
    scale = small.total_stride
    x = normal(4, 2, *[3 * scale, 2 * scale][:dims])
    small.train()(x)
    small.eval()
    layers = dict(large.named_modules())
    state = {}
    for name, value in small.state_dict().items():
        layer = layers[name.rpartition(".")[0]]
        lift = name.endswith("weight") and value.ndim > 1
        state[name] = along_a_new_axis(value, layer) if lift else value
    large.load_state_dict(state)
    repeated = x[:, :, None].expand(-1, -1, 2 * scale, *x.shape[2:]).contiguous()
    one, other = small(x), large(repeated)
    for codes, more in zip(one.codes, other.codes, strict=True):
        assert torch.equal(codes[:, None].expand_as(more), more)
    assert len(one.codes[0].unique()) > 1
    spread = one.reconstruction[:, :, None].expand_as(other.reconstruction)
    torch.testing.assert_close(other.reconstruction, spread, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.commitment_loss, one.commitment_loss)
    top = [codes[:1] for codes in one.codes[:1]]
    preview = large.preview([top[0][:, None].expand(-1, 2, *top[0].shape[1:])])
    torch.testing.assert_close(preview, small.preview(top)[:, :, None].expand_as(preview), rtol=1e-5, atol=1e-5)


@EACH_DIMS
@EACH_DEPTH
def test_shapes_and_round_trip(strides: tuple[int, ...], dims: int) -> None:
    vqvae = model(strides, dims)
    scale = vqvae.total_stride
    size = tuple(count * scale for count in (2, 1, 3)[:dims])
    images = normal(2, 2, *size)
    out = vqvae(images)
    assert out.reconstruction.shape == images.shape
    shapes = vqvae.code_shapes(size)
    assert shapes[0] == (2, 1, 3)[:dims]
    assert shapes[-1] == tuple(side // strides[0] for side in size)
    assert [tuple(codes.shape) for codes in out.codes] == [(2, *shape) for shape in shapes]
    codes = vqvae.encode(images)
    with torch.no_grad():
        assert torch.equal(vqvae.decode(codes), vqvae(images).reconstruction)
        known = [torch.ones_like(grid, dtype=torch.bool) for grid in codes]
        assert torch.equal(vqvae.preview(codes, known), vqvae.decode(codes))


@EACH_DIMS
def test_training_reaches_all_parameters_and_codebooks(dims: int) -> None:
    vqvae = model((2, 2), dims, channels=12, residual_channels=8).train()
    before = [quantizer.embedding.clone() for quantizer in vqvae.quantizers]
    images = normal(3, 2, *[8] * dims)
    out = vqvae(images)
    ((out.reconstruction - images).square().mean() + out.commitment_loss).backward()
    assert [name for name, p in vqvae.named_parameters() if p.grad is None or not (p.grad != 0).any()] == []
    assert not any(torch.equal(q.embedding, kept) for q, kept in zip(vqvae.quantizers, before, strict=True))


@pytest.mark.parametrize("dims", [1, 3])
def test_models_are_saved_and_loaded(dims: int, tmp_path: Path) -> None:
    vqvae = model((4,), dims)
    images = normal(1, 2, *[8] * dims)
    loaded = load_pretrained(vqvae.save_pretrained(tmp_path / "model"))
    assert loaded.config == vqvae.config
    assert torch.equal(loaded.encode(images)[0], vqvae.encode(images)[0])  # type: ignore[operator]


def test_configurations_of_images_are_written_as_before(tmp_path: Path) -> None:
    names = {field.name for field in dataclasses.fields(VQVAEConfig)}
    config = VQVAEConfig(in_channels=1)
    assert names - config.to_dict().keys() == {"spatial_dims"}
    assert VQVAEConfig.from_dict(config.to_dict()) == config
    assert config.spatial_dims == 2
    signals = dataclasses.replace(config, spatial_dims=1)
    assert signals.to_dict() == {**config.to_dict(), "spatial_dims": 1}
    assert VQVAEConfig.from_dict(json.loads(json.dumps(signals.to_dict()))) == signals
    folder = model((4,), 2).save_pretrained(tmp_path / "model")
    assert "spatial_dims" not in json.loads((folder / "config.json").read_text())["config"]


def test_the_shipped_models_are_those_their_checksums_speak_of() -> None:
    # What was recorded of it before there was a number of axes.
    expected = "8ec1ca4ca42b3a3311038af99a5ea8c199adcbc11519e0ea75d2370b2a5007af"
    assert model_checksum(Pipeline.from_pretrained("digits").vqvae) == expected


@pytest.mark.parametrize("name", ["tiny", "tiny-single", "imagenet256"])
def test_presets_are_of_images(name: str) -> None:
    config = PRESETS[name][1]
    assert isinstance(config, VQVAEConfig)
    assert config.spatial_dims == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: model((4,), 4), ArgumentError, "spatial_dims: must be at most 3, got 4"),
        (lambda: model((4,), 0), ArgumentError, "spatial_dims: must be at least 1, got 0"),
        (lambda: VQVAEConfig(spatial_dims="1"), ArgumentTypeError, "spatial_dims: expected an int, got str '1'"),  # type: ignore[arg-type]
        (lambda: model((4,), 1)(torch.zeros(1, 2, 6)), ArgumentError, "images: length must be positive multiples of 4"),
        (
            lambda: model((4,), 3)(torch.zeros(1, 2, 4, 4, 6)),
            ArgumentError,
            "images: depth, height and width must be positive multiples of 4, got 4 x 4 x 6",
        ),
        (
            lambda: model((4,), 1)(torch.zeros(1, 2, 4, 4)),
            ArgumentError,
            r"images: expected shape \[B, 2, L\], got \[1, 2, 4, 4\]",
        ),
        (
            lambda: model((4,), 3).decode([torch.zeros(1, 2, 2).long()]),
            ArgumentError,
            r"codes\[0\]: expected shape \[B, d, h, w\], got \[1, 2, 2\]",
        ),
        (
            lambda: model((4,), 1).code_shapes((8, 8)),
            ArgumentError,
            r"image_size: expected length \(spatial_dims=1\), got \(8, 8\)",
        ),
        (lambda: model((4,), 3).code_shapes((8, 8, 6)), ArgumentError, "image_size: expected positive multiples of 4"),
    ],
    ids=["four", "none", "text", "length", "volume", "images", "codes", "sides", "multiples"],
)
def test_refuses(call: Any, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        call()


@pytest.mark.parametrize("dims", [1, 3])
def test_training_on_images_refuses_other_numbers_of_axes(dims: int, tmp_path: Path) -> None:
    config = dataclasses.replace(VQVAE_CONFIG, spatial_dims=dims)
    with refuses(ArgumentError, "image_size: expected"):
        train_vqvae(Noise(), config, train_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_of_the_state_are_the_same_for_all() -> None:
    names = [[*model((2, 2), dims).state_dict()] for dims in (1, 2, 3)]
    assert all(left == right for left, right in itertools.pairwise(names))
