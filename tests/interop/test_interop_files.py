"""Checkpoints in the containers that are usual, and damaged ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import ForeignVQVAE
from helpers import refuses
from interop_helpers import foreign_prior
from safetensors.torch import save_file
from torch import Tensor

from fastvq.errors import ArgumentError, CorruptFileError
from fastvq.interop import load
from fastvq.models import PixelSNAIL

pytestmark = [
    pytest.mark.usefixtures("steady"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated"),
]


def nested(state: dict[str, Tensor], *names: str) -> dict[str, Any]:
    """The state dict under these names, the outermost first, beside what else is usual."""
    content: dict[str, Any] = state
    for name in reversed(names):
        content = {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}, name: content}
    return content


CONTAINERS: dict[str, tuple[tuple[str, ...], str]] = {
    "alone": ((), ""),
    "state_dict": (("state_dict",), ""),
    "model_state_dict": (("model_state_dict",), ""),
    "model": (("model",), ""),
    "module": (("module",), ""),
    "two-levels": (("model", "state_dict"), ""),
    "distributed": (("state_dict",), "module."),
    "compiled": (("model",), "_orig_mod."),
    "lightning": (("state_dict",), "model."),
    "net": ((), "net."),
    "several-prefixes": (("module",), "model._orig_mod.module."),
}


@pytest.mark.parametrize(("names", "prefix"), CONTAINERS.values(), ids=CONTAINERS.keys())
def test_usual_containers_are_opened(names: tuple[str, ...], prefix: str, tmp_path: Path) -> None:
    for theirs in (foreign_prior(), ForeignVQVAE()):
        state = theirs.state_dict()
        content = nested({prefix + name: tensor for name, tensor in state.items()}, *names)
        torch.save(content, tmp_path / "model.pt")
        expected = load(state, heads=2).state_dict()
        for source in (content, tmp_path / "model.pt"):
            found = load(source, heads=2).state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_arguments_beside_any_container_are_read(tmp_path: Path) -> None:
    state = foreign_prior().state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(dropout=0.25)}, tmp_path / "model.pt")
    assert load(tmp_path / "model.pt", heads=2).config.dropout == 0.25  # type: ignore[union-attr]


def test_safetensors_are_read(tmp_path: Path) -> None:
    state = foreign_prior().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(
        load(tmp_path / "model.safetensors", heads=2).state_dict()["output.bias"],
        load(state, heads=2).state_dict()["output.bias"],
    )
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with refuses(CorruptFileError, ".*model.safetensors: not a whole safetensors file"):
        load(tmp_path / "model.safetensors")


def test_other_containers_are_told_what_is_accepted() -> None:
    accepted = (
        r".*; accepted is a state dict of tensors, alone or under 'state_dict', 'model_state_dict', 'model', 'mod"
    )
    with refuses(
        ArgumentError, f"source: expected a state dict of named tensors, got 'weights' which are not{accepted}"
    ):
        load({"weights": foreign_prior().state_dict()})


def test_endless_containers_are_given_up() -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    with refuses(ArgumentError, "source: expected a state dict of named tensors, got 'model' which are not"):
        load(content)


def test_numbers_in_names_build_nothing() -> None:
    state = foreign_prior().state_dict()
    name = next(name for name in state if name.startswith("blocks.0.resblocks.0."))
    for number in ("9999", "99999999", "9" * 5000):
        changed = {**state, name.replace("blocks.0", f"blocks.{number}", 1): state[name]}
        with pytest.raises(ArgumentError, match=r"source: keys do not fit the layout|blocks: must be at most 10000"):
            load(changed, heads=2)
    vqvae = ForeignVQVAE().state_dict()
    with pytest.raises(ArgumentError, match=r"source: keys do not fit the layout"):
        load({**vqvae, **{f"dec.blocks.{n}.conv.1.weight": vqvae["dec.blocks.1.conv.1.weight"] for n in range(9, 99)}})


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    state = foreign_prior().state_dict()
    torch.save(state, path)
    whole = path.read_bytes()
    values = state["blocks.0.resblocks.0.conv1.conv.conv.weight_v"].numpy().tobytes()
    data = bytearray(whole)
    data[whole.index(values[:64]) + 5] ^= 1
    path.write_bytes(bytes(data))
    with refuses(CorruptFileError, f"source: {path} is damaged .*the checksum of its record .* does not fit"):
        load(path, heads=2)


def test_files_without_checksums_of_records_load(tmp_path: Path) -> None:
    state = foreign_prior().state_dict()
    usual = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(usual)
    assert isinstance(load(tmp_path / "model.pt", heads=2), PixelSNAIL)


def test_sparse_tensors() -> None:
    state = foreign_prior().state_dict()
    with refuses(ArgumentError, "source: expected dense tensors, got torch.sparse_coo for background"):
        load({**state, "background": state["background"].to_sparse()}, heads=2)
