"""What a sampling call asks for, checked once and cut into micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastvq._check import (
    require_codes,
    require_integer,
    require_mask,
    require_positive_int,
    require_real,
    require_shape,
    require_tensor,
)
from fastvq._unwrap import unwrap
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models.prior import Condition, Prior, condition_levels
from fastvq.ops.draw import check_options, draw
from fastvq.sampling.noise import Seed, fixed_seed, uniforms
from fastvq.sampling.own import OwnPrior, as_own_prior, require_causal

INDEX_LIMIT = 1 << 62
_LARGEST = torch.iinfo(torch.int64).max
# Sample, row and column.
Index = tuple[slice | Tensor, int | Tensor, int | Tensor]
# A class of all samples, or of each: NumPy's numbers and arrays as well.
Labels = int | Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class Settings:
    """How a code is drawn from its logits; see :func:`fastvq.ops.draw`.

    Attributes:
        temperature: of all samples, or a tuple with that of each.
    """

    temperature: float | tuple[float, ...] = 1.0
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def of(cls, temperature: object, top_k: int | None, top_p: float | None, n: int) -> Settings:
        """Of n samples; a temperature for each of them may come as a sequence, an array or a tensor."""
        return cls(_temperatures(temperature, n), top_k, top_p)

    def check(self, num_codes: int) -> None:
        each = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        for temperature in dict.fromkeys(each or (1.0,)):
            check_options(num_codes, temperature, self.top_k, self.top_p)

    def groups(self) -> Iterator[tuple[Settings, Tensor | None]]:
        """The settings of each temperature, and the samples that have it: int64, or None where all have the same."""
        if not isinstance(self.temperature, tuple):
            yield self, None
            return
        each = np.array(self.temperature)
        for temperature in dict.fromkeys(self.temperature):
            members = torch.from_numpy(np.flatnonzero(each == temperature))
            yield dataclasses.replace(self, temperature=temperature), members

    def numbers(self, num_codes: int) -> tuple[float, int, float]:
        """Temperature, top_k and top_p as kernels take them, who know no greedy drawing but that of the best one."""
        if self.temperature == 0:
            return 1.0, 1, 1.0
        assert not isinstance(self.temperature, tuple)
        top_k = num_codes if self.top_k is None else self.top_k
        return self.temperature, top_k, 1.0 if self.top_p is None else self.top_p


@dataclass(frozen=True)
class SampleRequest:
    """Everything an engine needs to fill grids of codes, on the prior's device.

    Attributes:
        noise: float32 [n, H, W] in [0, 1).
        condition: codes of the levels above, int64 [n, h, w] each, top first.
        label: int64 [n] or None.
        init_codes: int64 [n, H, W]; read where ``known`` is True.
        known: bool [n, H, W].
        settings: how codes are drawn.
    """

    noise: Tensor
    condition: tuple[Tensor, ...]
    label: Tensor | None
    init_codes: Tensor
    known: Tensor
    settings: Settings

    def rows(self, index: Tensor | slice) -> SampleRequest:
        """The request for some of the samples."""
        return dataclasses.replace(
            self,
            noise=self.noise[index],
            condition=tuple(codes[index] for codes in self.condition),
            label=None if self.label is None else self.label[index],
            init_codes=self.init_codes[index],
            known=self.known[index],
        )

    def start_codes(self) -> Tensor:
        """The grids before anything is drawn: known codes, and 0 elsewhere."""
        return torch.where(self.known, self.init_codes, 0)

    def parts(self, *, size: int, start: int, padded: bool) -> list[Part]:
        """Micro-batches in which the samples, from index ``start`` on, are drawn: each of one temperature."""
        found: list[Part] = []
        n = len(self.noise)
        for settings, members in self.settings.groups():
            if padded:
                for index, new in padded_micro_batches(start, n, size):
                    rows = index[new]
                    mine = torch.arange(len(rows)) if members is None else torch.isin(rows, members).nonzero()[:, 0]
                    if len(mine):
                        found.append(Part(settings, index, new.start + mine, rows[mine]))
                continue
            for part in micro_batches(n if members is None else len(members), size):
                index = torch.arange(part.start, part.stop) if members is None else members[part]
                found.append(Part(settings, index, torch.arange(len(index)), index))
        return found

    def draw_into(self, codes: Tensor, logits: Tensor, row: int, column: int) -> None:
        """Draw the codes of a position from logits [n, K], and keep those that are known."""
        self.draw_at(codes, logits, (slice(None), row, column))

    def draw_at(self, codes: Tensor, logits: Tensor, at: Index) -> None:
        """Draw the codes [N] at an index into the grids from logits [N, K], and keep those that are known."""
        drawn = draw(
            logits,
            self.noise[at],
            temperature=self.settings.temperature,  # type: ignore[arg-type]  # of one group
            top_k=self.settings.top_k,
            top_p=self.settings.top_p,
            backend="torch",
        )
        codes[at] = torch.where(self.known[at], codes[at], drawn)


class Part(NamedTuple):
    """Samples that are computed together.

    Attributes:
        settings: how they are drawn.
        chosen: their rows in the request, int64.
        new: those among them that are asked for; the others fill a micro-batch of a fixed size.
        place: where these belong in the result.
    """

    settings: Settings
    chosen: Tensor
    new: Tensor
    place: Tensor


def as_prior(
    prior: object,
    *,
    shape: tuple[int, int] | None = None,
    num_codes: int | None = None,
    num_classes: int | None = None,
) -> Prior:
    """The prior itself, without what PyTorch wraps around modules, or our form of one from another project.

    Args:
        shape, num_codes, num_classes: of a callable that is neither; others have their own.

    Raises:
        CausalityError: logits of the callable depend on codes that are not known when they are needed.
    """
    prior = unwrap(prior)
    if not isinstance(prior, Prior) and isinstance(prior, nn.Module):
        from fastvq.interop import convert, recognise

        kind = recognise(prior)
        if kind == "pixelsnail":
            prior = convert(prior)
        elif kind == "pixelcnn" and shape is not None:
            # It takes pixels, not codes.
            prior = convert(prior, shape=shape)
    found = as_own_prior(prior, shape=shape, num_codes=num_codes, num_classes=num_classes)
    if isinstance(found, OwnPrior) and found.why_no_plan() is not None:
        found.require_call()
        require_causal(found)  # a plan cannot leak
    return found


def micro_batches(n: int, size: int) -> Iterator[slice]:
    """Cut n samples into as few parts of up to ``size`` as there can be, of nearly equal length."""
    count = -(-n // size)
    for part in range(count):
        yield slice(n * part // count, n * (part + 1) // count)


def padded_micro_batches(start: int, n: int, size: int) -> Iterator[tuple[Tensor, slice]]:
    """Cut samples ``start .. start + n - 1`` at multiples of ``size`` of their index.

    Yields, for each micro-batch, ``size`` indices into the n samples, and where the new samples lie among them. A
    sample always has the same place in a micro-batch of the same size, for engines that round differently for other
    sizes and places; gaps are filled with its neighbours.
    """
    if n == 0:
        return
    for low in range(start - start % size, start + n, size):
        first, last = max(low, start), min(low + size, start + n)
        index = torch.arange(low, low + size).clamp(first, last - 1) - start
        yield index, slice(first - low, last - low)


def build_request(
    prior: Prior,
    n: int,
    *,
    condition: Condition,
    label: Labels | None,
    settings: Settings,
    seed: Seed | None,
    noise: Tensor | None,
    init_codes: Tensor | None,
    mask: Tensor | None,
    start: int,
) -> SampleRequest:
    """Check the arguments of :func:`fastvq.sample` and bring them to the prior's device."""
    n, start = check_indices(n, start)
    config = prior.config
    settings.check(config.num_codes)
    grid = [n, *config.shape]
    # Values are checked on the CPU, where reading them does not wait for a GPU.
    on_cpu = [
        _of_each(require_tensor(f"condition[{i}]", codes).cpu(), n)
        for i, codes in enumerate(condition_levels(condition))
    ]
    checked = prior.check_condition(on_cpu, n)
    label = check_labels(prior, label, n)
    if noise is None:
        noise = uniforms(fixed_seed(seed), start, n, config.shape, level=config.level)
    elif seed is not None:
        raise ArgumentError("noise and seed: give one or the other, got both")
    else:
        noise = _check_noise(noise, grid)
    if (init_codes is None) != (mask is None):
        raise ArgumentError("init_codes and mask: known positions need both, got only one of them")
    if init_codes is None or mask is None:
        return assemble(prior, settings, noise, checked, label)
    known = _check_mask(mask, grid)
    init_codes = _of_each(require_tensor("init_codes", init_codes).cpu(), n)
    codes = require_codes("init_codes", _on_cpu("init_codes", init_codes, known), grid, config.num_codes)
    return assemble(prior, settings, noise, checked, label, codes, known)


