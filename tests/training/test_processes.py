"""Several processes train what one trains, from the same batches, and end together."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from group_helpers import Ended, run_group
from helpers import refuses
from torch import Tensor
from training_helpers import TOP_CONFIG, VQVAE_CONFIG, Noise, before, files, make_codes, metrics, stage1, train_config

from fastvq import distributed
from fastvq.data import Augment
from fastvq.distributed import Group, join
from fastvq.errors import ArgumentError, CorruptFileError, UnavailableError
from fastvq.models import build
from fastvq.models.classifier import ClassifierConfig
from fastvq.training import TrainConfig, train_prior, train_vqvae
from fastvq.training import checkpoint as checkpoint_module
from fastvq.training import stage1 as stage1_module
from fastvq.training.batches import StepBatches
from fastvq.training.classifier import train_classifier
from fastvq.training.loop import resolve_device

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch is built without gloo"),
]

PRIOR = dataclasses.replace(TOP_CONFIG, dropout=0.0, attention_dropout=0.0)
STARTED = dataclasses.replace(VQVAE_CONFIG, codebook_init="kmeans", revive_below=0.9)
AUGMENT = Augment(max_shift=1, horizontal_flip=True)
CLASSIFIER = ClassifierConfig(in_channels=1, num_classes=3, channels=(8,), features=8)
# Weights move by up to 50 x 1e-3 in these runs; differences of rounding stay four orders of magnitude below that.
BOUND = 5e-6
# Their gradient is zero in exact arithmetic, as GroupNorm and softmax take them out again, and Adam scales up what
# rounding leaves of it.
WITHOUT_EFFECT = ("body.0.bias", "body.3.bias", "attention.key.bias")


def short(steps: int, **changes: Any) -> TrainConfig:
    settings = {"accumulate": 1, "learning_rate": 1e-3, "checkpoint_every": None, "batch_size": 6}
    return train_config(**{**settings, "steps": steps, **changes})


def scenarios(codes: Path) -> dict[str, Callable[[Path], Any]]:
    """Batches of 6 give three processes or more unequal shares; of 2 some of four processes have none."""
    prior: dict[str, Any] = {"validation_folder": codes / "validation"}
    return {
        "kmeans-revival": lambda run: train_vqvae(Noise(), STARTED, short(50), run, augment=AUGMENT),
        "few": lambda run: train_vqvae(Noise(), VQVAE_CONFIG, short(6, batch_size=2, validate_every=4), run),
        "parts": lambda run: train_vqvae(Noise(), STARTED, short(6, accumulate=3), run),
        "prior": lambda run: train_prior(codes / "train", 0, PRIOR, short(50, checkpoint_every=25), run, **prior),
        "prior-parts": lambda run: train_prior(codes / "train", 0, PRIOR, short(6, accumulate=2), run, **prior),
        "classifier": lambda run: train_classifier(
            Noise(), CLASSIFIER, short(10, validation_fraction=0.2, validate_every=3), run, augment=AUGMENT
        ),
    }


@pytest.fixture(scope="module")
def forkable() -> Iterator[None]:
    """One thread, as forked processes have, for what is made once for all tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def codes(forkable: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_codes(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, codes: Path) -> Path:
    """What one process makes of all scenarios."""
    folder = tmp_path_factory.mktemp("alone")
    for name, train in scenarios(codes).items():
        train(folder / name)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def together(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, codes: Path, alone: Path
) -> Path:
    """What several processes make of them, each joining anew in each run; and a run of one process that goes on."""
    folder = tmp_path_factory.mktemp(f"together{request.param}")
    shutil.copytree(alone / "prior", folder / "resumed", ignore=shutil.ignore_patterns("model", "step_00000050"))

    def work(rank: int) -> None:
        for name, train in scenarios(codes).items():
            model = train(folder / name)
            torch.save(model.state_dict(), folder / f"{name}-{rank}.pt")
        config = short(50, checkpoint_every=25)
        train_prior(
            codes / "train", 0, PRIOR, config, folder / "resumed", validation_folder=codes / "validation", resume=True
        )

    require_ended_well(run_group(request.param, folder / "said", work, 200))
    return folder


def require_ended_well(ended: list[Ended]) -> None:
    assert all(one.status == 0 for one in ended), "\n\n".join(one.errors for one in ended)


def weights(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


def require_same_weights(run: Path, other: Path) -> None:
    there, here = weights(run), weights(other)
    assert there.keys() == here.keys()
    for name, tensor in there.items():
        if not name.endswith(WITHOUT_EFFECT):
            torch.testing.assert_close(here[name], tensor, rtol=0, atol=BOUND, msg=lambda m, n=name: f"{n}: {m}")


SCENARIOS = tuple(scenarios(Path()))


@pytest.mark.parametrize("name", SCENARIOS)
def test_any_number_of_processes_trains_the_same_weights(alone: Path, together: Path, name: str) -> None:
    require_same_weights(alone / name, together / name)
    states = [torch.load(path, weights_only=True) for path in sorted(together.glob(f"{name}-?.pt"))]
    assert len(states) in (2, 4)
    for state in states[1:]:
        assert all(torch.equal(tensor, state[field]) for field, tensor in states[0].items())


@pytest.mark.parametrize("name", SCENARIOS)
def test_logs_are_of_all_processes(alone: Path, together: Path, name: str) -> None:
    """Loss, perplexity, validation: not those of one share."""
    there, here = metrics(alone / name), metrics(together / name)
    assert len(there) == len(here) > 1
    for line, other in zip(there, here, strict=True):
        assert line.keys() == other.keys()
        for field, value in line.items():
            assert other[field] == (pytest.approx(value, rel=2e-5, abs=1e-6) if isinstance(value, float) else value)


def test_counts_of_codes_are_exact(alone: Path, together: Path) -> None:
    """The averages of use are sums of integers times powers of the decay, the same wherever vectors were counted."""
    for level in (0, 1):
        name = f"quantizers.{level}.cluster_size"
        assert torch.equal(weights(alone / "few")[name], weights(together / "few")[name])


def test_a_run_goes_on_with_another_number_of_processes(alone: Path, together: Path) -> None:
    require_same_weights(alone / "prior", together / "resumed")
    there, here = metrics(alone / "prior"), metrics(together / "resumed")
    assert [line["step"] for line in there] == [line["step"] for line in here]


def test_only_the_first_process_writes(alone: Path, together: Path) -> None:
    for name in SCENARIOS:
        kinds = [sorted(path for path in files(folder / name)) for folder in (alone, together)]
        assert kinds[0] == kinds[1]
    assert not list(together.rglob(".*"))


# ---- How groups end


class Broken(Noise):
    """The processes of odd numbers cannot read one of the images."""

    def image(self, index: int) -> Tensor:
        if index == 7 and int(os.environ["RANK"]) % 2:
            raise CorruptFileError("photos/7.png: damaged")
        return super().image(index)


def test_what_fails_on_one_process_ends_all_with_its_message(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        stage1(tmp_path / "run", train_config(validation_fraction=0.0, accumulate=1), dataset=Broken())

    first, second = run_group(2, tmp_path / "said", work)
    assert (first.status, second.status) == (1, 1)
    assert "PeerError: process 1: photos/7.png: damaged" in first.errors
    assert "CorruptFileError: photos/7.png: damaged" in second.errors
    kept = checkpoint_module.checkpoints(tmp_path / "run" / "checkpoints")
    assert f"finished steps are in {kept[-1]}; mend the data and resume" in first.errors
    model = stage1(tmp_path / "run", train_config(validation_fraction=0.0, accumulate=1), resume=True, dataset=Noise())
    whole = stage1(tmp_path / "whole", train_config(validation_fraction=0.0, accumulate=1))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, number: int
) -> None:
    def work(own: int) -> None:
        if own == rank:
            action = before(StepBatches.__getitem__, 3, lambda: [signal.raise_signal(number) for _ in range(2)])
            monkeypatch.setattr(StepBatches, "__getitem__", action)
        train_vqvae(Noise(), STARTED, short(8), tmp_path / "run")

    ended = run_group(2, tmp_path / "said", work)
    assert [one.status for one in ended] == [130, 130], ended
    assert checkpoint_module.checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_00000004"
    train_vqvae(Noise(), STARTED, short(8), tmp_path / "run", resume=True)
    train_vqvae(Noise(), STARTED, short(8), tmp_path / "whole")
    require_same_weights(tmp_path / "whole", tmp_path / "run")


def test_a_process_that_dies_leaves_none_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            kill = before(StepBatches.__getitem__, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
            monkeypatch.setattr(StepBatches, "__getitem__", kill)
        train_vqvae(Noise(), STARTED, short(8, checkpoint_every=2), tmp_path / "run")

    first, second = run_group(2, tmp_path / "said", work)
    assert second.status == -signal.SIGKILL
    assert first.status == 1
    assert "PeerError: another process of the group has ended or cannot be reached" in first.errors
    train_vqvae(Noise(), STARTED, short(8, checkpoint_every=2), tmp_path / "run", resume=True)
    train_vqvae(Noise(), STARTED, short(8), tmp_path / "whole")
    require_same_weights(tmp_path / "whole", tmp_path / "run")


def test_models_begin_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and buffers are the first process's, wherever those of the others come from."""
    model, config = dataclasses.replace(VQVAE_CONFIG, codebook_init="normal"), short(3)

    def work(rank: int) -> None:
        def other(config: Any) -> Any:
            model = build(config)
            if rank:
                with torch.no_grad():
                    for tensor in model.state_dict().values():
                        tensor.add_(1)
            return model

        monkeypatch.setattr(stage1_module, "build", other)
        train_vqvae(Noise(), model, config, tmp_path / "run")

    require_ended_well(run_group(2, tmp_path / "said", work))
    train_vqvae(Noise(), model, config, tmp_path / "alone")
    require_same_weights(tmp_path / "alone", tmp_path / "run")


def test_dropout_differs_between_processes_and_goes_on(tmp_path: Path, codes: Path) -> None:
    """Masks of their own, and after an interruption those of a run that nothing interrupted."""
    config = short(6, checkpoint_every=3)

    def masks(rank: int) -> None:
        with join() as group:
            for name in ("whole", "resumed"):
                for resume in (False, True) if name == "resumed" else (False,):
                    run = tmp_path / name
                    train_prior(codes / "train", 0, TOP_CONFIG, config, run, resume=resume)
                    group.agree()  # until then the other may still be reading the model
                    with group.together():
                        if group.first and name == "resumed" and not resume:
                            shutil.rmtree(run / "model")
                            shutil.rmtree(run / "checkpoints" / "step_00000006")

    require_ended_well(run_group(2, tmp_path / "said", masks))
    whole, resumed = (files(tmp_path / name)["model/model.safetensors"] for name in ("whole", "resumed"))
    assert whole == resumed
    train_prior(codes / "train", 0, TOP_CONFIG, config, tmp_path / "alone")
    assert any((weights(tmp_path / "alone")[n] != t).any() for n, t in weights(tmp_path / "whole").items())


def test_processes_must_train_the_same_run(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        train_vqvae(Noise(seed=rank), VQVAE_CONFIG, short(2), tmp_path / "run")

    first, second = run_group(2, tmp_path / "said", work)
    assert (first.status, second.status) == (1, 1)
    for ended in (first, second):
        assert "the processes of a group must train the same run" in ended.errors
        assert "data.fingerprint: 'noise-22-0' there, 'noise-22-1' now" in ended.errors
    assert not (tmp_path / "run").exists()


def test_a_group_of_the_caller_stays(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        train_vqvae(Noise(), VQVAE_CONFIG, short(2), tmp_path / "run")
        assert dist.is_initialized()
        everyone = torch.ones(())
        dist.all_reduce(everyone)
        assert everyone == 2
        # By itself, whoever else is there.
        if rank == 0:
            with distributed.alone():
                train_classifier(Noise(), CLASSIFIER, short(2), tmp_path / "classifier")

    require_ended_well(run_group(2, tmp_path / "said", work))


def test_the_command_says_once_what_is_wrong(tmp_path: Path) -> None:
    from fastvq.cli import main

    def work(rank: int) -> int:
        # The second process does not find the images.
        data = "digits" if rank == 0 else str(tmp_path / "nowhere")
        options = ["--size", "8", "--preset", "tiny", "--set", "in_channels=1", "--steps", "2", "--batch-size", "4"]
        return main(["train-vqvae", "--run", str(tmp_path / "my"), "--data", data, *options])

    first, second = run_group(2, tmp_path / "said", work)
    assert (first.status, second.status) == (1, 1)
    assert f"fastvq: error: process 1: --data: {tmp_path / 'nowhere'}" in first.errors
    assert second.errors == ""
    assert not (tmp_path / "my").exists()


# ---- What a group is


def test_shares_are_the_whole_batch_in_order() -> None:
    for count in range(12):
        for size in (1, 2, 3, 4, 7):
            shares = [list(range(count))[Group(rank, size).share(count)] for rank in range(size)]
            assert [item for share in shares for item in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_step_of_all_shares_is_the_step() -> None:
    def rows(share: slice) -> list[tuple[np.ndarray, np.ndarray]]:
        batches = StepBatches(lambda rows, epochs: (), rows=7, batch_size=5, seed=4, share=share)
        return [batches.rows(step) for step in range(5)]

    parts = [rows(Group(rank, 3).share(5)) for rank in range(3)]
    for step, (whole, epochs) in enumerate(rows(slice(None))):
        assert np.array_equal(np.concatenate([part[step][0] for part in parts]), whole)
        assert np.array_equal(np.concatenate([part[step][1] for part in parts]), epochs)


def test_one_process_is_a_group_too() -> None:
    group = Group()
    assert group.first
    assert group.sum([0.1, 2.0]) == [0.1, 2.0]
    assert group.from_first("this") == "this"
    assert group.agree(flag=2) == 2
    with pytest.raises(KeyError, match="mine"), group.together():
        raise KeyError("mine")


PLACES = {
    "none": ({}, None),
    "one": ({"RANK": "0", "WORLD_SIZE": "1"}, None),
    "torchrun": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        (3, 4, 1, "env://"),
    ),
    "batch-script": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, None),
    "srun": (
        {
            "SLURM_PROCID": "5",
            "SLURM_STEP_NUM_TASKS": "8",
            "SLURM_LOCALID": "1",
            "SLURM_JOB_ID": "1000",
            "SLURM_STEP_ID": "2",
            "SLURM_STEP_NODELIST": "gpu[007-009,12],big1",
        },
        (5, 8, 1, f"tcp://gpu007:{20000 + 64002 % 20000}"),
    ),
    "srun-address": (
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "b", "MASTER_PORT": "5"},
        (0, 2, 0, "env://"),
    ),
}


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("SLURM_")] + [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("case", PLACES)
def test_place_in_the_environment(no_launcher: pytest.MonkeyPatch, case: str) -> None:
    from fastvq.distributed import _described

    variables, expected = PLACES[case]
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    found = _described()
    assert (None if found is None else tuple(found)) == expected


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("a[03-05,9],b", "a03"), ("r1c[2]-ib,x", "r1c2-ib"), ("n-[7,9]", "n-7")],
)
def test_first_host_of_a_list(nodes: str, host: str) -> None:
    from fastvq.distributed import first_host

    assert first_host(nodes) == host


def test_half_an_environment_is_refused(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("RANK", "one")
    no_launcher.setenv("WORLD_SIZE", "2")
    with refuses(ArgumentError, "RANK: expected a number in this variable of the environment, got 'one'"), join():
        pass
    no_launcher.setenv("RANK", "2")
    with refuses(ArgumentError, "RANK: expected 0..1, as WORLD_SIZE is 2, got 2"), join():
        pass
    no_launcher.setenv("RANK", "1")
    with refuses(ArgumentError, "MASTER_ADDR and MASTER_PORT: expected in the environment beside RANK"), join():
        pass


def test_processes_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert resolve_device("cuda", Group(5, 8, 1)) == torch.device("cuda:1")
    assert resolve_device(None, Group(5, 8, 1)) == torch.device("cuda:1")
    assert resolve_device("cpu", Group(5, 8, 1)) == torch.device("cpu")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with refuses(ArgumentError, "device: expected 'cuda' for 8 processes, each with its own, got 'cuda:1'"):
        resolve_device("cuda:1", Group(5, 8, 1))
    with refuses(UnavailableError, "device: process 2 of this machine needs a GPU of its own, there are 2"):
        resolve_device("cuda", Group(2, 3, 2))
