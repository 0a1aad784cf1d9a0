"""Damaged files in great number: every loader must refuse them in words of its own, or give what it always gives.

    python tests/fuzz_loaders.py --mutants 100000 --seed 0

A mutant is a file of a good folder with some bytes or some JSON entry changed. Those of loaders whose files carry
checksums must not be accepted with other contents; for the others that cannot be told. No mutant may end in a foreign
exception, take more than ten seconds, or ask for gigabytes. Exit status 1 if one does; it is printed with the number
that ``--only`` repeats.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import io
import json
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foreign_models import ForeignVQVAE, randomise
from helpers import pixelcnn, snail
from interop_helpers import foreign_prior
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from training_helpers import VQVAE_CONFIG, Noise, train_config

from fastvq import interop
from fastvq._files import SEAL, read_json, sha256, write_json
from fastvq.cli.project import Project, augmentation
from fastvq.data import CodeDataset, ImageFolder, extract_codes
from fastvq.errors import FastvqError
from fastvq.evaluation import statistics
from fastvq.evaluation.features import Features
from fastvq.models import PixelSNAILConfig, build, load_pretrained, preset
from fastvq.sampling import Pipeline
from fastvq.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from fastvq.training.ema import WeightAverage
from fastvq.training.log import MetricLog, last_validation
from fastvq.training.loop import _optimizer
from fastvq.training.run import open_run
from fastvq.training.weights import best_validation, load_weights

SECONDS = 10
MEMORY = 2**31
OUTCOMES = ("refused", "same", "other", "OTHER", "TRACEBACK", "HANG")
FAULTS = OUTCOMES[3:]


class Hang(BaseException):
    """Not to be caught by what a loader takes for a parser's mistake."""


@dataclass
class Loader:
    """A kind of file.

    Attributes:
        make: writes the good files into an empty folder.
        load: reads them; what it returns is compared between mutants.
        guarded: whether checksums must show every change of the contents.
        mend: brings checksums up to date after a change, so that what lies behind them is reached.
    """

    name: str
    make: Callable[[Path], object]
    load: Callable[[Path], object]
    guarded: bool = True
    mend: Callable[[Path], None] | None = None
    counts: Counter[str] = field(default_factory=Counter)


def digest(value: object) -> str:
    """Of tensors, arrays, modules, containers of them, and whatever else has a telling representation."""
    found = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, nn.Module):
            add([type(part).__name__, getattr(part, "config", None), part.state_dict()])
        elif isinstance(part, Tensor):
            found.update(f"{part.dtype}{list(part.shape)}".encode())
            found.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, np.ndarray):
            add(torch.from_numpy(part))
        elif isinstance(part, dict):
            for key, entry in part.items():
                found.update(repr(key).encode())
                add(entry)
        elif isinstance(part, (list, tuple)):
            for entry in part:
                add(entry)
        else:
            found.update(repr(part).encode("utf-8", "backslashreplace"))

    add(value)
    return found.hexdigest()


# ---- What is loaded


def make_pipeline(folder: Path) -> None:
    models = [build(preset(name, num_classes=2)[1]) for name in ("tiny-top", "tiny-bottom")]
    Pipeline(build(preset("tiny")[1]), models, class_names=["a", "b"]).save_pretrained(folder / "m")  # type: ignore[arg-type]


def load_pipeline(folder: Path) -> object:
    found = Pipeline.from_pretrained(folder / "m")
    return [found.vqvae, *found.priors, found.class_names]


def make_codes(folder: Path) -> None:
    extract_codes(build(VQVAE_CONFIG).eval(), Noise(), range(6), folder / "codes")


def load_codes(folder: Path) -> object:
    found = CodeDataset(folder / "codes")
    found.verify()
    codes = [found.codes(level, slice(None)) for level in range(found.num_levels)]
    return [codes, found.labels, found.source, found.shapes, found.num_codes, found.class_names, found.fingerprint()]


