"""Steps recorded as a CUDA graph: what is replayed is what would have been computed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from training_helpers import TOP_CONFIG, VQVAE_CONFIG, Noise, metrics, train_config
from triton_helpers import needs_gpu

from fastvq.training import loop, train_prior, train_vqvae
from fastvq.training.recorded import Recorded

pytestmark = pytest.mark.usefixtures("one_thread")


class Tape(TorchDispatchMode):
    """Stands for a CUDA graph on a CPU: operations and the memory of their results, which replaying fills anew."""

    replayed = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        Tape.replayed += 1
        for func, args, kwargs, out in self.calls:
            for kept, new in zip(tree_flatten(out)[0], tree_flatten(func(*args, **kwargs))[0], strict=True):
                if isinstance(kept, Tensor) and kept is not new:
                    kept.copy_(new)


@contextlib.contextmanager
def taping(tape: Tape) -> Iterator[None]:
    with tape:
        yield


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.CUDAGraph", Tape)
    monkeypatch.setattr("torch.cuda.graph", taping)
    monkeypatch.setattr(Tape, "replayed", 0)
    plain = loop.may_record
    monkeypatch.setattr(
        loop, "may_record", lambda state, config, group: config.cuda_graph and not plain(state, config, group)
    )


@pytest.mark.usefixtures("tapes")
def test_replays_follow_their_inputs() -> None:
    ran = []

    def work(tensors: Sequence[Tensor]) -> Tensor:
        ran.append(1)
        return tensors[0].square() + tensors[1]

    recorded = Recorded(work, torch.device("cpu"))
    for i in range(8):
        assert recorded([torch.tensor([float(i)]), torch.tensor([1.0])]).tolist() == [i * i + 1]
    # Three times as usual, once to record.
    assert len(ran) == 4
    assert Tape.replayed == 5


@pytest.mark.usefixtures("tapes")
def test_random_numbers_of_the_cpu_are_not_recorded() -> None:
    recorded = Recorded(lambda tensors: tensors[0] + torch.rand(1), torch.device("cpu"))
    torch.manual_seed(0)
    found = [float(recorded([torch.zeros(1)])) for _ in range(6)]
    torch.manual_seed(0)
    assert found == [float(torch.rand(1)) for _ in range(6)]
    assert not recorded.recording
    assert Tape.replayed == 0


def test_what_cannot_be_recorded_is_said_and_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refusing(tape: Tape) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr("torch.cuda.CUDAGraph", Tape)
    monkeypatch.setattr("torch.cuda.graph", refusing)
    recorded = Recorded(lambda tensors: tensors[0] * 2, torch.device("cpu"))
    for _ in range(3):
        recorded([torch.ones(1)])
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph: operation not permitted"):
        assert recorded([torch.ones(1)]).tolist() == [2.0]
    assert recorded([torch.full((1,), 3.0)]).tolist() == [6.0]


@pytest.mark.usefixtures("tapes")
def test_a_recorded_run_has_the_same_weights(codes: Path, tmp_path: Path) -> None:
    prior = dataclasses.replace(TOP_CONFIG, dropout=0.0, attention_dropout=0.0)
    models = []
    for recorded in (True, False):
        config = train_config(steps=7, cuda_graph=recorded, grad_clip=0.5, accumulate=1)
        models.append(train_prior(codes / "train", 0, prior, config, tmp_path / str(recorded)))
    assert Tape.replayed == 4
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        # Weights move by up to 0.05; operations one by one round a little otherwise.
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    for one_line, other_line in zip(metrics(tmp_path / "True"), metrics(tmp_path / "False"), strict=True):
        assert one_line == pytest.approx(other_line, abs=1e-5)


@needs_gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("stage", ["prior", "vqvae"])
def test_on_a_gpu(stage: str, bf16: bool, codes: Path, tmp_path: Path) -> None:
    prior = dataclasses.replace(TOP_CONFIG, attention_dropout=0.0)
    vqvae = dataclasses.replace(VQVAE_CONFIG, codebook_init="kmeans")
    models = []
    for recorded in (True, False):
        config = train_config(steps=12, cuda_graph=recorded, device="cuda", bf16=bf16, accumulate=1)
        run = tmp_path / str(recorded)
        if stage == "prior":
            models.append(train_prior(codes / "train", 0, prior, config, run))
        else:
            models.append(train_vqvae(Noise(), vqvae, config, run))
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