def assemble(
    prior: Prior,
    settings: Settings,
    noise: Tensor,
    condition: Sequence[Tensor],
    label: Tensor | None,
    init_codes: Tensor | None = None,
    known: Tensor | None = None,
) -> SampleRequest:
    """The request of what has been checked, on the prior's device; without ``known`` all codes are to be drawn."""
    device = next(prior.parameters()).device
    if init_codes is None or known is None:
        init_codes, known = torch.zeros(noise.shape, dtype=torch.int64), torch.zeros(noise.shape, dtype=torch.bool)
    return SampleRequest(
        noise=noise.to(device),
        condition=tuple(codes.to(device) for codes in condition),
        label=None if label is None else label.to(device),
        init_codes=init_codes.to(device),
        known=known.to(device),
        settings=settings,
    )


def check_indices(n: int, start: int) -> tuple[int, int]:
    """Both as Python's integers."""
    n, start = require_positive_int("n", n, minimum=0), require_positive_int("start", start, minimum=0)
    if start > INDEX_LIMIT:
        raise ArgumentError(f"start: must be at most 2**62, got {start}")
    return n, start


def check_labels(prior: Prior, label: Labels | None, n: int) -> Tensor | None:
    """The labels of n samples, int64 [n] on the CPU; None for a prior that knows none."""
    classes = prior.config.num_classes
    if label is None:
        return prior.check_label(None, n)
    if isinstance(label, (np.ndarray, Tensor)) and label.ndim == 0:
        one: Any = label.item()
        label = one
    if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
        if classes is not None and not 0 <= label < classes:
            raise ArgumentError(f"label: must lie in 0..{classes - 1}, got {label}")
        label = torch.full((n,), int(label) if classes else 0)
    return prior.check_label(_label_tensor(label, n).cpu(), n)


