"""Which part of the package may know which: imports go one way, and no signature inside grows without bound."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastvq
from fastvq import data, evaluation, interop, models, ops, sampling, training

ROOT = Path(__file__).resolve().parents[1]
# Lower rooms first; rooms of one line may know each other as far as no circle arises.
ROOMS = (
    ("fastvq.kernels",),
    ("fastvq.ops", "fastvq._watch"),
    ("fastvq.models",),
    ("fastvq.interop", "fastvq.data"),
    ("fastvq.training", "fastvq.sampling", "fastvq.evaluation"),
    ("fastvq.cli", "fastvq.__main__"),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
# What one function of ours asks of another; users read theirs by name, and most have defaults.
MOST_PARAMETERS = 12


def modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed, by name."""
    found = {}
    for folder, prefix in ((ROOT / "fastvq", ()), (ROOT / "kernels", ("fastvq",))):
        for path in folder.rglob("*.py"):
            parts = [*prefix, *path.relative_to(ROOT).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner
                elif node.module in known and inner != "fastvq._ext":
                    yield str(node.module)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    trees = modules()
    return {name: {*imports(name, tree, set(trees))} - {name} for name, tree in trees.items()}


def room(name: str) -> str:
    return ".".join(name.split(".")[:2])


def test_imports_have_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        order = [*TopologicalSorter(graph).static_order()]
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
    assert len(order) == len(graph) > 100


def test_nothing_imports_what_is_above_it(graph: dict[str, set[str]]) -> None:
    # Modules at the top of the package, `errors` and those with an underscore, are below all rooms.
    upward = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if name != "fastvq" and RANK.get(room(other), -1) > RANK.get(room(name), -1)
    ]
    assert upward == []


def test_rooms_are_there(graph: dict[str, set[str]]) -> None:
    assert {room(name) for name in graph} >= RANK.keys()
    packages = {room(name) for name in graph if name.count(".") > 1}
    assert packages <= RANK.keys()


def test_private_names_of_pytorch_are_there() -> None:
    """Nobody promises that the next version has them, so each is looked up: this says what is gone."""
    found = set()
    for tree in modules().values():
        homes = {"torch": "torch"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
                homes |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        found |= set(homes.values())
        for node in ast.walk(tree):
            head, *rest = chain(node)
            if rest and head in homes:
                found.add(".".join([homes[head], *rest]))
    private = {name for name in found if re.search(r"\._(?!_)", name)}
    assert {"torch._C._get_tracing_state", "torch.autograd.forward_ad._current_level"} <= private
    assert [name for name in sorted(private) if not exists(name)] == []


def chain(node: ast.AST) -> list[str]:
    """The names of ``a.b.c``; of anything else one that is none."""
    if isinstance(node, ast.Name):
        return [node.id]
    return [*chain(node.value), node.attr] if isinstance(node, ast.Attribute) else [""]


def exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_signatures_are_short() -> None:
    public = {
        name for home in (fastvq, data, evaluation, interop, models, ops, sampling, training) for name in home.__all__
    }
    long = []
    for name, tree in modules().items():
        if name.startswith("fastvq.kernels"):
            continue
        owner = {id(part): node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for part in node.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and owner.get(id(node), node.name) not in public:
                given = node.args
                count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
                if count > MOST_PARAMETERS:
                    long.append(f"{name}: {node.name} has {count}")
    assert long == []
