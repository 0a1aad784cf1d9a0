"""Checkpoints and live modules of the widely used port compute the same after conversion."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import engine_logits
from foreign_models import ForeignSnail, ForeignVQVAE, direction, randomise
from helpers import refuses
from interop_helpers import (
    PRIORS,
    foreign_codes,
    foreign_prior,
    require_equal,
    require_same_prior,
    require_same_vqvae,
)
from torch import Tensor, nn

import fastvq
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.interop import convert, load, recognise
from fastvq.models import VQVAE2, PixelSNAIL, PixelSNAILConfig, VQVAEConfig
from fastvq.models import build as build_model
from fastvq.ops.draw import draw, draw_margin

pytestmark = [
    pytest.mark.usefixtures("steady"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated"),
]


@pytest.mark.parametrize("inplace", [False, True], ids=["newer", "legacy"])
@pytest.mark.parametrize("name", PRIORS)
def test_prior_gives_the_same_logits(name: str, inplace: bool) -> None:
    theirs = foreign_prior(name, inplace=inplace)
    ours = load(theirs.state_dict(), legacy=inplace, heads=PRIORS[name].get("heads", 2))
    assert isinstance(ours, PixelSNAIL)
    assert not ours.training
    assert ours.config.level == int("cond_res_channel" in PRIORS[name])
    require_same_prior(ours, theirs)
    require_same_prior(convert(theirs), theirs)


@pytest.mark.parametrize("name", ["top", "bottom"])
def test_the_two_generations_differ(name: str) -> None:
    theirs = foreign_prior(name, inplace=True)
    codes, condition = foreign_codes(theirs)
    newer, legacy = (load(theirs.state_dict(), legacy=legacy, heads=2) for legacy in (False, True))
    assert (newer(codes, condition) - legacy(codes, condition)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["top", "bottom"])
def test_both_spellings_of_weight_norm(name: str) -> None:
    theirs = foreign_prior(name, spelling="new")
    assert any("parametrizations" in key for key in theirs.state_dict())
    assert recognise(theirs) == "pixelsnail"
    require_same_prior(load(theirs.state_dict(), heads=2), theirs)
    # One set of values under both spellings becomes the same model.
    old = foreign_prior(name, spelling="old")
    old.load_state_dict(
        {
            key.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): value
            for key, value in theirs.state_dict().items()
        }
    )
    first, second = load(old.state_dict(), heads=2).state_dict(), load(theirs.state_dict(), heads=2).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_masked_entries_do_not_count() -> None:
    theirs = foreign_prior()
    before = load(theirs.state_dict(), heads=2)
    masked = direction(theirs.blocks[0].resblocks[0].conv1.conv.conv)[:, :, -1, 1:]
    assert masked.abs().max() > 0
    with torch.no_grad():
        masked.mul_(100)
    after = load(theirs.state_dict(), heads=2)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_first_layer_has_no_bias_where_the_shifts_bring_in_zeros() -> None:
    theirs = foreign_prior(n_block=1, n_res_block=0, attention=False)
    with torch.no_grad():
        theirs.horizontal.conv.conv.bias.fill_(100)
        theirs.vertical.conv.conv.bias.fill_(-30)
    ours = convert(theirs)
    assert not ours.input.bias.any()
    found = ours.input(torch.zeros(1, 3, 3, dtype=torch.int64)).mean(1)[0].round(decimals=-1)
    assert found.tolist() == [[0, -30, -30], [100, 70, 70], [100, 70, 70]]


@pytest.mark.parametrize("inplace", [False, True], ids=["newer", "legacy"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"n_res_block": 0}, {"in_channel": 1, "channel": 10, "n_res_block": 1, "embed_dim": 3, "n_embed": 7}],
    ids=["small", "no-residual-blocks", "grey"],
)
def test_vqvae_gives_the_same_codes_and_images(changes: dict[str, Any], inplace: bool) -> None:
    theirs = randomise(ForeignVQVAE(**changes, inplace=inplace))
    ours = load(theirs.state_dict(), kind="vqvae", legacy=inplace)
    assert isinstance(ours, VQVAE2)
    require_same_vqvae(ours, theirs)
    converted = convert(theirs)
    require_same_vqvae(converted, theirs)
    assert converted.config.decay == 0.9


def test_vqvae_keeps_the_averages_of_its_codebooks() -> None:
    theirs = randomise(ForeignVQVAE())
    ours = load(theirs.state_dict())
    for level, quantizer in enumerate((theirs.quantize_t, theirs.quantize_b)):
        assert torch.equal(ours.quantizers[level].cluster_size, quantizer.cluster_size)
        assert torch.equal(ours.quantizers[level].embedding_sum, quantizer.embed_avg.T)
        assert torch.equal(ours.quantizers[level].embedding, quantizer.embed.T)
        assert bool(ours.quantizers[level].initialized)


def test_legacy_vqvae_differs_from_newer() -> None:
    theirs = randomise(ForeignVQVAE(inplace=True))
    with pytest.raises(AssertionError):
        require_same_vqvae(load(theirs.state_dict(), legacy=False), theirs)


def test_full_size_models_are_told_by_shapes() -> None:
    sizes: dict[str, tuple[Callable[[], nn.Module], int, float, Any]] = {
        "top": (
            lambda: ForeignSnail((32, 32), 512, 256, 5, 4, 4, 256, heads=8),
            226,
            84.9,
            PixelSNAILConfig(shape=(32, 32), num_codes=512, attention_channels=128),
        ),
        "bottom": (
            lambda: ForeignSnail(
                (64, 64), 512, 256, 5, 4, 4, 256, attention=False, n_cond_res_block=3, cond_res_channel=256
            ),
            171,
            89.8,
            PixelSNAILConfig(
                shape=(64, 64),
                num_codes=512,
                level=1,
                attention=False,
                condition_shapes=((32, 32),),
                condition_num_codes=(512,),
            ),
        ),
        "vqvae": (
            lambda: ForeignVQVAE(3, 128, 2, 32, 64, 512),
            64,
            1.39,
            VQVAEConfig(residual_channels=32, strides=(4, 2)),
        ),
    }
    from fastvq.interop import snail, vqvae

    for make, keys, millions, wanted in sizes.values():
        with torch.device("meta"):
            theirs = make()
            state = theirs.state_dict()
            assert len(state) == keys
            assert sum(p.numel() for p in theirs.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
            config: Any
            if isinstance(theirs, ForeignSnail):
                config = snail.infer(state, legacy=False, shape=None, heads=8, dropout=None)
                used = snail.links(config)
            else:
                config = vqvae.infer(state, legacy=False, decay=None)
                used = vqvae.links(config)
            assert config == wanted
            own = build_model(config).state_dict()
        expected = {
            name: tuple(shape)
            for link in used
            for name, shape in zip(link.sources, link.shapes(own[link.target].shape), strict=True)
        }
        if isinstance(theirs, ForeignSnail):
            expected["background"] = (1, 2, *config.shape)
        assert expected == {name: tuple(value.shape) for name, value in state.items()}
        assert {link.target for link in used} >= {name for name in own if not name.endswith("initialized")}


@torch.no_grad()
def sample_foreign(model: ForeignSnail, noise: Tensor, condition: Tensor | None, temperature: float) -> Tensor:
    """The port's sampler, its multinomial draw replaced by the inverse CDF at given uniforms."""
    codes, cache = torch.zeros(noise.shape, dtype=torch.int64), {}
    for i in range(noise.shape[1]):
        for j in range(noise.shape[2]):
            logits, cache = model(codes[:, : i + 1], condition=condition, cache=cache)
            codes[:, i, j] = draw(logits[:, :, i, j], noise[:, i, j], temperature=temperature)
    return codes


