"""Pages of HTML in one file: well-formed, escaped, self-contained; markers that sorting reads."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from fastvq._html import Page
from fastvq.errors import ArgumentError, ArgumentTypeError, MissingFileError

VOID = {"meta", "img", "br"}
SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>'


class Parsed(HTMLParser):
    """A document as its tags with attributes, and the text between them; every tag closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [data for name, data in self.texts if name == tag]


def picture(kind: str) -> bytes:
    written = io.BytesIO()
    Image.new("L", (3, 2), 77).save(written, format=kind)
    return written.getvalue()


def full_page() -> Page:
    page = Page("A <b>title</b> & more", "with *a* subtitle")
    page.heading("First `code`")
    page.text("One paragraph,\nof two lines.\n\nAnother one.")
    page.heading("Below", level=3)
    page.table(["name", "time", "x"], [["cpu", "1.3 ms", 2], ["naive", "-", 10]], numbers=(1, 2))
    page.picture(picture("PNG"), 'a "grey" picture', "Grey & **plain**.", width=30)
    page.code('print("<&>")\n')
    return page


def test_a_page_is_well_formed() -> None:
    text = full_page().html()
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    found = Parsed(text)
    assert found.all("meta")[0] == {"charset": "utf-8"}
    for one in ("html", "head", "title", "body", "main", "h1", "nav", "table", "figure", "script", "style"):
        assert len(found.all(one)) == 1, one
    names = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(names) == len(set(names)) == 2


def test_an_empty_page_is_well_formed() -> None:
    found = Parsed(Page("Nothing").html())
    assert found.text("h1") == ["Nothing"]
    assert not found.all("nav")
    assert not found.all("script")


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = full_page()
    page.text("[a link](https://example.org/)")
    found = Parsed(page.html())
    assert not found.all("link")
    sources = [value for _, attributes in found.tags for name, value in attributes.items() if name in ("src", "srcset")]
    assert [str(source)[:22] for source in sources] == ["data:image/png;base64,"]
    (style,) = found.text("style")
    assert "url(" not in style
    assert "@import" not in style


HOSTILE = "<script>alert('x')</script> & \"quoted\" &amp; </p>"


def test_everything_is_escaped() -> None:
    page = Page(HOSTILE, HOSTILE)
    page.heading(HOSTILE)
    page.text(HOSTILE)
    page.text(f'**{HOSTILE}** *{HOSTILE}* `{HOSTILE}` [{HOSTILE}](https://example.org/?a="b"&c=<d>)')
    page.table([HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]], numbers=[1])
    page.picture(picture("PNG"), HOSTILE, HOSTILE)
    page.code(HOSTILE)
    found = Parsed(page.html())
    assert len(found.all("script")) == 1
    for tag in ("title", "h1", "h2", "p", "th", "td", "figcaption", "code", "strong", "em", "a"):
        assert HOSTILE in found.text(tag), tag
    assert found.all("img")[0]["alt"] == HOSTILE
    assert found.all("a")[-1]["href"] == 'https://example.org/?a="b"&c=<d>'


def test_characters_that_no_document_may_hold_are_replaced(tmp_path: Path) -> None:
    page = Page("nul \0, a lone surrogate \udcff, a bell \x07")
    path = page.save(tmp_path / "page.html")
    assert Parsed(path.read_text(encoding="utf-8")).text("h1") == ["nul \ufffd, a lone surrogate \ufffd, a bell \ufffd"]


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        pytest.param("a `b*c*` d", "a <code>b*c*</code> d", id="code"),
        pytest.param("**bold** and *thin*", "<strong>bold</strong> and <em>thin</em>", id="bold and emphasis"),
        pytest.param("**a `b`**", "<strong>a <code>b</code></strong>", id="code in bold"),
        pytest.param("2 * 3 * 4", "2 * 3 * 4", id="products"),
        pytest.param("*e*: 64 x 64", "<em>e</em>: 64 x 64", id="one letter"),
        pytest.param(r"\*no\* \[x](y)", "*no* [x](y)", id="escaped"),
        pytest.param("[features 12ab] (k = 3)", "[features 12ab] (k = 3)", id="brackets that are no link"),
        pytest.param("[a](b.md)", '<a href="b.md">a</a>', id="relative link"),
        pytest.param("[a](#b:c)", '<a href="#b:c">a</a>', id="place on the page"),
        pytest.param("[a](x_(y))", '<a href="x_(y)">a</a>', id="brackets in an address"),
        pytest.param("[*a*](HTTPS://b)", '<a href="HTTPS://b"><em>a</em></a>', id="web"),
        pytest.param("[a](mailto:b@c.de)", '<a href="mailto:b@c.de">a</a>', id="mail"),
    ],
)
def test_text_knows_a_little_markdown(markdown: str, expected: str) -> None:
    page = Page("")
    page.text(markdown)
    assert f"<p>{expected}</p>" in page.html()


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert(1)",
        "JavaScript:alert(1)",
        "java\x01script:alert(1)",
        "\x01javascript:alert(1)",
        "data:text/html,x",
        "vbscript:x",
        "file:///etc/passwd",
    ],
    ids=repr,
)
def test_other_schemes_are_no_links(address: str) -> None:
    page = Page("")
    page.text(f"[here]({address})")
    page.table(["a"], [[f"[here]({address})"]])
    found = Parsed(page.html())
    assert not found.all("a")
    shown = f"[here]({address})".replace("\x01", "\ufffd")
    assert found.text("p") == found.text("td") == [shown]


def test_paragraphs() -> None:
    page = Page("")
    page.text("\n one\nline \n \n\n two \n")
    assert Parsed(page.html()).text("p") == ["one\nline", "two"]


