"""Messages of the command line: a bad value of any option of any command is blamed on that option, as it is typed."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvq.cli import main
from fastvq.cli.names import as_typed, configure
from fastvq.cli.parser import build_parser
from fastvq.data import Digits, extract_codes, save_grid
from fastvq.errors import ArgumentError
from fastvq.models import Classifier, ClassifierConfig, PixelSNAILConfig, preset
from fastvq.sampling import Pipeline, Shard, sample_shard

pytestmark = pytest.mark.usefixtures("steady")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside each other: the shipped digits as a project `my` with codes and a classifier, and a `file`."""
    root = tmp_path_factory.mktemp("work")
    digits, my = Pipeline.from_pretrained("digits"), root / "my"
    digits.vqvae.save_pretrained(my / "vqvae" / "model")
    for level, prior in enumerate(digits.priors):
        prior.save_pretrained(my / f"prior{level}" / "model")
    description = {"data": "digits", "size": [32, 32], "channels": 1, "class_names": list("0123456789")}
    description |= {"skip_broken": False, "flip": False, "shift": 0, "validation": 0.1, "seed": 0}
    (my / "data.json").write_text(json.dumps(description))
    sample_shard(digits, 2, Shard(0, 1), root / "parts", seed=0)
    for part in ("train", "validation"):
        extract_codes(digits.vqvae, Digits(32), torch.arange(20), my / "codes" / part)
    classifier = Classifier(ClassifierConfig(in_channels=1, num_classes=10, channels=(4,), features=4))
    classifier.save_pretrained(my / "classifier" / "model")
    made = root / "made"
    made.mkdir()
    np.save(made / "level0.npy", np.zeros((4, 2, 2), np.int64))
    (made / "codes.json").write_text('{"num_codes": 5}')
    (root / "file").write_text("words")
    for name, side in (("digit", 32), ("larger", 40)):
        save_grid(root / f"{name}.png", -torch.ones(1, 1, side, side), padding=0)
    return root


