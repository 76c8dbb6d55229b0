"""The page and the sheet of a data set: masks where they belong, strangers' phrases, broken rows, and the command."""

import base64
import io
import json

import datasets
import numpy as np
import pytest
from helpers.other_layouts import small_set
from helpers.pages import HOSTILE, Page, read
from helpers.refer_folder import ReferFolder
from helpers.rows import make_row, make_rows, write_prepared
from helpers.table_writers import SCHEMAS
from helpers.table_writers import write as write_table
from PIL import Image

from data import view
from data.masks import RleMask
from data.view import MAKER, default_output, draw_row, main

SIZE = (60, 90)  # height, width
FEW_SHAPES = json.dumps({"sizes": {"train": 3, "val": 2, "testA": 1, "testB": 1, "unseen": 1}})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_plots_unless_asked_for(request, monkeypatch):
    """Drawing them takes a second."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(view, "plot_surveys", lambda surveys: [])


@pytest.fixture
def plots():
    """Asks for plots."""


def grey(ref_id: int, *sentences: str, mask: np.ndarray | None = None, size=SIZE, **changes) -> dict:
    """A row with a grey image, whose mask is a rectangle that is in no symmetrical place."""
    if mask is None:
        mask = np.zeros(size)
        mask[size[0] // 6 : size[0] // 3, size[1] // 2 : size[1] - 3] = 1
    file = io.BytesIO()
    Image.new("RGB", size[::-1], (128, 128, 128)).save(file, "PNG")
    row = make_row(ref_id, mask=RleMask().encode_example(mask), sentences=list(sentences or ["a cat"]))
    return row | {"image": {"path": None, "bytes": file.getvalue()}, "bbox": [0.0] * 4} | changes


def write(folder, **splits: list[dict]) -> str:
    rows = {
        split: make_rows(*rows).cast_column("image", datasets.Image(decode=False)) for split, rows in splits.items()
    }
    return write_prepared(folder, **rows)


def picture(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))).astype(int)


def is_green(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 1] - pixels[..., 0] > 15


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exif", [None, 6])
def test_the_mask_is_drawn_where_it_lies(tmp_path, exif):
    """A transposed, mirrored or shifted mask would tint other pixels. A turned image has its mask upright."""
    row = grey(0)
    if exif:
        file, options = io.BytesIO(), Image.Exif()
        options[0x0112] = exif
        Image.new("RGB", SIZE, (128, 128, 128)).save(file, "JPEG", exif=options)  # lies on its side
        row["image"] = {"path": None, "bytes": file.getvalue()}
    main([write(tmp_path / "set", val=[row]), "--output", "page.html"])
    ((source, _),) = read(tmp_path / "page.html").images["Drawn at random"]
    found = is_green(picture(source))
    assert found.shape == (267, 400)
    top, bottom, left, right = (round(side * 400 / 90) for side in (10, 20, 45, 87))
    rim = 8  # pixels that the outline, its dark rim and JPEG's blocks reach
    assert found[top + rim : bottom - rim, left + rim : right - rim].all()
    found[top - rim : bottom + rim, left - rim : right + rim] = False
    assert not found.any()


def test_the_box_of_the_annotation_is_drawn_if_it_is_one():
    image, mask = Image.new("RGB", (90, 60), (128, 128, 128)), np.zeros((60, 90))
    yellow = (np.asarray(draw_row(image, mask, [9, 18, 45, 27])).astype(int) == (255, 200, 0)).all(-1)
    rows, columns = np.flatnonzero(yellow.any(1)), np.flatnonzero(yellow.any(0))
    edges = [columns.min(), rows.min(), columns.max(), rows.max()]
    assert np.abs(np.array(edges) - np.array([9, 18, 54, 45]) * 400 / 90).max() <= 1
    plain = np.asarray(draw_row(image, mask, None))
    for bbox in ([float("nan"), 0, 1, 1], [0, 0, 0, 0], [0, 0, -5, 5], [float("inf"), 0, 1, 1], [None] * 4):
        assert np.array_equal(draw_row(image, mask, bbox), plain)
    draw_row(image, mask, [-1e300, 0, 1e308, 1e308])  # is cut off at the border


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (2, 2), (1500, 20)])
def test_images_of_every_shape_are_shown(tmp_path, size):
    main([write(tmp_path / "set", val=[grey(0, mask=np.ones(size), size=size)]), "--output", "page.html"])
    ((source, _),) = read(tmp_path / "page.html").images["Drawn at random"]
    assert max(picture(source).shape) == 400 and picture(source).size


def test_all_phrases_stand_beneath_their_picture_and_what_it_is(tmp_path):
    rows = [grey(7, "left cat", "the cat", category="cat"), grey(8, "nothing", mask=np.zeros(SIZE))]
    assert main([write(tmp_path / "set", train=rows), "--output", "page.html"]) == 0
    page = read(tmp_path / "page.html")
    (caption,) = (caption for caption in page.captions if "left cat" in caption)
    assert caption.split("\n")[:4][-2:] == ["“left cat”", "“the cat”"] or "“left cat”\n“the cat”" in caption
    assert "train · ref_id 7 · cat · 7.8 % of the image" in page.text  # 10 * 42 of 60 * 90 pixels
    assert "train · ref_id 8 · names nothing" in page.text
    ((_, alt),) = page.images["Phrases that name nothing"]
    assert alt == "The image, in which “nothing” names nothing"


def test_strangers_phrases_stay_text(tmp_path):
    texts = [
        *HOSTILE,
        "e" + "\u0301" * 50,
        "שמאל",
        "القط",
        "左の猫",
        "😀",
        "a\nb",
        "x" * 9_000,
        " ".join(["word"] * 900),
    ]
    rows = [grey(number, text, category=text[:90]) for number, text in enumerate(texts)]
    rows.append(grey(99, *[f"phrase {number}" for number in range(500)]))
    name = write(tmp_path / "<b onclick=x>", val=rows)
    assert main([name, "--count", "60", "--output", "page.html"]) == 0
    page = read(tmp_path / "page.html")
    assert page.headings[0] == "<b onclick=x>" and "and 470 more" in page.text
    captions = "".join(page.captions)
    for text in HOSTILE[:-2] + ["שמאל", "القط", "左の猫", "😀"]:
        assert f"“{text}”" in captions
    assert "\x00" not in page.source and "\x1b" not in page.source and "x" * 301 not in page.source
    assert main([name, "--count", "60", "--output", "sheet.png"]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 4 * 414 + 14 and sheet.height < 20_000


def test_a_page_has_a_bounded_size(tmp_path):
    noise = io.BytesIO()
    Image.effect_noise((400, 400), 200).convert("RGB").save(noise, "PNG")
    image, random = {"path": None, "bytes": noise.getvalue()}, np.random.default_rng(0)
    sentences = ["word " * 1_900] * 10
    mask = RleMask().encode_example(random.integers(0, 2, (400, 400)))
    rows = [make_row(number, image=image, mask=mask, sentences=sentences) for number in range(5)]
    main([write(tmp_path / "set", val=rows), "--count", "5", "--output", "page.html"])
    assert (tmp_path / "page.html").stat().st_size < 5 * 50_000 + 10_000


# --- broken rows ----------------------------------------------------------------------------------------------------


def broken_rows(folder) -> list[dict]:
    """Rows of which only the first is sound."""
    gone = folder / "gone.png"
    Image.new("RGB", SIZE[::-1]).save(gone)
    other_size = grey(2, "of another size") | {"image": grey(0, size=(30, 30))["image"]}
    return [
        grey(0, "sound"),
        grey(1, "gone") | {"image": {"path": str(gone), "bytes": None}},
        other_size,
        grey(3, "cut short") | {"image": {"path": None, "bytes": grey(0)["image"]["bytes"][:-60]}},
        grey(4, "mask of noise") | {"mask": {"size": list(SIZE), "counts": "~~~~"}},
    ]


@pytest.mark.parametrize("output", ["page.html", "sheet.png"])
def test_broken_rows_are_shown_as_such_and_named(tmp_path, capsys, output):
    name = write(tmp_path / "set", val=broken_rows(tmp_path))
    (tmp_path / "gone.png").unlink()
    assert main([name, "--output", output]) == 1
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if "ref_id" in line and "Not readable" in line]
    for ref_id in range(5):
        assert (f"ref_id {ref_id}" in printed.err) == (ref_id > 0)
    assert "5 rows of set are in" in printed.out
    if output == "page.html":
        page = read(tmp_path / "page.html")
        assert len(page.captions) == 5 and page.text.count("It cannot be read.") == 4
        assert page.images.keys() & {"Drawn at random", "Smallest masks", "Largest masks", "Longest phrases"}
        for text in ("gone.png", "30 x 30 pixels, height x width, but its mask 60 x 90", "compressed counts"):
            assert text in page.text
    else:
        Image.open(tmp_path / "sheet.png").load()


def test_a_set_without_a_sound_row_is_shown_too(plots, tmp_path):
    name = write(tmp_path / "set", val=broken_rows(tmp_path)[1:2])
    (tmp_path / "gone.png").unlink()
    for output in ("page.html", "sheet.png"):
        assert main([name, "--output", output]) == 1
        assert (tmp_path / output).stat().st_size


# --- the command ----------------------------------------------------------------------------------------------------


def test_splits_are_shown_together_or_one_alone(plots, tmp_path, capsys):
    name = write(tmp_path / "set", train=[grey(0)] * 1, validation=[grey(1), grey(2)])
    assert main([name]) == 0
    assert "3 rows of set are in view_set.html" in capsys.readouterr().out
    page = read(tmp_path / "view_set.html")
    head, objects, *_ = page.tables["set"]
    assert (head, objects) == (["split", "train", "validation"], ["objects", "1", "2"])
    assert {*page.images} >= {"Words of a phrase", "Mask's share of the image", "Phrases of an object"}
    assert main([name, "--split", "train"]) == 0
    assert "1 row of set is in view_set-train.html" in capsys.readouterr().out
    assert read(tmp_path / "view_set-train.html").tables["set"][0] == ["split", "train"]


def test_only_rows_that_are_shown_are_decoded(tmp_path, monkeypatch):
    decoded, decode = [], view.read_thumbnail
    monkeypatch.setattr(view, "read_thumbnail", lambda *args: decoded.append(1) or decode(*args))
    main([write(tmp_path / "set", val=[grey(number) for number in range(30)]), "--count", "5", "--output", "a.html"])
    assert len(decoded) == 5 == len(read(tmp_path / "a.html").captions)


def test_the_seed_draws_the_rows(tmp_path):
    name = write(tmp_path / "set", val=[grey(number, f"phrase {number}") for number in range(40)])
    captions = []
    for seed in ("0", "0", "1"):
        main([name, "--count", "10", "--seed", seed, "--output", "page.html"])
        captions.append(read(tmp_path / "page.html").captions)
    assert captions[0] == captions[1] != captions[2]


def test_sets_of_refer_ones_own_folder_and_shapes_are_shown(tmp_path, capsys):
    ReferFolder(tmp_path / "refer").write()
    assert main(["refcoco/unc", "--data_root", "refer", "--split", "train", "--output", "refer.html"]) == 0
    page = read(tmp_path / "refer.html")
    assert "train · ref_id 111 · cat" in page.text and "second.png" in page.text
    mine = tmp_path / "mine"
    mine.mkdir()
    Image.new("RGB", (64, 48)).save(mine / "a.png")
    line = {"file_name": "a.png", "sentences": ["a ball"], "mask": [[5, 5, 20, 5, 20, 20, 5, 20]]}
    (mine / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["mine", "--output", "mine.html"]) == 0
    assert "“a ball”" in "".join(read(tmp_path / "mine.html").captions)
    assert main(["shapes", "--shapes_config", FEW_SHAPES, "--count", "4"]) == 0
    assert len(read(tmp_path / "view_shapes.html").captions) == 4
    assert "published" not in capsys.readouterr().out  # a single split is compared with nothing
    assert main(["refcoco/unc", "--data_root", "refer", "--output", "refer.html"]) == 0
    assert "(published: 42404)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["refcoco_m", "bool_masks"])
def test_tables_with_pixels_are_shown(tmp_path, kind):
    schema = SCHEMAS[kind]
    folder = write_table(schema, schema.rows(small_set(tmp_path)), tmp_path / "table", "parquet")
    assert main([str(folder), "--split", "train", "--output", "table.html"]) == 0
    page = read(tmp_path / "table.html")
    assert page.tables["table"][0] == ["split", "train"] and "train · ref_id" in page.text
    columns = ["--columns", "image=image", "mask=mask", "text=text"]
    if kind == "bool_masks":
        assert main([str(folder), "--output", "table.html", *columns]) == 0


def test_an_output_of_others_is_not_replaced(tmp_path, monkeypatch):
    name = write(tmp_path / "set", val=[grey(0)])
    for output, content in (("page.html", f"<p>{'x' * 1000} {MAKER}"), ("sheet.png", "a photograph")):
        path = tmp_path / output
        path.write_text(content)
        with monkeypatch.context() as patch:
            patch.setattr(view, "load_splits", lambda *_: pytest.fail("this may take minutes"))
            with pytest.raises(
                SystemExit, match=f"data.view: {output} exists and was not made by data.view: name ano"
            ):
                main([name, "--output", output])
        assert path.read_text() == content
        assert main([name, "--output", output, "--overwrite"]) == 0
        assert main([name, "--output", output]) == 0  # it is ours now
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "link.html").symlink_to("nowhere")
    for output in ("folder.html", "link.html"):
        with pytest.raises(SystemExit, match=f"{output} exists"):
            main([name, "--output", output])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nosuch"], "'nosuch' is neither 'shapes' nor a"),
        (["set", "--split", "test"], "set has no split 'test': it has validation"),
        (["set", "--output", "nowhere/a.html"], "There is no folder .*nowhere: make it"),
        (["set", "--columns", "image"], "columns has .image.: write <key>=<column>"),
    ],
)
def test_errors_are_one_sentence(tmp_path, arguments, message):
    write(tmp_path / "set", validation=[grey(0)])
    with pytest.raises(SystemExit, match=f"^python -m data.view: .*{message}") as end:
        main(arguments)
    assert "\n" not in end.value.code and len(end.value.code) < 400


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "page.pdf"], "--output is page.pdf: give a name that ends in .html or .png"),
        (["--count", "0"], "--count is 0: give 1 to 200 rows"),
        (["--count", "201"], "--count is 201"),
        (["--seed", "-1"], "--seed is -1"),
        (["--shapes_config", "{"], "--shapes_config"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["set", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, split, expected",
    [
        ("refcoco/unc", "val", "view_refcoco-unc-val.html"),
        ("hub:someone/mine", None, "view_someone-mine.html"),
        ("/", None, "view_set.html"),
        ("x" * 300, None, f"view_{'x' * 80}.html"),
    ],
)
def test_the_output_has_the_name_of_the_set(name, split, expected):
    assert default_output(name, split) == expected


def test_the_sheet_has_the_plots(plots, tmp_path, monkeypatch):
    name = write(tmp_path / "set", train=[grey(0)], validation=[grey(1)])
    main([name, "--output", "sheet.png"])
    monkeypatch.setattr(view, "plot_surveys", lambda surveys: [])
    main([name, "--output", "without.png"])
    with Image.open(tmp_path / "sheet.png") as sheet, Image.open(tmp_path / "without.png") as without:
        assert sheet.height > without.height + 3 * 400 and sheet.width == without.width


def test_the_page_needs_neither_scripts_nor_a_network(plots, tmp_path):
    main([write(tmp_path / "set", val=[grey(0)]), "--output", "page.html"])
    page = Page(tmp_path / "page.html")
    page.check()
    assert "default-src 'none'" in page.source and "color-scheme: light dark" in page.source
    assert all(alt for images in page.images.values() for _, alt in images)


def test_phrases_do_not_turn_the_text_beside_them_on_the_sheet():
    row = view.ShownRow(["a \u202ecat"], 0, "val · \u202ecat", None, "", "no \u2067file")
    assert [text for text, _ in view._card(row).texts] == ["“a cat”", "no file", "val · cat"]


def test_training_comes_first():
    rows = make_rows(grey(0))
    splits = datasets.DatasetDict({"testB": rows, "val": rows, "train": rows})
    assert [split.split for split in view.survey_splits("set", splits, None, 0)] == ["train", "val", "testB"]