def test_headings_are_listed_with_places_of_their_own() -> None:
    page = Page("")
    for text, level in (("Time & size", 2), ("Time, size", 3), ("time-size 2", 2), ("Time size", 4), ("§", 2)):
        page.heading(text, level)
    found = Parsed(page.html())
    links = [str(attributes["href"]) for attributes in found.all("a")]
    assert links == ["#time-size", "#time-size-2", "#time-size-2-2", "#time-size-3", "#section"]
    assert [f"#{attributes['id']}" for _, attributes in found.tags if "id" in attributes] == links
    assert found.text("a") == ["Time & size", "Time, size", "time-size 2", "Time size", "§"]
    assert [attributes["class"] for attributes in found.all("li")] == [f"level-{n}" for n in (2, 3, 2, 4, 2)]


def test_a_link_in_a_heading_is_no_link_in_the_contents() -> None:
    page = Page("")
    page.heading("[here](a.html)")
    page.heading("`there`")
    found = Parsed(page.html())
    assert [attributes["href"] for attributes in found.all("a")] == ["#here", "#there", "a.html"]


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("12.5 %", "12.5"),
        ("+1.465", "1.465"),
        ("0.022 / 0.098", "0.022"),
        ("-63.544 ± 114.383", "-63.544"),
        ("\u22122", "-2.0"),
        ("1,617 images", "1617.0"),
        ("1e-3", "0.001"),
        ("89.2x", "89.2"),
        ("5 s e", "5.0"),
        ("*e* **2 min**", "120.0"),
        ("1.5 KiB", "1536.0"),
        ("16-32", "16.0"),
        ("x-5", "5.0"),
        ("7 seconds", "7.0"),
        ("28.6 dB", "28.6"),
        ("[9](a3.html)", "9.0"),
        ("-", None),
        ("", None),
        ("not comparable", None),
        ("1e999", None),
    ],
)
def test_numbers_sort_by_the_first_of_a_cell(cell: str, value: str | None) -> None:
    page = Page("")
    page.table(["number"], [[cell]], numbers=[0])
    assert Parsed(page.html()).all("td") == [{"class": "number"} | ({} if value is None else {"data-value": value})]


def test_times_and_sizes_sort_across_units() -> None:
    page = Page("")
    ascending = ["800 ns", "2 us", "3 µs", "1.3 ms", "14 ms", "0.5 s", "5.14 s", "2 min", "1 h"]
    sizes = ["1 kB", "1 KiB", "2 MB", "2 MiB", "1 GB", "1 GiB", "1 TB", "-", "-"]
    page.table(["time", "size"], zip(ascending, sizes, strict=True), numbers=(0, 1))
    cells = Parsed(page.html()).all("td")
    times, found = ([float(str(cell["data-value"])) for cell in cells[k::2] if "data-value" in cell] for k in (0, 1))
    assert times == sorted(times) == pytest.approx([8e-7, 2e-6, 3e-6, 1.3e-3, 1.4e-2, 0.5, 5.14, 120, 3600], rel=1e-12)
    assert found == sorted(found) == [1e3, 1024, 2e6, 2 * 2**20, 1e9, 2**30, 1e12]


def test_columns_of_numbers_are_marked_and_others_are_not() -> None:
    page = Page("")
    page.table(["name", "n"], [["5", 6]], numbers=[1])
    found = Parsed(page.html())
    assert found.all("th") == [{"scope": "col"}, {"scope": "col", "class": "number"}]
    assert found.all("td") == [{}, {"class": "number", "data-value": "6.0"}]
    (style,) = found.text("style")
    assert re.search(r"\.number \{[^}]*text-align: right;[^}]*tabular-nums", style)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "JPEG", "SVG"])
@pytest.mark.parametrize("as_file", [False, True], ids=["bytes", "file"])
def test_pictures_are_inside(kind: str, as_file: bool, tmp_path: Path) -> None:
    content = SVG if kind == "SVG" else picture(kind)
    (tmp_path / "name").write_bytes(content)
    page = Page("")
    page.picture(tmp_path / "name" if as_file else content, "alt", width=12)
    (image,) = Parsed(page.html()).all("img")
    media = "svg+xml" if kind == "SVG" else kind.lower()
    beginning, comma, rest = str(image["src"]).partition(",")
    assert beginning + comma == f"data:image/{media};base64,"
    assert base64.b64decode(rest, validate=True) == content
    assert (image["alt"], image["width"]) == ("alt", "12")


def test_a_saved_page_is_what_html_gives(tmp_path: Path) -> None:
    page, path = full_page(), tmp_path / "new" / "page.html"
    assert page.save(path) == path
    assert path.read_bytes() == page.html().encode("utf-8")
    page.text("more")
    page.save(str(path))
    assert path.read_bytes() == page.html().encode("utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_mistakes_are_named(tmp_path: Path) -> None:
    page = full_page()
    before = page.html()
    with pytest.raises(ArgumentError, match="level: must be at least 2, got 1"):
        page.heading("a", level=1)
    with pytest.raises(ArgumentError, match="rows: expected 2 cells as in the header, got 1 in row 1"):
        page.table(["a", "b"], [["1", "2"], ["3"]])
    with pytest.raises(ArgumentError, match=r"numbers: expected columns in 0..1, got \[2\]"):
        page.table(["a", "b"], [], numbers=[2])
    with pytest.raises(MissingFileError, match="data: no file .*missing.png"):
        page.picture(tmp_path / "missing.png", "")
    with pytest.raises(ArgumentError, match="expected a PNG, GIF, JPEG or SVG picture, got these bytes"):
        page.picture(b"<html><svg>", "")
    with pytest.raises(ArgumentTypeError, match="width: expected an int, got float 1.5"):
        page.picture(SVG, "", width=1.5)  # type: ignore[arg-type]
    assert page.html() == before
