"""The script that takes pictures from an emoji font, on a font that is laid out by hand."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import script_at
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "docs" / "emoji" / "extract_emoji.py"
IVOIRE = "flag: Côte d\N{RIGHT SINGLE QUOTATION MARK}Ivoire"
LISTING = f"""\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                                  ; fully-qualified     # x E1.0 grinning face
263A FE0F                                              ; fully-qualified     # x E0.6 smiling face
263A                                                   ; unqualified         # x E0.6 smiling face
# group: Component
1F3FB                                                  ; component           # x E1.0 light skin tone
1F9B0                                                  ; fully-qualified     # x E1.0 red hair
# group: Flags
1F1E9 1F1EA                                            ; fully-qualified     # x E0.6 flag: Germany
1F1E8 1F1EE                                            ; fully-qualified     # x E2.0 {IVOIRE}
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_at(SCRIPT)


def bitmap(colour: tuple[int, int, int, int]) -> SimpleNamespace:
    """136 x 128: four columns of black on both sides of a square whose left half is transparent."""
    pixels = np.zeros((128, 136, 4), np.uint8)
    pixels[:, :4] = pixels[:, -4:] = (0, 0, 0, 255)
    pixels[:, 68:132] = colour
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return SimpleNamespace(imageData=written.getvalue())


def lookup(kind: int, ligatures: dict[str, list[tuple[list[str], str]]]) -> SimpleNamespace:
    parts = {
        first: [SimpleNamespace(Component=rest, LigGlyph=glyph) for rest, glyph in found]
        for first, found in ligatures.items()
    }
    part: Any = SimpleNamespace(LookupType=4, ligatures=parts)
    return SimpleNamespace(SubTable=[part if kind == 4 else SimpleNamespace(LookupType=7, ExtSubTable=part)])


class Font(dict[str, Any]):
    def getBestCmap(self) -> dict[int, str]:
        return {0x1F600: "grin", 0x263A: "smile", 0x1F1E9: "D", 0x1F1EA: "E", 0x1F1E8: "C", 0x1F1EE: "I"}


@pytest.fixture
def font() -> Font:
    """Two letters become a flag, and that with a third one another, by an extension; C and I stay two glyphs."""
    lookups = [lookup(4, {"D": [(["E"], "DE")]}), lookup(7, {"DE": [(["C"], "DEC")]})]
    features = [SimpleNamespace(Feature=SimpleNamespace(LookupListIndex=[0, 1]))]
    gsub = SimpleNamespace(
        FeatureList=SimpleNamespace(FeatureRecord=features), LookupList=SimpleNamespace(Lookup=lookups)
    )
    bitmaps = {
        "grin": bitmap((255, 0, 0, 255)),
        "smile": bitmap((0, 255, 0, 255)),
        "C": bitmap((9, 9, 9, 255)),
        "DE": bitmap((0, 0, 255, 128)),
        "DEC": bitmap((255, 255, 0, 255)),
    }
    return Font(CBDT=SimpleNamespace(strikeData=[bitmaps]), GSUB=SimpleNamespace(table=gsub))


def test_the_list_is_read_in_full_spelling_and_without_parts(script: ModuleType) -> None:
    assert list(script.listed(LISTING)) == [
        ("Smileys & Emotion", "grinning face", (0x1F600,)),
        ("Smileys & Emotion", "smiling face", (0x263A, 0xFE0F)),
        ("Flags", "flag: Germany", (0x1F1E9, 0x1F1EA)),
        ("Flags", IVOIRE, (0x1F1E8, 0x1F1EE)),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (IVOIRE, "flag_cote_d_ivoire"),
        ("keycap: #", "keycap_number_sign"),
        ("keycap: *", "keycap_asterisk"),
        ("thumbs up: light skin tone", "thumbs_up_light_skin_tone"),
        ("Smileys & Emotion", "smileys_emotion"),
    ],
)
def test_names_are_readable(script: ModuleType, name: str, expected: str) -> None:
    assert script.readable(name) == expected


def test_the_longest_sequence_is_joined_first(script: ModuleType) -> None:
    lookup = {("a", "b"): "ab", ("a", "b", "c"): "abc"}
    assert script._joined(["a", "b", "c", "a", "b", "x"], lookup) == ["abc", "ab", "x"]


def test_pictures_are_cropped_on_white(script: ModuleType, font: Font, tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    counts, missing = script.extract(font, LISTING, out)
    assert counts == {"smileys-emotion": 2, "flags": 1}
    assert missing == [IVOIRE]
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert written == [
        "flags/flag_germany.png",
        "smileys-emotion/grinning_face.png",
        "smileys-emotion/smiling_face.png",
    ]
    for name, colour in zip(written, [(127, 127, 255), (255, 0, 0), (0, 255, 0)], strict=True):
        pixels = np.asarray(Image.open(out / name))
        assert pixels.shape == (128, 128, 3)
        assert (pixels[:, :64] == 255).all()
        assert (pixels[:, 64:] == colour).all()
    with pytest.raises(FileExistsError, match="emoji is not empty"):
        script.extract(font, LISTING, out)


def test_later_lookups_see_what_earlier_ones_made(script: ModuleType, font: Font) -> None:
    emoji = script.EmojiFont(font)
    assert emoji.picture((0x1F1E9, 0x1F1EA, 0x1F1E8)).getpixel((100, 9)) == (255, 255, 0)
    # Characters that the font lacks, and a glyph without a bitmap.
    assert emoji.picture((0x1F602,)) is None
    assert emoji.picture((0x1F1E9,)) is None
