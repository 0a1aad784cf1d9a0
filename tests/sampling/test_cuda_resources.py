"""What the CUDA kernels take: registers, shared memory, stack and spills, read off the compiler's own report."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# What CMake builds machine code for.
ARCHITECTURES = ("80", "90", "100")
# What has no kernels is compiled once, to see that it has none from elsewhere.
JOBS = [
    (source, arch)
    for source in SOURCES
    for arch in (ARCHITECTURES if "__global__" in source.read_text() else ARCHITECTURES[:1])
]

# Registers of a multiprocessor, the most a thread can have, and the unit in which a warp gets them.
REGISTER_FILE, MOST_REGISTERS, REGISTER_UNIT = 65536, 255, 8
# Bytes of stack that a function may use. An array that is indexed at run time lands there, in slow memory.
MOST_STACK = 0


class Usage(NamedTuple):
    """Of one function: registers of a thread (None: no kernel, counted with its callers), bytes of the rest."""

    name: str
    architecture: str
    registers: int | None
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def parse_report(report: str) -> list[Usage]:
    """What ``ptxas -v`` says about every function.

    Raises:
        ValueError: it says something unexpected, or nothing.
    """
    found: list[Usage] = []
    entry, architecture = "", ""
    name: str | None = None
    frame: tuple[int, ...] = ()
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            entry, architecture = match.groups()
        elif match := re.search(r"Function properties for '?(\w+)'?", line):
            name = match.group(1)
        elif "bytes stack frame" in line:
            numbers = re.fullmatch(
                r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s*", line
            )
            if name is None or numbers is None:
                raise ValueError(f"report: expected the stack frame of a function, got {line!r}")
            frame = tuple(int(number) for number in numbers.groups())
            if name != entry:
                found.append(Usage(name, architecture, None, 0, *frame))
            name = None
        elif "registers" in line and "Used" in line:
            numbers = re.search(r"Used (\d+) registers", line)
            if numbers is None or not frame or not entry:
                raise ValueError(f"report: expected the registers of a kernel, got {line!r}")
            shared = re.search(r"(\d+) bytes smem", line)
            found.append(
                Usage(entry, architecture, int(numbers.group(1)), int(shared.group(1)) if shared else 0, *frame)
            )
            entry, frame = "", ()
    if not any(usage.registers is not None for usage in found):
        raise ValueError(f"report: expected at least one kernel, got {report!r}")
    return found


def problems(usage: Usage, threads: int, most_stack: int = MOST_STACK) -> list[str]:
    """What is wrong with a function of which blocks of ``threads`` threads are launched."""
    wrong = []
    if usage.spill_stores or usage.spill_loads:
        wrong.append(f"{usage.spill_stores} bytes of spill stores and {usage.spill_loads} of loads")
    if usage.stack > most_stack:
        wrong.append(f"{usage.stack} bytes of stack, at most {most_stack}")
    if usage.registers is not None:
        # Registers come in units, so a few more than asked for are taken.
        taken = -(-usage.registers // REGISTER_UNIT) * REGISTER_UNIT * threads
        if usage.registers > MOST_REGISTERS or taken > REGISTER_FILE:
            wrong.append(f"{usage.registers} registers x {threads} threads exceed {REGISTER_FILE}")
        if usage.shared:
            # All shared memory is asked for at launch, so that one number says what a block needs.
            wrong.append(f"{usage.shared} bytes of static shared memory")
    return wrong


def block_threads() -> int:
    """Threads of a block, as program.h defines them."""
    text = (ROOT / "csrc" / "cuda" / "program.h").read_text()
    match = re.search(r"#define FASTVQ_CUDA_THREADS (\d+)", text)
    assert match is not None
    return int(match.group(1))


def table(usages: list[Usage]) -> str:
    rows = [("function", "for", "registers", "shared", "stack", "spilled")]
    for usage in usages:
        registers = "-" if usage.registers is None else str(usage.registers)
        spilled = str(usage.spill_stores + usage.spill_loads)
        rows.append((usage.name, usage.architecture, registers, str(usage.shared), str(usage.stack), spilled))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# In the compiler's format, with made-up names and numbers.
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_90a'
ptxas info    : Function properties for _Z5cleanPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers
ptxas info    : Compile time = 2.013 ms
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_90a'
ptxas info    : Function properties for _Z5spillPf
    440 bytes stack frame, 620 bytes spill stores, 616 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 440 bytes cumulative stack size, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 65.690 ms
ptxas info    : Function properties for _Z6helperf
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_parser_reads_every_number() -> None:
    assert parse_report(REPORT) == [
        Usage("_Z5cleanPf", "sm_90a", 96, 0, 0, 0, 0),
        Usage("_Z5spillPf", "sm_90a", 32, 1024, 440, 620, 616),
        Usage("_Z6helperf", "sm_90a", None, 0, 32, 0, 0),
    ]


def test_a_spill_a_stack_frame_and_static_shared_memory_are_problems() -> None:
    clean, spilling, helper = parse_report(REPORT)
    assert problems(clean, 256) == []
    assert problems(spilling, 256) == [
        "620 bytes of spill stores and 616 of loads",
        "440 bytes of stack, at most 0",
        "1024 bytes of static shared memory",
    ]
    assert problems(helper, 256) == ["32 bytes of stack, at most 0"]


@pytest.mark.parametrize(
    ("registers", "threads", "fits"),
    [(255, 256, True), (128, 512, True), (129, 512, False), (65, 1024, False), (256, 32, False)],
)
def test_registers_of_a_block_must_fit(registers: int, threads: int, fits: bool) -> None:
    assert (problems(Usage("k", "sm_80", registers, 0, 0, 0, 0), threads) == []) == fits


@pytest.mark.parametrize(
    "report",
    [
        "",
        "ptxas info    : 0 bytes gmem",
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
        REPORT.replace("spill stores", "spills"),
        "ptxas info    : Used 96 registers, used 1 barriers",
    ],
    ids=["empty", "no-kernel", "frame-of-nothing", "other-words", "registers-of-nothing"],
)
def test_a_report_that_is_not_understood_is_an_error(report: str) -> None:
    with pytest.raises(ValueError, match="report: expected"):
        parse_report(report)


def compiled(source: Path, arch: str, folder: Path) -> str:
    """The report of compiling a source to machine code for one architecture."""
    target = folder / f"{source.stem}.{arch}.cubin"
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", code, "-Xptxas", "-v", "-cubin", "-o", str(target)]
    # Not colours, whatever the terminal.
    environment = {**os.environ, "TERM": "dumb"}
    done = subprocess.run(
        ["nvcc", *flags, str(source)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size > 0
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[Path, str], Future[str]]]:
    """Of every source and architecture; two compilers run at a time."""
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(2) as pool:
        yield {(source, arch): pool.submit(compiled, source, arch, folder) for source, arch in JOBS}


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no CUDA compiler (nvcc) on the path")


def test_architectures_are_those_of_the_build() -> None:
    lists = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES (\d[^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert lists
    assert tuple(re.findall(r"\d+\w?", lists[0].replace("-real", ""))) == ARCHITECTURES


def test_the_step_kernel_is_among_the_sources() -> None:
    assert {"step_kernel.cu", "probes.cu"} <= {source.name for source in SOURCES}


@needs_nvcc
@pytest.mark.parametrize(("source", "arch"), JOBS, ids=[f"{source.stem}-sm_{arch}" for source, arch in JOBS])
def test_kernels_fit(source: Path, arch: str, reports: dict[tuple[Path, str], Future[str]]) -> None:
    report = reports[source, arch].result()
    if "__global__" not in source.read_text():
        assert "entry function" not in report
        return
    usages = parse_report(report)
    print(table(usages))
    assert {usage.architecture for usage in usages} == {f"sm_{arch}"}
    wrong = {usage.name: found for usage in usages if (found := problems(usage, block_threads()))}
    assert not wrong
