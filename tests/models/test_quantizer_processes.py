"""Two processes that share every batch have one codebook, the one a single process gets from the whole batch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from quantizer_helpers import is_row_of, normal, squared_distances

from fastvq.models import ResidualVQ, VectorQuantizer

pytestmark = pytest.mark.usefixtures("steady")

NAN = float("nan")

# Each of two processes sees its share of every batch; what they end with goes to a file.
WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from fastvq.models import ResidualVQ, VectorQuantizer

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
batches = torch.load(f"{folder}/batches.pt", weights_only=True)
results = {}
for name, settings in torch.load(f"{folder}/settings.pt", weights_only=True).items():
    torch.manual_seed(rank)
    make = ResidualVQ if "num_quantizers" in settings else VectorQuantizer
    quantizer = make(**{"num_codes": 6, "code_dim": 3, "channels_last": True, **settings})
    quantizer.load_state_dict(torch.load(f"{folder}/start.pt", weights_only=True)[name])
    call = torch.compile(quantizer, fullgraph=True, backend="eager") if name == "compiled" else quantizer
    outputs = []
    for batch in batches[name][rank]:
        if name == "checkpointed" and rank == 0:
            # What is repeated on one process alone must not wait for the other.
            out = checkpoint(quantizer, batch.requires_grad_(), use_reentrant=False)
            out.loss.backward()
        else:
            out = call(batch, mask=batch[..., 0] < 1 if "masked" in name else None)
        outputs.append({"codes": out.codes, "perplexity": out.perplexity, "dead_codes": out.dead_codes})
    results[name] = {"state": quantizer.state_dict(), "outputs": outputs}
torch.save(results, f"{folder}/results{rank}.pt")
dist.destroy_process_group()
"""