def training_state() -> TrainingState:
    config = train_config(steps=2)
    model = build(PixelSNAILConfig(**{**snail().config.to_dict(), "residual_channels": 2}))
    state = TrainingState(model, WeightAverage(model, 0.9), _optimizer(model, config), torch.device("cpu"), 0, {}, 0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    return state


def make_checkpoint(folder: Path) -> None:
    state = training_state()
    state.step, state.totals, state.totals_steps = 4, {"loss": 1.5}, 2
    save_checkpoint(folder, state, keep=1, versions={"torch": "2"})


prototype = functools.cache(training_state)


def load_state(folder: Path) -> object:
    state = copy.deepcopy(prototype())
    with torch.random.fork_rng([]):
        load_checkpoint(folder / "step_00000004", state)
        rng = torch.get_rng_state()
    assert state.average is not None
    optimizer = state.optimizer.state_dict()
    return [state.model, state.average.model, optimizer, state.step, state.totals, state.totals_steps, rng]


RUN: dict[str, Any] = {
    "format": 1,
    "stage": 1,
    "model": {"class": "VQVAE2", **VQVAE_CONFIG.to_dict()},
    "train": {"steps": 3},
    "data": {"size": [4, 4]},
}


def make_run(folder: Path) -> None:
    with open_run(folder / "run", RUN, resume=False, notes={"preset": "tiny"}) as run:
        run.keep_best(build(VQVAE_CONFIG), 2, "mse", 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with MetricLog(folder / "run" / "logs", 0) as log:
            for step in (1, 2):
                log.write(step, "train", {"loss": 0.5})
                log.write(step, "validation", {"mse": 0.25})
    for path in (folder / "run" / "logs").iterdir():
        if path.suffix != ".jsonl":
            path.unlink()
    data = {"data": "digits", "size": [32, 32], "channels": 1, "class_names": ["0"], "skip_broken": False}
    write_json(folder / "data.json", data | {"flip": False, "shift": 2, "validation": 0.1, "seed": 0})


def load_run(folder: Path) -> object:
    with open_run(folder / "run", RUN, resume=True) as run:
        found = [run.record(), run.done, best_validation(run.path), last_validation(run.path, "mse")]
    description = Project(folder).read_data()
    return [*found, description, augmentation(description), load_weights(folder / "run", weights="best")]


def make_unfinished(folder: Path) -> None:
    model = build(VQVAE_CONFIG)
    with open_run(folder / "run", RUN, resume=False) as run:
        state = TrainingState(
            model, None, _optimizer(model, train_config(steps=3)), torch.device("cpu"), 2, {"loss": 1.5}, 2
        )
        save_checkpoint(run.checkpoints, state, keep=1, versions={"torch": "2"})


def make_foreign(folder: Path, suffix: str = "pt", zipped: bool = True) -> None:
    state = foreign_prior().state_dict()
    if suffix == "safetensors":
        save_file(state, folder / "prior.safetensors")
        return
    content = {"model": state, "args": argparse.Namespace(dropout=0.25)}
    torch.save(content, folder / "prior.pt", _use_new_zipfile_serialization=zipped)
    vqvae = {"state_dict": randomise(ForeignVQVAE(), 0).state_dict()}
    torch.save(vqvae, folder / "vqvae.pt", _use_new_zipfile_serialization=zipped)


def load_foreign(folder: Path) -> object:
    return [interop.load(path, heads=2) for path in sorted(folder.iterdir())]


def make_statistics(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    found = statistics.FeatureStatistics(5, num_classes=3)
    found.update(Features(torch.randn(12, 5, generator=generator), torch.randn(12, 3, generator=generator)))
    statistics._save(folder / "features.safetensors", found)


def load_statistics(folder: Path) -> object:
    found = statistics._load(folder / "features.safetensors")
    assert found.inception is not None
    return [found.gaussian.mean, found.gaussian.scatter, found.count, found.vectors, found.numbers, found._words,
            found.keep, found.seed, found.inception.state()]  # fmt: skip


def make_images(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg", "c.bmp", "d.webp", "e.gif"):
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / name)


def load_images(folder: Path) -> object:
    found = ImageFolder(folder / "images", 8)
    return [found.image(index) for index in range(len(found))]


def make_json(folder: Path) -> None:
    write_json(folder / "a.json", {"a": [1, -2.5, True, None, {"b": "text"}], "c": {"d": [[1, 2], [3]]}, "e": "ä"})


def mend_weights(folder: Path) -> None:
    """New checksums for every model, checkpoint and description of codes below a folder."""
    for path in folder.rglob("*.json"):
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue
        if not isinstance(content, dict) or SEAL not in content:
            continue
        content.pop(SEAL)
        for weights in path.parent.glob("*.safetensors"):
            content["sha256"] = sha256(weights)
        if path.name == "codes.json":
            content.pop("sha256", None)
        path.write_text(json.dumps(content))


LOADERS = [
    Loader(
        "model", lambda folder: snail(num_classes=2).save_pretrained(folder / "m"), lambda f: load_pretrained(f / "m")
    ),
    Loader("pipeline", make_pipeline, load_pipeline),
    Loader("codes", make_codes, load_codes),
    Loader("checkpoint", make_checkpoint, load_state),
    Loader("statistics", make_statistics, load_statistics),
    Loader("foreign .pt", make_foreign, load_foreign),
    Loader("run and project", make_run, load_run, guarded=False),
    Loader("unfinished run", make_unfinished, lambda folder: load_weights(folder / "run"), guarded=False),
    Loader("foreign old .pt", lambda folder: make_foreign(folder, zipped=False), load_foreign, guarded=False),
    Loader("foreign .safetensors", lambda folder: make_foreign(folder, "safetensors"), load_foreign, guarded=False),
    Loader("images", make_images, load_images, guarded=False),
    Loader("JSON", make_json, lambda folder: read_json(folder / "a.json"), guarded=False),
    Loader(
        "prior, mended",
        lambda folder: snail(condition_shapes=((1, 2),), condition_num_codes=(3,)).save_pretrained(folder / "m"),
        lambda folder: load_pretrained(folder / "m"),
        guarded=False,
        mend=mend_weights,
    ),
    Loader(
        "PixelCNN, mended",
        lambda folder: pixelcnn().save_pretrained(folder / "m"),
        lambda folder: load_pretrained(folder / "m"),
        guarded=False,
        mend=mend_weights,
    ),
    Loader("pipeline, mended", make_pipeline, load_pipeline, guarded=False, mend=mend_weights),
    Loader("codes, mended", make_codes, load_codes, guarded=False, mend=mend_weights),
    Loader("checkpoint, mended", make_checkpoint, load_state, guarded=False, mend=mend_weights),
]


# ---- How it is changed


STRANGE: list[Any] = [
    0, 1, -1, 2, 255, 256, 10**6, 2**31, 2**63, 2**70, 10**400, -(2**40), 0.5, -0.0, 1e308, float("inf"), float("nan"),
    True, False, None, "", "x", "1", "\ud800", "\0", [], [0], [[]], {}, {"": 0}, "9" * 5000,
]  # fmt: skip


def change_json(data: bytes, dice: random.Random) -> bytes:
    """One entry of another value, type or sign, missing, doubled, or deep."""
    tree = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    if not places:
        return b"[]"
    node, key = dice.choice(places)
    kind = dice.randrange(8)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node[key], (int, float)):
        node[key] = -node[key] if dice.random() < 0.5 else node[key] + dice.choice([-1, 1, 1e-9])
    elif kind == 2 and isinstance(node, dict):
        node[dice.choice([str(key) + "x", "", str(key).upper()])] = node.pop(key)
    elif kind == 3 and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif kind == 4:
        other, name = dice.choice(places)
        node[key] = copy.deepcopy(other[name])
    elif kind == 5:
        depth = dice.choice([3, 50, 900, 5000])
        mark = json.dumps(f"deep{depth}")
        node[key] = json.loads(mark)
        return json.dumps(tree).replace(mark, "[" * depth + "]" * depth).encode()
    else:
        node[key] = dice.choice(STRANGE)
    try:
        return json.dumps(tree).encode()
    except RecursionError:
        return data


def change_bytes(data: bytes, dice: random.Random) -> bytes:
    """Flipped bits, bytes cut off, left out, put in, overwritten, or copied to elsewhere."""
    if not data:
        return dice.randbytes(8)
    changed = bytearray(data)
    # Headers are where parsers look.
    near = min(len(data), 512) if dice.random() < 0.5 else len(data)
    place = dice.randrange(near)
    size = dice.choice([1, 2, 4, 8, 16, 64, 256])
    kind = dice.randrange(7)
    if kind <= 1:
        for _ in range(dice.choice([1, 1, 1, 2, 4])):
            changed[dice.randrange(near)] ^= 1 << dice.randrange(8)
    elif kind == 2:
        return data[:place]
    elif kind == 3:
        del changed[place : place + size]
    elif kind == 4:
        changed[place:place] = dice.choice([dice.randbytes(size), bytes(size), b"\xff" * size])
    elif kind == 5:
        changed[place : place + size] = dice.choice([dice.randbytes(size), bytes(size), b"\xff" * size, b"9" * size])
    else:
        start = dice.randrange(len(data))
        changed[place : place + size] = data[start : start + size]
    return bytes(changed)


def change_archive(data: bytes, dice: random.Random) -> bytes:
    """A zip archive with one record changed and its checksum brought up to date."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as there, zipfile.ZipFile(made, "w") as archive:
        records = there.infolist()
        chosen = records[0] if dice.random() < 0.7 else dice.choice(records)
        for record in records:
            content = there.read(record)
            archive.writestr(record.filename, change_bytes(content, dice) if record is chosen else content)
    return made.getvalue()


def change_header(data: bytes, dice: random.Random) -> bytes:
    """A safetensors file with one entry of its header changed, and the header's length brought up to date."""
    size = int.from_bytes(data[:8], "little")
    header = change_json(data[8 : 8 + size], dice)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def change(path: Path, data: bytes, loader: Loader, dice: random.Random) -> bytes:
    aware = dice.random() < 0.5
    if aware and path.suffix == ".json":
        return change_json(data, dice)
    if aware and path.suffix == ".safetensors":
        return change_header(data, dice)
    if aware and data[:2] == b"PK" and not loader.guarded:
        return change_archive(data, dice)
    if aware and path.suffix == ".jsonl":
        lines = data.split(b"\n")
        place = dice.randrange(len(lines) - 1)
        lines[place] = change_json(lines[place], dice)
        return b"\n".join(lines)
    return change_bytes(data, dice)


# ---- The run


def attempt(loader: Loader, folder: Path, expected: str) -> tuple[str, str]:
    """What a mutant comes to, and the words of a fault."""

    def too_long(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = digest(loader.load(folder))
    except FastvqError:
        return "refused", ""
    except Hang:
        return "HANG", f"more than {SECONDS} s"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "TRACEBACK", f"{type(error).__name__}: {str(error)[:150]} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if found == expected:
        return "same", ""
    return ("OTHER", "accepted with other contents") if loader.guarded else ("other", "")


def run(mutants: int, seed: int, root: Path, *, only: int | None = None, names: str = "") -> Iterator[str]:
    """Try so many mutants, in turn for each loader; yields a line for each fault."""
    loaders = [loader for loader in LOADERS if names in loader.name]
    originals: list[tuple[Path, dict[Path, bytes], str]] = []
    for place, loader in enumerate(loaders):
        folder = root / str(place)
        folder.mkdir()
        loader.counts.clear()
        torch.manual_seed(0)
        loader.make(folder)
        if loader.mend:
            loader.mend(folder)
        files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        expected = digest(loader.load(folder))
        assert digest(loader.load(folder)) == expected, f"{loader.name}: loads differently each time"
        originals.append((folder, files, expected))
    for number in range(mutants) if only is None else [only]:
        loader = loaders[number % len(loaders)]
        folder, files, expected = originals[number % len(loaders)]
        dice = random.Random(f"{seed} {number}")
        path = dice.choice(list(files))
        path.write_bytes(change(path, files[path], loader, dice))
        if loader.mend:
            loader.mend(folder)
        outcome, words = attempt(loader, folder, expected)
        loader.counts[outcome] += 1
        if outcome in FAULTS:
            yield f"{number}: {loader.name}, {path.relative_to(folder)}: {outcome}: {words}"
        if only is None:
            for name, data in files.items():
                if loader.mend or name == path:
                    name.write_bytes(data)


def table() -> str:
    rows = [[loader.name, sum(loader.counts.values()), *(loader.counts[o] for o in OUTCOMES)] for loader in LOADERS]
    rows.append(["all", *(sum(row[column] for row in rows) for column in range(1, len(OUTCOMES) + 2))])
    lines = [f"{'loader':22}{'tried':>9}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES)]
    lines += [f"{row[0]:22}{row[1]:9}" + "".join(f"{count:11}" for count in row[2:]) for row in rows]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mutant, whose folder is kept")
    parser.add_argument("--loader", default="", help="loaders whose names contain this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    faults = 0
    try:
        for line in run(arguments.mutants, arguments.seed, root, only=arguments.only, names=arguments.loader):
            print(line, flush=True)
            faults += 1
    except KeyboardInterrupt:
        print("interrupted")
    print(table())
    if arguments.only is not None:
        print(root)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
