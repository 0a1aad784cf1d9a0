"""Configurations, the preset table, and models on disk: what is kept, what is refused, what an interruption leaves."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pixelcnn, random_codes, refuses, snail
from safetensors.torch import load_file, save_file

from fastvq import _files
from fastvq.errors import ArgumentError, ArgumentTypeError, CorruptFileError, FileConflictError, MissingFileError
from fastvq.models import (
    PRESETS,
    VQVAE,
    VQVAE2,
    Config,
    GatedPixelCNN,
    GatedPixelCNNConfig,
    PixelSNAIL,
    PixelSNAILConfig,
    PretrainedModel,
    PriorConfig,
    VQVAEConfig,
    build,
    load_pretrained,
    preset,
)
from fastvq.models import pretrained as pretrained_module

pytestmark = pytest.mark.usefixtures("steady")

NAN, INF = math.nan, math.inf
PRIOR: dict[str, Any] = {"shape": (4, 6), "num_codes": 8}
UNDER_TWO: dict[str, Any] = {"condition_shapes": ((1, 2), (2, 6)), "condition_num_codes": (3, 4)}

CONFIGS: dict[str, Config] = {
    "vqvae": VQVAEConfig(strides=(8, 2, 2), decay=0.5, codebook_init="kmeans"),
    "snail": PixelSNAILConfig(**PRIOR, **UNDER_TWO, num_classes=3, level=2, mask="inclusive", attention_channels=64),
    "pixelcnn": GatedPixelCNNConfig(**PRIOR, kernel_size=5),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@each_config
def test_configuration_survives_json(config: Config) -> None:
    stored = json.loads(json.dumps(config.to_dict()))
    back = type(config).from_dict(stored)
    assert back == config
    assert hash(back) == hash(config)
    fields = dataclasses.fields(config)  # type: ignore[arg-type]
    assert set(stored) == {field.name for field in fields if "added" not in field.metadata}


@each_config
def test_configuration_is_frozen(config: Config) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_codes = 9  # type: ignore[attr-defined]


def test_lists_become_tuples() -> None:
    config = PixelSNAILConfig(shape=[4, 6], num_codes=8, condition_shapes=[[2, 3]], condition_num_codes=[5])  # type: ignore[arg-type]
    assert config == PixelSNAILConfig(**PRIOR, condition_shapes=((2, 3),), condition_num_codes=(5,))
    assert VQVAEConfig(strides=[4, 2]) == VQVAEConfig(strides=(4, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({**PRIOR, "depth": 3}, ArgumentError, r"PixelSNAILConfig: unknown fields \['depth'\], missing fields \[\]"),
        ({"shape": (4, 6)}, ArgumentError, r"PixelSNAILConfig: unknown fields \[\], missing fields \['num_codes'\]"),
        ([], ArgumentTypeError, "PixelSNAILConfig: expected a mapping of fields, got list"),
        (None, ArgumentTypeError, "PixelSNAILConfig: expected a mapping of fields, got NoneType"),
    ],
    ids=["unknown", "missing", "list", "none"],
)
def test_from_dict_refuses(values: Any, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        PixelSNAILConfig.from_dict(values)


POSITIVE = "must be at least 1, got 0"
NOT_NEGATIVE = "must be at least 0, got -1"
NO_INT = "expected an int, got"
BELOW_ONE = r"must lie in \[0, 1\), got"
NO_NUMBER = "expected a number, got"

BAD_FIELDS: list[tuple[type[Config], dict[str, Any], type[Exception], str]] = [
    *[
        (VQVAEConfig, {name: value}, error, f"{name}: {message}")
        for name in ("in_channels", "channels", "residual_channels", "num_codes", "code_dim")
        for value, error, message in ((0, ArgumentError, POSITIVE), (2.0, ArgumentTypeError, NO_INT))
    ],
    (VQVAEConfig, {"channels": 7}, ArgumentError, "channels: must be even, got 7"),
    (VQVAEConfig, {"residual_layers": -1}, ArgumentError, f"residual_layers: {NOT_NEGATIVE}"),
    (VQVAEConfig, {"residual_layers": True}, ArgumentTypeError, f"residual_layers: {NO_INT} bool"),
    *[
        (VQVAEConfig, {"strides": value}, ArgumentError, "strides: expected powers of two from 2")
        for value in ((), (1,), (3,), (4, 6), (0, 2), (-2,), (2.0,), ("2",))
    ],
    (VQVAEConfig, {"strides": 4}, ArgumentTypeError, "strides: expected a tuple, got 4"),
    (VQVAEConfig, {"codebook_init": "zeros"}, ArgumentError, "codebook_init: expected one of"),
    *[
        (VQVAEConfig, {name: value}, error, f"{name}: {message}")
        for name in ("commitment", "revive_below")
        for value, error, message in (
            (-0.1, ArgumentError, "must not be negative, and finite, got -0.1"),
            (NAN, ArgumentError, "must not be negative, and finite, got nan"),
            (INF, ArgumentError, "must not be negative, and finite, got inf"),
            ("1", ArgumentTypeError, NO_NUMBER),
            (None, ArgumentTypeError, NO_NUMBER),
        )
    ],
    *[
        (config_class, {name: value}, error, f"{name}: {message}")
        for config_class, name in (
            (VQVAEConfig, "decay"),
            (PixelSNAILConfig, "dropout"),
            (PixelSNAILConfig, "attention_dropout"),
            (GatedPixelCNNConfig, "dropout"),
        )
        for value, error, message in (
            (1.0, ArgumentError, BELOW_ONE),
            (-0.1, ArgumentError, BELOW_ONE),
            (NAN, ArgumentError, BELOW_ONE),
            ("half", ArgumentTypeError, NO_NUMBER),
            (True, ArgumentTypeError, NO_NUMBER),
        )
    ],
    *[
        (PixelSNAILConfig, {name: value}, error, f"{name}: {message}")
        for name in ("num_codes", "num_classes", "condition_channels", "channels", "residual_channels", "blocks")
        for value, error, message in ((0, ArgumentError, POSITIVE), ("9", ArgumentTypeError, NO_INT))
    ],
    *[
        (PixelSNAILConfig, {name: value}, error, f"{name}: {message}")
        for name in ("condition_blocks", "level", "layers_per_block", "output_blocks")
        for value, error, message in ((-1, ArgumentError, NOT_NEGATIVE), (1.5, ArgumentTypeError, NO_INT))
    ],
    *[
        (PriorConfig, {"shape": value}, error, message)
        for value, error, message in (
            ((4,), ArgumentError, r"shape: expected \(height, width\), got \(4,\)"),
            ((4, 6, 8), ArgumentError, r"shape: expected \(height, width\), got \(4, 6, 8\)"),
            ((4, 0), ArgumentError, "shape: must be at least 1, got 0"),
            ((4, 6.0), ArgumentTypeError, f"shape: {NO_INT} float 6.0"),
            (24, ArgumentTypeError, "shape: expected a tuple, got 24"),
        )
    ],
    *[
        (PriorConfig, {"condition_shapes": shapes, "condition_num_codes": counts}, error, message)
        for shapes, counts, error, message in (
            (((2, 3),), (), ArgumentError, "condition_num_codes: expected one size per condition shape"),
            ((), (5,), ArgumentError, "condition_num_codes: expected one size per condition shape"),
            (((2, 3),), (0,), ArgumentError, "condition_num_codes: must be at least 1, got 0"),
            (((2, 3),), ("5",), ArgumentTypeError, f"condition_num_codes: {NO_INT}"),
            (((3, 3),), (5,), ArgumentError, r"condition_shapes: \(3, 3\) does not divide \(4, 6\) evenly"),
            (((1, 3), (2, 2)), (5, 5), ArgumentError, r"condition_shapes: \(1, 3\) does not divide \(2, 2\) evenly"),
            (((8, 12),), (5,), ArgumentError, r"condition_shapes: \(8, 12\) does not divide \(4, 6\) evenly"),
            ((2, 3), (5, 5), ArgumentError, r"condition_shapes: expected \(height, width\), got 2"),
            (7, (5,), ArgumentTypeError, "condition_shapes: expected a tuple, got 7"),
            (((2, 3),), 5, ArgumentTypeError, "condition_num_codes: expected a tuple, got 5"),
        )
    ],
    (PriorConfig, {"condition_kernel": 2}, ArgumentError, "condition_kernel: must be odd, got 2"),
    (PriorConfig, {"condition_kernel": 1.5}, ArgumentTypeError, f"condition_kernel: {NO_INT}"),
    (PixelSNAILConfig, {"kernel_size": 1}, ArgumentError, "kernel_size: must be at least 2, got 1"),
    (PixelSNAILConfig, {"form": "square"}, ArgumentError, "form: expected one of"),
    (PixelSNAILConfig, {"mask": None}, ArgumentError, "mask: expected one of"),
    (PixelSNAILConfig, {"activation": "relu"}, ArgumentError, "activation: expected one of"),
    (PixelSNAILConfig, {"attention": "no"}, ArgumentTypeError, "attention: expected a bool, got str 'no'"),
    (PixelSNAILConfig, {"attention_heads": 0}, ArgumentError, f"attention_heads: {POSITIVE}"),
    (PixelSNAILConfig, {"attention_channels": 0}, ArgumentError, f"attention_channels: {POSITIVE}"),
    (
        PixelSNAILConfig,
        {"attention_channels": 20},
        ArgumentError,
        "attention_channels: 20 is not a multiple of 8 heads",
    ),
    (PixelSNAILConfig, {"channels": 12}, ArgumentError, "attention_channels: 6 is not a multiple of 8 heads"),
    (GatedPixelCNNConfig, {"channels": 0}, ArgumentError, f"channels: {POSITIVE}"),
    (GatedPixelCNNConfig, {"output_channels": 0}, ArgumentError, f"output_channels: {POSITIVE}"),
    (GatedPixelCNNConfig, {"layers": -1}, ArgumentError, f"layers: {NOT_NEGATIVE}"),
    (GatedPixelCNNConfig, {"kernel_size": 4}, ArgumentError, "kernel_size: must be odd, got 4"),
    (GatedPixelCNNConfig, {"kernel_size": 1}, ArgumentError, "kernel_size: must be at least 3, got 1"),
    (GatedPixelCNNConfig, {"kernel_size": 3.5}, ArgumentTypeError, f"kernel_size: {NO_INT}"),
]


@pytest.mark.parametrize(
    ("config_class", "fields", "error", "message"),
    BAD_FIELDS,
    ids=[f"{case[0].__name__}-{'-'.join(f'{k}={v}' for k, v in case[1].items())}" for case in BAD_FIELDS],
)
def test_configuration_refuses(
    config_class: type[Config], fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    base = {} if config_class is VQVAEConfig else PRIOR
    with refuses(error, message):
        config_class(**{**base, **fields})


def test_without_attention_its_width_is_of_no_consequence() -> None:
    assert PixelSNAILConfig(**PRIOR, channels=12, attention=False).channels == 12


# Razavi et al. 2019, appendix; columns as there.
PRIOR_TABLE: dict[str, dict[str, Any]] = {
    "imagenet256-top": {
        "shape": (32, 32),
        "num_classes": 1000,
        "residual_channels": 2048,
        "layers": 20,
        "attention_layers": 4,
        "dropout": 0.1,
        "output_blocks": 20,
        "condition_blocks": 0,
    },
    "imagenet256-bottom": {
        "shape": (64, 64),
        "num_classes": 1000,
        "residual_channels": 1024,
        "layers": 20,
        "attention_layers": 0,
        "dropout": 0.1,
        "output_blocks": 0,
        "condition_blocks": 20,
    },
    "ffhq1024-top": {
        "shape": (32, 32),
        "num_classes": None,
        "residual_channels": 2048,
        "layers": 20,
        "attention_layers": 4,
        "dropout": 0.5,
        "output_blocks": 0,
        "condition_blocks": 0,
    },
    "ffhq1024-mid": {
        "shape": (64, 64),
        "num_classes": None,
        "residual_channels": 1024,
        "layers": 20,
        "attention_layers": 1,
        "dropout": 0.3,
        "output_blocks": 0,
        "condition_blocks": 8,
    },
    "ffhq1024-bottom": {
        "shape": (128, 128),
        "num_classes": None,
        "residual_channels": 1024,
        "layers": 10,
        "attention_layers": 0,
        "dropout": 0.25,
        "output_blocks": 0,
        "condition_blocks": 8,
    },
}


def on_meta(name: str) -> PretrainedModel:
    model_class, _ = PRESETS[name]
    with torch.device("meta"):
        return model_class.from_preset(name)


@pytest.mark.parametrize(("name", "row"), PRIOR_TABLE.items(), ids=PRIOR_TABLE.keys())
def test_priors_of_the_paper(name: str, row: dict[str, Any]) -> None:
    prior = on_meta(name)
    assert isinstance(prior, PixelSNAIL)
    config = prior.config
    assert (config.channels, config.kernel_size, config.num_codes) == (512, 5, 512)
    for field in ("shape", "num_classes", "residual_channels", "dropout", "output_blocks"):
        assert getattr(config, field) == row[field], field
    assert config.level == ("top", "mid", "bottom").index(name.split("-")[1]) - (name == "imagenet256-bottom")
    # The built model, not only the numbers it is built from.
    assert sum(len(block.layers) for block in prior.blocks) == row["layers"]
    attention = [block.attention for block in prior.blocks if block.attention is not None]
    assert len(attention) == row["attention_layers"]
    assert all(layer.heads == 8 for layer in attention)
    assert all(layer.dropout == row["dropout"] for layer in attention)
    assert len(prior.output_blocks) == row["output_blocks"]
    built = 0 if prior.context_encoder is None else len(prior.context_encoder.blocks)
    assert built == row["condition_blocks"]
    if built:
        assert config.condition_channels == 512
    for block in prior.blocks:
        for layer in block.layers:
            assert layer.conv1.weight.shape == (row["residual_channels"], 512, 5, 5)
            assert layer.conv2.weight.shape == (2 * 512, row["residual_channels"], 5, 5)


@pytest.mark.parametrize(
    ("name", "grids"),
    [("imagenet256", [(32, 32), (64, 64)]), ("ffhq1024", [(32, 32), (64, 64), (128, 128)])],
)
def test_autoencoders_of_the_paper(name: str, grids: list[tuple[int, int]]) -> None:
    vqvae = on_meta(name)
    assert isinstance(vqvae, VQVAE2)
    config = vqvae.config
    assert (config.channels, config.residual_channels, config.residual_layers) == (128, 64, 2)
    assert (config.num_codes, config.code_dim, config.in_channels) == (512, 64, 3)
    assert (config.commitment, config.decay) == (0.25, 0.99)
    size = int(name.removeprefix("imagenet").removeprefix("ffhq"))
    assert list(vqvae.code_shapes((size, size))) == grids
    names = [f"{name}-{level}" for level in (["top", "bottom"] if len(grids) == 2 else ["top", "mid", "bottom"])]
    for level, prior_name in enumerate(names):
        prior = PRESETS[prior_name][1]
        assert isinstance(prior, PixelSNAILConfig)
        assert (prior.shape, prior.level) == (grids[level], level)
        assert prior.condition_shapes == tuple(grids[:level])
        assert prior.condition_num_codes == (512,) * level


def test_the_single_level_model_of_2017() -> None:
    vqvae, prior = on_meta("imagenet128"), on_meta("imagenet128-pixelcnn")
    assert isinstance(vqvae, VQVAE)
    assert isinstance(prior, GatedPixelCNN)
    assert vqvae.config.channels == 256
    assert vqvae.code_shapes((128, 128)) == (prior.config.shape,) == ((32, 32),)
    assert vqvae.config.num_codes == prior.config.num_codes == 512


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_built(name: str) -> None:
    model_class, config = PRESETS[name]
    model = on_meta(name)
    assert type(model) is model_class
    assert model.config == config
    assert preset(name) == (model_class, config)
    with torch.device("meta"):
        assert type(build(config)) is model_class


@pytest.mark.parametrize("family", ["digits", "tiny"])
def test_small_presets_run(family: str) -> None:
    vqvae = VQVAE2.from_preset(family).eval()
    top, bottom = (PixelSNAIL.from_preset(f"{family}-{level}").eval() for level in ("top", "bottom"))
    scale = vqvae.total_stride
    size = (top.config.shape[0] * scale, top.config.shape[1] * scale)
    codes = vqvae.encode(torch.zeros(2, 1, *size))
    label = None if top.config.num_classes is None else torch.zeros(2).long()
    assert top(codes[0], None, label).shape == (2, top.config.num_codes, *top.config.shape)
    assert bottom(codes[1], codes[:1], label).shape == (2, bottom.config.num_codes, *bottom.config.shape)


def test_overrides() -> None:
    prior = PixelSNAIL.from_preset("tiny-top", num_classes=4, channels=32)
    assert (prior.config.num_classes, prior.config.channels, prior.config.shape) == (4, 32, (2, 2))
    assert PRESETS["tiny-top"][1].channels == 16  # type: ignore[attr-defined]
    assert preset("tiny", strides=[2, 2])[1] == dataclasses.replace(PRESETS["tiny"][1], strides=(2, 2))  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PixelSNAIL.from_preset("tiny-topp"), "name: unknown preset 'tiny-topp', expected one of digits, "),
        (lambda: PixelSNAIL.from_preset("tiny-top", width=3), "overrides: no field 'width', expected one of "),
        (lambda: PixelSNAIL.from_preset("tiny-top", channels=0), "channels: must be at least 1, got 0"),
        (lambda: PixelSNAIL.from_preset("tiny"), "name: preset 'tiny' is a VQVAE2, not a PixelSNAIL"),
        (lambda: VQVAE.from_preset("tiny"), "name: preset 'tiny' is a VQVAE2, not a VQVAE"),
        (lambda: VQVAE2.from_preset("tiny-single"), "name: preset 'tiny-single' is a VQVAE, not a VQVAE2"),
        (lambda: VQVAE2.from_preset("tiny", strides=(4,)), r"config.strides: VQVAE2 has two levels or more"),
        (lambda: build(PriorConfig(**PRIOR)), "config: no model is built from a PriorConfig"),
    ],
    ids=["name", "field", "value", "class", "levels-2", "levels-1", "strides", "config"],
)
def test_presets_refuse(call: Callable[[], object], message: str) -> None:
    with refuses(ArgumentError, message):
        call()


def trained_vqvae(strides: tuple[int, ...]) -> PretrainedModel:
    fields: dict[str, Any] = {
        "channels": 8,
        "residual_channels": 4,
        "residual_layers": 1,
        "num_codes": 6,
        "code_dim": 3,
    }
    model = build(VQVAEConfig(in_channels=1, strides=strides, codebook_init="data", **fields))
    model.train()(torch.randn(2, 1, 16, 16))
    return model


MODELS: dict[str, Callable[[], PretrainedModel]] = {
    "VQVAE": lambda: trained_vqvae((4,)),
    "VQVAE2": lambda: trained_vqvae((2, 2)),
    "PixelSNAIL": lambda: snail(num_classes=3, condition_shapes=((1, 2),), condition_num_codes=(4,)),
    "GatedPixelCNN": pixelcnn,
}


@pytest.mark.parametrize(("name", "make"), MODELS.items(), ids=MODELS.keys())
def test_round_trip_is_exact(name: str, make: Callable[[], PretrainedModel], tmp_path: Path) -> None:
    model = make()
    folder = tmp_path / "deep" / "model"
    assert model.save_pretrained(str(folder)) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    for back in (type(model).from_pretrained(folder), load_pretrained(str(folder))):
        assert type(back).__name__ == name
        assert back.config == model.config
        assert not any(module.training for module in back.modules())
        state, stored = model.state_dict(), back.state_dict()
        assert list(state) == list(stored)
        for key, value in state.items():
            assert stored[key].dtype == value.dtype, key
            assert torch.equal(stored[key], value), key


def test_a_loaded_model_gives_the_same_logits(tmp_path: Path) -> None:
    prior = snail()
    prior.save_pretrained(tmp_path / "model")
    codes = random_codes(2, 3, 4)
    assert torch.equal(PixelSNAIL.from_pretrained(tmp_path / "model")(codes), prior(codes))


def test_weights_in_other_memory_orders_are_saved(tmp_path: Path) -> None:
    model = trained_vqvae((2, 2)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.save_pretrained(tmp_path / "model")
    back = VQVAE2.from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_does_not_overwrite(tmp_path: Path) -> None:
    pixelcnn().save_pretrained(tmp_path / "model")
    before = contents(tmp_path)
    with refuses(FileConflictError, ".*model exists already and is not an empty folder; nothing was written"):
        snail().save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    with refuses(FileConflictError, ".*file exists already"):
        snail().save_pretrained(tmp_path / "file")
    assert contents(tmp_path) == {**before, "file": b"mine"}


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    snail().save_pretrained(tmp_path / "model")
    assert isinstance(load_pretrained(tmp_path / "model"), PixelSNAIL)


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    pixelcnn().save_pretrained(folder)
    (folder / "notes.txt").write_text("about the old model")
    new = snail()
    new.save_pretrained(folder, overwrite=True)
    assert sorted(contents(tmp_path)) == ["model/config.json", "model/model.safetensors"]
    assert isinstance(load_pretrained(folder), PixelSNAIL)


class Interruption(BaseException):
    """Like KeyboardInterrupt, no Exception."""


@pytest.mark.parametrize("point", ["save_tensors", "sha256", "write_json", "sync"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "overwrite"])
def test_an_interrupted_save_leaves_what_was_there(
    point: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    if there:
        pixelcnn().save_pretrained(folder)
    before = contents(tmp_path)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if point == "save_tensors":
            Path(args[1]).write_bytes(b"half of the wei")
        raise Interruption

    monkeypatch.setattr(_files if point == "sync" else pretrained_module, point, interrupted)
    with pytest.raises(Interruption):
        snail().save_pretrained(folder, overwrite=True)
    assert contents(tmp_path) == before
    assert folder.exists() == there
    assert len(list(tmp_path.iterdir())) == int(there)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(_files.sealed({**json.loads(path.read_text()), **changes})))


def edit_fields(folder: Path, **changes: Any) -> None:
    edit_config(folder, config={**json.loads((folder / "config.json").read_text())["config"], **changes})


def flip_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(bytes(data))


def truncate(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors and bring the checksum up to date."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit_config(folder, sha256=_files.sha256(path))


def truncate_with_checksum(folder: Path) -> None:
    truncate(folder, 100)
    edit_config(folder, sha256=_files.sha256(folder / "model.safetensors"))


FIT = ".*model: weights and configuration do not fit together"
DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "flipped-byte": (flip_byte, CorruptFileError, ".*safetensors: checksum differs from the one in config.json"),
    "truncated": (lambda folder: truncate(folder, 500), CorruptFileError, ".*safetensors: checksum differs"),
    "emptied": (lambda folder: truncate(folder, 0), CorruptFileError, ".*safetensors: checksum differs"),
    "truncated-with-checksum": (truncate_with_checksum, CorruptFileError, FIT),
    "no-checksum": (lambda folder: edit_config(folder, sha256=None), CorruptFileError, ".*: checksum differs"),
    "no-weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        MissingFileError,
        "folder: .* holds no model.safetensors, so it is not a saved model",
    ),
    "no-config": (
        lambda folder: (folder / "config.json").unlink(),
        MissingFileError,
        "folder: .* holds no config.json, so it is not a saved model",
    ),
    "half-json": (
        lambda folder: (folder / "config.json").write_text('{"format": 1,'),
        CorruptFileError,
        ".*config.json: not valid JSON",
    ),
    "not-text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
        CorruptFileError,
        ".*config.json: not valid JSON",
    ),
    "json-list": (
        lambda folder: (folder / "config.json").write_text("[1, 2]"),
        CorruptFileError,
        ".*config.json: expected a JSON object, got list",
    ),
    "other-format": (
        lambda folder: edit_config(folder, format=2),
        CorruptFileError,
        ".*config.json: format 2, expected 1",
    ),
    "unknown-class": (
        lambda folder: edit_config(folder, model="PixelSnail"),
        CorruptFileError,
        ".*config.json: model 'PixelSnail', expected one of",
    ),
    "another-class": (lambda folder: edit_config(folder, model="GatedPixelCNN"), CorruptFileError, FIT),
    "config-null": (lambda folder: edit_config(folder, config=None), CorruptFileError, FIT),
    "config-list": (lambda folder: edit_config(folder, config=[]), CorruptFileError, FIT),
    "unknown-field": (
        lambda folder: edit_fields(folder, depth=3),
        CorruptFileError,
        rf"{FIT} \(PixelSNAILConfig: unknown fields \['depth'\]",
    ),
    "field-of-wrong-type": (
        lambda folder: edit_fields(folder, channels="4"),
        CorruptFileError,
        rf"{FIT} \(channels: expected an int",
    ),
    "another-width": (lambda folder: edit_fields(folder, channels=8), CorruptFileError, FIT),
    "extra-tensor": (
        lambda folder: rewrite_weights(folder, lambda t: t.update(extra=torch.zeros(2))),
        CorruptFileError,
        FIT,
    ),
    "missing-tensor": (
        lambda folder: rewrite_weights(folder, lambda t: t.pop("output.bias")),
        CorruptFileError,
        FIT,
    ),
    "tensor-of-another-shape": (
        lambda folder: rewrite_weights(folder, lambda t: t.update({"output.bias": torch.zeros(6)})),
        CorruptFileError,
        FIT,
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found(
    damage: Callable[[Path], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    snail().save_pretrained(folder)
    assert isinstance(load_pretrained(folder), PixelSNAIL)
    damage(folder)
    with refuses(error, message):
        PixelSNAIL.from_pretrained(folder)


def test_a_missing_config_field_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    snail().save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())["config"]
    del fields["shape"]
    edit_config(folder, config=fields)
    with refuses(CorruptFileError, rf"{FIT} \(PixelSNAILConfig: unknown fields \[\], missing fields \['shape'\]\)"):
        load_pretrained(folder)


def test_the_wrong_class_is_named(tmp_path: Path) -> None:
    snail().save_pretrained(tmp_path / "model")
    with refuses(ArgumentError, "folder: .*model holds a PixelSNAIL, not a GatedPixelCNN"):
        GatedPixelCNN.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["missing", "org/name", "file"])
def test_a_mistyped_path_is_an_error_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    with refuses(MissingFileError, f"folder: {name} does not exist or is not a folder; models are loaded from local"):
        PixelSNAIL.from_pretrained(name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
