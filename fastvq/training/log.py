"""Metrics of a run: a line of JSON each, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastvq._files import full_disk_named, reading, replacing_file, sync
from fastvq._schema import ENTRIES, TEXT, integer, number, require_entries

METRICS = "metrics.jsonl"


class MetricLog:
    """Appends to ``metrics.jsonl`` in a folder, from which lines past the step to go on from are removed first.

    Lines hold no times, so a run that was interrupted ends with the same file as one that was not.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS
        with replacing_file(self._path) as temporary:
            temporary.write_text("".join(_lines_until(self._path, step)), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warnings.warn(
                f'TensorBoard is not installed, metrics go to {METRICS} alone; pip install "fastvq[train]" adds it',
                stacklevel=2,
            )
        else:
            with self._board_optional():
                self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def has(self, step: int, split: str) -> bool:
        """Whether the log holds a line of a step."""
        entries = map(_entry, _lines_until(self._path, step))
        return any(entry and entry["step"] == step and entry["split"] == split for entry in entries)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        with full_disk_named(self._path):
            self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            with self._board_optional():
                for name, value in values.items():
                    self._board.add_scalar(f"{split}/{name}", value, step)

    @contextlib.contextmanager
    def _board_optional(self) -> Iterator[None]:
        """The numbers are in ``metrics.jsonl``: training goes on where TensorBoard's files cannot be written."""
        try:
            yield
        except OSError as error:
            self._board = None
            warnings.warn(
                f"TensorBoard's files cannot be written ({error}); metrics go to {METRICS} alone", stacklevel=3
            )

    def sync(self) -> None:
        """Put what was written on disk: a checkpoint must not outlive the lines before it."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What could not be written when it was due is tried again here, while that error is on its way already.
        with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
            self._file.close()
            sync(self._path)
        if self._board is not None:
            with self._board_optional():
                self._board.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of the log up to a step. The first one that is damaged ends it: a write was cut short there."""
    kept: list[str] = []
    if not path.exists():
        return kept
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        entry = _entry(line)
        if not line.endswith("\n") or entry is None or entry["step"] > step:
            break
        kept.append(line)
    return kept


def last_validation(run: Path, *names: str) -> dict[str, Any]:
    """The last line on validation in a run's log; empty if there is none.

    Args:
        names: metrics that such a line holds.

    Raises:
        CorruptFileError: a line is damaged, or lacks one of these metrics.
    """
    lines = [entry for entry in read_metrics(run) if entry["split"] == "validation"]
    if not lines:
        return {}
    require_entries(metrics_path(run), lines[-1], dict.fromkeys(names, number()))
    return lines[-1]


def metrics_path(run: Path) -> Path:
    """The log of a run."""
    return run / "logs" / METRICS


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's log, each with its ``step``, ``split`` (``train`` or ``validation``) and metrics.

    Raises:
        CorruptFileError: a line is damaged.
    """
    found, path = [], metrics_path(run)
    with reading(f"{path}: not a log of metrics"):
        for place, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            entry = _entry(line)
            if entry is None:
                raise ValueError(f"line {place} is damaged")
            found.append(entry)
    return found


def _entry(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return (
        value if ENTRIES.test(value) and integer().test(value.get("step")) and TEXT.test(value.get("split")) else None
    )
