"""Draws the pictures of the pages in this folder: ``python docs/ideas/draw.py``.

The numbers in them are asked of the package, not typed. The same versions of matplotlib and Pillow give the same
pixels each time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from drawing import cached, front, levels, quantiser

HERE = Path(__file__).resolve().parent
PICTURES = {
    "two-levels.png": levels.draw_model,
    "two-levels-emoji.png": levels.draw_emoji,
    "cached-sampling.png": cached.draw,
    "wavefront.png": front.draw,
    "wavefront.gif": front.animate,
    "fused-quantiser.png": quantiser.draw,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/ideas.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)} (default: all)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: beside this script)")
    chosen = parser.parse_args(arguments)
    for name in chosen.names:
        if name not in PICTURES:
            parser.error(f"expected one of {', '.join(PICTURES)}, got {name!r}")
    for name in chosen.names or PICTURES:
        PICTURES[name](chosen.out / name)
        print(chosen.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
