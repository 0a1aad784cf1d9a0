"""Training: the loop, the quantities it reports, and its refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import (
    TOP_CONFIG,
    VQVAE_CONFIG,
    Noise,
    metrics,
    stage1,
    stage2,
    state_tensors,
    train_config,
)

from fastvq.data import CodeDataset, extract_codes, split_indices
from fastvq.errors import (
    ArgumentError,
    ArgumentTypeError,
    CorruptFileError,
    FastvqError,
    MissingFileError,
    UnavailableError,
)
from fastvq.models import VQVAE2, Prior, build
from fastvq.training import DivergedError, TrainConfig, WeightAverage, learning_rate, train_prior, train_vqvae
from fastvq.training import checkpoint as checkpoint_module
from fastvq.training import log as log_module
from fastvq.training.batches import StepBatches
from fastvq.training.stage1 import _Reconstruction

Train = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- The loop


def test_accumulation_equals_the_whole_batch(train: Train, tmp_path: Path, codes: Path) -> None:
    """Without dropout and once codebooks are initialised, parts change nothing but the rounding."""
    plain = dataclasses.replace(VQVAE_CONFIG, codebook_init="normal", revive_below=0.0)
    prior = dataclasses.replace(TOP_CONFIG, dropout=0.0, attention_dropout=0.0)
    weights = []
    for accumulate in (1, 4):
        config = train_config(steps=4, accumulate=accumulate, learning_rate=1e-3)
        if train is stage1:
            model = train_vqvae(Noise(), plain, config, tmp_path / str(accumulate))
        else:
            model = train_prior(codes / "train", 0, prior, config, tmp_path / str(accumulate))
        weights.append(model.state_dict())
    for name, whole in weights[0].items():
        torch.testing.assert_close(weights[1][name], whole, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_codebooks_move_once_per_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = VQVAE2(dataclasses.replace(VQVAE_CONFIG, codebook_init="normal")).train()
    parts = VQVAE2(whole.config).train()
    parts.load_state_dict(whole.state_dict())
    images = Noise().pixels[:8]
    task = _Reconstruction(Noise(), np.arange(20), np.arange(20, 22), VQVAE_CONFIG, train_config(), None)
    with torch.no_grad():
        whole(images)
        with task.accumulation(parts):
            for part in images.split(2):
                parts(part)
    assert all(module.training for module in parts.modules())
    assert not any(module._forward_pre_hooks for module in parts.modules())
    for (name, expected), actual in zip(whole.named_buffers(), parts.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_workers_change_nothing(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "none", train_config(steps=6))
    train(tmp_path / "two", train_config(steps=6, num_workers=2))
    assert state_tensors(tmp_path / "none") == state_tensors(tmp_path / "two")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_image_while_training_is_named(num_workers: int, tmp_path: Path) -> None:
    class Broken(Noise):
        def image(self, index: int) -> torch.Tensor:
            raise CorruptFileError(f"images/{index}.png: truncated")

    with pytest.raises(CorruptFileError) as caught:
        stage1(tmp_path, train_config(num_workers=num_workers), dataset=Broken())
    assert "Traceback" not in str(caught.value)


def test_callers_generators_are_left_alone(train: Train, tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global generator is the subject
    expected = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    train(tmp_path, train_config(steps=3))
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert np.array_equal(np.random.get_state()[1], expected[1])  # noqa: NPY002


def test_result_does_not_depend_on_the_callers_generators(train: Train, tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        train(tmp_path / str(seed), train_config(steps=3))
    assert state_tensors(tmp_path / "1") == state_tensors(tmp_path / "2")


def test_each_epoch_visits_every_row_once() -> None:
    batches = StepBatches(lambda rows, epochs: (), rows=7, batch_size=3, seed=4)
    rows, epochs = (np.concatenate(part) for part in zip(*(batches.rows(s) for s in range(14)), strict=True))
    orders = [rows[epochs == e] for e in range(6)]
    assert [sorted(order) for order in orders] == [list(range(7))] * 6
    assert len({tuple(order) for order in orders}) == 6
    fresh = StepBatches(lambda rows, epochs: (), rows=7, batch_size=3, seed=4)
    assert np.array_equal(fresh.rows(9)[0], rows[27:30])
    assert [batches.epoch(step) for step in (0, 2, 3, 7)] == [0, 0, 1, 3]


def test_batch_larger_than_the_data() -> None:
    rows, epochs = StepBatches(lambda rows, epochs: (), rows=3, batch_size=8, seed=0).rows(1)
    assert sorted(rows[epochs == 3]) == [0, 1, 2]
    assert epochs.tolist() == [2, 3, 3, 3, 4, 4, 4, 5]


def test_weight_average_against_the_formula() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    nn.init.constant_(model[0].weight, 1.0)
    average = WeightAverage(model, decay=0.3)
    expected = 1.0
    for t in range(12):
        nn.init.constant_(model[0].weight, float(t))
        model[1].running_mean.fill_(t)
        average.update(model, t)
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * t
        assert average.model[0].weight[0, 0].item() == pytest.approx(expected, rel=1e-6)
        assert average.model[1].running_mean.item() == t
    assert not average.model.training


def test_learning_rate_values() -> None:
    config = TrainConfig(steps=12, batch_size=1, learning_rate=2.0, warmup_steps=4, final_lr_fraction=0.1)
    rates = [learning_rate(step, config) for step in range(13)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[8] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert rates[12] == pytest.approx(0.2)
    constant = dataclasses.replace(config, final_lr_fraction=1.0, warmup_steps=0)
    assert {learning_rate(step, constant) for step in range(12)} == {2.0}
    all_warmup = dataclasses.replace(config, warmup_steps=12)
    assert learning_rate(11, all_warmup) == 2.0


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_first_steps_against_a_plain_loop(optimizer: str, tmp_path: Path) -> None:
    """The loop's weights equal those of PyTorch's own pieces put together by hand."""
    model_config = dataclasses.replace(VQVAE_CONFIG, codebook_init="normal", revive_below=0.0)
    config = train_config(
        steps=3, accumulate=1, optimizer=optimizer, weight_decay=0.1, grad_clip=0.05, ema_decay=None, betas=(0.8, 0.9)
    )
    dataset = Noise()
    trained = train_vqvae(dataset, model_config, config, tmp_path)

    torch.manual_seed(config.seed)
    model = build(model_config).train()
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam
    reference = kind(model.parameters(), lr=1.0, betas=(0.8, 0.9), weight_decay=0.1)
    training, _ = split_indices(len(dataset), config.validation_fraction, config.seed)
    batches = StepBatches(lambda rows, epochs: (), len(training), config.batch_size, config.seed)
    losses = []
    for step in range(3):
        images = dataset.pixels[training[batches.rows(step)[0]]]
        out = model(images)
        loss = ((out.reconstruction - images) ** 2).mean() + out.commitment_loss
        reference.param_groups[0]["lr"] = learning_rate(step, config)
        reference.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        reference.step()
        losses.append(loss.item())
    assert metrics(tmp_path, "train")[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], expected, rtol=1e-4, atol=1e-6)


def test_bf16_runs_and_stays_close(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "float32", train_config(steps=4))
    train(tmp_path / "bf16", train_config(steps=4, bf16=True))
    losses = [metrics(tmp_path / kind, "train")[0]["loss"] for kind in ("float32", "bf16")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_compiled_forward_pass(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the backend that only captures the graph, so that no compiler is needed, results are the same to the bit."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    train(tmp_path / "compiled", train_config(steps=3, compile=True))
    train(tmp_path / "plain", train_config(steps=3))
    assert metrics(tmp_path / "compiled") == metrics(tmp_path / "plain")


def test_diverged_loss_stops_before_the_update(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cross_entropy, mse = F.cross_entropy, F.mse_loss
    broken = {"on": False}

    def switch(step_batches: StepBatches, step: int) -> Any:
        broken["on"] = step == 6
        return original(step_batches, step)

    original = StepBatches.__getitem__
    monkeypatch.setattr(StepBatches, "__getitem__", switch)
    monkeypatch.setattr(F, "cross_entropy", lambda *a, **k: cross_entropy(*a, **k) * (math.nan if broken["on"] else 1))
    monkeypatch.setattr(F, "mse_loss", lambda *a, **k: mse(*a, **k) * (math.nan if broken["on"] else 1))
    with pytest.raises(DivergedError, match=r"step 7: loss is nan.*step_00000004"):
        train(tmp_path)
    assert issubclass(DivergedError, FastvqError)
    assert [path.name for path in checkpoint_module.checkpoints(tmp_path / "checkpoints")] == ["step_00000004"]


def test_infinite_gradient_stops_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *a: torch.tensor(math.inf))
    with pytest.raises(DivergedError, match="step 1: grad_norm is inf; there is no checkpoint yet"):
        stage1(tmp_path)


def test_images_are_written(tmp_path: Path, codes: Path) -> None:
    stage1(tmp_path / "1", train_config(image_every=5))
    names = [f"reconstructions_{step:08d}.png" for step in (5, 10, 13)]
    assert sorted(path.name for path in (tmp_path / "1" / "images").iterdir()) == names
    seen = []

    def sample(prior: Prior, step: int) -> torch.Tensor:
        assert not prior.training
        seen.append(step)
        return torch.rand(4, 1, 8, 8)  # draws from the global generator, which must not disturb training

    stage2(codes, tmp_path / "2", train_config(image_every=5), sample_images=sample)
    stage2(codes, tmp_path / "3", train_config(image_every=5))
    assert seen == [5, 10, 13]
    assert (tmp_path / "2" / "images" / "samples_00000010.png").is_file()
    assert state_tensors(tmp_path / "2") == state_tensors(tmp_path / "3")


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage1(tmp_path / "with", train_config(steps=2))
    assert list((tmp_path / "with" / "logs").glob("events.out.tfevents.*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="TensorBoard is not installed"):
        stage1(tmp_path / "without", train_config(steps=2))
    assert [path.name for path in (tmp_path / "without" / "logs").iterdir()] == [log_module.METRICS]
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage1(tmp_path, train_config(steps=2), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err


# ---- What is reported


def test_reconstruction_metrics_by_hand(tmp_path: Path) -> None:
    dataset = Noise()
    config = train_config(validation_fraction=0.3)
    model = stage1(tmp_path, config, dataset=dataset)
    _, validation = split_indices(len(dataset), 0.3, config.seed)
    assert len(validation) == 7
    images = dataset.pixels[validation]
    with torch.no_grad():
        out = model(images)
    last = metrics(tmp_path, "validation")[-1]
    mse = float(((out.reconstruction - images).double() ** 2).mean())
    assert last["mse"] == pytest.approx(mse, rel=1e-5)
    assert last["psnr"] == pytest.approx(10 * math.log10(2**2 / mse), rel=1e-5)
    for level, codes in enumerate(out.codes):
        share = np.bincount(codes.numpy().ravel(), minlength=8) / codes.numel()
        used = share[share > 0]
        assert last[f"perplexity_{level}"] == pytest.approx(math.exp(-(used * np.log(used)).sum()))
        assert last[f"usage_{level}"] == len(used) / 8
    assert [line["step"] for line in metrics(tmp_path, "validation")] == [2, 4, 6, 8, 10, 12, 13]
    assert [line["step"] for line in metrics(tmp_path, "train")] == [3, 6, 9, 12, 13]


def test_no_validation_when_nothing_is_held_out(tmp_path: Path, codes: Path) -> None:
    stage1(tmp_path / "1", train_config(steps=3, validation_fraction=0.0))
    stage2(codes, tmp_path / "2", train_config(steps=3), validation_folder=None)
    for stage in ("1", "2"):
        assert {line["split"] for line in metrics(tmp_path / stage)} == {"train"}


def test_likelihood_of_a_uniform_prior_is_log_k(tmp_path: Path, codes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prior, "forward", lambda self, codes, *rest: _uniform_logits(self, codes))
    stage2(codes, tmp_path, train_config(steps=1, warmup_steps=0, learning_rate=1e-30, grad_clip=None))
    last = metrics(tmp_path, "validation")[-1]
    assert last["nll"] == pytest.approx(math.log(8), rel=1e-6)
    assert last["bits"] == pytest.approx(3.0, rel=1e-6)
    assert metrics(tmp_path, "train")[-1]["loss"] == pytest.approx(math.log(8), rel=1e-6)


def _uniform_logits(prior: Prior, codes: torch.Tensor) -> torch.Tensor:
    zero = sum(parameter.sum() * 0 for parameter in prior.parameters())
    return torch.full((len(codes), 8, 2, 2), 1.5) + zero


def test_likelihood_by_hand(tmp_path: Path, codes: Path) -> None:
    prior = stage2(codes, tmp_path)
    data = CodeDataset(codes / "validation")
    grid = data.codes(0, slice(None))
    assert data.labels is not None
    with torch.no_grad():
        probabilities = prior(grid, label=data.labels).double().softmax(1)
    nats = -probabilities.gather(1, grid[:, None]).log().mean()
    assert metrics(tmp_path, "validation")[-1]["nll"] == pytest.approx(float(nats), rel=1e-5)


def test_bottom_prior_sees_the_level_above(tmp_path: Path, codes: Path) -> None:
    config = dataclasses.replace(
        TOP_CONFIG, shape=(4, 4), level=1, condition_shapes=((2, 2),), condition_num_codes=(8,), num_classes=None
    )
    prior = train_prior(codes / "train", 1, config, train_config(), tmp_path)
    data = CodeDataset(codes / "train")
    above, grid = data.codes(0, slice(0, 2)), data.codes(1, slice(0, 2))
    assert not torch.equal(prior(grid, above), prior(grid, (above + 1) % 8))


# ---- Refusals


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("steps", 0, ArgumentError),
        ("steps", 2.5, ArgumentTypeError),
        ("batch_size", -1, ArgumentError),
        ("learning_rate", 0, ArgumentError),
        ("learning_rate", math.nan, ArgumentError),
        ("learning_rate", "fast", ArgumentTypeError),
        ("optimizer", "sgd", ArgumentError),
        ("betas", (0.9, 1.0), ArgumentError),
        ("betas", 0.9, ArgumentTypeError),
        ("weight_decay", -0.1, ArgumentError),
        ("warmup_steps", 14, ArgumentError),
        ("final_lr_fraction", 1.1, ArgumentError),
        ("grad_clip", 0.0, ArgumentError),
        ("ema_decay", 1.0, ArgumentError),
        ("bf16", 1, ArgumentTypeError),
        ("compile", "yes", ArgumentTypeError),
        ("accumulate", 3, ArgumentError),
        ("seed", -1, ArgumentError),
        ("seed", 2**63, ArgumentError),
        ("validation_fraction", 1.0, ArgumentError),
        ("log_every", 0, ArgumentError),
        ("image_every", 0, ArgumentError),
        ("validate_every", 0, ArgumentError),
        ("checkpoint_every", 0, ArgumentError),
        ("keep_checkpoints", 0, ArgumentError),
        ("num_workers", -1, ArgumentError),
        ("device", "gpu", ArgumentError),
    ],
)
def test_bad_settings_name_their_field(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{field}:"):
        train_config(**{field: value})


def test_settings_survive_json() -> None:
    config = train_config(betas=(0.5, 0.6), grad_clip=None)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ArgumentError, match=r"unknown fields \['stepz'\], missing fields \['steps'\]"):
        TrainConfig.from_dict({"stepz": 1, "batch_size": 2})


def test_devices_that_are_not_there(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="no CUDA device"):
        train(tmp_path / "run", train_config(device="cuda"))
    with pytest.raises(ArgumentError, match="device: expected 'cpu' or 'cuda'"):
        train(tmp_path / "run", train_config(device="mps"))
    assert not (tmp_path / "run").exists()


def test_images_that_do_not_fit_the_model(tmp_path: Path) -> None:
    class Odd(Noise):
        size = (8, 6)

    class Colour(Noise):
        channels = 3

    for dataset, message in ((Odd(), "multiples of 4"), (Colour(), "in_channels: 1, the data have 3")):
        with pytest.raises(ArgumentError, match=message):
            stage1(tmp_path / "run", dataset=dataset)
    with pytest.raises(ArgumentError, match="leaves nothing to train on"):
        stage1(tmp_path / "run", dataset=Noise(1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (4, 4)}, r"model_config.shape: \(4, 4\), but codes_folder .* needs \(2, 2\)"),
        ({"num_codes": 9}, "model_config.num_codes: 9"),
        ({"num_classes": 10}, "model_config.num_classes: 10"),
        ({"level": 1}, "model_config.level: 1"),
        ({"condition_shapes": ((1, 1),), "condition_num_codes": (8,)}, "model_config.condition_shapes"),
    ],
)
def test_codes_that_do_not_fit_the_prior(changes: dict[str, Any], message: str, codes: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        train_prior(codes / "train", 0, dataclasses.replace(TOP_CONFIG, **changes), train_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_codes_that_do_not_fit(codes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ArgumentError, match=r"level: .* holds levels 0..1, got 2"):
        train_prior(codes / "train", 2, TOP_CONFIG, train_config(), run)
    with pytest.raises(MissingFileError, match=r"codes.json"):
        train_prior(tmp_path, 0, TOP_CONFIG, train_config(), run)
    torch.manual_seed(1)
    other = extract_codes(build(VQVAE_CONFIG).eval(), Noise(), [0, 1], tmp_path / "other")
    with pytest.raises(ArgumentError, match="different stage-1 models"):
        train_prior(codes / "train", 0, TOP_CONFIG, train_config(), run, validation_folder=other)

    class Unlabelled(Noise):
        num_classes = None  # type: ignore[assignment]
        class_names = ()  # type: ignore[assignment]

        def __init__(self) -> None:
            super().__init__()
            self.labels = None

    unlabelled = extract_codes(build(VQVAE_CONFIG).eval(), Unlabelled(), [0, 1], tmp_path / "unlabelled")
    with pytest.raises(ArgumentError, match="have no labels"):
        train_prior(unlabelled, 0, TOP_CONFIG, train_config(), run)
    assert not run.exists()
