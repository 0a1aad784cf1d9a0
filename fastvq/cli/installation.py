"""What is installed here, on which machine, and what can run: what a report of a bug needs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import fastvq
from fastvq import _engine
from fastvq._version import __version__
from fastvq.cli.summary import bytes_text
from fastvq.models import GatedPixelCNN, PixelSNAIL, Prior
from fastvq.ops.explain import usable_backends
from fastvq.sampling import shipped
from fastvq.sampling.engines import ENGINES
from fastvq.sampling.engines.cuda import cuda_summary
from fastvq.training.machine import free_memory

WIDTH = 100
_PACKAGES = ("triton", "numpy", "safetensors", "pillow", "scikit-learn", "tensorboard", "matplotlib", "nvtx")
# Variables of the environment that change what runs or how fast.
_VARIABLES = re.compile(r"(FASTVQ|OMP|KMP|GOMP|MKL|TRITON|CUDA|PYTORCH|NCCL)_\w+|NVIDIA_TF32_OVERRIDE|LD_PRELOAD")
_CPU, _MEMORY = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_DRIVER = Path("/proc/driver/nvidia/version")


def installation(device: str) -> dict[str, Any]:
    """All of it, ready for JSON. What is unknown is None.

    Args:
        device: on which engines and backends are asked whether they can run.
    """
    return {
        "fastvq": {"version": __version__, **_commit(), "path": str(Path(fastvq.__file__).parent)},
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "pytorch": {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()},
        "packages": {name: _version(name) for name in _PACKAGES},
        "extension": _extension(),
        "cuda": cuda_summary(),
        "system": platform.platform(),
        "processor": {"model": _entry(_CPU, "model name") or platform.machine(), "cores": _cores()},
        "memory": {"total": _bytes(_entry(_MEMORY, "MemTotal")), "free": free_memory("cpu")},
        "gpus": _gpus(),
        "driver": _driver(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)},
        "device": device,
        "engines": _engines(torch.device(device)),
        "backends": {op: dict(rows) for op, rows in usable_backends(torch.device(device)).items()},
        "pretrained": list(shipped()),
    }


def print_installation(device: str) -> None:
    """For people, in lines of at most `WIDTH` characters."""
    for name, text in _lines(installation(device)):
        print(textwrap.fill(f"{name:12}{text}", width=WIDTH, subsequent_indent=" " * 12, break_on_hyphens=False))


def print_json(device: str) -> None:
    print(json.dumps(installation(device), indent=2))


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    own, pytorch, extension = found["fastvq"], found["pytorch"], found["extension"]
    # Said in full once.
    short = {extension["error"]: "it needs the extension"}
    commit = own["commit"] and f", commit {own['commit'][:8]}{' with changes' if own['changed'] else ''}"
    yield "fastvq", f"{own['version']}{commit or ''}, Python {found['python']}, in {own['path']}"
    yield "pytorch", f"{pytorch['version']}, {'CUDA ' + pytorch['cuda'] if pytorch['cuda'] else 'without CUDA'}"
    yield "packages", ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    missing = [name for name, version in found["packages"].items() if not version]
    if missing:
        yield "", f"not there: {', '.join(missing)}"
    yield "extension", extension["error"] or _built(extension)
    yield "cuda", found["cuda"]
    yield "system", found["system"]
    processor, memory = found["processor"], found["memory"]
    sizes = [f"{bytes_text(memory[name])} {name}" for name in ("total", "free") if memory[name] is not None]
    yield "machine", f"{processor['model']}, {processor['cores']} core(s), memory: {', '.join(sizes) or 'unknown'}"
    yield "devices", f"cpu ({pytorch['threads']} threads){''.join(', ' + _gpu(gpu) for gpu in found['gpus'])}"
    if found["driver"]:
        yield "driver", found["driver"]
    yield "environment", " ".join(f"{name}={value}" for name, value in found["environment"].items()) or "nothing set"
    yield "engines", f"{_usable(found['engines'])} (on {found['device']})"
    yield from (("", f"not {name}: {short.get(reason, reason)}") for name, reason in found["engines"].items() if reason)
    yield "backends", "; ".join(f"{op}: {_usable(rows)}" for op, rows in found["backends"].items())
    against = {(name, reason) for rows in found["backends"].values() for name, reason in rows.items() if reason}
    yield from (("", f"not {name}: {short.get(reason, reason)}") for name, reason in sorted(against))
    yield "pretrained", ", ".join(found["pretrained"]) or "none"


def _usable(rows: Mapping[str, str | None]) -> str:
    return ", ".join(name for name, reason in rows.items() if reason is None) or "none"


def _built(extension: Mapping[str, Any]) -> str:
    sets = " ".join(extension.get("instruction_sets", ()))
    return f"available, built by {extension.get('compiler', 'an unknown compiler')}; this processor has {sets or '?'}"


def _extension() -> dict[str, Any]:
    reason = _engine.why_unavailable()
    if reason is not None:
        return {"error": reason}
    module = _engine.require()
    return {"error": None, "path": module.__file__, **module.build_info()}


def _engines(device: torch.device) -> dict[str, str | None]:
    """Of each engine why it cannot run on a device, or None where it can for every kind of prior."""
    # Engines may differ for these.
    priors: dict[str, Prior] = {
        "with attention": PixelSNAIL.from_preset("tiny-top"),
        "without attention": GatedPixelCNN.from_preset("tiny-pixelcnn"),
    }
    found = {}
    for engine in ENGINES:
        reasons = {kind: engine.why_not(prior, device) for kind, prior in priors.items()}
        if len(set(reasons.values())) == 1:
            found[engine.name] = reasons[next(iter(reasons))]
        else:
            found[engine.name] = "; ".join(f"priors {kind}: {reason or 'can run'}" for kind, reason in reasons.items())
    return found


def _commit() -> dict[str, Any]:
    """The commit of the checkout that is installed, if it is one, and whether its files have changed since."""
    root = Path(fastvq.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {"commit": None, "changed": None}
    commit = _run("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changed is None else bool(changed)}


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int | None:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _entry(path: Path, name: str) -> str | None:
    """A line ``name : value`` of a file in /proc."""
    try:
        found = re.search(rf"^{name}\s*:\s*(.+)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return found and found[1].strip()


def _bytes(text: str | None) -> int | None:
    return None if text is None else 1024 * int(text.split()[0])


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        try:
            known = torch.cuda.get_device_properties(index)
        except (RuntimeError, AssertionError) as error:  # a report matters most where CUDA does not start
            return [{"error": str(error).splitlines()[0]}]
        found.append({"name": known.name, "capability": f"{known.major}.{known.minor}", "memory": known.total_memory})
    return found


def _gpu(gpu: Mapping[str, Any]) -> str:
    if "error" in gpu:
        return f"GPUs that do not start ({gpu['error']})"
    return f"{gpu['name']} ({gpu['capability']}, {bytes_text(gpu['memory'])})"


def _driver() -> str | None:
    """Version of NVIDIA's driver."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found and f"NVIDIA {found[1]}"
