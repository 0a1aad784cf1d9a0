"""What docstrings of public names hold mechanically: a sentence first, every parameter described, none that is not."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fastvq
from fastvq import data, distributed, errors, evaluation, interop, models, ops, sampling, training
from fastvq.interop import quantizers as foreign
from fastvq.models import quantizer

ROOT = Path(__file__).resolve().parents[1]
HOMES = (fastvq, data, evaluation, interop, foreign, models, quantizer, ops, sampling, training)
# Of modules without a list of names: what they define.
WHOLE = (distributed, errors)
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Warns")
# What printing calls.
NOT_READ = {"extra_repr"}
# Arguments that are the same everywhere: where something is put, whether a bar is shown.
EVIDENT = {"device", "progress", "overwrite", "folder", "batch_size"}


class Docstring(NamedTuple):
    """A docstring of Google's style, taken apart.

    Attributes:
        prose: what is in no section.
        sections: names of the entries of each section, and its text.
    """

    prose: str
    sections: dict[str, tuple[list[str], str]]

    @classmethod
    def of(cls, text: str) -> Docstring:
        prose: list[str] = []
        found: dict[str, list[str]] = {}
        section: str | None = None
        for line in text.splitlines():
            header = re.fullmatch(r"(\w+):", line)
            if header and header[1] in SECTIONS:
                section = header[1]
                found[section] = []
            elif section is not None and (not line or line.startswith(" ")):
                found[section].append(line)
            else:
                section = None
                prose.append(line)
        sections = {}
        for name, lines in found.items():
            entries = [re.match(r"    ([*\w]+(?:, [*\w]+)*):(?: |$)", line) for line in lines]
            names = [one.lstrip("*") for entry in entries if entry for one in entry[1].split(", ")]
            sections[name] = (names, "\n".join(lines))
        return cls("\n".join(prose), sections)

    def names(self, *sections: str) -> list[str]:
        return [name for section in sections for name in self.sections.get(section, ([], ""))[0]]

    def describes(self, name: str) -> bool:
        if name in self.names("Args", "Attributes"):
            return True
        returned = self.sections.get("Returns", ([], ""))[1]
        return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", f"{self.prose}\n{returned}") is not None


def of_ours(thing: Any) -> bool:
    return getattr(thing, "__module__", "").split(".")[0] == "fastvq"


@functools.cache
def public() -> dict[str, Any]:
    """Functions, classes, and public methods and properties of these classes, by where they are reached."""
    tops: dict[str, Any] = {}
    for home in HOMES:
        for name in home.__all__:
            thing = getattr(home, name)
            if of_ours(thing) and (inspect.isclass(thing) or inspect.isroutine(thing)):
                tops.setdefault(f"{thing.__module__}.{thing.__qualname__}", thing)
    for home in WHOLE:
        for name, thing in vars(home).items():
            if not name.startswith("_") and getattr(thing, "__module__", "") == home.__name__ and callable(thing):
                tops.setdefault(f"{home.__name__}.{name}", thing)
    found = dict(tops)
    for top, thing in tops.items():
        if inspect.isclass(thing):
            found.update({f"{top}.{name}": member for name, member in members(thing)})
    return found


def members(owner: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(owner).items():
        member = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        readable = inspect.isroutine(member) or isinstance(member, (property, functools.cached_property))
        if not name.startswith("_") and readable and name not in NOT_READ:
            yield name, member


def documentation(name: str) -> str:
    """The docstring of a public name; of a method without one that of the method it stands for."""
    thing = public()[name]
    text = inspect.getdoc(thing)
    if not text:
        owner = public().get(name.rpartition(".")[0])
        inherited = [
            vars(base)[thing.__name__]
            for base in getattr(owner, "__mro__", ())
            if hasattr(thing, "__name__") and thing.__name__ in vars(base) and of_ours(base)
        ]
        text = next((inspect.getdoc(one) for one in inherited if inspect.getdoc(one)), None)
    return text or ""


def parameters(thing: Any) -> list[str]:
    if isinstance(thing, (property, functools.cached_property)):
        return []
    if inspect.isclass(thing):
        if issubclass(thing, (BaseException,)) or getattr(thing, "_is_protocol", False):
            return []
        if dataclasses.is_dataclass(thing):
            return [field.name for field in dataclasses.fields(thing) if not field.name.startswith("_")]
        if hasattr(thing, "_fields"):
            return [*thing._fields]
        if not of_ours(thing.__init__):
            return []
        thing = thing.__init__
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def referred(text: str) -> set[str]:
    """Parameters of the functions whose arguments a docstring says its own are."""
    found: set[str] = set()
    for path in re.findall(r"rguments are those of (?::\w+:)?`~?([\w.]+)`", text):
        # Names are reached at shorter paths than those of their modules.
        *homes, last = path.split(".")
        ending = ".".join(["", *(home for home in homes if home[0].isupper()), last])
        found |= set(parameters(next(thing for name, thing in public().items() if name.endswith(ending))))
    return found


def undescribed(name: str) -> list[str]:
    """Parameters that neither a docstring describes, nor that of a class which it derives from."""
    thing, text = public()[name], documentation(name)
    bases = [base for base in thing.__mro__[1:] if of_ours(base)] if inspect.isclass(thing) else []
    docs = [Docstring.of(text), *(Docstring.of(inspect.getdoc(base) or "") for base in bases)]
    others = referred(text) | EVIDENT
    return [p for p in parameters(thing) if p not in others and not any(doc.describes(p) for doc in docs)]


def test_there_are_names_to_look_at() -> None:
    assert len(public()) > 250
    assert {"fastvq.sampling.api.sample", "fastvq.errors.PeerError", "fastvq.distributed.Group.share"} <= set(public())


def test_every_public_name_says_what_it_is_in_a_sentence() -> None:
    wrong = []
    for name in public():
        first = documentation(name).partition("\n")[0]
        if not re.fullmatch(r"\S.*\S\.", first):
            wrong.append(f"{name}: {first!r}")
    assert wrong == []


def test_every_parameter_is_described() -> None:
    wrong = {name: missing for name in public() if (missing := undescribed(name))}
    assert wrong == {}


def test_no_argument_is_described_that_is_not_there() -> None:
    wrong = {}
    for name, thing in public().items():
        described = Docstring.of(inspect.getdoc(thing) or "").names("Args")
        if inspect.isclass(thing) and not dataclasses.is_dataclass(thing) and of_ours(thing.__init__):
            known = {*inspect.signature(thing.__init__).parameters}
        else:
            known = {*parameters(thing)}
        if stale := [one for one in described if one not in known]:
            wrong[name] = stale
    assert wrong == {}


def test_no_attribute_is_described_that_is_not_there() -> None:
    wrong = {}
    for name, thing in public().items():
        if not inspect.isclass(thing):
            continue
        bases = [base for base in thing.__mro__ if of_ours(base)]
        source = "\n".join(inspect.getsource(base) for base in bases)
        known = {key for base in bases for key in (*vars(base), *vars(base).get("__annotations__", {}))}
        described = Docstring.of(inspect.getdoc(thing) or "").names("Attributes")
        missing = [one for one in described if one not in known and not re.search(rf'self\.{one}\b|"{one}"', source)]
        if missing:
            wrong[name] = missing
    assert wrong == {}


def test_errors_that_are_described_are_errors() -> None:
    known = {name for name in vars(errors) if name.endswith(("Error", "Warning"))}
    known |= {"DivergedError", "KeyError", "ValueError", "TypeError", "StopIteration", "Exception"}
    wrong = {}
    for name, thing in public().items():
        doc = Docstring.of(inspect.getdoc(thing) or "")
        entries, text = doc.sections.get("Raises", ([], ""))
        if strange := [one for one in entries if one not in known] or ([text] if text.strip() and not entries else []):
            wrong[name] = strange
    assert wrong == {}


def leads_somewhere(path: str) -> bool:
    """Whether a dotted path is a module, or a name in one; of kernels, which import Triton, their sources say it."""
    parts = path.split(".")
    if parts[:2] == ["fastvq", "kernels"]:
        source = ROOT.joinpath("kernels", *parts[2:3]).with_suffix(".py")
        return source.is_file() and all(re.search(rf"(def|class) {name}\b", source.read_text()) for name in parts[3:])
    # A function may have the name of its module.
    for count in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            thing: Any = importlib.import_module(".".join(parts[:count]))
            break
    for name in parts[count:]:
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


def test_paths_in_docstrings_and_comments_lead_somewhere() -> None:
    wrong = []
    for home in ("fastvq", "kernels"):
        for source in (ROOT / home).rglob("*.py"):
            found = re.findall(r"`~?(fastvq\.[A-Za-z_][\w.]*)`", source.read_text(encoding="utf-8"))
            wrong += [f"{source.relative_to(ROOT)}: {path}" for path in found if not leads_somewhere(path)]
    assert wrong == []


def test_nothing_is_markup_by_chance() -> None:
    """Bars and asterisks at the beginning of a word stand for something else in reStructuredText."""
    wrong = {}
    for name, thing in public().items():
        text = re.sub(r"``.+?``|`.+?`|::\n\n(?: .*\n|\n)+", "", inspect.getdoc(thing) or "", flags=re.DOTALL)
        if found := re.findall(r"""(?:^|[\s'"(\[{<\-/:])[|*]\S+""", text):
            wrong[name] = found
    assert wrong == {}


@pytest.mark.parametrize(
    ("text", "described", "missing"),
    [
        pytest.param("A thing of x.\n\nArgs:\n    a, b: both.\n        More: words.\n", "abx", "c", id="entries"),
        pytest.param("A thing.\n\nArgs:\n    a: one.\n\nReturns:\n    b.\n\nMore of c.\n", "abc", "d", id="prose"),
        pytest.param("A thing.\n\nRaises:\n    ArgumentError: of a.\n", "", "a", id="errors describe nothing"),
    ],
)
def test_what_counts_as_described(text: str, described: str, missing: str) -> None:
    doc = Docstring.of(text)
    assert [name for name in described + missing if doc.describes(name)] == [*described]
