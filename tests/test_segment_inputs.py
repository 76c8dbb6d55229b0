"""What segment.py is given: lines of phrases, names that fit several pictures, folders, addresses, standard input."""

import http.server
import io
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.segmenting import PHRASES, make_folder, results_in, save_picture
from PIL import Image
from pycocotools import mask as coco_mask

import segment
import segment_inputs
from segment_inputs import Phrase, find_pictures, match_phrases, read_phrases

pytestmark = pytest.mark.usefixtures("one_thread")
LINE = {"image": "a.png", "text": "the bed"}


def write(path: Path, content: str | bytes | dict) -> str:
    content = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    "line, phrases",
    [
        (LINE, [Phrase("the bed")]),
        (LINE | {"text": ["a", "b"]}, [Phrase("a"), Phrase("b")]),
        (LINE | {"adapter_name": "x"}, [Phrase("the bed", "x")]),
        (LINE | {"adapter_name": None}, [Phrase("the bed")]),
        (LINE | {"text": "החתול"}, [Phrase("החתול")]),
    ],
)
def test_lines(tmp_path, line, phrases):
    content = json.dumps(line, ensure_ascii=False).encode()
    for whole in (content, b"\xef\xbb\xbf" + content + b"\r\n\r\n"):
        assert list(read_phrases(write(tmp_path / "x.jsonl", whole))) == [("a.png", phrases)]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "give image, text"),
        ({"image": "a.png"}, "give image, text"),
        (LINE | {"adaptername": "x"}, "give image, text and, if wanted, adapter_name"),
        (LINE | {"text": ""}, "a phrase is empty"),
        (LINE | {"text": ["a", "\u3000"]}, "a phrase is empty"),
        (LINE | {"text": []}, "text is \\[\\]"),
        (LINE | {"text": {"a": 1}}, "text is {'a': 1}"),
        (LINE | {"text": [["a"]]}, "a phrase is \\['a'\\]"),
        (LINE | {"text": "a" * 10_001}, "at most 10,000"),
        (LINE | {"text": "\ud800"}, "half a character"),
        (LINE | {"image": 7}, "image is 7"),
        (LINE | {"adapter_name": 7}, "adapter_name is 7"),
    ],
    ids=repr,
)
def test_wrong_line_is_named_by_its_number(tmp_path, line, message):
    wrong = json.dumps(line) if isinstance(line, dict) else line
    path = write(tmp_path / "x.jsonl", f"{json.dumps(LINE)}\n\n{wrong}\n")
    with pytest.raises(ValueError, match=f"^{path}: line 3: .*{message}"):
        list(read_phrases(path))


@pytest.mark.parametrize("content, message", [(b"", "it is empty"), (b"\n \n", "it is empty"), (b"\xff\xfe", "utf-8")])
def test_file_without_lines(tmp_path, content, message):
    path = write(tmp_path / "x.jsonl", content)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        list(read_phrases(path))


def test_names_are_matched_by_path_and_name(tmp_path):
    found = {"photos/a.png": "a.png", "photos/sub/a.png": "sub/a.png", "photos/sub/b.png": "sub/b.png"}

    def sources(image: str) -> dict[str, str]:
        path = write(tmp_path / "x.jsonl", LINE | {"image": image})
        phrases, names = match_phrases(path, found, "photos")
        assert phrases.keys() == names.keys()
        return names

    for image in ("photos/sub/a.png", "sub/a.png", "./sub/../sub/a.png"):
        assert sources(image) == {"photos/sub/a.png": "sub/a.png"}
    assert sources("b.png") == {"photos/sub/b.png": "sub/b.png"}
    assert sources("c.png") == {"photos/c.png": "c.png"}
    assert sources("../c.png") == {"c.png": "c.png"}
    assert sources("/elsewhere/c.png") == {"/elsewhere/c.png": "c.png"}
    assert sources("https://x.org/a/c%20d.png?e") == {"https://x.org/a/c%20d.png?e": "c-d.png"}
    assert sources("https://x.org/") == {"https://x.org/": "picture"}
    with pytest.raises(ValueError, match="a.png fits 2 pictures, such as photos/a.png: write its path"):
        sources("a.png")


