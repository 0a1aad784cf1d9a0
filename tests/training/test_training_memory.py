"""Memory of training, counted without allocating it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import PRESETS, ClassifierConfig, GatedPixelCNNConfig, build
from fastvq.training import TrainConfig, TrainingMemory, training_memory

_FLOAT = 4


def memory_of(preset: str, batch: int, size: tuple[int, int] | None = None, **rest: Any) -> TrainingMemory:
    processes = rest.pop("processes", 1)
    config = TrainConfig(steps=1, batch_size=batch, **rest)
    return training_memory(PRESETS[preset][1], config, image_size=size, processes=processes)


@functools.cache
def pixelcnn(batch: int, **rest: Any) -> TrainingMemory:
    return memory_of("tiny-pixelcnn", batch, **rest)


def test_bytes_of_what_stays_are_exact() -> None:
    found = memory_of("tiny", 4, (32, 32))
    model = build(PRESETS["tiny"][1])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parameters = list(model.parameters())
    assert found.parameters == sum(p.numel() for p in parameters)
    assert found.gradients == sum(p.nbytes for p in parameters)
    assert found.weights == found.gradients + sum(buffer.nbytes for buffer in model.buffers())
    assert found.average == found.weights
    assert found.optimizer == sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    stays = found.weights + found.optimizer + found.average + found.batch
    assert found.peak >= stays + found.activations


def test_activations_of_a_network_counted_by_hand() -> None:
    batch, height, width, channels, features, classes = 3, 8, 6, 4, 5, 7
    model = ClassifierConfig(in_channels=1, num_classes=classes, channels=(channels,), features=features)
    found = training_memory(model, TrainConfig(steps=1, batch_size=batch), image_size=(height, width))
    # Group norms keep their input and two numbers per group, of which there are as many as channels; ReLUs their
    # output. The second convolution halves the sides.
    images = 2 * channels * (height * width + height * width // 4)
    statistics = 2 * 2 * channels
    # Linear layers keep their inputs, the softmax its output.
    vectors = channels + features + classes
    # The loss, the weight it is divided by, and the accuracy.
    scalars = 3
    assert found.activations == _FLOAT * (batch * (images + statistics + vectors) + scalars)
    assert found.batch == batch * (_FLOAT * height * width + 8)


def test_activations_grow_with_the_batch_alone() -> None:
    one, two, three = (pixelcnn(count) for count in (8, 16, 24))
    assert two.activations - one.activations == three.activations - two.activations > 0
    assert two.batch == 2 * one.batch
    for name in ("parameters", "weights", "gradients", "optimizer", "average"):
        assert getattr(one, name) == getattr(three, name)
    # The largest of the shares is 16.
    divided = pixelcnn(46, processes=3, accumulate=2)
    assert (divided.activations, divided.batch) == (one.activations, two.batch)
    assert (one.buckets, divided.buckets) == (0, one.gradients)


def test_bf16_halves_activations_and_nothing_that_stays() -> None:
    wide, short = pixelcnn(16), pixelcnn(16, bf16=True, ema_decay=None)
    # Sums of residual blocks, the loss and the indices of look-ups stay as wide as they are.
    assert 0.5 < short.activations / wide.activations < 0.8
    assert (short.weights, short.gradients, short.optimizer) == (wide.weights, wide.gradients, wide.optimizer)
    assert short.average == 0


@pytest.mark.parametrize(
    ("preset", "batch", "options", "message"),
    [
        ("tiny", 4, {}, "image_size: this model's memory depends on the size of its images"),
        ("tiny", 4, {"size": (30, 32)}, "image_size: expected positive multiples of 8, got 30 x 32"),
        ("tiny-top", 4, {"size": (8, 8)}, r"image_size: a prior's grids are its own, \(2, 2\); got \(8, 8\)"),
        ("tiny-top", 4, {"processes": 0}, "processes: must be at least 1, got 0"),
    ],
    ids=["no size", "size", "a prior's size", "no processes"],
)
def test_mistakes_are_named(preset: str, batch: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        memory_of(preset, batch, **options)


def test_other_models_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="model_config: expected that of an autoencoder, a classifier or a p"):
        training_memory(TrainConfig(steps=1, batch_size=1), TrainConfig(steps=1, batch_size=1))


def test_nothing_without_values_stays_behind() -> None:
    config = GatedPixelCNNConfig(shape=(3, 5), num_codes=7, channels=8, layers=1, output_channels=8)
    training_memory(config, TrainConfig(steps=1, batch_size=2))
    model = build(config)
    loss = model(torch.zeros(2, 3, 5, dtype=torch.int64)).square().mean()
    loss.backward()
    assert all(type(p.grad) is torch.Tensor for p in model.parameters())
