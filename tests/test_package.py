"""What an installation contains, what imports what, and life without the extension."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastvq import __version__, _engine

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
from fastvq import __version__, _engine
print(_engine.available(), _engine.why_unavailable(), "build_info" in dir(_engine.require()), "torch" in sys.modules)
"""
    assert run_python(code, tmp_path).strip() == "True None True False"


def test_everything_with_a_pytorch_path_runs_without_the_extension(tmp_path: Path) -> None:
    code = """
import fastvq, torch
from fastvq import __version__, _engine
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
from fastvq import __version__, _engine
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


needs_build_tools = pytest.mark.skipif(
    bool(missing_build_tools()), reason=f"build tools not installed: {missing_build_tools()}"
)
FOLDERS = (".ci", "bench", "csrc", "docs", "fastvq", "kernels", "tests")
FILES = ("CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "LICENSE-DATA.md")
FILES += ("MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
LICENSES = ("LICENSE", "LICENSE-DATA.md")
# What work in a checkout leaves behind.
JUNK = (
    "build/lib/fastvq/removed.py",
    "docs/_build/html/index.html",
    "fastvq/_ext.cpython-311-x86_64-linux-gnu.so",
    "kernels/__pycache__/ema.cpython-311.pyc",
    "runs/my/vqvae/config.json",
    "tests/ops/__pycache__/test_draw.cpython-311.pyc",
)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that nothing is written into it and nothing left there by a build gets in."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "*.dylib", "_build")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"many megabytes, which take seconds to pack")
    return folder


@pytest.fixture(scope="module")
def archive(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    tree, out = tmp_path_factory.mktemp("tree") / "tree", tmp_path_factory.mktemp("archive")
    shutil.copytree(source, tree)
    for name in JUNK:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("junk")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    with tarfile.open(out / f"fastvq-{__version__}.tar.gz") as packed:
        packed.extractall(out, filter="data")
    return out / f"fastvq-{__version__}"


@needs_build_tools
def test_source_archive_holds_the_tree_and_no_junk(source: Path, archive: Path) -> None:
    added = {"PKG-INFO", "setup.cfg"}
    found = {name for name in files(archive) if not name.startswith("fastvq.egg-info/")}
    assert found - added == files(source)


@needs_build_tools
def test_wheel_from_the_archive_holds_every_module_and_data_file(source: Path, archive: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, archive]
    # What a wheel holds depends neither on CUDA, whose kernels take a minute to compile, nor on how fast the code is.
    compiling = "<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> -O0 -o <OBJECT> -c <SOURCE>"
    options = shlex.join(["-DFASTVQ_CUDA=OFF", f"-DCMAKE_CXX_COMPILE_OBJECT={compiling}"])
    environment = {**os.environ, "FASTVQ_REQUIRE_EXT": "1", "CMAKE_ARGS": options}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    about = f"fastvq-{__version__}.dist-info"
    described = {name for name in names if name.startswith(f"{about}/")}
    assert {f"{about}/licenses/{name}" for name in LICENSES} <= described
    (binary,) = (name for name in names if re.fullmatch(r"fastvq/_ext\..*(so|pyd)", name))
    shipped = {f"fastvq/{name}" for name in files(source / "fastvq")}
    kernels = {f"fastvq/kernels/{name}" for name in files(source / "kernels")}
    assert names - described - {binary} == shipped | kernels


def test_one_version_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^(version|date-released): (.+)$", citation, re.MULTILINE))
    heading = re.search(r"^## (\S+) (?:- (\d{4}-\d\d-\d\d)|\(not released yet\))$", changes, re.MULTILINE)
    assert heading is not None
    assert (stated["version"], stated.get("date-released")) == heading.groups()
    assert stated["version"] == __version__
