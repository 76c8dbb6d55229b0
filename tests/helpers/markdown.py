"""What Markdown files hold: code, links, anchors; and the commands inside shell code."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token


class Snippet(NamedTuple):
    """A piece of a document: code, or the target of a link."""

    document: str
    line: int
    text: str
    language: str = ""


@cache
def _parse(path: Path) -> list[tuple[int, Token]]:
    """The tokens of a document, inline ones too, each with its line."""
    tokens, line = [], 0
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else line
        tokens += [(line, token), *((line, child) for child in token.children or ())]
    return tokens


def code_blocks(path: Path, *languages: str) -> list[Snippet]:
    """The fenced blocks in these languages."""
    blocks = [(line, token) for line, token in _parse(path) if token.type == "fence" and token.info in languages]
    return [Snippet(path.name, line, token.content, token.info) for line, token in blocks]


def inline_code(path: Path) -> list[Snippet]:
    """What stands between single backticks."""
    codes = [(line, token) for line, token in _parse(path) if token.type == "code_inline"]
    return [Snippet(path.name, line, token.content) for line, token in codes]


def links(path: Path) -> list[Snippet]:
    """The targets of links and pictures."""
    targets = [(line, token.attrGet("href") or token.attrGet("src")) for line, token in _parse(path)]
    return [Snippet(path.name, line, target) for line, target in targets if target]


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found, tokens = [], [token for _, token in _parse(path)]
    for heading, content in zip(tokens, tokens[1:]):
        if heading.type == "heading_open":
            text = "".join(child.content for child in content.children)
            found.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return {
        anchor if not found[:i].count(anchor) else f"{anchor}-{found[:i].count(anchor)}"
        for i, anchor in enumerate(found)
    }


def table_rows(path: Path, *header: str) -> list[list[str]]:
    """The rows of the tables whose first row is `header`: each cell as it is written."""
    tables, cells = [], []
    for _, token in _parse(path):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            cells = []
        elif token.type == "inline":
            cells.append(token.content)
        elif token.type == "tr_close":
            tables[-1].append(cells)
    return [row for table in tables if table[0] == list(header) for row in table[1:]]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without comments and here documents."""
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        if words := shlex.split(line, comments=True):
            yield words
        if here := re.search(r"<<'(\w+)'", line):
            while next(lines) != here[1]:
                pass