def made(settings: dict[str, Any]) -> VectorQuantizer | ResidualVQ:
    """A quantiser with these settings."""
    fields: dict[str, Any] = {"num_codes": 6, "code_dim": 3, "channels_last": True, **settings}
    return ResidualVQ(**fields) if "num_quantizers" in settings else VectorQuantizer(**fields)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes on shares of the same batches: settings, batches and results by scenario."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch is built without gloo")
    folder = tmp_path_factory.mktemp("processes")
    settings: dict[str, dict[str, Any]] = {
        "average": {"decay": 0.7},
        "uneven": {"decay": 0.7, "revive_below": 0.9},
        "not-finite": {"decay": 0.7},
        "revival": {"decay": 0.5, "revive_below": 0.1},
        "data": {"init": "data"},
        "kmeans": {"init": "kmeans"},
        "cosine": {"decay": 0.7, "metric": "cosine"},
        "compiled": {"decay": 0.7},
        "checkpointed": {"decay": 0.7},
        "masked-heads": {"decay": 0.7, "heads": 2},
        "own-codebooks": {"decay": 0.7, "heads": 2, "separate_codebook_per_head": True},
        "not-synchronised": {"decay": 0.7, "sync_codebook": False},
        "learnable": {"learnable_codebook": True, "decay": 0.5, "revive_below": 0.1},
        "residual": {"decay": 0.7, "num_quantizers": 3},
        "masked-shared-residual": {"decay": 0.7, "num_quantizers": 3, "shared_codebook": True},
        "residual-revival": {"decay": 0.5, "num_quantizers": 3, "shared_codebook": True, "revive_below": 0.9},
        "dropout": {"decay": 0.7, "num_quantizers": 3, "quantize_dropout": True, "init": "kmeans"},
    }
    shares = {
        name: [[normal(20, 3 * some.get("heads", 1), seed=10 * s + r) for s in range(4)] for r in range(2)]
        for name, some in settings.items()
    }
    # A process may get no vectors, or others than its peer; dead codes then find places among those of the other.
    shares["uneven"][0][1], shares["uneven"][1][2] = torch.zeros(0, 3), torch.zeros(0, 3)
    shares["not-finite"][1][1][3, 0] = NAN
    # Code 5 is far away from all data; in the scenario of revival its N falls below 0.1 in the last of four steps.
    start = {name: made(some).state_dict() for name, some in settings.items()}
    for name in ("average", "uneven", "not-finite", "revival", "learnable"):
        for field in ("embedding", "embedding_sum"):
            if field in start[name]:
                start[name][field][5] = 100.0
    for name, value in (("settings", settings), ("batches", shares), ("start", start)):
        torch.save(value, folder / f"{name}.pt")
    script = folder / "worker.py"
    script.write_text(WORKER)
    workers = [
        subprocess.Popen([sys.executable, script, str(rank), folder], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, complaint = worker.communicate(timeout=90)
            assert worker.returncode == 0, complaint
    finally:
        for worker in workers:
            worker.kill()
    return {
        "settings": settings,
        "shares": shares,
        "start": start,
        "results": [torch.load(folder / f"results{rank}.pt", weights_only=True) for rank in range(2)],
    }


SHARING = (
    "average",
    "checkpointed",
    "uneven",
    "not-finite",
    "revival",
    "data",
    "kmeans",
    "cosine",
    "compiled",
    "masked-heads",
    "own-codebooks",
    "learnable",
    "residual",
    "masked-shared-residual",
    "residual-revival",
    "dropout",
)


@pytest.mark.parametrize("scenario", SHARING)
def test_two_processes_have_one_codebook(two_processes: dict[str, Any], scenario: str) -> None:
    first, second = (result[scenario] for result in two_processes["results"])
    start = two_processes["start"][scenario]
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    assert any((value != start[name]).any() for name, value in first["state"].items())
    for left, right in zip(first["outputs"], second["outputs"], strict=True):
        assert torch.equal(left["perplexity"], right["perplexity"])
        assert torch.equal(left["dead_codes"], right["dead_codes"])


def test_processes_may_keep_to_themselves(two_processes: dict[str, Any]) -> None:
    for rank, result in enumerate(two_processes["results"]):
        alone = made(two_processes["settings"]["not-synchronised"])
        alone.load_state_dict(two_processes["start"]["not-synchronised"])
        for batch in two_processes["shares"]["not-synchronised"][rank]:
            alone(batch)
        have = result["not-synchronised"]["state"]
        assert all(torch.equal(value, have[name]) for name, value in alone.state_dict().items())


@pytest.mark.parametrize("scenario", [name for name in SHARING if name != "dropout"])
def test_two_processes_equal_one_on_all_vectors(two_processes: dict[str, Any], scenario: str) -> None:
    torch.manual_seed(0)  # as the first process, which draws for both
    quantizer = made(two_processes["settings"][scenario])
    quantizer.load_state_dict(two_processes["start"][scenario])
    results = [result[scenario] for result in two_processes["results"]]
    for step, batch in enumerate(zip(*two_processes["shares"][scenario], strict=True)):
        joint = torch.cat(batch)
        out = quantizer(joint, mask=joint[..., 0] < 1 if "masked" in scenario else None)
        theirs = [result["outputs"][step] for result in results]
        assert torch.equal(out.codes, torch.cat([other["codes"] for other in theirs]))
        torch.testing.assert_close(out.perplexity, theirs[0]["perplexity"])
        assert torch.equal(out.dead_codes, theirs[0]["dead_codes"])
    for name, value in quantizer.state_dict().items():
        torch.testing.assert_close(results[0]["state"][name], value, rtol=1e-6, atol=1e-6)


def test_kmeans_sees_the_vectors_of_both_processes(two_processes: dict[str, Any]) -> None:
    vectors = torch.cat([share[0] for share in two_processes["shares"]["kmeans"]])
    torch.manual_seed(0)
    start = VectorQuantizer(6, 3, init="data", channels_last=True)
    start.initialize(vectors)
    centres, vectors = start.embedding.double(), vectors.double()
    for _ in range(10):
        nearest = squared_distances(vectors, centres).argmin(1)
        centres = torch.stack([vectors[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(6)])
    # The codes of the first batch are those of the centres, before the codebook moves.
    codes = torch.cat([result["kmeans"]["outputs"][0]["codes"] for result in two_processes["results"]])
    assert torch.equal(codes, squared_distances(vectors, centres).argmin(1))


def test_two_processes_revive_alike(two_processes: dict[str, Any]) -> None:
    result = two_processes["results"][1]["revival"]["state"]
    assert result["cluster_size"][5] == 1
    # It lies on a vector that one of the processes saw last, and its average is that vector too.
    last = torch.cat([share[-1] for share in two_processes["shares"]["revival"]])
    assert is_row_of(result["embedding"][5:], last)
    assert torch.equal(result["embedding"][5], result["embedding_sum"][5])
