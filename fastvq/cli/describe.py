"""The command that describes: ``info``."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from fastvq._config import Config
from fastvq.cli.codebook import say_use_of_codes, say_use_of_run
from fastvq.cli.images import image_size
from fastvq.cli.installation import print_installation, print_json
from fastvq.cli.names import configure
from fastvq.cli.project import Project, choose_device, is_one_model, load_pipeline, parse_overrides
from fastvq.cli.summary import TOO_MANY_FOR_A_CPU, bytes_text
from fastvq.data import CodeDataset
from fastvq.errors import ArgumentError, UnavailableError
from fastvq.models import PRESETS, HierarchicalVQVAE, Prior, build, preset
from fastvq.models.pretrained import CONFIG_FILE
from fastvq.models.stored import outline
from fastvq.sampling import describe
from fastvq.sampling.project import how_to_sample_elsewhere, made_elsewhere
from fastvq.training import TrainConfig, load_weights, training_memory
from fastvq.training.recipes import MEASURED, RECIPES, Recipe
from fastvq.training.run import RunFolder

# Options that say something of a preset, and of these the ones that say something of its training.
_OF_TRAINING = ("batch_size", "accumulate", "bf16", "ema", "processes")
_OF_PRESETS = ("set", "size", "train", *_OF_TRAINING)
# That every parameter takes in training: itself, its average, its gradient and its two moments.
_BYTES = 5 * 4
_TEXTS = {
    "weights": "parameters and codebooks",
    "gradients": "of the parameters",
    "buckets": "of gradients that processes exchange",
    "optimizer": "two moments of every parameter",
    "average": "averaged weights",
    "batch": "what is loaded for a step",
    "activations": "kept by a forward pass for the backward pass",
    "peak": "the most at a time, in a step",
}


def info(arguments: argparse.Namespace) -> None:
    device = choose_device(getattr(arguments, "device", None))
    described = (arguments.preset, arguments.checkpoint, arguments.pretrained)
    if arguments.json and any(value is not None for value in described):
        raise ArgumentError("--json: describes the installation, and goes without a model or a preset")
    if arguments.preset is not None:
        _print_preset(arguments)
        return
    _refuse(arguments, _OF_PRESETS, "of a preset, which --preset names")
    if arguments.checkpoint is None and arguments.pretrained is None:
        if arguments.json:
            print_json(device)
        else:
            print_installation(device)
            _print_presets()
        return
    if arguments.checkpoint is not None and is_one_model(arguments.checkpoint):
        if (arguments.checkpoint / "checkpoints").is_dir():
            print(f"run         {Project(arguments.checkpoint.parent).state(arguments.checkpoint)}")
        model = load_weights(arguments.checkpoint, weights=arguments.weights)
        _print_model(type(model).__name__, model)
        return
    if arguments.checkpoint is not None and made_elsewhere(arguments.checkpoint):
        _print_imported(Project(arguments.checkpoint))
        return
    if arguments.checkpoint is not None and Project(arguments.checkpoint).vqvae.is_dir():
        project = Project(arguments.checkpoint)
        states = project.stages()
        for name, state in states.items():
            print(f"{name:11} {state}")
        if not say_use_of_run(project, warn=True):
            say_use_of_codes(project, whole=False)
        begun = [name for name in states if _has_weights(project.path / name)]
        if len(begun) < len(states) or not (project.vqvae / "model").is_dir():
            for name in begun:
                _print_model(name, load_weights(project.path / name))
            return
        pipeline = load_pipeline(arguments.checkpoint, None, "cpu", arguments.weights)
    else:
        pipeline = load_pipeline(arguments.checkpoint, arguments.pretrained, "cpu", arguments.weights)
    channels, height, width = pipeline.image_shape
    grids = [prior.config.shape for prior in pipeline.priors]
    bits = sum(math.prod(prior.config.shape) * math.log2(prior.config.num_codes) for prior in pipeline.priors)
    pixels = channels * height * width
    print(f"images      {height} x {width}, {channels} channel(s)")
    print(f"codes       {', '.join(f'{h} x {w}' for h, w in grids)} (top first), {bits:.0f} bits per image")
    print(f"compression {8 * pixels / bits:.0f}x against 8-bit pixels")
    if pipeline.num_classes:
        names = pipeline.class_names or [str(index) for index in range(pipeline.num_classes)]
        print(f"classes     {', '.join(f'{index}: {name}' for index, name in enumerate(names))}")
    _print_model("vqvae", pipeline.vqvae)
    for level, prior in enumerate(pipeline.priors):
        _print_model(f"prior {level}", prior)


def _print_imported(project: Project) -> None:
    """A project over codes that were made elsewhere."""
    codes = CodeDataset(project.codes)
    grids = ", ".join(f"{height} x {width}" for height, width in codes.shapes)
    print(f"codes       {grids} (top first), {len(codes)} rows, made elsewhere, so there is no autoencoder here")
    runs = [project.prior(level) for level in range(codes.num_levels)]
    for run in runs:
        print(f"{run.name:11} {project.state(run)}")
    print(f"next        {how_to_sample_elsewhere(project.path)}")
    for run in runs:
        if _has_weights(run):
            _print_model(run.name, load_weights(run))


def _has_weights(run: Path) -> bool:
    return (run / CONFIG_FILE).is_file() and RunFolder(run).done > 0


def _print_model(title: str, model: HierarchicalVQVAE | Prior | torch.nn.Module) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"\n{title}: {type(model).__name__}, {count / 1e6:.2f} million parameters")
    for name, value in getattr(model, "config").to_dict().items():  # noqa: B009
        print(f"  {name} = {value!r}")


def _print_preset(arguments: argparse.Namespace) -> None:
    """A preset that is never built: parameters, grids of codes, and the memory of sampling or training it."""
    if not arguments.train:
        _refuse(arguments, _OF_TRAINING, "of training, which --train asks about")
    config = configure(preset(arguments.preset)[1], parse_overrides(arguments.set))
    model = outline(lambda: build(config))
    size = None if arguments.size is None else image_size(arguments.size)
    _print_model(arguments.preset, model)
    recipe = RECIPES.get(arguments.preset)
    if isinstance(model, HierarchicalVQVAE):
        size = size or (None if recipe is None else recipe.size)
        sides = size or (model.total_stride, model.total_stride)
        grids = ", ".join(f"{height} x {width}" for height, width in model.code_shapes(sides))
        print(f"\ncodes of {sides[0]} x {sides[1]} images: {grids} (top first)")
    elif isinstance(model, Prior) and size is not None:
        raise ArgumentError(f"--size: of an autoencoder's images, and {arguments.preset} is a prior")
    if recipe is not None:
        _print_recipe(arguments.preset, recipe, config, size)
        if recipe.schedule is not None and arguments.batch_size is None:
            arguments.batch_size = recipe.schedule.batch_size
    if arguments.train:
        _print_training(arguments, config, size)
    elif isinstance(model, Prior):
        memory = _sampling(model)
        if memory is None:
            print("\nsampling: only the naive engine runs it")
        else:
            print(f"\nsampling: {describe(model)}")
            print(f"  in all       {memory}, the prior itself included")


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """Options that would count for nothing are a mistake."""
    for name in names:
        if getattr(arguments, name) not in (None, []):
            raise ArgumentError(f"{arguments.options[name]}: {why}")


def _print_training(arguments: argparse.Namespace, model: Config, size: tuple[int, int] | None) -> None:
    if arguments.batch_size is None:
        raise ArgumentError("--batch-size: the memory of training depends on it")
    processes = 1 if arguments.processes is None else arguments.processes
    given: dict[str, Any] = {name: getattr(arguments, name) for name in ("accumulate", "bf16")}
    given["ema_decay"] = arguments.ema
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.ema == 0:
        given["ema_decay"] = None
    config = TrainConfig(steps=1, batch_size=arguments.batch_size, **given)
    found = training_memory(model, config, image_size=size, processes=processes)
    of = "" if processes == 1 else f", of each of {processes} processes"
    print(f"\ntraining with batches of {config.batch_size}{of}:")
    for name, value in dataclasses.asdict(found).items():
        if name in _TEXTS:
            print(f"  {name:12} {value / 1e6:12.2f} MB  {_TEXTS[name]}")


def _print_presets() -> None:
    """Two tables: autoencoders, and the priors over their codes. Nothing is built, nothing counted step by step."""
    kinds: dict[bool, list[str]] = {False: [], True: []}
    for name in sorted(PRESETS, key=_order):
        kinds[issubclass(PRESETS[name][0], Prior)].append(name)
    print()
    print(_row("autoencoders", "parameters", "images", "codes, top first", "to train", "1000 steps"))
    for name in kinds[False]:
        print(_described(name))
    print()
    print(_row("priors", "parameters", "images", _grid_and_memory("codes", "to sample"), "to train", "1000 steps"))
    for name in kinds[True]:
        print(_described(name))
    print(
        "\nMemory to sample one image, and to train with the batches (@) that are taken unless --batch-size is\n"
        "typed; >: what parameters alone take, for no recipe was tried. B: billions of parameters, for large\n"
        "GPUs. More of one: fastvq info --preset NAME"
    )


def _order(name: str) -> tuple[bool, int, str, int]:
    """Those with a recipe to start from first, by the size of their images, then by levels."""
    recipe = RECIPES.get(name)
    if recipe is None:
        return True, 0, name, 0
    return recipe.schedule is None, recipe.size[0], recipe.vqvae or name, recipe.level or 0


def _row(name: str, parameters: str, images: str, codes: str, training: str, times: str) -> str:
    return f"{name:21}{parameters:>10}  {images:9}  {codes:20}{training:>14}  {times}".rstrip()


def _grid_and_memory(grid: str, sampling: str) -> str:
    return f"{grid:9}{sampling:>10}"


def _described(name: str) -> str:
    """A row on a preset."""
    config, recipe = PRESETS[name][1], RECIPES.get(name)
    model = outline(lambda: build(config))
    count = sum(parameter.numel() for parameter in model.parameters())
    codes = ""
    if isinstance(model, HierarchicalVQVAE) and recipe is not None:
        codes = " ".join(map(_sides, model.code_shapes(recipe.size)))
    elif isinstance(model, Prior):
        codes = _grid_and_memory(_sides(model.config.shape), _sampling(model) or "naive")
    training = f"> {bytes_text(_BYTES * count)}"
    if recipe is not None and recipe.schedule is not None:
        training = f"{bytes_text(1e9 * recipe.schedule.memory)} @ {recipe.schedule.batch_size}"
    return _row(
        name,
        f"{count / 1e9:.1f} B" if count > TOO_MANY_FOR_A_CPU else f"{count / 1e6:.2f} M",
        "" if recipe is None else _sides(recipe.size),
        codes,
        training,
        ", ".join(f"{one.seconds:.4g} s {one.device}" for one in MEASURED.get(name, ())[:1]),
    )


def _sampling(prior: Prior) -> str | None:
    """The memory of the prior and of what its engine takes beyond it for one sample; None without a plan of it."""
    try:
        beyond = describe(prior).memory(1)
    except UnavailableError:
        return None
    return bytes_text(sum(parameter.nbytes for parameter in prior.parameters()) + beyond)


def _sides(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"


def _print_recipe(name: str, recipe: Recipe, config: Config, size: tuple[int, int] | None) -> None:
    """What a preset is meant for, what is taken from its recipe, and what was measured."""
    images = "images of {} x {}".format(*recipe.size)
    print(f"\nfor         {images if recipe.vqvae is None else f'level {recipe.level} of {recipe.vqvae}, {images}'}")
    schedule = recipe.schedule
    if schedule is not None:
        print(f"recipe      --batch-size {schedule.batch_size} --lr {schedule.learning_rate} --steps {schedule.steps}")
        needed = training_memory(config, TrainConfig(**schedule.settings), image_size=size).peak
        print(f"training    {bytes_text(needed)} of memory with that batch (--train: what takes it)")
    for one in MEASURED.get(name, ()):
        print(f"measured    {one.seconds:.4g} s per 1000 steps on {one.device} ({one.source})")
