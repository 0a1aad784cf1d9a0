"""Which files are pictures, and the pixels of one."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from fastvq.errors import CorruptFileError

T = TypeVar("T")

# Formats that Pillow opens and that are no still pictures, or whose endings mostly belong to other things: EPS runs
# another program, MPEG is film, FITS holds measurements, .pcd point clouds, .gbr circuit boards, .iim bare metadata.
_OTHER_FORMATS = frozenset({"EPS", "MPEG", "FITS", "PCD", "GBR", "IPTC"})
_OTHER_SUFFIXES = frozenset({".pfm"})  # floating-point numbers
_FILMS = frozenset({"AVIF", "DCX", "FLI", "GIF", "PNG", "TIFF", "WEBP"})  # not MPO, whose further frames are previews
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_SIDEWAYS = frozenset({5, 6, 7, 8})
# Pixels that a reduced JPEG keeps on each side, for one of the picture.
_GAP = 2
_JPEG = frozenset({"JPEG", "MPO"})
_ENDS = {**dict.fromkeys(_JPEG, b"\xff\xd9"), "PNG": b"\0\0\0\0IEND\xaeB`\x82", "GIF": b";"}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})


@functools.cache
def picture_types() -> dict[str, str]:
    """Pillow's format of each ending (lower case, with its dot) of still pictures that it opens here."""
    Image.init()
    types = {}
    for suffix, name in Image.registered_extensions().items():
        opener = Image.OPEN.get(name, (None, None))[0]
        # A stub knows a format by its first bytes and needs a plug-in for the rest.
        stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        if opener is not None and not stub and name not in _OTHER_FORMATS and suffix not in _OTHER_SUFFIXES:
            types[suffix] = name
    return dict(sorted(types.items()))


def formats_of(suffixes: Iterable[str]) -> tuple[str, ...]:
    """The formats in which files of these endings may come; all of them where an ending is not known here."""
    types = picture_types()
    names = {types.get(suffix) for suffix in suffixes}
    return tuple(sorted(set(types.values()) if None in names else {name for name in names if name is not None}))


@dataclass(frozen=True)
class PictureRules:
    """Which files are read.

    Attributes:
        formats: those of Pillow that count, see :func:`formats_of`.
        max_pixels: largest width * height of a file. Pillow's own limit holds besides.
    """

    formats: tuple[str, ...]
    max_pixels: int

    @property
    def limit(self) -> int:
        # Pillow only warns at its limit and raises at twice that; here the limit is the limit.
        return min(self.max_pixels, Image.MAX_IMAGE_PIXELS or self.max_pixels)


def read_picture(
    path: Path, size: tuple[int, int], channels: int, rules: PictureRules, *, draft: bool = False
) -> tuple[np.ndarray, bool]:
    """Pixels of a picture (of its first frame, if it has several), upright, cropped and resized.

    Metadata do not decide: where EXIF cannot be read the picture stays as it lies, texts and colour profiles are
    ignored, damaged or not.

    Args:
        size: (H, W).
        draft: decode a JPEG file of at least 4 times that size at a half, a quarter or an eighth of its own, but no
            less than twice ``size``. Pixels differ by a few of 255 levels from those of the whole picture.

    Returns:
        uint8 [H, W, C], and whether there are further frames.

    Raises:
        CorruptFileError: the file cannot be read.
    """

    def read(image: Image.Image) -> tuple[np.ndarray, bool]:
        return _convert(image, size, channels, draft), _has_frames(image)

    return _opened(path, rules, read)


def read_whole(path: Path, rules: PictureRules) -> np.ndarray:
    """Grey values of a picture as large as it is, upright: uint8 [H, W].

    Raises:
        CorruptFileError: the file cannot be read.
    """
    return _opened(path, rules, lambda image: np.array(_whole(image).convert("L")))


def check_picture(path: Path, rules: PictureRules) -> bool:
    """Whether a picture has several frames, from its header.

    Finds out what a file is, its size in pixels, and of JPEG, PNG, GIF and WebP whether it is cut off: one that does
    not end as it should is decoded. Other damage after the header is not found.

    Raises:
        CorruptFileError: the file cannot be read.
    """
    several, kind = _opened(path, rules, lambda image: (_has_frames(image), image.format))
    if not _ends_well(path, kind):
        read_picture(path, (1, 1), 1, rules)
    return several