@pytest.mark.parametrize("inplace", [False, True], ids=["newer", "legacy"])
@pytest.mark.parametrize("name", ["top", "bottom"])
def test_sampling_gives_the_codes_of_the_foreign_sampler(name: str, inplace: bool) -> None:
    theirs = foreign_prior(name, inplace=inplace)
    _, condition = foreign_codes(theirs, batch=3)
    noise = torch.rand(3, *theirs.background.shape[2:])
    ours = convert(theirs)
    found = fastvq.sample(ours, 3, condition=condition, noise=noise, temperature=1.3)
    with torch.no_grad():
        logits = theirs(found, condition)[0].movedim(1, -1)
    # The certificate: no uniform is so near to a boundary that rounding could decide.
    assert draw_margin(logits, noise, found, temperature=1.3).min() > 1e-5
    assert torch.equal(found, sample_foreign(theirs, noise, condition, 1.3))


@pytest.mark.parametrize("name", ["top", "bottom", "conditioned-attention", "no-gated-layers"])
@torch.no_grad()
def test_plan_of_a_legacy_prior(name: str) -> None:
    theirs = foreign_prior(name, inplace=True)
    ours = convert(theirs)
    codes, condition = foreign_codes(theirs)
    found = engine_logits("torch", ours, codes, {"condition": condition})
    require_equal(found.movedim(-1, 1), theirs(codes, condition)[0])


