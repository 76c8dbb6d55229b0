"""The files beside the code say the same as the code: citation, licence, versions, targets of make."""

import re
from pathlib import Path

import yaml

from model_card import CARD

ROOT = Path(__file__).parents[1]
# Allowed and required by version 1.2.0 of the Citation File Format, at the top and in the preferred citation.
CITATION_KEYS = {
    *("abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords"),
    *("license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact"),
    *("repository-code", "title", "type", "url", "version"),
}
REQUIRED_KEYS = {"authors", "cff-version", "message", "title"}
REQUIRED_OF_A_REFERENCE = {"authors", "title", "type"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_is_valid_and_the_same_as_the_model_cards():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert REQUIRED_KEYS <= citation.keys() <= CITATION_KEYS and citation["cff-version"] == "1.2.0"
    assert all(author.keys() <= {"name", "family-names", "given-names"} for author in citation["authors"])
    paper = citation["preferred-citation"]
    assert REQUIRED_OF_A_REFERENCE <= paper.keys() and paper["type"] == "conference-paper"
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert dict(re.findall(r"(\w+) = \{\{(.+)\}\}", CARD)) == {
        "title": paper["title"],
        "author": authors,
        "booktitle": paper["collection-title"],
        "year": str(paper["year"]),
    }
    (arxiv,) = (identifier["value"] for identifier in paper["identifiers"])
    assert arxiv in CARD and arxiv in read("README.md")


def test_the_licence_is_mit_with_the_notice_of_the_official_implementation():
    own, notice = read("LICENSE").split("NOTICE")
    permission = own[own.index("Permission is hereby granted") : own.index("\n\n---")]
    assert own.startswith("MIT License\n\nCopyright (c) 2026 The DETRIS on Transformers authors\n\n")
    assert permission in notice and "https://github.com/jiaqihuang01/DETRIS" in notice
    assert yaml.safe_load(read("CITATION.cff"))["license"] == "MIT"


def test_commits_are_checked_by_the_ruff_of_the_lock():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    (version,) = re.findall(r"^ruff==(.+)$", read("requirements-dev.lock"), re.M)
    assert repository["rev"] == f"v{version}"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_makefile_says_what_can_be_made():
    targets = re.search(r"^\.PHONY: (.+)$", read("Makefile"), re.M)[1].split()
    assert re.findall(r"^# make (\S+)  ", read("Makefile"), re.M) == targets
