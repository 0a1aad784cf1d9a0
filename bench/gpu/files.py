"""Files of measurements, each with machine, versions and commit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.machine import describe_commit, describe_machine, describe_versions, now


def save(path: Path, found: Mapping[str, Any]) -> None:
    """Write it in place of what there was, never half of it."""
    facts = {"date": now(), "machine": describe_machine(), "versions": describe_versions(), **describe_commit()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({"format": 1, **facts, **found}, indent=1) + "\n")
    part.replace(path)


def load(path: Path) -> dict[str, Any] | None:
    """What a run has saved, if there was one."""
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose columns are as wide as they need to be."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
