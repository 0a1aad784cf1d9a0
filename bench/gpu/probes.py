"""What a GPU does at best: ``python -m bench.gpu.probes --out DIR`` writes DIR/probes.json and prints a table.

Blocks meeting and passing a flag on, starting kernels, copying, and library products in float32, TF32 and bfloat16.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu.files import aligned, save
from bench.gpu.floors import Rates
from bench.machine import GPU_UNITS, Ceilings

FILE = "probes.json"
_ROUNDS = 20_000
_LAUNCHES = 2_000
_LARGE_BYTES = 4 << 30
# A square that fills the chip, and products of the row phase.
_PRODUCTS = ((8192, 8192, 8192), (4096, 5120, 512), (16384, 5120, 512))


def measure(device: int = 0) -> dict[str, Any]:
    """All of it, as JSON. Probes of blocks and launches are missing, with the reason, where they are not built."""
    properties = torch.cuda.get_device_properties(device)
    ceilings = Ceilings()
    with torch.cuda.device(device):
        for unit in GPU_UNITS:
            for product in _PRODUCTS:
                ceilings.measure_gpu(unit, *product)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cache_bytes": properties.L2_cache_size,
        "shared_bytes_per_multiprocessor": properties.shared_memory_per_block_optin,
        "copy_bytes_per_s": copy_rate(_LARGE_BYTES, device),
        # Source and destination together take half of the cache.
        "cached_copy_bytes_per_s": copy_rate(properties.L2_cache_size // 4, device),
        "gpu_flops_per_s": ceilings.gpu,
        **blocks_and_launches(device),
    }


def blocks_and_launches(device: int) -> dict[str, Any]:
    """Microseconds of each probe of the module ``fastvq._probes``, or why they are missing."""
    try:
        probes = importlib.import_module("fastvq._probes")
    except ImportError as error:
        how = "CMAKE_ARGS=-DFASTVQ_PROBES=ON pip install -e . builds it where there is a CUDA compiler"
        return {"missing": f"fastvq._probes cannot be imported ({error}); {how}"}
    launches = [probes.launch(_LAUNCHES, device) for _ in range(5)]
    return {
        "microseconds": {
            "barrier of all blocks": [probes.barrier(0, _ROUNDS, device) for _ in range(5)],
            "flag from block to block": [probes.flag_hop(_ROUNDS, device) for _ in range(5)],
            "empty kernel": [plain for plain, _ in launches],
            "empty kernel in a graph": [graph for _, graph in launches],
        }
    }


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


def rates_of(found: dict[str, Any]) -> Rates | None:
    """What floors need; None where the probes of blocks are missing."""
    if "microseconds" not in found:
        return None
    products = found["gpu_flops_per_s"]
    return Rates(
        flops={unit.removeprefix("cuda "): max(map(max, rates.values())) for unit, rates in products.items()},
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
    return aligned(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.probes", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    found = measure()
    save(options.out / FILE, found)
    print("\n".join(lines(found)))
    return 1 if "missing" in found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
