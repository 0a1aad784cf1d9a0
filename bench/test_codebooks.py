"""The comparison of codebook settings: what it writes, and that each setting is the one that it names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import codebooks
from fastvq import VectorQuantizer


def test_each_setting_is_what_it_is_called() -> None:
    for name, options in codebooks.SETTINGS.items():
        for quantizer in codebooks.autoencoder(options, 8).quantizers:
            assert isinstance(quantizer, VectorQuantizer)
            assert (quantizer.init == "kmeans") == ("k-means" in name)
            assert quantizer.revive_below == (
                float(name.split("revival ")[1].split(",")[0]) if "revival" in name else 0
            )
            assert (quantizer.metric == "cosine") == ("cosine" in name)
            assert (quantizer.gradient == "rotation") == ("rotation" in name)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "out").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{index}.png")
    command = f"codebooks --data noise={tmp_path / 'pictures'} --out {tmp_path / 'out'} --setting EMA --at 1 3"
    options = "--size 16 --batch-size 4 --channels 8 --device cpu"
    monkeypatch.setattr(sys, "argv", f"{command} {options}".split())
    codebooks.main()
    (written,) = (tmp_path / "out").iterdir()
    rows = json.loads(written.read_text())["rows"]
    assert [(row["data"], row["setting"], row["step"]) for row in rows] == [("noise", "EMA", 1), ("noise", "EMA", 3)]
    # One image of 4 top and 16 bottom codes is held out.
    for row in rows:
        assert 1 <= row["perplexity_0"] <= 4
        assert 1 <= row["perplexity_1"] <= 16
        assert row["usage_0"] * 512 <= 4
    assert rows[1]["mse"] < rows[0]["mse"]
    assert "| noise | EMA | 3 |" in capsys.readouterr().out
