"""The code on the page for those who come from vector-quantize-pytorch runs, and the options it names exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvq.models import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantizer

pytestmark = pytest.mark.usefixtures("steady")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migrating-from-vector-quantize-pytorch.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def table(title: str) -> list[list[str]]:
    """Cells of the rows of the table under this heading."""
    section = re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_code_of_our_own_runs() -> None:
    first, second = [block for block in BLOCKS if "fastvq" in block and "vector_quantize_pytorch" not in block]
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["quantized"].shape == names["vectors"].shape == (2, 64, 8, 8)
    assert names["loss"].requires_grad
    exec(second, names)
    assert type(names["quantizer"]) is LFQ


def test_all_code_runs() -> None:
    """It compares codes, codebooks and losses of both packages itself."""
    pytest.importorskip("vector_quantize_pytorch")
    assert len(BLOCKS) == 5
    assert sum(block.count("assert") for block in BLOCKS) == 8
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])
def test_converted_states_train_on_alike(heads: int, cosine: bool) -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    names: dict[str, Any] = {}
    exec(next(block for block in BLOCKS if "def converted" in block).split("\n\n\nours.")[0], names)
    apart = {"heads": heads, "separate_codebook_per_head": heads > 1}
    theirs = package.VectorQuantize(4 * heads, 12, codebook_dim=4, use_cosine_sim=cosine, rotation_trick=False, **apart)
    ours = VectorQuantizer(
        12, 4, decay=0.8, commitment=1.0, channels_last=True, metric="cosine" if cosine else "euclidean", **apart
    )
    ours.load_state_dict(names["converted"](theirs.state_dict()))
    for seed in range(4):
        x = torch.randn(3, 20, 4 * heads, generator=torch.Generator().manual_seed(seed))
        quantized, indices, loss = theirs(x)
        out = ours(x)
        assert torch.equal(indices, out.codes)
        torch.testing.assert_close(quantized, out.quantized)
        torch.testing.assert_close(loss, out.commitment_loss)
    torch.testing.assert_close(theirs.codebook, ours.embedding)
    torch.testing.assert_close(theirs._codebook.cluster_size.squeeze(0), ours.cluster_size)


def test_states_are_converted_with_their_projections() -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    names: dict[str, Any] = {}
    exec(next(block for block in BLOCKS if "def converted" in block).split("\n\n\nours.")[0], names)
    theirs = package.VectorQuantize(6, 12, codebook_dim=4, rotation_trick=False).eval()
    ours = VectorQuantizer(12, 4, input_dim=6, channels_last=True).eval()
    ours.load_state_dict(names["converted"](theirs.state_dict()))
    x = torch.randn(3, 20, 6)
    torch.testing.assert_close(ours(x).quantized, theirs(x)[0])


def test_what_is_not_there_is_the_rest_of_the_package() -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    named = re.findall(r"`(\w+)`", " ".join(there for there, _ in table("Not there")))
    there = {name for name, value in vars(package).items() if inspect.isclass(value)}
    assert {*named} == there - {"VectorQuantize", "ResidualVQ", "FSQ", "LFQ", "SimVQ"}


@pytest.mark.parametrize(
    ("title", "ours"),
    [
        ("VectorQuantize", VectorQuantizer),
        ("ResidualVQ", ResidualVQ),
        ("FSQ", FSQ),
        ("LFQ", LFQ),
        ("SimVQ", SimVQ),
    ],
)
def test_the_tables_are_complete_and_right(title: str, ours: type) -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    rows = table(title)
    assert all(len(row) == 3 for row in rows)
    named = " ".join(there for there, _, _ in rows)
    options = list(inspect.signature(getattr(package, title).__init__).parameters)[1:]
    patterns = [pattern.replace("*", ".*") for pattern in re.findall(r"\w*\*\w*", named)]
    # What ResidualVQ shares with the plain quantiser stands in the first table.
    named += " " + (" ".join(there for there, _, _ in table("VectorQuantize")) if title == "ResidualVQ" else "")
    missing = [
        option
        for option in options
        if not re.search(rf"\b{option}\b", named) and not any(re.fullmatch(pattern, option) for pattern in patterns)
    ]
    assert missing in ([], ["vq_kwargs"])
    parameters = {**inspect.signature(ours.__init__).parameters}
    if "options" in parameters:
        parameters = {**inspect.signature(VectorQuantizer.__init__).parameters, **parameters}
    for _, here, _ in rows:
        for option, value in re.findall(r"`(\w+)=([^`]+)`", here):
            assert option in parameters, option
            if re.fullmatch(r"None|[\d.]+(e-\d+)?", value):
                assert parameters[option].default == (None if value == "None" else float(value)), option
