"""The machine a benchmark runs on: what it is, and how fast it multiplies and reads."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import fastvq
from fastvq import _engine

ROOT = Path(__file__).resolve().parent.parent
# Below this a call costs as much as the reading, and the rate would come out too low.
_LEAST_BUFFER = 4 << 20
# Units of arithmetic, where they run and their type.
CPU_FLOAT32 = "cpu float32"
GPU_UNITS = ("cuda float32", "cuda tf32", "cuda bfloat16")


class Ceilings:
    """The best rates seen in a session: on the CPU in float32 with all of PyTorch's threads, on a GPU in several types.

    A floor is honest only if its rate is one that the machine really reaches, so every measurement is kept and the
    best one counts.
    """

    def __init__(self) -> None:
        self.gemm: dict[str, list[float]] = {}
        self.read: dict[int, list[float]] = {}
        self.gpu: dict[str, dict[str, list[float]]] = {}

    @property
    def rate(self) -> float:
        """FLOP/s of the fastest library product on the CPU."""
        if not self.gemm:
            self.measure_gemm()
        return max(max(rates) for rates in self.gemm.values())

    def rate_of(self, unit: str) -> float:
        """FLOP/s of the fastest library product of a unit: `CPU_FLOAT32`, or one of `GPU_UNITS`."""
        if unit == CPU_FLOAT32:
            return self.rate
        if unit not in self.gpu:
            self.measure_gpu(unit, 8192, 8192, 8192)
        return max(max(rates) for rates in self.gpu[unit].values())

    def bandwidth(self, working_set: int) -> float:
        """Bytes/s at which a buffer of this many bytes is read over and over."""
        size = max(working_set, _LEAST_BUFFER)
        if size not in self.read:
            self.measure_read(working_set)
        return max(self.read[size])

    @torch.inference_mode()
    def measure_gemm(self, repeats: int = 4) -> None:
        """``torch.mm`` on a large square and on shapes of the row phase, and a convolution as the row phase does it."""
        for m, k, n in ((2048, 2048, 2048), (512, 5120, 512), (2048, 5120, 512)):
            a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
            seconds = _best(functools.partial(torch.mm, a, b, out=out), repeats)
            self.gemm.setdefault(f"mm [{m}, {k}] x [{k}, {n}]", []).append(2 * m * k * n / seconds)
        # Convolutions come from another library than matrix products, and one may use the machine better.
        x = torch.randn(8, 256, 16, 68).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(512, 256, 4, 5).contiguous(memory_format=torch.channels_last)
        flops = 2 * weight.numel() * 8 * 13 * 64
        rate = flops / _best(lambda: F.conv2d(x, weight), repeats)
        self.gemm.setdefault("conv 4x5, 256 to 512 channels on [8, 13, 64]", []).append(rate)

    @torch.inference_mode()
    def measure_tile(self, m: int, k: int, n: int, repeats: int = 20) -> None:
        """A product whose result stays in the caches: of thin matrices the rate is that of writing it, otherwise."""
        a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        rate = 2 * m * k * n / _best(functools.partial(torch.mm, a, b, out=out), repeats)
        self.gemm.setdefault(f"mm [{m}, {k}] x [{k}, {n}]", []).append(rate)

    @torch.inference_mode()
    def measure_gpu(self, unit: str, m: int, k: int, n: int, repeats: int = 10) -> None:
        """``torch.mm`` on the current GPU."""
        dtype = torch.bfloat16 if unit == "cuda bfloat16" else torch.float32
        a = torch.randn(m, k, device="cuda", dtype=dtype)
        b = torch.randn(k, n, device="cuda", dtype=dtype)
        out = torch.empty(m, n, device="cuda", dtype=dtype)

        def run() -> None:
            torch.mm(a, b, out=out)
            torch.cuda.synchronize()

        with allowing_tf32(unit == "cuda tf32"):
            rate = 2 * m * k * n / _best(run, repeats)
        self.gpu.setdefault(unit, {}).setdefault(f"mm [{m}, {k}] x [{k}, {n}]", []).append(rate)

    @torch.inference_mode()
    def measure_read(self, working_set: int, repeats: int = 30) -> None:
        """Best of a sum and a dot product of its halves: one addition or one multiply-add for every four bytes."""
        size = max(working_set, _LEAST_BUFFER)
        buffer = torch.rand(size // 8 * 2)
        half = buffer.numel() // 2
        seconds = min(_best(buffer.sum, repeats), _best(lambda: torch.dot(buffer[:half], buffer[half:]), repeats))
        self.read.setdefault(size, []).append(4 * buffer.numel() / seconds)

    def lines(self) -> list[str]:
        lines = [f"{name}: {max(rates) / 1e9:.0f} GFLOP/s" for name, rates in self.gemm.items()]
        lines += [
            f"{unit}, {name}: {max(rates) / 1e9:.0f} GFLOP/s"
            for unit, products in self.gpu.items()
            for name, rates in products.items()
        ]
        return lines + [
            f"reading {size / 1e6:.0f} MB over and over: {max(rates) / 1e9:.0f} GB/s"
            for size, rates in sorted(self.read.items())
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "flops_per_s": self.gemm,
            "gpu_flops_per_s": self.gpu,
            "read_bytes_per_s": {str(size): rates for size, rates in self.read.items()},
        }


@contextlib.contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU's float32 products may round their factors to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _best(run: Callable[[], object], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def describe_machine() -> dict[str, Any]:
    """CPU, caches, memory, GPUs."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "caches": caches(),
        "memory_bytes": _memory(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict[str, Any]:
    """Python, libraries, and how the extension was built."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "fastvq": fastvq.__version__,
        "peers": {name: _version(name) for name in ("vector-quantize-pytorch", "faiss-cpu", "monai", "triton")},
        "extension": dict(_engine.require().build_info()) if _engine.available() else _engine.why_unavailable(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_commit() -> dict[str, Any]:
    """The commit of the source tree, and whether files in it have changed since."""
    commit = _git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": None if commit is None else bool(_git("status", "--porcelain"))}


def load_average() -> float:
    """Average number of processes that wanted to run in the last minute."""
    return os.getloadavg()[0]


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def caches() -> dict[str, str]:
    """Size of each level of cache that the first core sees, such as ``{"L2": "1024K"}``."""
    found: dict[str, str] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            level = (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        found[f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind, '') }"] = size
    return found


def private_cache_bytes() -> int:
    """Second-level cache of all threads together; 0 if unknown."""
    return _cache_bytes("L2") * torch.get_num_threads()


def shared_cache_bytes() -> int:
    """Third-level cache; 0 if unknown."""
    return _cache_bytes("L3")


def _cache_bytes(level: str) -> int:
    size = caches().get(level, "0K")
    return int(size[:-1]) * 1024 if size.endswith("K") else 0


def _memory() -> int | None:
    total = _field("/proc/meminfo", "MemTotal")
    return int(total.split()[0]) * 1024 if total else None


def _field(path: str, name: str) -> str | None:
    """A line ``name : value`` of a file in /proc."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), None)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
