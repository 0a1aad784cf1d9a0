"""Commands in the shell blocks of pages, and whether their programs would take them."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Sequence

import pytest
from packaging.requirements import Requirement
from page_blocks import ROOT
from torch.distributed.run import get_args_parser

from fastvq.cli.parser import build_parser
from fastvq.models import PRESETS


def commands(text: str) -> list[list[str]]:
    """Words of each command: one a line, or several joined by ``&&``; comments and variables before it are left out."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
        lexer.whitespace_split = True
        for joint, group in itertools.groupby(lexer, lambda word: word == "&&"):
            if not joint:
                words = [*itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), group)]
                assert words, f"a line of nothing but variables: {line}"
                found.append(words)
    return found


def check(words: Sequence[str]) -> None:
    """
    Raises:
        AssertionError: no rule is known for the program, or it would not take these words.
    """
    program, *arguments = words
    if program == "python" and arguments[:1] == ["-m"]:
        program, *arguments = arguments[1:]
        if program not in _RULES:
            _check_python(program, arguments)
            return
    if program == "python" and arguments[:1] and arguments[0].endswith(".py"):
        _check_python(*arguments[:1], arguments[1:])
        return
    assert program in _RULES, f"no rule says how to check the program {program!r}; see _RULES"
    _RULES[program](arguments)


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    def refuse(message: str) -> None:
        raise AssertionError(f"{parser.prog} {shlex.join(arguments)}: {message}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "error", lambda self, message: refuse(message))
        return parser.parse_args([*arguments])


def _check_fastvq(arguments: Sequence[str]) -> None:
    given = _parsed(build_parser(), arguments)
    preset = getattr(given, "preset", None)
    assert preset is None or preset in PRESETS, preset


def _check_torchrun(arguments: Sequence[str]) -> None:
    given = _parsed(get_args_parser(), arguments)
    assert (given.module, given.training_script) == (True, "fastvq"), "torchrun took a word of ours for its own"
    _check_fastvq(given.training_script_args)


_WITH_VALUE = {"-c", "-d", "-r", "-w", "--dest", "--extra-index-url", "--index-url", "--target", "--wheel-dir"}


def _check_pip(arguments: Sequence[str]) -> None:
    command, *words = arguments
    assert command in ("install", "wheel", "download", "uninstall"), command
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    named = []
    for before, word in itertools.pairwise(["", *words]):
        if not word.startswith("-") and before not in _WITH_VALUE:
            named.append(word)
            if own := re.fullmatch(r"(?:\.|fastvq)(?:\[([\w,-]+)\])?", word):
                missing = {*(own[1] or "").split(",")} - extras - {""}
                assert missing == set(), f"no such extra: {missing}"
            elif not word.endswith(".whl"):
                Requirement(word)
    assert named, "nothing to install"


def _check_pytest(arguments: Sequence[str]) -> None:
    """Files and folders that it names; its options are checked by `check_pytest_options`."""
    targets = [word for word in arguments if re.fullmatch(r"[\w.-]+/[\w./-]*|[\w/]+\.py", word)]
    assert [target for target in targets if not (ROOT / target).exists()] == []


_HELP = """
import json, sys
import pytest
refused = [given for given in json.loads(sys.argv[1]) if pytest.main(["-p", "no:cacheprovider", "--help", *given]) != 0]
print(json.dumps(refused), file=sys.stderr)
"""


def check_pytest_options(commands: Sequence[Sequence[str]]) -> None:
    """
    Raises:
        AssertionError: pytest, with what the conftest of the folder adds, would not take the words of one.
    """
    done = subprocess.run(
        [sys.executable, "-c", _HELP, json.dumps(commands)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == [], done.stderr


def _check_make(arguments: Sequence[str]) -> None:
    option, folder, *targets = arguments
    assert option == "-C"
    lines = (ROOT / folder / "Makefile").read_text(encoding="utf-8").splitlines()
    assert [target for target in targets if f"{target}:" not in lines] == []


class _AcceptedError(Exception):
    """A program of ours has taken its arguments, and would go on now."""


def _check_python(program: str, arguments: Sequence[str]) -> None:
    """Run a module or a script of the repository up to where its parser has taken the arguments."""
    parse = argparse.ArgumentParser.parse_args

    def accept(self: argparse.ArgumentParser, *given: object) -> None:
        parse(self, [*arguments])
        raise _AcceptedError

    def refuse(self: argparse.ArgumentParser, message: str) -> None:
        raise AssertionError(f"{program} {shlex.join(arguments)}: {message}")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.syspath_prepend(ROOT)
        patch.setattr(sys, "argv", [program, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", accept)
        patch.setattr(argparse.ArgumentParser, "error", refuse)
        script = program.endswith(".py")
        run = runpy.run_path if script else functools.partial(runpy.run_module, alter_sys=True)
        place = str(ROOT / program) if script else program
        # A module of bench may be imported already, by another of its rooms.
        warnings.filterwarnings("ignore", "'.*' found in sys.modules after import of package", RuntimeWarning)
        with pytest.raises(_AcceptedError):
            run(place, run_name="__main__")


_RULES: dict[str, Callable[[Sequence[str]], None]] = {
    "fastvq": _check_fastvq,
    "make": _check_make,
    "pip": _check_pip,
    "pytest": _check_pytest,
    "torchrun": _check_torchrun,
}
