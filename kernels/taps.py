"""Which taps of a kernel over a grid in raster order are read."""

from __future__ import annotations

from typing import NamedTuple

# Channels are copied 16 bytes at a time only where Triton knows their addresses to be multiples of that, and libraries
# multiply at full rate.
CHANNEL_MULTIPLE = 16


class Taps(NamedTuple):
    """The taps that are read of a kernel whose rows are ``kernel`` columns wide: ``count`` of them, row by row.

    ``above`` whole rows lie above the current position, and column j reads j - ``left`` columns to the right of it.
    """

    kernel: int
    above: int
    left: int
    count: int

    @property
    def current(self) -> int:
        """Columns of the last row that are read."""
        return self.count - self.above * self.kernel


def read_taps(kernel: int, mask: str, form: str) -> Taps:
    """Of a causal k x k kernel, see `fastvq.ops.causal_conv2d`."""
    above = kernel - 1 if form == "rows" else kernel // 2
    left = kernel // 2
    return Taps(kernel, above, left, above * kernel + left + (mask == "inclusive"))
