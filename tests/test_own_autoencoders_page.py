"""The commands and the Python of docs/own-autoencoders.md, run as they stand, from top to bottom."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.cli import main
from fastvq.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("steady")
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "own-autoencoders.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for kind, code in BLOCKS:
        if kind == "python":
            exec(compile(code, "own-autoencoders.md", "exec"), names)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "fastvq"
            assert main(arguments) == 0, line
    out, painted, images = names["out"], names["painted"], names["images"]
    assert out.images.shape == (12, 1, 32, 32)
    assert torch.equal(out.images[:, :, ::8, ::8][:, 0], names["autoencoder"].shades[out.codes[0]].detach())
    with Image.open("own.png") as picture:
        assert np.asarray(picture).shape == (3 * 34 + 2, 4 * 34 + 2)
    assert torch.equal(painted.images[:, :, :16], images[:1, :, :16].expand(4, -1, -1, -1))
    again = names["pipeline"].sample(12, label=out.labels, temperature=0.9, seed=0)
    assert torch.equal(again.images, out.images)
    with pytest.raises(ArgumentError, match="save_pretrained: the autoencoder is a Shades, which only its own project"):
        names["pipeline"].save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
