"""The Python of the README, run as it stands; what it takes for granted is laid out beforehand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import ForeignSnail, ForeignVQVAE, randomise
from foreign_pixelcnn import ForeignPixelCNN, foreign_sequence
from foreign_quantizers import Quantize
from torch import nn

import fastvq
from fastvq.models import Classifier, ClassifierConfig
from fastvq.sampling import Pipeline

pytestmark = pytest.mark.usefixtures("steady")

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def trained_project(folder: Path) -> dict[str, Any]:
    """What the commands of the README leave: the shipped digits as a project, with a classifier."""
    digits = Pipeline.from_pretrained("digits")
    digits.vqvae.save_pretrained(folder / "my" / "vqvae" / "model")
    for level, prior in enumerate(digits.priors):
        prior.save_pretrained(folder / "my" / f"prior{level}" / "model")
    names = [str(index) for index in range(10)]
    (folder / "my" / "data.json").write_text(json.dumps({"class_names": names}))
    classifier = Classifier(ClassifierConfig(in_channels=1, num_classes=10, channels=(8,), features=8))
    classifier.save_pretrained(folder / "my" / "classifier" / "model")
    return {}


def models_of_the_port(folder: Path) -> dict[str, Any]:
    theirs = randomise(ForeignSnail(channel=16, heads=8, spelling="new"))
    torch.save(theirs.state_dict(), folder / "pixelsnail_bottom.pt")
    torch.save(randomise(ForeignVQVAE()).state_dict(), folder / "vqvae.pt")
    torch.save(foreign_sequence().state_dict(), folder / "pixelcnn.pt")
    return {"their_pixelsnail": theirs}


def own_prior(folder: Path) -> dict[str, Any]:
    return {"my_prior": ForeignPixelCNN(512, 4, 1).eval()}


# By a word of the block: what it needs, and what it has to give.
NEEDS: dict[str, tuple[Callable[[Path], dict[str, Any]], dict[str, Callable[[Any], bool]]]] = {
    "digits.sample": (
        lambda folder: {},
        {
            "out": lambda out: out.images.shape == (8, 1, 32, 32),
            "images": lambda images: images.shape == (8, 1, 32, 32),
            "logits": lambda logits: logits.shape == (2, 512, 32, 32),
            "loss": lambda loss: loss.shape == () and bool(loss > 0),
            "drawn": lambda drawn: drawn.shape == (8, 4, 4),
        },
    ),
    "fastvq.explain": (lambda folder: {}, {}),
    "VectorQuantizer(": (
        lambda folder: {},
        {
            "out": lambda out: out.codes.shape == (8, 32, 32),
            "indices": lambda indices: indices.shape == (65536,),
            "counts": lambda counts: int(counts.sum()) == 65536,
        },
    ),
    "causal_attention(": (
        lambda folder: {},
        {"y": lambda y: y.shape == (8, 256, 32, 32), "found": lambda found: found.shape == (8, 4, 1024, 64)},
    ),
    "fastvq.accelerate": (
        lambda folder: {"model": nn.Sequential(nn.Linear(3, 4), Quantize(4, 6))},
        {"model": lambda model: [one.accelerated for one in fastvq.acceleration(model).quantizers] == [True]},
    ),
    "my_prior": (
        own_prior,
        {"codes": lambda codes: codes.shape == (8, 32, 32) and codes.unique().numel() > 100},
    ),
    "fastvq.interop": (
        models_of_the_port,
        {
            "codes": lambda codes: codes.shape == (8, 4, 6),
            "prior": lambda prior: type(prior).__name__ == "PixelCNN",
            "vqvae": lambda vqvae: type(vqvae).__name__ == "VQVAE2",
        },
    ),
    "sample_with_rejection": (
        trained_project,
        {"best": lambda best: best.images.shape == (64, 1, 32, 32) and best.labels.tolist() == [7] * 64},
    ),
}


def test_every_block_is_run() -> None:
    assert [[word for word in NEEDS if word in block] for block in BLOCKS] == [[word] for word in NEEDS]


@pytest.mark.parametrize("word", NEEDS)
def test_a_block_runs_as_it_stands(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, results = NEEDS[word]
    monkeypatch.chdir(tmp_path)
    names = prepare(tmp_path)
    exec(compile(next(block for block in BLOCKS if word in block), f"README.md, {word}", "exec"), names)
    for name, holds in results.items():
        assert holds(names[name]), name
    if word == "fastvq.explain":
        printed = capsys.readouterr().out
        for part in ("levels per position", "FLOP", "of weights", "memory", "times less"):
            assert part in printed
