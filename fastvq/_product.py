"""Products of matrices on the CPU, every output of which is summed in one fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvq import _engine
from fastvq._memory import address, strided_address


class Product:
    """Windows of some histories times weights: the bits of an output depend on its window, weights and start alone.

    Not on how many samples there are, nor on threads; and those of ``avx2`` and ``avx512`` are equal.

    Args:
        weights: for every input [R, T, C, N] float32: R rows and T columns of a window, C channels. They are copied.
        kernels: ``auto``, or ``avx512``, ``avx2``, ``baseline`` to force one.

    Raises:
        UnavailableError: there is no compiled extension.
    """

    def __init__(self, weights: Sequence[Tensor], kernels: str = "auto") -> None:
        if len({weight.shape[3] for weight in weights}) != 1:
            raise AssertionError(f"weights: expected as many columns each, got {[list(w.shape) for w in weights]}")
        self._windows = [tuple(weight.shape[:3]) for weight in weights]
        self._columns = weights[0].shape[3]
        flat = [weight.reshape(-1, self._columns) for weight in weights]
        packed = flat[0].contiguous() if len(flat) == 1 else torch.cat(flat)
        depth = packed.shape[0]
        self._native = _engine.require().make_product(
            address("weights", packed, torch.float32, depth * self._columns), depth, self._columns, kernels
        )

    @property
    def weight_bytes(self) -> int:
        return self._native.weight_bytes

    @property
    def fused(self) -> bool:
        """Whether products are added without being rounded before; instruction sets that do agree in bits."""
        return self._native.fused

    def __call__(
        self, inputs: Sequence[Tensor], out: Tensor, start: Tensor | None = None, *, threads: int | None = None
    ) -> Tensor:
        """Fill and return ``out`` [B, W, N]: at position c, ``start`` plus the windows of columns c .. c + T - 1.

        All are float32 on the CPU without gaps along the last axis; products are added one after the other, input by
        input, row by row, column by column, channel by channel.

        Args:
            inputs: each [B, R, W + T - 1, C]. They must not overlap ``out``.
            start: anything that broadcasts to ``out``, also ``out`` itself; zeros if None.
            threads: PyTorch's number of threads unless given.
        """
        samples, width, columns = out.shape
        if columns != self._columns or len(inputs) != len(self._windows):
            raise AssertionError(
                f"expected {len(self._windows)} inputs and {self._columns} columns of out,"
                f" got {len(inputs)} and {columns}"
            )
        fields: list[int] = []
        for (rows, taps, channels), x in zip(self._windows, inputs, strict=True):
            at = strided_address("input", x, torch.float32, (samples, rows, width + taps - 1, channels))
            of_sample, of_row, of_column, _ = x.stride()
            if taps == 1 or of_column == channels:
                fields += (at, of_sample, of_column, of_row, rows, taps * channels)
                continue
            for row in range(rows):  # columns lie apart
                fields += (at + 4 * row * of_row, of_sample, of_column, of_column, taps, channels)
        begin: tuple[int, ...] = (0, 0, 0)
        if start is not None and start.ndim == 1:
            begin = (strided_address("start", start, torch.float32, (columns,)), 0, 0)
        elif start is not None:
            wide = start.expand(samples, width, columns)
            begin = (strided_address("start", wide, torch.float32, out.shape), *wide.stride()[:2])
        self._native.run(
            samples,
            width,
            fields,
            *begin,
            strided_address("out", out, torch.float32, out.shape),
            *out.stride()[:2],
            torch.get_num_threads() if threads is None else threads,
        )
        return out
