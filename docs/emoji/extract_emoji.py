#!/usr/bin/env python3
"""The pictures of Noto Color Emoji as PNG files, in one folder per group of Unicode's list.

    pip install fonttools pillow
    python extract_emoji.py NotoColorEmoji.ttf emoji-test.txt emoji

writes emoji/GROUP/NAME.png, 128 x 128 on white. In Debian the font is in the package fonts-noto-color-emoji
(/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf), the list in unicode-data (/usr/share/unicode/emoji/emoji-test.txt).
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

if TYPE_CHECKING:
    from fontTools.ttLib import TTFont

SIDE = 128
# Asks for a picture instead of a letter; the font has nothing else.
VARIATION_SELECTOR = 0xFE0F
# Parts of other emoji: colours of skin and hair.
NOT_A_CLASS = "Component"
_LIGATURES, _EXTENSION = 4, 7
_LINE = re.compile(r"([0-9A-F ]+); fully-qualified +# \S+ E[\d.]+ (.+)")


class Emoji(NamedTuple):
    """One of Unicode's list: its group, its name, and its characters."""

    group: str
    name: str
    characters: tuple[int, ...]


def listed(text: str) -> Iterator[Emoji]:
    """The emoji of an emoji-test.txt (UTS #51), each in its full spelling."""
    group = ""
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif (found := _LINE.match(line)) and group != NOT_A_CLASS:
            yield Emoji(group, found[2].strip(), tuple(int(code, 16) for code in found[1].split()))


def readable(name: str) -> str:
    """A name for a file or a folder: lower-case words of ASCII letters and digits with _ between them.

    "flag: Côte d'Ivoire" becomes flag_cote_d_ivoire, "keycap: #" keycap_number_sign.
    """
    name = name.replace("#", "number sign").replace("*", "asterisk")
    plain = (letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    return "_".join(re.findall(r"[a-z0-9]+", "".join(plain).lower()))


class EmojiFont:
    """The bitmaps of a font with CBDT and CBLC tables, and the ligatures that sequences of characters become."""

    def __init__(self, font: TTFont) -> None:
        self._characters: Mapping[int, str] = font.getBestCmap()
        (self._bitmaps,) = font["CBDT"].strikeData
        self._lookups = list(_ligatures(font)) if "GSUB" in font else []

    def picture(self, characters: tuple[int, ...]) -> Image.Image | None:
        """The middle 128 x 128 pixels on white, RGB; None if the font draws them not at all or as several pictures."""
        glyphs = [self._characters.get(code) for code in characters if code != VARIATION_SELECTOR]
        if None in glyphs:
            return None
        for lookup in self._lookups:
            glyphs = _joined(glyphs, lookup)
        bitmap = self._bitmaps.get(glyphs[0]) if len(glyphs) == 1 else None
        if bitmap is None:
            return None
        drawn = Image.open(io.BytesIO(bitmap.imageData)).convert("RGBA")
        canvas = Image.new("RGBA", (SIDE, SIDE), "white")
        canvas.alpha_composite(_middle(drawn))
        return canvas.convert("RGB")


def _ligatures(font: TTFont) -> Iterator[dict[tuple[str, ...], str]]:
    """What sequences of glyphs become, of each lookup of ligatures in the order in which they apply."""
    table = font["GSUB"].table
    indices = sorted({index for record in table.FeatureList.FeatureRecord for index in record.Feature.LookupListIndex})
    for index in indices:
        found: dict[tuple[str, ...], str] = {}
        for part in table.LookupList.Lookup[index].SubTable:
            part = part.ExtSubTable if part.LookupType == _EXTENSION else part
            if part.LookupType == _LIGATURES:
                for first, ligatures in part.ligatures.items():
                    for ligature in ligatures:
                        found.setdefault((first, *ligature.Component), ligature.LigGlyph)
        if found:
            yield found


def _joined(glyphs: list[str | None], lookup: Mapping[tuple[str | None, ...], str]) -> list[str | None]:
    """Glyphs with every sequence of the lookup replaced, from left to right, the longest one first."""
    result: list[str | None] = []
    start = 0
    while start < len(glyphs):
        ends = [end for end in range(len(glyphs), start + 1, -1) if tuple(glyphs[start:end]) in lookup]
        end = ends[0] if ends else start + 1
        result.append(lookup[tuple(glyphs[start:end])] if ends else glyphs[start])
        start = end
    return result


def _middle(picture: Image.Image) -> Image.Image:
    """The middle 128 x 128 pixels, transparent where the picture has none."""
    left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
    return picture.crop((left, top, left + SIDE, top + SIDE))


def extract(font: TTFont, listing: str, out: Path) -> tuple[dict[str, int], list[str]]:
    """Write the pictures; returns how many there are of each class, and the names that the font does not draw.

    Raises:
        FileExistsError: the folder is there and not empty; nothing is written.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    emoji_font = EmojiFont(font)
    counts: dict[str, int] = {}
    missing = []
    for emoji in listed(listing):
        picture = emoji_font.picture(emoji.characters)
        if picture is None:
            missing.append(emoji.name)
            continue
        folder = out / readable(emoji.group).replace("_", "-")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{readable(emoji.name)}.png"
        if path.exists():
            raise FileExistsError(f"two emoji are called {path}")
        picture.save(path)
        counts[folder.name] = counts.get(folder.name, 0) + 1
    return counts, missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("font", type=Path, help="NotoColorEmoji.ttf, with bitmaps (CBDT)")
    parser.add_argument("listing", type=Path, help="Unicode's emoji-test.txt")
    parser.add_argument("out", type=Path, help="a new folder")
    arguments = parser.parse_args()
    from fontTools.ttLib import TTFont

    with TTFont(arguments.font) as font:
        if "CBDT" not in font:
            parser.error(f"{arguments.font} holds no bitmaps (CBDT); Debian's and Android's Noto Color Emoji does")
        try:
            counts, missing = extract(font, arguments.listing.read_text(encoding="utf-8"), arguments.out)
        except FileExistsError as error:
            parser.error(str(error))
    for name, count in counts.items():
        print(f"{count:5} {name}")
    print(f"{sum(counts.values()):5} pictures in {arguments.out}")
    if missing:
        print(f"not in this font: {len(missing)}, such as {', '.join(missing[:3])}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