def _opened(path: Path, rules: PictureRules, use: Callable[[Image.Image], T]) -> T:
    """What ``use`` makes of a picture that is as ``rules`` say; whatever fails is a CorruptFileError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("not a regular file")
        try:
            return _within_limit(path, rules, use)
        except Exception:
            # Pillow gives up on a PNG for a damaged or large chunk that has nothing to do with its pixels.
            stripped = _png_without_metadata(path)
            if stripped is None:
                raise
            return _within_limit(stripped, rules, use)
    # Damaged files make Pillow's decoders raise nearly anything, from OSError to IndexError.
    except Exception as error:
        raise CorruptFileError(f"{path}: {_reason(error)}") from error


def _within_limit(source: Path | io.BytesIO, rules: PictureRules, use: Callable[[Image.Image], T]) -> T:
    with Image.open(source, formats=rules.formats) as image:
        pixels = image.width * image.height
        if pixels > rules.limit:
            raise ValueError(f"{image.width} x {image.height} = {pixels} pixels, more than the limit {rules.limit}")
        return use(image)


def _has_frames(image: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # damage in a later frame
        return image.format in _FILMS and bool(getattr(image, "is_animated", False))
    return False


def _ends_well(path: Path, kind: str | None) -> bool:
    """Whether the last bytes of a file are those of a whole one, where that can be told from them."""
    with path.open("rb") as file:
        if kind == "WEBP":
            head = file.read(8)
            return int.from_bytes(head[4:], "little") + 8 <= os.fstat(file.fileno()).st_size
        end = _ENDS.get(kind or "")
        if end is None:
            return True
        file.seek(-min(len(end), os.fstat(file.fileno()).st_size), io.SEEK_END)
        return file.read() == end


def _convert(image: Image.Image, size: tuple[int, int], channels: int, draft: bool) -> np.ndarray:
    height, width = size
    mode = "L" if channels == 1 else "RGB"
    small = _reduced(image, (width, height), mode) if draft and image.format in _JPEG else None
    if small is None:
        small = ImageOps.fit(_whole(image).convert(mode), (width, height), Image.Resampling.BICUBIC)
    return np.array(small).reshape(height, width, channels)


def _whole(image: Image.Image) -> Image.Image:
    """A picture decoded, upright, opaque and of 8 bits."""
    _scale_transparent_value(image)
    image.load()
    image = _upright(image, _orientation(image))
    if image.mode == "F" or (image.mode == "I" and image.format not in (None, "PNG", "PPM")):
        raise ValueError(f"pixels of mode {image.mode}, whose range is not known; expected 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow opens as I;16 or, in some formats and versions, as I
        return _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    return image


def _reduced(image: Image.Image, size: tuple[int, int], mode: str) -> Image.Image | None:
    """A JPEG decoded at a part of its size, cropped and resized to (W, H); None if it is not large enough."""
    orientation = _orientation(image)
    across, down = size[::-1] if orientation in _SIDEWAYS else size
    whole = image.size
    drafted = image.draft(None, (_GAP * across, _GAP * down))
    if drafted is None or image.size == whole:
        return None
    # Sides are rounded up to whole pixels of which the last shows less than the others, so turning comes last.
    box = _centre(drafted[1][2:], (across, down))
    return _upright(image.convert(mode).resize((across, down), Image.Resampling.BICUBIC, box=box), orientation)


def _centre(whole: tuple[float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box of a picture that ImageOps.fit would take; sizes are (W, H)."""
    share = min(whole[0] / size[0], whole[1] / size[1])
    width, height = share * size[0], share * size[1]
    left, top = (whole[0] - width) / 2, (whole[1] - height) / 2
    return left, top, left + width, top + height


def _scale_transparent_value(image: Image.Image) -> None:
    """Pillow scales a PNG's pixels to 8 bits and leaves its transparent value as the file has it."""
    value = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    if image.format != "PNG" or value is None or not tiles:
        return
    layout = str(tiles[0][3])
    if layout in ("L;2", "L;4"):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[layout]
    elif layout == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def _orientation(image: Image.Image) -> int | None:
    with contextlib.suppress(Exception):  # damaged EXIF makes Pillow raise nearly anything
        found: int = image.getexif().get(_ORIENTATION, 1)
        return found if found in _TRANSPOSE else None
    return None


def _upright(image: Image.Image, orientation: int | None) -> Image.Image:
    method = _TRANSPOSE.get(orientation or 1)
    if method is None:
        return image
    turned = image.transpose(method)
    turned.format = image.format
    return turned


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 65535
    return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))


def _png_without_metadata(path: Path) -> io.BytesIO | None:
    """What a PNG's pixels need, and its EXIF where the checksum holds; None if the file is no PNG."""
    with path.open("rb") as file:
        if file.read(len(_PNG_SIGNATURE)) != _PNG_SIGNATURE:
            return None
        kept = io.BytesIO()
        kept.write(_PNG_SIGNATURE)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in _PNG_PIXELS or kind == b"eXIf":
                body = file.read(length + 4)
                if kind in _PNG_PIXELS or body[-4:] == struct.pack(">I", zlib.crc32(kind + body[:-4])):
                    kept.write(head + body)
            else:
                file.seek(length + 4, io.SEEK_CUR)
            if kind == b"IEND":
                break
    kept.seek(0)
    return kept


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a type that is read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
