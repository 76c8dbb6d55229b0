"""Pages as a browser would see them, and phrases that must stay text there."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

TAGS = set(
    "html head meta title style body h1 h2 h3 h4 p bdi div section img ul li span details summary table tr th td br "
    "small figure figcaption code strong".split()
)
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "{{ 7 * 7 }} {% raw %}",
    "$\\frac{1}{$ _legend &amp; </title></style>",
    "\u202eright to left\x00\x1b[31m",
    "http://example.com/ javascript:alert(1)",
]


class Page(HTMLParser):
    """What a browser would make of a page.

    Attributes:
        tags, attributes: names of all tags, and all their attributes.
        headings: texts of the headings.
        images: source and alternative text of each picture, by the heading that it stands under.
        tables: rows of cells of each table, by the heading that it stands under.
        captions: texts of the captions.
        text: all text outside of style.
    """

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.headings, self.captions = set(), [], [], []
        self.images, self.tables, self.text, self.inside = {}, {}, "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.inside, "a tag is not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str]]) -> None:
        self.tags.add(tag)
        self.attributes += attributes
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append("")
        elif tag == "table":
            self.tables[self.headings[-1]] = []
        elif tag == "tr":
            self.tables[self.headings[-1]].append([])
        elif tag in ("th", "td"):
            self.tables[self.headings[-1]][-1].append("")
        elif tag == "figcaption":
            self.captions.append("")
        elif tag == "img":
            values = dict(attributes)
            self.images.setdefault(self.headings[-1], []).append((values["src"], values["alt"]))
        elif tag == "br":
            self.handle_data(" ")
        if tag not in ("meta", "img", "br"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.inside:
            return
        self.text += data
        if self.inside and self.inside[-1] != "small" or "td" in self.inside:
            if {"h1", "h2", "h3", "h4"} & {*self.inside}:
                self.headings[-1] += data
            elif {"th", "td"} & {*self.inside}:
                self.tables[self.headings[-1]][-1][-1] += data
            elif "figcaption" in self.inside:
                self.captions[-1] += data

    def check(self) -> None:
        """Nothing runs, nothing is fetched, and every picture is one."""
        assert self.tags <= TAGS
        assert not [name for name, _ in self.attributes if name.startswith("on") or name in ("href", "srcset")]
        assert "url(" not in self.source and "@import" not in self.source
        for source, alt in (image for images in self.images.values() for image in images):
            kind, _, content = source.partition(";base64,")
            content = base64.b64decode(content, validate=True)
            assert alt
            if kind == "data:image/svg+xml":
                assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
            else:
                assert kind == "data:image/jpeg"
                Image.open(io.BytesIO(content)).load()


def read(path: Path) -> Page:
    page = Page(path)
    page.check()
    return page
