"""What an installation contains, what imports what, and life without the extension."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastvq import _engine

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_EXTENSION = "import sys; sys.modules['fastvq._ext'] = None\n"


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light(tmp_path: Path) -> None:
    code = """
import sys
import fastvq, fastvq._engine, fastvq.errors, fastvq.kernels
print(sorted({"torch", "triton", "numpy", "fastvq._ext"} & set(sys.modules)))
"""
    assert run_python(code, tmp_path).strip() == "[]"


def test_extension_loads_without_torch(tmp_path: Path) -> None:
    if not _engine.available():
        pytest.skip(_engine.why_unavailable() or "")
    code = """
import sys
from fastvq import _engine
print(_engine.available(), _engine.why_unavailable(), "build_info" in dir(_engine.require()), "torch" in sys.modules)
"""
    assert run_python(code, tmp_path).strip() == "True None True False"


def test_everything_with_a_pytorch_path_runs_without_the_extension(tmp_path: Path) -> None:
    code = """
import fastvq, torch
from fastvq import _engine
from fastvq.errors import UnavailableError
from fastvq.ops import explain_backend
from fastvq.ops.draw import draw
logits, u = torch.zeros(3, 4), torch.tensor([0.0, 0.3, 0.9])
assert not _engine.available()
assert draw(logits, u).tolist() == [0, 1, 3]
assert draw(logits, u, backend="torch").tolist() == [0, 1, 3]
assert "torch: chosen" in explain_backend("draw", logits)
for call in (lambda: draw(logits, u, backend="cpp"), _engine.require):
    try:
        call()
    except UnavailableError as error:
        assert "pip install -e ." in str(error) and "C++17" in str(error), error
    else:
        raise AssertionError("expected UnavailableError")
"""
    run_python(WITHOUT_EXTENSION + code, tmp_path)


def test_a_binary_from_other_sources_is_refused(tmp_path: Path) -> None:
    code = """
import sys, types
stale = types.ModuleType("fastvq._ext")
stale.INTERFACE = -1
sys.modules["fastvq._ext"] = stale
import fastvq
fastvq._ext = stale
from fastvq import _engine
print(_engine.available(), _engine.why_unavailable())
"""
    answer = run_python(code, tmp_path)
    assert answer.startswith("False")
    assert "out of date" in answer


@pytest.mark.parametrize("inside", [True, False], ids=["in-source-folder", "elsewhere"])
def test_kernels_have_one_name(tmp_path: Path, inside: bool) -> None:
    cwd = ROOT if inside else tmp_path
    assert run_python("import fastvq.kernels; print(fastvq.kernels.__name__)", cwd).strip() == "fastvq.kernels"
    path = "" if inside else f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code = f"""{path}
import kernels
assert not hasattr(kernels, "__version__") and not hasattr(kernels, "__path__")
for statement in ("from kernels import ema", "kernels.ema", "import kernels.ema"):
    try:
        exec(statement)
    except ImportError as error:
        print(error)
"""
    answer = run_python(code, cwd)
    assert answer.count("use 'import fastvq.kernels'") == 2
    assert answer.count("'kernels' is not a package") == 1


def test_version_is_that_of_the_installation() -> None:
    from importlib.metadata import version

    import fastvq

    assert version("fastvq") == fastvq.__version__


def missing_build_tools() -> list[str]:
    return [name for name in ("setuptools", "cmake", "ninja", "nanobind") if importlib.util.find_spec(name) is None]


def packages(folder: Path, name: str) -> set[str]:
    return {f"{name}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


@pytest.mark.skipif(bool(missing_build_tools()), reason=f"build tools not installed: {missing_build_tools()}")
def test_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    # From a copy, so that nothing is written into the tree and nothing left there by a build gets in.
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "*.dylib")
    for folder in ("fastvq", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    # What a wheel holds depends neither on CUDA, whose kernels take a minute to compile, nor on how fast the code is.
    compiling = "<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> -O0 -o <OBJECT> -c <SOURCE>"
    options = shlex.join(["-DFASTVQ_CUDA=OFF", f"-DCMAKE_CXX_COMPILE_OBJECT={compiling}"])
    environment = {**os.environ, "FASTVQ_REQUIRE_EXT": "1", "CMAKE_ARGS": options}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    (wheel,) = wheels.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert packages(source / "fastvq", "fastvq") <= names
    assert packages(source / "kernels", "fastvq/kernels") <= names
    data = {
        f"fastvq/{path.relative_to(source / 'fastvq').as_posix()}"
        for path in (source / "fastvq" / "pretrained").rglob("*")
        if path.is_file() and path.suffix in (".json", ".safetensors")
    }
    assert data <= names
    assert "fastvq/kernels/tuned.json" in names
    assert "fastvq/py.typed" in names
    assert any(re.fullmatch(r"fastvq/_ext\..*(so|pyd)", name) for name in names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastvq"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
