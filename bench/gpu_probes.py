"""What a GPU does at best: ``python -m bench.gpu_probes --out DIR`` writes DIR/probes.json and prints a table.

Blocks meeting and passing a flag on, starting kernels, copying, and library products in float32, TF32 and bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu_floors import GpuRates
from bench.machine import GPU_UNITS, Ceilings, describe_commit, describe_machine, describe_versions, now
from fastvq import _engine

FILE = "probes.json"
_ROUNDS = 20_000
_LAUNCHES = 2_000
_LARGE_BYTES = 4 << 30
# A square that fills the chip, and products of the row phase.
_PRODUCTS = ((8192, 8192, 8192), (4096, 5120, 512), (16384, 5120, 512))


def measure(device: int = 0) -> dict[str, Any]:
    """All of it, as JSON. Probes of blocks and launches are missing, with the reason, where the extension has none."""
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cache_bytes": properties.L2_cache_size,
        "shared_bytes_per_multiprocessor": properties.shared_memory_per_block_optin,
        "copy_bytes_per_s": copy_rate(_LARGE_BYTES, device),
        # Source and destination together take half of the cache.
        "cached_copy_bytes_per_s": copy_rate(properties.L2_cache_size // 4, device),
    }
    ceilings = Ceilings()
    with torch.cuda.device(device):
        for unit in GPU_UNITS:
            for product in _PRODUCTS:
                ceilings.measure_gpu(unit, *product)
    found["gpu_flops_per_s"] = ceilings.gpu
    extension = _engine.require() if _engine.available() else None
    if extension is None or not hasattr(extension, "probe_barrier"):
        found["missing"] = _engine.why_unavailable() or "the extension was built without CUDA"
        return found
    barrier = [extension.probe_barrier(0, _ROUNDS, device) for _ in range(5)]
    hop = [extension.probe_flag_hop(_ROUNDS, device) for _ in range(5)]
    launches = [extension.probe_launch(_LAUNCHES, device) for _ in range(5)]
    found["microseconds"] = {
        "barrier of all blocks": barrier,
        "flag from block to block": hop,
        "empty kernel": [plain for plain, _ in launches],
        "empty kernel in a graph": [graph for _, graph in launches],
    }
    return found


def copy_rate(size: int, device: int, repeats: int = 20) -> float:
    """Bytes/s, read and written together, of copying ``size`` bytes of random numbers on the device."""
    source = torch.randint(1 << 31, (size // 8,), device=f"cuda:{device}")
    target = torch.empty_like(source)
    loops = max(1, (1 << 28) // size)  # so that a copy within the cache takes longer than starting it
    seconds = []
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(repeats + 2):
        start.record(torch.cuda.current_stream(device))
        for _ in range(loops):
            target.copy_(source)
        stop.record(torch.cuda.current_stream(device))
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3 / loops)
    if not torch.equal(source, target):
        raise RuntimeError("copy: the target differs from the source")
    return 2 * source.numel() * 8 / statistics.median(seconds[2:])


def rates_of(found: dict[str, Any]) -> GpuRates | None:
    """What floors need; None where the probes of blocks are missing."""
    if "microseconds" not in found:
        return None
    return GpuRates(
        hop=1e-6 * statistics.median(found["microseconds"]["flag from block to block"]),
        copy=found["copy_bytes_per_s"],
        cached=max(found["cached_copy_bytes_per_s"], found["copy_bytes_per_s"]),
        cache_bytes=found["cache_bytes"],
        shared_bytes=found["multiprocessors"] * found["shared_bytes_per_multiprocessor"],
    )


def lines(found: dict[str, Any]) -> list[str]:
    """A short table."""
    rows = [(name, f"{statistics.median(values):.3f} us") for name, values in found.get("microseconds", {}).items()]
    if "missing" in found:
        rows.append(("blocks and launches", f"not measured: {found['missing']}"))
    rows.append(("copy, read + write", f"{found['copy_bytes_per_s'] / 1e9:.0f} GB/s"))
    rows.append(("copy within the cache", f"{found['cached_copy_bytes_per_s'] / 1e9:.0f} GB/s"))
    for unit, products in found["gpu_flops_per_s"].items():
        name, best = max(((name, max(rates)) for name, rates in products.items()), key=lambda pair: pair[1])
        rows.append((f"product, {unit.removeprefix('cuda ')}", f"{best / 1e12:.1f} TFLOP/s ({name})"))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def load(folder: Path) -> dict[str, Any] | None:
    """What an earlier run in the same folder found."""
    path = folder / FILE
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def save(found: dict[str, Any], folder: Path) -> None:
    facts = {"date": now(), "machine": describe_machine(), "versions": describe_versions(), **describe_commit()}
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{FILE}.part"
    part.write_text(json.dumps({"format": 1, **facts, **found}, indent=1) + "\n")
    part.replace(folder / FILE)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_probes", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    found = measure()
    save(found, options.out)
    print("\n".join(lines(found)))
    return 1 if "missing" in found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
