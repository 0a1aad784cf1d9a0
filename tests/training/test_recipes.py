"""The table of recipes fits the table of presets."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvq.models import PRESETS, HierarchicalVQVAE, PriorConfig, VQVAEConfig, build
from fastvq.models.registry import is_ours
from fastvq.models.stored import outline
from fastvq.training import TrainConfig, training_memory
from fastvq.training.recipes import MEASURED, RECIPES, prior_preset


def test_presets_have_recipes() -> None:
    # The tiny ones are for tests, whatever their images are.
    own = {name for name, (kind, _) in PRESETS.items() if is_ours(kind)}
    assert {name for name in own if not name.startswith("tiny")} == RECIPES.keys()
    assert MEASURED.keys() <= {name for name, recipe in RECIPES.items() if recipe.schedule is not None}


def test_times_are_of_recorded_runs() -> None:
    for one in (one for times in MEASURED.values() for one in times):
        assert one.seconds > 0
        assert (Path(__file__).parents[2] / one.source).exists(), one.source


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_their_presets(name: str) -> None:
    recipe, config = RECIPES[name], PRESETS[name][1]
    if recipe.vqvae is None:
        assert isinstance(config, VQVAEConfig)
        vqvae, level = name, None
    else:
        assert isinstance(config, PriorConfig)
        vqvae, level = recipe.vqvae, recipe.level
        assert prior_preset(vqvae, config.level) == name
    model = outline(lambda: build(PRESETS[vqvae][1]))
    assert isinstance(model, HierarchicalVQVAE)
    grids = model.code_shapes(recipe.size)
    if isinstance(config, PriorConfig):
        assert level == config.level
        assert (*config.condition_shapes, config.shape) == grids[: config.level + 1]
        assert {config.num_codes, *config.condition_num_codes} == {model.config.num_codes}
    if recipe.schedule is not None:
        TrainConfig(**recipe.schedule.settings)


def test_every_level_of_an_autoencoder_has_a_prior() -> None:
    for name, recipe in RECIPES.items():
        if recipe.vqvae is None:
            config = PRESETS[name][1]
            assert isinstance(config, VQVAEConfig)
            assert all(prior_preset(name, level) for level in range(len(config.strides)))
            assert prior_preset(name, len(config.strides)) is None


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.schedule is not None])
def test_memory_is_what_training_memory_says(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.schedule is not None
    config = TrainConfig(**recipe.schedule.settings)
    found = training_memory(PRESETS[name][1], config, image_size=None if recipe.vqvae else recipe.size)
    assert recipe.schedule.memory == float(f"{found.peak / 1e9:.3g}")