def test_pictures_of_a_folder_and_of_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("p/b.png", "p/a.JPG", "p/s/c.webp", "p/s/n.txt", "p/out/a.JPG/1.png", "p/x[1].png", "p/outer/d.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    everything = ["a.JPG", "b.png", "outer/d.png", "s/c.webp", "x[1].png"]
    for source in ("p", "p/", "./p", os.path.abspath("p")):
        found = find_pictures(source, Path("p/out"))
        assert list(found.values()) == everything and all(map(os.path.isfile, found))
    assert list(find_pictures("p/**/*.*", Path("p/out")).values()) == sorted([*everything, "s/n.txt"])
    assert list(find_pictures("*/s/*", Path("out")).values()) == ["p/s/c.webp", "p/s/n.txt"]
    assert find_pictures("p/s/c*", Path("out")) == {"p/s/c.webp": "c.webp"}
    assert find_pictures("p/x[1].png", Path("out")) == {"p/x[1].png": "x[1].png"}  # is no pattern if it is a file
    assert len(find_pictures("p", Path("."))) == 6  # results in the folder above are not among them
    assert find_pictures(os.path.abspath("p/s/*.webp"), Path("out")) == {os.path.abspath("p/s/c.webp"): "c.webp"}
    assert find_pictures("-", Path("out")) == {"-": "standard-input"}


def test_folder_that_cannot_be_read_is_not_left_out_in_silence(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):  # the superuser, who may run the tests, can read everything
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(OSError, match="closed cannot be read \\(Permission denied\\)"):
        find_pictures(str(tmp_path), tmp_path / "out")


# --- phrases from a file, pictures from elsewhere -----------------------------------------------------------------


def write_lines(path: Path, *lines: dict) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def labels(output: str = "out") -> dict[str, list[str]]:
    return {
        entry["folder"]: [result["label"] for result in entry["results"]] for entry in results_in(output)["pictures"]
    }


@pytest.mark.parametrize("first", [[], ["photos"], ["photos/*.png"]], ids=str)
def test_each_picture_has_its_own_phrases(run_segment, place, capsys, first):
    make_folder(place / "photos", 4)
    lines = [
        {"image": "02.png", "text": "left cat"},
        {"image": "00.png", "text": PHRASES},
        {"image": "none.png", "text": "a"},
        {"image": "02.png", "text": ["the bed"]},
    ]
    file = "photos/phrases.jsonl" if first != ["photos"] else "phrases.jsonl"
    write_lines(place / file, *lines)
    assert run_segment(*first, "--phrases", file, "--batch_size", 2) == 1
    assert labels() == {"02.png": ["left cat", "the bed"], "00.png": PHRASES}
    assert [entry["image"] for entry in results_in("out")["failed"]] == ["photos/none.png"]
    assert ("2 pictures have no phrases" in capsys.readouterr().err) == bool(first)


def test_adapters_for_all_phrases_and_for_some(segment_pipe, place, monkeypatch):
    save_picture(place / "photo.png")
    asked = []

    def recording(items, **options):
        asked.extend(item["adapter_name"] for item in items)
        return segment_pipe([{**item, "adapter_name": None} for item in items], **options)

    recording.model, recording.processor = segment_pipe.model, segment_pipe.processor
    loaded = []
    monkeypatch.setattr(
        segment_pipe.model, "check_adapter_names", lambda names: loaded.append(names) if names else None
    )
    monkeypatch.setattr(segment, "load_pipeline", lambda *arguments: loaded.append(arguments) or recording)
    command = ["photo.png", "--model", "m", "--device", "cpu", "--dtype", "bfloat16"]
    assert segment.main([*command, *PHRASES, "--adapter", "runs/v1.1"]) == 0
    assert loaded == [("m", {"v1_1": "runs/v1.1"}, "cpu", "bfloat16", None, None, None), ["v1_1", "v1_1"]]
    assert asked == [["v1_1", "v1_1"]]
    write_lines(
        place / "phrases.jsonl",
        {"image": "photo.png", "text": ["a", "b"]},
        {"image": "photo.png", "text": "c", "adapter_name": "second"},
        {"image": "photo.png", "text": "d", "adapter_name": "__base__"},
    )
    adapters = ["--adapter", "first=runs/x", "--adapter", "second=runs/y"]
    assert segment.main([*command, "--phrases", "phrases.jsonl", *adapters]) == 0
    assert asked[1:] == [["first", "first", "second", "__base__"]]
    (entry,) = results_in("out")["pictures"]
    assert [result["adapter_name"] for result in entry["results"]] == asked[1]


@pytest.mark.usefixtures("place")
def test_adapter_that_is_loaded_decides(capsys):
    released = Path(__file__).parent / "fixtures" / "released"
    save_picture(Path("photo.png"))
    command = ["photo.png", "the bed", "--model", str(released / "whole"), "--device", "cpu"]
    assert segment.main(command) == 0
    own = results_in("out")["pictures"][0]["results"][0]
    assert segment.main([*command, "--adapter", f"new={released / 'adapter'}", "--output", "new"]) == 0
    new = results_in("new")["pictures"][0]["results"][0]
    loaded = segment.load_pipeline(str(released / "whole"), {"new": str(released / "adapter")}, "cpu")
    (wanted,) = loaded("photo.png", "the bed", adapter_name="new")
    np.testing.assert_array_equal(coco_mask.decode(new["rle"]) * 255, wanted["mask"])
    assert new["rle"] != own["rle"] and new["adapter_name"] == "new" and own["adapter_name"] is None
    assert results_in("new")["settings"]["adapters"] == {"new": str(released / "adapter")}
    write_lines(Path("phrases.jsonl"), {"image": "photo.png", "text": "the bed", "adapter_name": "unknown"})
    capsys.readouterr()
    assert segment.main(["--phrases", "phrases.jsonl", *command[2:]]) == 1
    assert "unknown" in capsys.readouterr().err


def test_standard_input(run_segment, segment_pipe, place, monkeypatch):
    pixels = save_picture(place / "photo.png")
    content = (place / "photo.png").read_bytes()
    for _ in range(2):  # also when it is finished
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert run_segment("-", *PHRASES) == 0
        (wanted, _) = segment_pipe(Image.fromarray(pixels), PHRASES)
        np.testing.assert_array_equal(Image.open("out/standard-input/1_the-bed.png"), wanted["mask"])
    assert results_in("out")["pictures"][0]["image"] == "-"


@pytest.mark.parametrize("content, message", [(b"", "is empty"), (b"no picture", "it is no JPEG")])
def test_standard_input_without_a_picture(run_segment, place, monkeypatch, capsys, content, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert run_segment("-", "the bed") == 1
    assert message in capsys.readouterr().err


@pytest.fixture
def server(place):
    """Serves the folder `served` on this machine; its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(place / "served"))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05}).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_addresses(run_segment, segment_pipe, place, server, capsys):
    pixels = save_picture(place / "served" / "a b" / "photo.png")
    (place / "served" / "page.html").write_text("<html></html>")
    address = f"{server}/a%20b/photo.png?size=large"
    assert run_segment(address, *PHRASES) == 0
    (wanted, _) = segment_pipe(Image.fromarray(pixels), PHRASES)
    np.testing.assert_array_equal(Image.open("out/photo.png/1_the-bed.png"), wanted["mask"])
    assert results_in("out")["pictures"][0]["image"] == address
    write_lines(
        place / "phrases.jsonl",
        *({"image": f"{server}/{path}", "text": "a"} for path in ("a%20b/photo.png", "none.png", "page.html")),
        {"image": "http://127.0.0.1:9/photo.png", "text": "a"},
        {"image": "http://[/photo.png", "text": "a"},
    )
    assert run_segment("--phrases", "phrases.jsonl", "--output", "many") == 1
    results = results_in("many")
    (found,) = results["pictures"]
    assert found["image"] == f"{server}/a%20b/photo.png" and found["folder"].startswith("photo.png-")
    missing, page, refused, impossible = (entry["error"] for entry in results["failed"])
    assert "404" in missing and "it is no JPEG" in page and "refused" in refused and "cannot be read" in impossible


def test_a_server_that_never_ends_is_left(run_segment, place, server, monkeypatch, capsys):
    save_picture(place / "served" / "photo.png")
    monkeypatch.setattr(segment_inputs, "DOWNLOAD_SECONDS", -1)
    assert run_segment(f"{server}/photo.png", "the bed") == 1
    assert "has not sent all of it within -1 seconds" in capsys.readouterr().err


def test_answers_are_not_read_without_end(run_segment, place, server, monkeypatch, capsys):
    monkeypatch.setattr(segment_inputs, "MAX_BYTES", 1000)
    save_picture(place / "served" / "photo.png")
    assert (place / "served" / "photo.png").stat().st_size > 1000
    for source in (f"{server}/photo.png", "served/photo.png"):
        assert run_segment(source, "the bed") == 1
        assert "has over 1,000 bytes" in capsys.readouterr().err