def _label_tensor(label: Labels, n: int) -> Tensor:
    if isinstance(label, Tensor):
        return label
    expected = f"an int, or {n} of them in a sequence, an array or a tensor"
    if isinstance(label, np.ndarray):
        if not np.issubdtype(label.dtype, np.integer):
            raise ArgumentTypeError(f"label: expected {expected}, got an array of {label.dtype}")
        return torch.from_numpy(np.array(label, dtype=np.int64))
    if not isinstance(label, Sequence) or isinstance(label, (str, bytes)):
        raise ArgumentTypeError(f"label: expected {expected}, got {type(label).__name__} {label!r}")
    for one in label:
        if isinstance(one, bool) or not isinstance(one, (int, np.integer)):
            raise ArgumentTypeError(f"label: expected {expected}, got one that is {type(one).__name__} {one!r}")
    return torch.tensor([max(-_LARGEST, min(int(one), _LARGEST)) for one in label], dtype=torch.int64)


def _temperatures(value: Any, n: int) -> float | tuple[float, ...]:
    if isinstance(value, (np.ndarray, Tensor)):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        require_real("temperature", value)
        return value
    if len(value) != n:
        raise ArgumentError(f"temperature: expected one value, or one for each of {n} samples, got {len(value)}")
    return tuple(require_real(f"temperature[{i}]", one) for i, one in enumerate(value))


def _of_each(grids: Tensor, n: int) -> Tensor:
    """One grid [H, W] or [1, H, W] for all of n samples; anything else as it came, for checks to say what is wrong."""
    if grids.ndim == 2:
        grids = grids[None]
    return grids.expand(n, -1, -1) if grids.ndim == 3 and len(grids) == 1 else grids


def _on_cpu(name: str, codes: Tensor, known: Tensor) -> Tensor:
    """Codes with those at unknown positions, which are never read, set to 0."""
    codes = require_integer(name, codes).cpu()
    return codes.masked_fill(~known, 0) if codes.shape == known.shape else codes


def _check_noise(noise: Tensor, grid: list[int]) -> Tensor:
    noise = require_tensor("noise", noise).cpu()
    if noise.dtype != torch.float32:
        raise ArgumentTypeError(f"noise: expected float32, got {noise.dtype}")
    require_shape("noise", noise, grid)
    outside = ~((noise >= 0) & (noise < 1))
    if bool(outside.any()):
        raise ArgumentError(f"noise: values must lie in [0, 1), got {float(noise[outside][0])}")
    return noise


def _check_mask(mask: Tensor, grid: list[int]) -> Tensor:
    flat = require_tensor("mask", mask).ndim == 2
    mask = mask if flat else _of_each(mask, grid[0])
    return require_mask("mask", mask, grid[1:] if flat else grid, "where a code is known").cpu().expand(grid)