VQVAE = "train-vqvae --run new --data digits --size 32 --preset tiny --steps 2 --batch-size 4 --warmup 0"
PRIOR = "train-prior --run my --level 0 --preset digits-top --steps 2 --batch-size 4 --warmup 0"
CLASSIFIER = "train-classifier --run my --name other --steps 2 --batch-size 4 --warmup 0"
SAMPLE = "sample --pretrained digits --out new.png -n 1"
INPAINT = "inpaint --pretrained digits --image digit.png --box 8 8 4 4 --out new.png -n 1"
PART = "--shard 0/2 --out new --seed 0"
RECONSTRUCT = "reconstruct --pretrained digits --data digits --out new.png"
EVALUATE = "evaluate my -n 40 --data digits --out new-report --no-curves"
COMMANDS = {
    "demo": "demo --out new",
    "train-vqvae": VQVAE,
    "extract": "extract --run my",
    "import-codes": "import-codes made --run new",
    "train-prior": PRIOR,
    "sample": SAMPLE,
    "inpaint": INPAINT,
    "merge": "merge parts",
    "reconstruct": RECONSTRUCT,
    "train-classifier": CLASSIFIER,
    "evaluate": EVALUATE,
    "plot": "plot my",
    "info": "info",
}
TRAINING = ["--steps 0", "--batch-size 0", "--batch-size -3", "--lr 0", "--lr nan", "--weight-decay -1", "--warmup -1"]
TRAINING += ["--warmup 3", "--ema 1", "--ema -0.5", "--workers -1", "--seed -1", "--log-every 0", "--validate-every 0"]
TRAINING += ["--init-from nowhere", "--checkpoint-every 0", "--seed 9223372036854775808"]
BOTH_STAGES = [*TRAINING, "--grad-clip 0", "--accumulate 0", "--accumulate 3", "--image-every 0", "--preset absent"]
BOTH_STAGES += ["--set num_codes=0", "--set dropout", "--set chanels=3"]
DRAWING = ["--temperature -1", "--temperature nan", "--temperature 1 2 3", "--label 10", "--label ten", "--label 3 ten"]
DRAWING += ["-n 0", "--top-k 0", "--top-k 129", "--top-p 0", "--top-p 2", "--engine gpu"]
DRAWING += ["--precision bfloat16 --engine torch", "--micro-batch 0"]
# The end of a command line; the option whose value is bad is the first one.
BAD: dict[str, list[str]] = {
    "demo": ["--out file", "--label 10", "--label -1", "--seed -1", "--effort 0", "--effort nan"],
    "train-vqvae": [
        *BOTH_STAGES,
        "--run file",
        "--data nowhere",
        "--data file",
        "--size 0",
        "--size 1 2 3",
        "--channels 3",
        "--shift -1",
        "--validation 1",
        "--validation -0.1",
        "--preset tiny-top",
        "--set channels=0",
        "--set in_channels=0",
        "--set strides=(3,)",
        "--cache-images file",
    ],
    "extract": [
        "--shard 1",
        "--run nowhere",
        "--data nowhere",
        "--batch-size 0",
        "--copies 0",
        "--copies 2",
        "--workers -1",
        "--cache-images file",
    ],
    "import-codes": ["--run my", "--validation 1", "--validation -0.1", "--seed -1"],
    "train-prior": [
        *BOTH_STAGES,
        "--run nowhere",
        "--level 2",
        "--level -1",
        "--preset tiny",
        "--set dropout=1",
        "--set attention_heads=3",
        "--set activation=relu",
        "--code-init codebooks --init-from my/prior0/model",
    ],
    "sample": [
        *DRAWING,
        "--out my",
        "--like nowhere",
        "--keep-levels 1",
        "--keep-levels 0 --like digit.png",
        "--keep-levels 2 --like digit.png",
        "--animate new.jpg",
        "--animate new.png",
        "--animate digit.png",
        "--animate new.gif -n 20000",
        "--shard 2/2 --seed 0 --out new",
        "--shard half --seed 0 --out new",
        "--shard env --seed 0 --out new",
        "--images png",
        "--out new.png --shard 0/2 --seed 0",
        f"--temperature -1 {PART}",
        f"--label 10 {PART}",
        f"-n 0 {PART}",
        f"--micro-batch 0 {PART}",
        f"--label 3 10 {PART}",
        f"--like digit.png {PART}",
        f"--keep-levels 1 {PART}",
        f"--animate new.gif {PART}",
    ],
    "inpaint": [
        *DRAWING,
        "--image nowhere",
        "--box 0 0 0 4",
        "--box -1 0 4 4",
        "--box 30 0 4 4",
        "--margin -1",
        "--rounds 0",
        "--out my",
        "--out file.gif",
    ],
    "merge": ["--out file", "--out my", "--out new.png"],
    "reconstruct": ["--data nowhere", "--size 0", "--size 1 2 3", "-n 0", "--out file.gif"],
    "train-classifier": [
        *TRAINING,
        "--run file",
        "--data nowhere",
        "--size 0",
        "--channels 3",
        "--shift -1",
        "--validation 1",
        "--set channels=0",
        "--set dropout=1",
        "--set width=3",
        "--cache-images file",
    ],
    "evaluate": [
        "-n 0",
        "--data nowhere",
        "--temperature 1 2 3",
        "--temperature -1",
        "--classifier nowhere",
        "--classifier my/vqvae",
        "--features nowhere",
        "--inception nowhere",
        "--inception file",
        "--neighbours 0",
        "--vectors 0",
        "--keep 0",
        "--keep 2",
        "--keep 0.01",
        "--accuracy-steps -1",
        "--batch-size 0",
        "--validation 1",
        "--shift -1",
        "--out file",
        "--out my",
        "--from-shards nowhere",
        "--shard half",
        "--shard 0/2",
        "--out new --shard 0/2 --from-shards parts",
        "-n 3 --from-shards parts",
        "--seed 1 -n 2 --from-shards parts",
        "--temperature 0.5 -n 2 --from-shards parts",
    ],
    "plot": ["--out file", "--out my", "--out new.jpg"],
    "info": [
        "--checkpoint nowhere",
        "--pretrained absent",
        "--preset absent",
        "--set channels=0 --preset tiny",
        "--set chanels=3 --preset tiny",
        "--set dropout",
        "--json --preset tiny",
        "--size 20 --preset tiny",
        "--size 1 2 3 --preset tiny",
        "--size 8 --preset tiny-top",
        "--size 0 --preset tiny --train --batch-size 4",
        "--train",
        "--batch-size 4 --preset tiny-top",
        "--batch-size 0 --preset tiny-top --train",
        "--accumulate 3 --preset tiny-top --train --batch-size 4",
        "--ema 1 --preset tiny-top --train --batch-size 4",
        "--processes 0 --preset tiny-top --train --batch-size 4",
    ],
}
WHOLE = {
    "sample": ["--checkpoint nowhere", "--checkpoint .", "--pretrained absent"],
    "inpaint": [
        "--checkpoint nowhere --image digit.png --box 0 0 4 4",
        "--pretrained absent --image digit.png --box 0 0 4 4",
        "--mask nowhere --pretrained digits --image digit.png --out new.png",
        "--mask digit.png --pretrained digits --image digit.png --out new.png",
        "--mask larger.png --pretrained digits --image digit.png --out new.png",
    ],
    "merge": ["nowhere", "."],
    "reconstruct": [
        "--checkpoint nowhere --data digits",
        "--pretrained absent --data digits",
        "--checkpoint my/prior0/model --data digits",
    ],
    "evaluate": ["nowhere", "--pretrained absent --data digits", "my --pretrained digits"],
    "import-codes": ["nowhere --run new", "parts --run new"],
    "plot": ["nowhere", "file", "."],
}
# Options of which every value is one, or whose values argparse checks.
FREE = {
    "help",
    "debug",
    "quiet",
    "overwrite",
    "resume",
    "skip_broken",
    "flip",
    "unconditional",
    "bf16",
    "compile",
    "classes_by",
}
FREE |= {"cuda_graph", "curves", "optimizer", "name", "cache", "changed_data", "weights", "draft", "plain", "paste"}
FREE |= {"dry_run", "classes_by"}
# Of these every integer is a seed.
SAMPLING = ("sample", "inpaint", "evaluate")


