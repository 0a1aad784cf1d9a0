"""Cases of the masked convolution for the Triton kernels, by loops in float64 and by PyTorch's operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MASKS = ("strict", "inclusive")
FORMS = ("rows", "symmetric")
ACTIVATIONS = (None, "elu", "concat_elu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def above(kernel: int, form: str) -> int:
    return kernel - 1 if form == "rows" else kernel // 2


def is_read(row: int, column: int, mask: str) -> bool:
    return row < 0 or (row == 0 and (column < 0 or (column == 0 and mask == "inclusive")))


def read_taps(kernel: int, mask: str, form: str) -> Tensor:
    """bool [k, k]."""
    rows, columns = range(-above(kernel, form), kernel - above(kernel, form)), range(-(kernel // 2), kernel)
    return torch.tensor([[is_read(row, column, mask) for column in columns[:kernel]] for row in rows])


def activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    return F.elu(x) if activation == "elu" else F.elu(torch.cat([x, -x], dim=1))


def shifted(x: Tensor, row: int, column: int) -> Tensor:
    """[B, C, H, W] whose position (r, c) holds x at (r + row, c + column), or 0 outside."""
    height, width = x.shape[2:]
    reach = max(abs(row), abs(column))
    padded = F.pad(x, (reach,) * 4)
    return padded[:, :, reach + row : reach + row + height, reach + column : reach + column + width]


def by_loop(x: Tensor, weight: Tensor, mask: str, form: str) -> Tensor:
    """The convolution of activated features, one tap at a time."""
    kernel = weight.shape[-1]
    out = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
    for i, j in read_taps(kernel, mask, form).nonzero().tolist():
        moved = shifted(x, i - above(kernel, form), j - kernel // 2)
        out = out + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], moved)
    return out


def by_torch(x: Tensor, weight: Tensor, mask: str, form: str) -> Tensor:
    """The same by PyTorch's operator with zeros for masked weights, in the type of its arguments."""
    kernel, up = weight.shape[-1], above(weight.shape[-1], form)
    weight = torch.where(read_taps(kernel, mask, form).to(weight.device), weight, 0)
    left = kernel // 2
    return F.conv2d(F.pad(x, (left, kernel - 1 - left, up, kernel - 1 - up)), weight)


class Case(NamedTuple):
    """Arguments of the convolution; ``out`` counts the columns before a gate."""

    kernel: int = 3
    mask: str = "strict"
    form: str = "rows"
    activation: str | None = None
    shape: tuple[int, int, int, int] = (2, 5, 4, 3)
    out: int = 6
    dtype: torch.dtype = torch.float32
    context: str | None = None
    gate: bool = False
    residual: bool = False
    precision: str = "ieee"

    @property
    def how(self) -> dict[str, Any]:
        return {"mask": self.mask, "form": self.form, "activation": self.activation, "precision": self.precision}

    def tensors(self) -> dict[str, Tensor]:
        """Of the case's type, on the CPU."""
        batch, channels, height, width = self.shape
        depth = channels * (2 if self.activation == "concat_elu" else 1)
        spread = (depth * self.kernel**2) ** -0.5
        made = {
            "x": normal(*self.shape),
            "weight": normal(self.out, depth, self.kernel, self.kernel, seed=1) * 2 * spread,
            "bias": normal(self.out, seed=2),
        }
        if self.context:
            grid = (height, width) if self.context == "grid" else (1, 1)
            made["context"] = normal(batch, self.out, *grid, seed=3)
        if self.residual:
            made["residual"] = normal(batch, self.out // (1 + self.gate), height, width, seed=4)
        return {name: value.to(self.dtype) for name, value in made.items()}


def surround(case: Case, made: dict[str, Tensor], out: Tensor) -> Tensor:
    """What follows the convolution, in the type of its arguments."""
    out = out + made["bias"][:, None, None]
    if case.context:
        out = out + made["context"]
    if case.gate:
        out = F.glu(out, dim=1)
    return out + made["residual"] if case.residual else out


def close(name: str, got: Tensor, want: Tensor, *peers: Tensor) -> None:
    """Asserts that the largest error is at most twice the worst peer's, and half a unit of the largest value.

    Results lie on a grid of such units, which moves either error by as much, whatever the sums before.
    """
    assert got.shape == want.shape, name
    assert got.dtype == peers[0].dtype, name
    if want.numel() == 0:
        return
    error, *others = ((value.detach().cpu().double() - want).abs().max() for value in (got, *peers))
    theirs = torch.stack(others).max()
    # Where PyTorch happens to be exact, one rounding of the result is still allowed.
    least = want.abs().max() * torch.finfo(got.dtype).eps / 2
    allowed = 2 * torch.maximum(theirs, least) + least
    assert error <= allowed, f"{name}: {error:.2e}, PyTorch {theirs:.2e}, allowed {allowed:.2e}"