def test_checkpoint_files(tmp_path: Path) -> None:
    theirs = foreign_prior("bottom")
    arguments = argparse.Namespace(hier="bottom", dropout=0.4, sched=None, lr=3e-4)
    for new_format in (True, False):
        path = tmp_path / f"pixelsnail_{new_format}.pt"
        torch.save({"model": theirs.state_dict(), "args": arguments}, path, _use_new_zipfile_serialization=new_format)
        ours = load(path, kind="pixelsnail")
        assert ours.config.dropout == 0.4
        require_same_prior(ours, theirs)
        require_same_prior(load(str(path)), theirs)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    vqvae = randomise(ForeignVQVAE())
    torch.save(vqvae.state_dict(), tmp_path / "vqvae.pt")
    require_same_vqvae(load(tmp_path / "vqvae.pt"), vqvae)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(prefix: str) -> None:
    theirs = foreign_prior()
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    assert recognise(state) == "pixelsnail"
    require_same_prior(load({"model": state, "args": None}, heads=2), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_precisions_become_float32(dtype: torch.dtype) -> None:
    theirs = foreign_prior("bottom", shape=(6, 10))
    narrow = {name: value.to(dtype) for name, value in theirs.state_dict().items()}
    theirs.load_state_dict({name: value.float() for name, value in narrow.items()})
    ours = load(narrow)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    # Coordinates are computed anew, not rounded with the rest.
    theirs.background.copy_(ours.background)
    require_same_prior(ours, theirs)


def test_another_grid() -> None:
    theirs = foreign_prior("bottom")
    ours = load(theirs.state_dict(), shape=(8, 4))
    assert ours.config.shape == (8, 4)
    assert ours.config.condition_shapes == ((4, 2),)
    larger = foreign_prior("bottom", shape=(8, 4))
    larger.load_state_dict({**theirs.state_dict(), "background": larger.background})
    require_same_prior(ours, larger)
    without = {name: value for name, value in theirs.state_dict().items() if name != "background"}
    require_same_prior(load(without, shape=[8, 4]), larger)  # type: ignore[arg-type]


def test_converted_model_can_be_saved(tmp_path: Path) -> None:
    ours = convert(foreign_prior("conditioned-attention", inplace=True))
    again = PixelSNAIL.from_pretrained(ours.save_pretrained(tmp_path / "prior"))
    assert again.config == ours.config
    assert again.config.legacy_skip
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_configurations_saved_before_the_field_load() -> None:
    fields = PixelSNAILConfig(shape=(2, 2), num_codes=3).to_dict()
    del fields["legacy_skip"]
    assert not PixelSNAILConfig.from_dict(fields).legacy_skip
    with refuses(ArgumentError, "legacy_skip: expected activation 'elu'"):
        PixelSNAILConfig(shape=(2, 2), num_codes=3, legacy_skip=True, activation="concat_elu")
    with refuses(ArgumentTypeError, "legacy_skip: expected a bool, got int 1"):
        VQVAEConfig(legacy_skip=1)  # type: ignore[arg-type]


def test_recognise() -> None:
    assert recognise(foreign_prior()) == "pixelsnail"
    assert recognise(foreign_prior("bottom").state_dict()) == "pixelsnail"
    assert recognise(ForeignVQVAE()) == "vqvae"
    assert recognise(nn.DataParallel(ForeignVQVAE())) == "vqvae"
    assert recognise(nn.Linear(2, 2)) is None
    assert recognise(convert(foreign_prior())) is None
    assert recognise({}) is None
    assert recognise({1: torch.zeros(1)}) is None  # type: ignore[dict-item]
