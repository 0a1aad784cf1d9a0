"""What pages take for granted: files in the folder where their blocks run, and names."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from foreign_models import ForeignSnail, ForeignVQVAE, randomise
from foreign_pixelcnn import ForeignPixelCNN, foreign_sequence
from foreign_quantizers import Quantize
from page_blocks import Work
from PIL import Image
from torch import Tensor, nn

from fastvq import Pipeline, evaluation, training
from fastvq.evaluation import FeatureExtractor, score_shard
from fastvq.sampling import Shard, sample_shard


def _set(**fields: int) -> str:
    return " ".join(f"--set {name}={value}" for name, value in fields.items())


# What makes the commands for photographs a matter of seconds.
_TRAINING = "--steps 2 --batch-size 2 --warmup 0 --quiet --device cpu"
_WIDTHS = {"channels": 8, "residual_channels": 8}
SMALL = {
    "train-vqvae": f"{_TRAINING} --validation 0.25 {_set(**_WIDTHS, num_codes=16, code_dim=4)}",
    "extract": "--quiet --device cpu",
    "train-prior": f"{_TRAINING} {_set(**_WIDTHS, condition_channels=8, condition_blocks=1, blocks=1)}",
    "sample": "-n 2 --quiet --device cpu",
    "reconstruct": "-n 2 --device cpu",
    "info": "--device cpu",
}


def photographs(work: Work) -> dict[str, Any]:
    """A folder of eight pictures of two classes."""
    numbers = np.random.default_rng(0)
    for name in ("hills", "sea"):
        (work.folder / "photos" / name).mkdir(parents=True)
        for index in range(4):
            pixels = numbers.integers(0, 256, (72, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(work.folder / "photos" / name / f"{index}.jpg")
    return {}


def models_of_the_port(work: Work) -> dict[str, Any]:
    theirs = randomise(ForeignSnail(channel=16, heads=8, spelling="new"))
    torch.save(theirs.state_dict(), work.folder / "pixelsnail_bottom.pt")
    torch.save(randomise(ForeignVQVAE()).state_dict(), work.folder / "vqvae.pt")
    torch.save(foreign_sequence().state_dict(), work.folder / "pixelcnn.pt")
    return {"their_pixelsnail": theirs}


def own_models(work: Work) -> dict[str, Any]:
    """A prior and an autoencoder's quantiser of other projects."""
    return {"my_prior": ForeignPixelCNN(512, 4, 1).eval(), "model": nn.Sequential(nn.Linear(3, 4), Quantize(4, 6))}


class _Means(nn.Module):
    """Four features of an image of one channel: the means of its quarters."""

    num_features = 4

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def own_features(work: Work) -> dict[str, Any]:
    """A network; and `evaluate` looks at fewer images than it is told to."""
    evaluate = evaluation.evaluate

    def smaller(pipeline: Any, images: Any, training: Any, validation: Any, config: Any, **options: Any) -> Any:
        config = dataclasses.replace(config, samples=min(config.samples, 40))
        return evaluate(pipeline, images, training[:60], validation[:20], config, **options)

    work.patch.setattr(evaluation, "evaluate", smaller)
    return {"my_network": _Means()}


class _Judge(nn.Module):
    """Sure that an image is of one of ten classes, each of which is as likely as another."""

    def forward(self, images: Tensor) -> Tensor:
        classes = (images.abs().sum((1, 2, 3)) * 1000).long() % 10
        return nn.functional.one_hot(classes, 10) * 20.0


def judge(work: Work) -> dict[str, Any]:
    return {"classifier": _Judge()}


def drawn_in_parts(work: Work) -> dict[str, Any]:
    """40 samples in eight parts, and the features of all but one."""
    pipeline, extractor = Pipeline.from_pretrained("digits"), FeatureExtractor(_Means(), name="my network")
    for index in range(8):
        sample_shard(pipeline, 40, Shard(index, 8), "my-samples", seed=0)
    for index in range(8):
        if index != 3:
            score_shard(pipeline, "my-samples", extractor, Shard(index, 8))
    return {}


def few_steps(work: Work) -> dict[str, Any]:
    """Runs end after two steps, whatever they are told."""
    config = training.TrainConfig
    work.patch.setattr(training, "TrainConfig", lambda **given: config(**{**given, "steps": 2}))
    return {}
