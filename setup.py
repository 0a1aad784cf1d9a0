"""Lists the packages and builds the extension through CMake; everything else is in pyproject.toml.

Environment variables:
    FASTVQ_REQUIRE_EXT=1: fail when the extension cannot be built. By default the installation goes on without it,
        because everything that has a PyTorch path works without.
    CXX, CXXFLAGS, CUDACXX, CMAKE_ARGS: as CMake reads them. CMAKE_ARGS=-DFASTVQ_CUDA=OFF leaves the CUDA engine out,
        which is otherwise part of the extension where there is a CUDA compiler; CMAKE_ARGS=-DFASTVQ_PROBES=ON adds the
        module fastvq._probes, which benchmarks of GPUs measure floors with, and CMAKE_ARGS=-DFASTVQ_TRACE=ON the module
        fastvq._trace, the CUDA engine with a tracer.
"""

from __future__ import annotations

import atexit
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
REQUIRE_EXTENSION = os.environ.get("FASTVQ_REQUIRE_EXT", "0") not in ("", "0")
# Modules for benchmarks of GPUs, each built if asked for.
EXTRA = [name for name in ("probes", "trace") if f"-DFASTVQ_{name.upper()}=ON" in os.environ.get("CMAKE_ARGS", "")]


def version() -> str:
    text = (ROOT / "fastvq" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('fastvq/_version.py: expected a line __version__ = "..."')
    return found.group(1)


def tool(name: str) -> str:
    """Path of cmake or ninja: beside this Python first, because pip does not put the environment's scripts on PATH."""
    here = os.path.dirname(sys.executable)
    path = shutil.which(name, path=here) or shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} was not found (pip install {name})")
    return path


class Build(build):
    """Builds in a temporary folder: one kept in the tree would carry files deleted since into the next wheel."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = tempfile.mkdtemp(prefix="fastvq-build-")
        atexit.register(shutil.rmtree, self.build_base, ignore_errors=True)


class CMakeBuild(build_ext):
    """Runs CMake in a folder of its own for each build.

    An isolated build sees ninja and nanobind under a temporary path, which a kept CMake cache would still point to the
    next time.
    """

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "fastvq._ext":
            return  # comes with the other, where there is a CUDA compiler
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            try:
                self.run_cmake(target.parent)
            except subprocess.CalledProcessError:
                if REQUIRE_EXTENSION:
                    raise
                # Whatever is wrong with nvcc, the engines for the CPU do not need it.
                self.run_cmake(target.parent, "-DFASTVQ_CUDA=OFF")
            if not target.is_file():
                raise FileNotFoundError(f"CMake did not make {target.name}")
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if not REQUIRE_EXTENSION:
                self.announce_missing(error)
            raise CompileError(f"fastvq: the extension could not be built: {error}") from error

    def run_cmake(self, output: Path, *more: str) -> None:
        import nanobind

        cmake = tool("cmake")
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dnanobind_DIR={nanobind.cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            *more,
        ]
        with tempfile.TemporaryDirectory(prefix="fastvq-cmake-") as folder:
            subprocess.run([cmake, "-S", str(ROOT), "-B", folder, *options], check=True)
            subprocess.run([cmake, "--build", folder, "--config", "Release"], check=True)
            subprocess.run([cmake, "--install", folder, "--config", "Release", "--prefix", str(output)], check=True)

    def announce_missing(self, error: Exception) -> None:
        rule = "*" * 100
        print(
            f"{rule}\nWARNING: fastvq is installed WITHOUT its compiled extension: {error}\n"
            "PyTorch paths work; the engines in C++ do not. They need a C++17 compiler. To make this an error:\n"
            f"    FASTVQ_REQUIRE_EXT=1 pip install -v -e .\n{rule}",
            file=sys.stderr,
            flush=True,
        )

    def copy_extensions_to_source(self) -> None:
        # A binary left by an earlier build must not pass for the one that has just failed.
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, built = self._get_inplace_equivalent(build_py, ext)
            if not os.path.exists(built):
                Path(inplace).unlink(missing_ok=True)
        super().copy_extensions_to_source()


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").rglob(pattern))


setup(
    version=version(),
    packages=[
        *find_packages(include=["fastvq", "fastvq.*"]),
        "fastvq.kernels",
        *(f"fastvq.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastvq.kernels": "kernels"},
    package_data={
        "fastvq": ["py.typed", "pretrained/**/*.json", "pretrained/**/*.safetensors"],
        "fastvq.kernels": ["*.json"],
    },
    ext_modules=[
        Extension(
            "fastvq._ext",
            sources=sources("*.cpp"),
            depends=["CMakeLists.txt", *sources("*.h", "*.cu", "*.cuh")],
            optional=not REQUIRE_EXTENSION,
        ),
        *(Extension(f"fastvq._{name}", sources=[], optional=True) for name in EXTRA),
    ],
    cmdclass={"build": Build, "build_ext": CMakeBuild},
    zip_safe=False,
)
