"""Which files are pictures, and the pixels of one."""

from __future__ import annotations

import contextlib
import functools
import io
import stat
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from fastvq.errors import CorruptFileError

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


def read_picture(
    path: Path,
    size: tuple[int, int] | None,
    channels: int,
    *,
    limit: int,
    formats: tuple[str, ...],
    decode: bool = True,
) -> tuple[np.ndarray, bool]:
    """Pixels of a picture (of its first frame, if it has several), upright, cropped and resized.

    Metadata do not decide: where EXIF cannot be read the picture stays as it lies, texts and colour profiles are
    ignored, damaged or not.

    Args:
        size: (H, W); None: as large as it is, and whole.
        limit: largest width * height of the file.
        decode: False: read the header only; the pixels are empty then.

    Returns:
        uint8 [H, W, C], and whether there are further frames (False without ``decode``).

    Raises:
        CorruptFileError: the file cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("not a regular file")
        try:
            return _read(path, size, channels, limit, formats, decode)
        except Exception:
            # Pillow gives up on a PNG for a damaged or large chunk that has nothing to do with its pixels.
            stripped = _png_without_metadata(path)
            if stripped is None:
                raise
            return _read(stripped, size, channels, limit, formats, decode)
    # Damaged files make Pillow's decoders raise nearly anything, from OSError to IndexError.
    except Exception as error:
        raise CorruptFileError(f"{path}: {_reason(error)}") from error


def _read(
    source: Path | io.BytesIO,
    size: tuple[int, int] | None,
    channels: int,
    limit: int,
    formats: tuple[str, ...],
    decode: bool,
) -> tuple[np.ndarray, bool]:
    with Image.open(source, formats=formats) as image:
        pixels = image.width * image.height
        # Pillow only warns at its limit and raises at twice that; here the limit is the limit.
        limit = min(limit, Image.MAX_IMAGE_PIXELS or limit)
        if pixels > limit:
            raise ValueError(f"{image.width} x {image.height} = {pixels} pixels, more than the limit {limit}")
        if not decode:
            return np.empty(0, np.uint8), False
        converted = _convert(image, size, channels)
        several = False
        with contextlib.suppress(Exception):  # damage in a later frame
            several = image.format in _FILMS and bool(getattr(image, "is_animated", False))
        return converted, several


def _convert(image: Image.Image, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    _scale_transparent_value(image)
    image.load()
    image = _upright(image)
    if image.mode == "F" or (image.mode == "I" and image.format not in (None, "PNG", "PPM")):
        raise ValueError(f"pixels of mode {image.mode}, whose range is not known; expected 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow opens as I;16 or, in some formats and versions, as I
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    return np.array(image).reshape(image.height, image.width, channels)


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


def _upright(image: Image.Image) -> Image.Image:
    try:
        method = _TRANSPOSE.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF makes Pillow raise nearly anything
        method = None
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
