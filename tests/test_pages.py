"""What pages are made of: bins, pictures that fit, templates that escape, files that are whole."""

import base64
import io

import jinja2
import numpy as np
import pytest
from PIL import Image

import pages
from pages import MAX_PICTURE, bin_numbers, mask_size_bins, render, shortened, small_jpeg, write_whole


def test_a_value_on_a_bound_belongs_to_the_bin_above():
    bins = {"low": 0, "middle": 2, "high": 5}
    assert bin_numbers(np.array([0, 1.9, 2, 4, 5, 1e9, -1]), bins).tolist() == [0, 0, 1, 1, 2, 2, 0]


def test_empty_masks_have_a_bin_of_their_own_in_all_splits():
    labels, bins = mask_size_bins([np.array([0.005, 0.01, 1.0]), np.array([0.0, 0.5])])
    assert labels[-1] == "no target" and [numbers.tolist() for numbers in bins] == [[0, 1, 4], [5, 4]]
    assert "no target" not in mask_size_bins([np.array([0.1])])[0]


@pytest.mark.parametrize("noisy", [False, True])
def test_pictures_fit(noisy):
    pixels = np.random.default_rng(0).integers(0, 256 if noisy else 2, (300, 300, 3), np.uint8)
    content = base64.b64decode(small_jpeg(Image.fromarray(pixels)).partition("base64,")[2])
    assert len(content) <= MAX_PICTURE and Image.open(io.BytesIO(content)).size == (300, 300)


def test_templates_escape_and_miss_nothing(tmp_path):
    template = tmp_path / "a.html"
    template.write_text('{% from "page.html" import page_head %}{{ page_head(title) }}<p>{{ text }}</p>')
    page = render(template, title="<i>", text="<script>")
    assert "<title>&lt;i&gt; · DETRIS</title>" in page and "<p>&lt;script&gt;</p>" in page
    with pytest.raises(jinja2.UndefinedError, match="text"):
        render(template, title="x")


def test_a_file_is_whole_or_the_older_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    other = path.with_name(f".{path.name}")
    other.write_bytes(b"somebody's")
    write_whole(path, "half \ud800")
    assert path.read_bytes() == b"half ?" and other.read_bytes() == b"somebody's"
    other.unlink()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(pages.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"half ?" and list(tmp_path.iterdir()) == [path]


def test_long_texts_are_cut():
    assert shortened("abcdef", 6) == "abcdef" and shortened("abcdefg", 6) == "abcdef …"
