"""Folders of models that were tampered with, that are older, or that hold classes of the user's own."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import TablePrior, pixelcnn, random_codes, refuses, snail
from torch import Tensor, nn

from fastvq import _files, sample
from fastvq.errors import ArgumentError, CorruptFileError
from fastvq.models import (
    MODEL_CLASSES,
    VQVAE2,
    Classifier,
    ClassifierConfig,
    Config,
    GatedPixelCNNConfig,
    PixelSNAIL,
    PixelSNAILConfig,
    PretrainedModel,
    Prior,
    PriorConfig,
    VQVAEConfig,
    load_pretrained,
)

pytestmark = pytest.mark.usefixtures("steady")


def description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder: Path, *, seal: bool, **fields: Any) -> None:
    """Change fields of the configuration, with or without a checksum that fits."""
    content = description(folder)
    content["config"] |= fields
    content.pop(_files.SEAL)
    (folder / "config.json").write_text(json.dumps(_files.sealed(content) if seal else content))


SAME_SHAPES: dict[str, tuple[Callable[[], PretrainedModel], str, str]] = {
    "heads": (snail, '"attention_heads": 2', '"attention_heads": 1'),
    "mask": (snail, '"mask": "strict"', '"mask": "inclusive"'),
    "form": (snail, '"form": "rows"', '"form": "symmetric"'),
    "level": (snail, '"level": 0', '"level": 1'),
    "legacy-skip": (snail, '"legacy_skip": false', '"legacy_skip": true'),
    "shape": (pixelcnn, "3,\n      4", "4,\n      3"),
    "decay": (lambda: VQVAE2.from_preset("tiny"), '"decay": 0.99', '"decay": 0.9'),
    "class": (snail, '"PixelSNAIL"', '"GatedPixelCNN"'),
    "weights": (snail, '"sha256": "', '"sha256": "0'),
}


@pytest.mark.parametrize(("make", "there", "instead"), SAME_SHAPES.values(), ids=SAME_SHAPES.keys())
def test_a_changed_configuration_is_refused(
    make: Callable[[], PretrainedModel], there: str, instead: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    make().save_pretrained(folder)
    path = folder / "config.json"
    text = path.read_text()
    assert text.count(there) == 1
    path.write_text(text.replace(there, instead))
    with refuses(CorruptFileError, ".*config.json: its entries do not fit the checksum among them"):
        load_pretrained(folder)


def test_folders_without_a_checksum_of_the_configuration_load(tmp_path: Path) -> None:
    prior = snail()
    prior.save_pretrained(tmp_path / "model")
    rewrite(tmp_path / "model", seal=False)
    assert _files.SEAL not in description(tmp_path / "model")
    codes = random_codes(2, 3, 4)
    assert torch.equal(PixelSNAIL.from_pretrained(tmp_path / "model")(codes), prior(codes))


def test_earlier_versions_find_what_they_look_for(tmp_path: Path) -> None:
    snail().save_pretrained(tmp_path / "model")
    found = description(tmp_path / "model")
    assert found["format"] == 1
    assert found["model"] == "PixelSNAIL"
    assert found["sha256"] == _files.sha256(tmp_path / "model" / "model.safetensors")
    assert PixelSNAILConfig.from_dict(found["config"]) == snail().config


BOMBS: dict[str, tuple[Callable[[], PretrainedModel], dict[str, Any]]] = {
    "codes": (snail, {"num_codes": 2**24}),
    "channels": (snail, {"channels": 2**22}),
    "depth": (snail, {"blocks": 10_000, "layers_per_block": 10_000}),
    "output-depth": (snail, {"output_blocks": 10_000}),
    "positions": (snail, {"shape": [2048, 2048], "kernel_size": 255}),
    "pixelcnn-depth": (pixelcnn, {"layers": 10_000}),
    "vqvae-depth": (lambda: VQVAE2.from_preset("tiny"), {"residual_layers": 10_000}),
    "vqvae-codes": (lambda: VQVAE2.from_preset("tiny"), {"num_codes": 2**24, "code_dim": 2**24}),
    "classifier-depth": (
        lambda: Classifier(ClassifierConfig(in_channels=1, num_classes=3, channels=(4,))),
        {"channels": [4] * 10_000},
    ),
}


@pytest.mark.parametrize(("make", "fields"), BOMBS.values(), ids=BOMBS.keys())
def test_nothing_large_is_built_before_the_shapes_are_compared(
    make: Callable[[], PretrainedModel], fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().save_pretrained(tmp_path / "model")
    rewrite(tmp_path / "model", seal=True, **fields)
    allocated: list[int] = []
    empty = torch.empty

    def counted(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        allocated.append(0 if made.is_meta else made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", counted)
    tracemalloc.start()
    try:
        with refuses(CorruptFileError, ".*model: weights and configuration do not fit together"):
            load_pretrained(tmp_path / "model")
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert sum(allocated) < 2**20


PRIOR: dict[str, Any] = {"shape": (4, 6), "num_codes": 8}
LIMITS: list[tuple[type[Config], dict[str, Any], str]] = [
    *((VQVAEConfig, {name: 2**24 + 1}, f"{name}: must be at most 16777216") for name in ("channels", "num_codes")),
    (VQVAEConfig, {"residual_layers": 10_001}, "residual_layers: must be at most 10000, got 10001"),
    (VQVAEConfig, {"strides": (2,) * 17}, "strides: expected at most 16, none above 16777216"),
    (VQVAEConfig, {"strides": (2**25,)}, "strides: expected at most 16, none above 16777216"),
    (VQVAEConfig, {"commitment": 10**400}, "commitment: must not be negative, and finite"),
    (PriorConfig, {"shape": (2**12, 2**11)}, r"shape: must have at most 4194304 positions, got \(4096, 2048\)"),
    (PriorConfig, {"condition_kernel": 257}, "condition_kernel: must be at most 255, got 257"),
    (PriorConfig, {"condition_blocks": 10_001}, "condition_blocks: must be at most 10000"),
    (PriorConfig, {"level": 2**70}, "level: must be at most 16777216"),
    (
        PriorConfig,
        {"condition_shapes": ((1, 1),) * 17, "condition_num_codes": (2,) * 17},
        "condition_shapes: expected at most 16 levels, got 17",
    ),
    (
        PriorConfig,
        {"condition_shapes": ((1, 1),), "condition_num_codes": (2**25,)},
        "condition_num_codes: must be at most 16777216",
    ),
    (PixelSNAILConfig, {"kernel_size": 256}, "kernel_size: must be at most 255, got 256"),
    (PixelSNAILConfig, {"blocks": 10**6}, "blocks: must be at most 10000, got 1000000"),
    (GatedPixelCNNConfig, {"layers": 10**6}, "layers: must be at most 10000, got 1000000"),
    (ClassifierConfig, {"channels": (1,) * 10_001}, "channels: expected at most 10000 stages, got 10001"),
    (ClassifierConfig, {"channels": (2**25,)}, "channels: must be at most 16777216"),
]


@pytest.mark.parametrize(
    ("config_class", "fields", "message"), LIMITS, ids=[f"{case[0].__name__}-{next(iter(case[1]))}" for case in LIMITS]
)
def test_configurations_have_limits(config_class: type[Config], fields: dict[str, Any], message: str) -> None:
    base = PRIOR if issubclass(config_class, PriorConfig) else {}
    with refuses(ArgumentError, message):
        config_class(**{**base, **fields})


class Shifted(Prior):
    """Logits from the code before, with a table that is tied to a second name and a buffer that is not stored."""

    scale: Tensor

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.num_codes, config.num_codes)
        self.tied = self.embedding
        # By values, which an outline does not have.
        self.start = float(self.embedding.weight.detach().mean())
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        shifted = nn.functional.pad(codes, (1, 0))[..., :-1]
        return self.scale * self.embedding(shifted).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class WideConfig(PriorConfig):
    width: int = 3


class Wide(Prior):
    config_class: ClassVar[type[WideConfig]] = WideConfig
    config: WideConfig

    def __init__(self, config: WideConfig) -> None:
        super().__init__(config)
        self.inner = nn.Embedding(config.num_codes, config.width)
        self.outer = nn.Linear(config.width, config.num_codes)

    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        return self.outer(self.inner(nn.functional.pad(codes, (1, 0))[..., :-1])).permute(0, 3, 1, 2)


class Logged(PixelSNAIL):
    """One of ours with something added."""


OWN: dict[str, Callable[[], Prior]] = {
    "prior": lambda: Shifted(PriorConfig(shape=(3, 4), num_codes=5)),
    "configuration": lambda: Wide(WideConfig(shape=(3, 4), num_codes=5, width=7)),
    "subclass": lambda: Logged(snail().config),
    "half": lambda: Shifted(PriorConfig(shape=(3, 4), num_codes=5)).bfloat16(),
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN.keys())
def test_a_class_of_ones_own_comes_back(make: Callable[[], Prior], tmp_path: Path) -> None:
    prior = make().eval()
    prior.save_pretrained(tmp_path / "model")
    before = torch.get_rng_state()
    for back in (type(prior).from_pretrained(tmp_path / "model"), load_pretrained(tmp_path / "model")):
        assert type(back) is type(prior)
        assert back.config == prior.config
        assert {k: v.dtype for k, v in back.state_dict().items()} == {k: v.dtype for k, v in prior.state_dict().items()}
        codes = random_codes(2, 3, 4)
        assert torch.equal(back(codes).float(), prior(codes).float())
        assert torch.equal(sample(back, 2, seed=3, engine="naive"), sample(prior, 2, seed=3, engine="naive"))
    assert torch.equal(torch.get_rng_state(), before)
    assert not isinstance(back, Shifted) or back.tied.weight is back.embedding.weight


def test_a_class_that_is_not_there_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OWN["configuration"]().save_pretrained(tmp_path / "model")
    monkeypatch.delitem(MODEL_CLASSES, "Wide")
    with refuses(CorruptFileError, ".*: model 'Wide', expected one of .*; import the module that defines it, test_m"):
        load_pretrained(tmp_path / "model")


def test_of_two_classes_of_one_name_the_last_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = type("Twin", (Shifted,), {})
    first(PriorConfig(shape=(3, 4), num_codes=5)).save_pretrained(tmp_path / "model")
    last = type("Twin", (Shifted,), {"__module__": "notebook"})
    assert type(load_pretrained(tmp_path / "model")) is last
    with refuses(ArgumentError, "save_pretrained: a Twin could not be loaded again: notebook has another class of"):
        first(PriorConfig(shape=(3, 4), num_codes=5)).save_pretrained(tmp_path / "other")
    monkeypatch.delitem(MODEL_CLASSES, "Twin")


def test_names_of_this_package_stay_its_own(tmp_path: Path) -> None:
    double = type("PixelSNAIL", (PixelSNAIL,), {})
    assert MODEL_CLASSES["PixelSNAIL"] is PixelSNAIL
    with refuses(ArgumentError, "save_pretrained: a PixelSNAIL could not be loaded again: fastvq.models.pixelsnail"):
        double(snail().config).save_pretrained(tmp_path / "model")


def replaced_layer() -> Prior:
    prior = snail()
    prior.output = nn.Conv2d(4, 9, 1)
    return prior


def other_configuration() -> Prior:
    return Shifted(WideConfig(shape=(3, 4), num_codes=5))


def normalised() -> Prior:
    prior = snail()
    nn.utils.parametrizations.weight_norm(prior.output)
    return prior


class Remembering(Shifted):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: object) -> None:
        pass


LOST: dict[str, tuple[Callable[[], Any], str]] = {
    "replaced-layer": (replaced_layer, r"output.weight has shape \[9, 4, 1, 1\], expected \[5, 4, 1, 1\]"),
    "renamed-tensors": (normalised, "output.weight is missing; output.parametrizations.weight.original0 is unknown"),
    "other-configuration": (other_configuration, "PriorConfig: unknown fields "),
    "other-constructor": (lambda: TablePrior((3, 4), 5), r"TablePrior.__init__\(\) missing 1 required positional"),
    "abstract": (lambda: Prior(PriorConfig(shape=(3, 4), num_codes=5)), "it is abstract"),
    "extra-state": (lambda: Remembering(PriorConfig(shape=(3, 4), num_codes=5)), "'dict' object has no attribute"),
}


@pytest.mark.parametrize(("make", "reason"), LOST.values(), ids=LOST.keys())
def test_what_cannot_be_loaded_is_not_saved(make: Callable[[], Any], reason: str, tmp_path: Path) -> None:
    model = make()
    with refuses(ArgumentError, f"save_pretrained: a {type(model).__name__} could not be loaded again: {reason}"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_field_after_building_is_not_saved(tmp_path: Path) -> None:
    prior = snail()
    prior.config = dataclasses.replace(prior.config, channels=8)
    with refuses(ArgumentError, "save_pretrained: a PixelSNAIL could not be loaded again: input.weight has shape"):
        prior.save_pretrained(tmp_path / "model")
