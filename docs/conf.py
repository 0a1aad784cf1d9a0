"""The pages as a site: ``pip install -e ".[docs]" && make -C docs html``.

The source folder is the whole repository, so that a link from page to page, or from a page to a recorded result, is the
same here as on a code host. The order of the pages is that of the lists in index.md.
"""

from __future__ import annotations

import pydoc
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvq import __version__

if TYPE_CHECKING:
    from docutils.nodes import TextElement, document
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parents[1]

project = "fastvq"
version = release = __version__
html_title = f"fastvq {__version__}"

root_doc = "README"
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE-DATA.md",
    "docs/**",
    "bench/results/gpu/README.md",
]
# Folders that hold no page are not searched.
exclude_patterns = [".*", "build", "csrc", "dist", "docs/_build", "fastvq", "kernels", "runs", "tests", "venv"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
highlight_language = "text"
smartquotes_action = "D"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False

default_role = "py:obj"
autoclass_content = "both"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 90
# Names that share a line ("x, codebook: ...") are one entry; fields of their own would take the first for a type.
napoleon_use_param = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False

_HEADING = re.compile(r"^## (.+)$")
_LINK = re.compile(r"^ *- \[(.+?)\]\(([^)#]+)\)")


def parts() -> dict[str, list[tuple[str, str]]]:
    """Headings of index.md, and the pages listed under each: title and path inside the repository."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines():
        if heading := _HEADING.match(line):
            found[heading[1]] = []
        elif link := _LINK.match(line):
            path = (ROOT / "docs" / link[2]).resolve().relative_to(ROOT).as_posix()
            found[[*found][-1]].append((link[1], path))
    return found


def _toctree(caption: str, pages: list[tuple[str, str]]) -> str:
    entries = "\n".join(f"{title} </{path.rpartition('.')[0]}>" for title, path in pages if path != f"{root_doc}.md")
    return f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def _add_toctrees(app: Sphinx, docname: str, source: list[str]) -> None:
    """The front page is the README, which names its pages in sentences; what Sphinx needs is added here."""
    if docname != root_doc:
        return
    listed = parts()
    known = {root_doc, "docs/index", *(path.rpartition(".")[0] for pages in listed.values() for _, path in pages)}
    first, *others = listed.items()
    source[0] += _toctree(first[0], [*first[1], ("All pages", "docs/index.md")])
    source[0] += "".join(_toctree(caption, pages) for caption, pages in others)
    if more := sorted(app.env.found_docs - known):
        source[0] += "\n```{toctree}\n:hidden:\n:caption: More\n\n" + "\n".join(f"/{name}" for name in more) + "\n```\n"


def _plain_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings as they are written here, as reStructuredText.

    Bars and stars are those of formulas (``|x|``, ``N * K``). A section of errors that says no more than "as X" has no
    type before a colon.
    """
    for index, line in enumerate(lines):
        code = re.split(r"(``.+?``|`.+?`)", line)
        code[::2] = [re.sub(r"(?<=\S)\*|\*(?=\S)|\|", r"\\\g<0>", text) for text in code[::2]]
        # "num_codes: K." has no list in it.
        lines[index] = re.sub(r"^(\s+[\w, ]+: )(\w\.)", r"\1\\\2", "".join(code))
    for index in reversed(range(len(lines) - 1)):
        first = lines[index + 1]
        if lines[index] == "Raises:" and not re.match(r"\s+\w+(, \w+)*: ", first):
            more = lines[index + 2 : index + 3] != [] and lines[index + 2].startswith(" ")
            lines[index : index + 2] = [f":raises: {first.strip()}", "", *(["Raises:"] if more else [])]


def _is_field_of_a_tuple(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of a NamedTuple say "Alias for field number 0"; the class says what they are."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _elsewhere(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: TextElement) -> Any:
    """Names by other paths than they are documented under: ``fastvq.sampling.sample`` is ``fastvq.sample``."""
    if node.get("refdomain") != "py":
        return None
    target, domain = node["reftarget"], env.domains.python_domain
    for name in (target, f"{node.get('py:module')}.{target}"):
        thing = pydoc.locate(name) if name.startswith("fastvq.") else None
        known = f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', None)}"
        if known in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", known, node, text)
    return None


def _suit_pages(app: Sphinx, doctree: document) -> None:
    """Links to folders, which a code host shows, become plain words; short cells of tables do not break."""
    from docutils.nodes import entry
    from sphinx.addnodes import pending_xref

    for link in list(doctree.findall(pending_xref)):
        if link["reftype"] == "myst" and (ROOT / link["refdoc"]).parent.joinpath(link["reftarget"]).is_dir():
            link.replace_self(link.children)
    for cell in doctree.findall(entry):
        if len(cell.astext()) <= 20:
            cell["classes"].append("short")


def _add_index(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("source-read", _add_toctrees)
    app.connect("autodoc-process-docstring", _plain_text, priority=400)
    app.connect("autodoc-skip-member", _is_field_of_a_tuple)
    app.connect("missing-reference", _elsewhere)
    app.connect("doctree-read", _suit_pages)
    app.connect("build-finished", _add_index)
