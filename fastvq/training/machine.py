"""What a device is called, and the memory that is free on it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_MEMORY = Path("/proc/meminfo")
# Of a container: the second version of control groups, and the first.
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat"), "anon"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.stat"), "total_rss"),
)


def device_title(device: str) -> str:
    """A device in words: a GPU's name, or the number of a CPU's cores that are used."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{count} CPU core{'s' if count > 1 else ''}"


def free_memory(device: str) -> int | None:
    """Bytes that can still be had: of a GPU, or of main memory as far as machine and container allow; None: unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_entry(_MEMORY, "MemAvailable:", 1024), *(_below(*paths) for paths in _LIMITS)]
    return min((value for value in found if value is not None), default=None)


def _below(limit: Path, state: Path, used: str) -> int | None:
    """What a control group's limit leaves, caches of files not counted: they give way."""
    try:
        text = limit.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    taken = _entry(state, used)
    return None if not text.isdecimal() or taken is None else max(0, int(text) - taken)


def _entry(path: Path, name: str, unit: int = 1) -> int | None:
    try:
        found = re.search(rf"^{re.escape(name)}\s+(\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else unit * int(found[1])
