"""The page for those who come from vector-quantize-pytorch converts states rightly, and the options it names exist."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from page_blocks import ROOT, blocks, run_python

from fastvq.models import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantizer

pytestmark = pytest.mark.usefixtures("steady")

NAME = "docs/migrating-from-vector-quantize-pytorch.md"
PAGE = (ROOT / NAME).read_text(encoding="utf-8")


def table(title: str) -> list[list[str]]:
    """Cells of the rows of the table under this heading."""
    section = re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def converted(state: dict[str, Any]) -> dict[str, Any]:
    """By the function on the page, which is the beginning of its block."""
    (block,) = [block for block in blocks(NAME) if "def converted" in block.text]
    names: dict[str, Any] = {}
    run_python(replace(block, text=block.text.split("\n\n\nours.")[0]), names)
    found: dict[str, Any] = names["converted"](state)
    return found


def test_the_page_compares_both_packages() -> None:
    """Its blocks are run by test_blocks.py; they compare codes, codebooks and losses themselves."""
    assert [block.language for block in blocks(NAME)] == ["python"] * 5
    assert sum(block.text.count("assert") for block in blocks(NAME)) == 8


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])
def test_converted_states_train_on_alike(heads: int, cosine: bool) -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    apart = {"heads": heads, "separate_codebook_per_head": heads > 1}
    theirs = package.VectorQuantize(4 * heads, 12, codebook_dim=4, use_cosine_sim=cosine, rotation_trick=False, **apart)
    ours = VectorQuantizer(
        12, 4, decay=0.8, commitment=1.0, channels_last=True, metric="cosine" if cosine else "euclidean", **apart
    )
    ours.load_state_dict(converted(theirs.state_dict()))
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
    theirs = package.VectorQuantize(6, 12, codebook_dim=4, rotation_trick=False).eval()
    ours = VectorQuantizer(12, 4, input_dim=6, channels_last=True).eval()
    ours.load_state_dict(converted(theirs.state_dict()))
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