def blamed(line: str) -> str:
    """What a bad end of a command line is to be blamed on."""
    first, *values = line.split()
    if first == "--set" and "=" in values[0]:
        return f"--set {values[0].partition('=')[0]}"
    return first if first.startswith("-") else "RUN"


CASES = [(command, f"{COMMANDS[command]} {end}", blamed(end)) for command, ends in BAD.items() for end in ends]
CASES += [(command, f"{command} {end}", blamed(end)) for command, ends in WHOLE.items() for end in ends]
CASES += [
    (command, f"{line} --device abacus", "--device")
    for command, line in COMMANDS.items()
    if command not in ("import-codes", "merge", "plot")
]


@pytest.mark.parametrize(
    ("command", "line", "option"), CASES, ids=[f"{case[0]}: {case[1][len(COMMANDS[case[0]]) :]}" for case in CASES]
)
def test_the_option_is_named(
    command: str,
    line: str,
    option: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(work)
    before = sorted(path.name for path in work.rglob("*"))
    assert main(line.split()) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("fastvq: error: "))
    found = error.removeprefix("fastvq: error: ")
    # Another option can mend these as well, and it is the one named.
    option = {"--set attention_heads": "--set attention_channels", "--channels": "--data"}.get(option, option)
    if option == "RUN":
        option = {"merge": "FOLDER", "import-codes": "SOURCE"}.get(command, option)
    assert found.startswith(f"{option}: "), error
    python = set(build_parser().parse_args([*COMMANDS[command].split()]).options) | {
        "ema_decay",
        "num_workers",
        "max_shift",
    }
    python |= {"learning_rate", "warmup_steps", "run_dir", "validation_fraction", "num_samples"}
    for name in python:
        if "_" in name:
            assert not re.search(rf"(?<![\w/-]){name}(?!\w)", found), error
    assert sorted(path.name for path in work.rglob("*")) == before


def test_every_option_has_a_bad_value() -> None:
    parser = build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert set(commands) == set(COMMANDS)
    for name, command in commands.items():
        ends = [end.split() for end in (*BAD[name], *WHOLE.get(name, []), "--device abacus")]
        typed = {word for end in ends for word in end if word.startswith("-")}
        given = {action.dest for action in command._actions if typed & set(action.option_strings)}
        free = FREE | {"seed"} if name in SAMPLING else FREE
        wanted = {action.dest for action in command._actions if action.option_strings} - free
        assert wanted <= given, name


@pytest.mark.parametrize(
    ("wrong", "closest"),
    [("chanels", "channels"), ("num_code", "num_codes"), ("head", "attention_heads"), ("layers", "layers_per_block")],
)
def test_fields_are_listed_the_closest_first(wrong: str, closest: str) -> None:
    _, template = preset("imagenet256-top")
    with pytest.raises(ArgumentError) as refused:
        configure(template, {wrong: 1})
    head, _, listed = str(refused.value).partition("it has ")
    assert head == f"--set {wrong}: PixelSNAILConfig has no such field; closest first, "
    fields = listed.split(", ")
    assert fields[0] == closest
    assert sorted(fields) == sorted(PixelSNAILConfig.__dataclass_fields__)


TRANSLATED = {
    "plain": ("batch_size: must be at least 1", "--batch-size: must be at least 1"),
    "in-the-text": ("accumulate: batch_size 5 cannot be cut", "--accumulate: --batch-size 5 cannot be cut"),
    "paths-stay": ("root: /data/batch_size/x holds batch_size.txt", "--data: /data/batch_size/x holds batch_size.txt"),
    "words-stay": ("steps: 3 steps of the data", "--steps: 3 steps of the data"),
    "no-argument": ("the data: is none", "the data: is none"),
    "path-first": ("my/vqvae: has no model", "my/vqvae: has no model"),
    "field": ("model_config.in_channels: 1, the data have 3", "--set in_channels: 1, the data have 3"),
    "option-already": ("--set num_codes: must be", "--set num_codes: must be"),
}


@pytest.mark.parametrize(("message", "expected"), TRANSLATED.values(), ids=TRANSLATED)
def test_translation(message: str, expected: str) -> None:
    arguments = build_parser().parse_args(VQVAE.split())
    assert as_typed(message, "train-vqvae", arguments, arguments.options) == expected
