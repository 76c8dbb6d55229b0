"""Tables that strangers may have made hostile: broken cells are listed, sound rows kept, nothing outside is opened.

In a call, each of `RECORDS` records is one case, and after it stands a sound record, which must be kept.
"""

import io
import json
import os
import pickle
import shutil
from collections import Counter

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.canary import Code, fuzz_settings, guarded
from helpers.prepared import load_prepared, problems_of
from helpers.refer_folder import HEIGHT, WIDTH, A, not_waiting, pixels, rectangle, rle
from helpers.table_writers import COLUMNS, SCHEMAS, TEXT, changed, columns, png, sound, write
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare
from data.sources import open_records

CALLS, RECORDS = 5, 70
CASES = Counter()
FUZZ = fuzz_settings(CALLS)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    with guarded(tmp_path / "canary", tmp_path / "opened") as opened:
        yield opened


def paths(tmp_path):
    """Texts in place of pixels: files and addresses that nobody may open, and what shells would run."""
    outside = tmp_path / "canary" / "canary.png"
    os.mkfifo(tmp_path / "pipe.png")
    return [
        str(outside),
        os.path.relpath(outside),
        f"file://{outside}",
        f"zip://canary.png::{outside}",
        "/etc/passwd",
        "../x",
        "http://127.0.0.1:9/x.png",
        "hf://datasets/someone/x/x.png",
        "/dev/zero",
        str(tmp_path / "pipe.png"),
        f"| touch {tmp_path / 'ran'}",
        "\0",
        "",
    ]


def bad_images(tmp_path, sizes):
    """Cells of an image column that hold no image, or, where `sizes` are known, one of another size."""
    image = png(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    gif = io.BytesIO()
    PIL.Image.new("RGB", (WIDTH + 1, HEIGHT)).save(gif, "GIF")
    huge = image[:16] + (2**31 - 1).to_bytes(4) * 2 + image[24:]
    contents = [b"", b"\0", image[:60], huge, pickle.dumps(Code(tmp_path / "ran")), bytes(10**6)]
    contents += [b"P6 40 30 255 " + bytes(3600), b"%!PS-Adobe\n" * 9]
    contents += [png(np.zeros((HEIGHT - 1, WIDTH), np.uint8)), gif.getvalue()] if sizes else []
    return [None, {"path": None, "bytes": None}, *({"path": path, "bytes": None} for path in paths(tmp_path))] + [
        {"path": "/etc/passwd", "bytes": content} for content in contents
    ]


ODD = [float("nan"), float("inf"), -float("inf"), 1e300, -1e9, 1e12]
CORNERS = st.floats(-20, 60, allow_nan=False)
BAD_POLYGON = st.one_of(
    st.lists(CORNERS, max_size=5),  # up to 2 corners and a half
    st.lists(CORNERS, min_size=3, max_size=9).map(lambda sides: [*sides, *sides[:-1]]),  # an odd number
    st.tuples(st.lists(CORNERS, min_size=5, max_size=5), st.sampled_from(ODD)).map(lambda it: [*it[0], it[1]]),
    st.lists(st.floats(1e3, 1e12), min_size=6, max_size=6),
    st.just([0.0, 0.0, 40.0, 30.0] * 30_000),  # an outline of 3 million pixels
)
BAD_SIZES = st.one_of(
    st.lists(st.integers(-3, 99), max_size=4).filter(lambda size: size != [HEIGHT, WIDTH]),
    st.sampled_from([None, [2**31 - 1] * 2, [WIDTH, HEIGHT], [None, None]]),
)
BAD_COUNTS = st.one_of(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=9).map(lambda counts: counts + "~"),
    st.text("0123456789", min_size=1, max_size=3),  # too few pixels
    st.sampled_from([None, "", "1" * 1300, "0" * 10**5, "é", "/etc/passwd"]),
)
BAD_RLE = st.one_of(
    BAD_SIZES.map(lambda size: rle(pixels(A), compressed=True) | {"size": size}),
    BAD_COUNTS.map(lambda counts: {"size": [HEIGHT, WIDTH], "counts": counts}),
    st.none(),
)
BAD_GRID = st.one_of(
    st.lists(st.lists(st.booleans(), max_size=9), min_size=1, max_size=9),
    st.integers(0, WIDTH - 1).map(lambda width: [[True] * WIDTH] * (HEIGHT - 1) + [[True] * width]),
    st.sampled_from([[None], [[None] * WIDTH] * HEIGHT, [[True] * HEIGHT] * WIDTH, [[True] * 10**6], [[]] * HEIGHT]),
)
BAD_BOXES = st.one_of(
    st.tuples(st.integers(0, 3), st.sampled_from([*ODD[:3], None])).map(
        lambda it: [*[1.0] * it[0], it[1], *[1.0] * (3 - it[0])]
    ),
    st.lists(st.floats(0, 9), max_size=8).filter(lambda box: len(box) != 4),
)
BAD_PHRASE = st.sampled_from(["", " ", "\t\n", "\u2003", "x" * 10_001, None])
BAD_PHRASES = st.one_of(st.lists(BAD_PHRASE, max_size=2), BAD_PHRASE.map(lambda phrase: ["a cat", phrase]), st.none())
BAD_NUMBERS = st.integers(2, 2**63 - 1)  # where another cell says 1
LONG = "x" * 5000
ANNOTATION, REF, SAMPLE = "ref_list.0.ann_info", "ref_list.0.ref_info", "samples.0"
BAD = {  # what cannot be read in each schema, by its place; all of the types that the columns have
    "refcoco_benchmark": {
        "ref_list": st.sampled_from([None, [], [None]]),
        ANNOTATION: st.none(),
        REF: st.none(),
        f"{ANNOTATION}.segmentation": st.one_of(
            BAD_POLYGON.map(lambda polygon: [rectangle(*A), polygon]),
            st.sampled_from([None, [], [None], [[None] * 6]]),
        ),
        f"{ANNOTATION}.bbox": BAD_BOXES,
        f"{ANNOTATION}.image_id": BAD_NUMBERS,
        f"{ANNOTATION}.category_id": BAD_NUMBERS.filter(lambda number: number != 17),
        f"{REF}.sentences": st.one_of(
            BAD_PHRASE.map(lambda phrase: [{"sent": phrase}]), st.sampled_from([None, [], [None]])
        ),
    },
    "refcoco_m": {
        "samples": st.sampled_from([None, [], [None]]),
        "image_id": BAD_NUMBERS,
        f"{SAMPLE}.mask": BAD_RLE,
        f"{SAMPLE}.sentences": BAD_PHRASES,
        f"{SAMPLE}.bbox": BAD_BOXES,
        f"{SAMPLE}.category": st.just(LONG),
    },
    "pbench": {
        "expression": BAD_PHRASE,
        "masks": BAD_RLE.map(lambda part: [part]),
        "count": st.integers(-9, 9).filter(lambda count: count != 1),
    },
    "bool_masks": {"text": BAD_PHRASE, "mask": BAD_GRID, "bbox": BAD_BOXES.filter(lambda box: box != [])},
    "lmms": {
        "answer": BAD_PHRASES,
        "segmentation": st.one_of(BAD_POLYGON, st.none()),
        "bbox": BAD_BOXES,
        "iscrowd": st.integers(1, 127),
    },
    "columns": {
        COLUMNS["mask"]: st.one_of(
            BAD_RLE.filter(bool).map(json.dumps),
            BAD_POLYGON.map(lambda polygon: json.dumps([rectangle(*A), polygon])),
            BAD_GRID.map(json.dumps),
            st.text(max_size=9).map(lambda text: "{" + text),
            st.sampled_from(
                ["/etc/passwd", "[" * 10**5, "7", "true", '"x"', "{}", "[7]", f"[{'9' * 5000}]", "[[[]]]"]
            ),
        ),
        COLUMNS["text"]: BAD_PHRASES,
        COLUMNS["bbox"]: BAD_BOXES,
        COLUMNS["category"]: st.just(LONG),
        COLUMNS["ann_id"]: st.sampled_from(["x", "1.5", "-", "9" * 30, "8_9", "../x"]),
    },
}


@st.composite
def changes(draw, bad):
    """A place of a record, and what makes the record unreadable there; for an image any number."""
    place = draw(st.sampled_from(["image", *bad]))
    return place, draw(st.integers(0, 99) if place == "image" else bad[place])


def named(kind, number):
    """A sound record and the places that tell it from others."""
    phrase = f"cat {number}"
    if kind == "columns":
        cells = {"mask": json.dumps([rectangle(*A)]), "text": [phrase], "ann_id": str(number), "bbox": None}
        return {"photo": sound("lmms")["image"]} | {COLUMNS[part]: cell for part, cell in cells.items()}
    record = sound(kind)
    places = {
        "refcoco_benchmark": {f"{REF}.sentences": [{"sent": phrase}], f"{REF}.ref_id": number},
        "refcoco_m": {f"{SAMPLE}.sentences": [phrase], f"{SAMPLE}.id": number},
        "pbench": {"expression": phrase},
        "bool_masks": {"text": phrase, "ann_id": number},
        "lmms": {"answer": [phrase]},
    }
    for place, value in places[kind].items():
        record = changed(record, place, value)
    return record


def schema_of(kind):
    if kind != "columns":
        return datasets.Features(SCHEMAS[kind].features).arrow_schema
    types = columns("json").features | {COLUMNS["ann_id"]: TEXT}
    return datasets.Features(types).arrow_schema


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_hostile_cells(tmp_path, canary, kind):
    sizes = kind not in ("lmms", "columns")  # polygons fit an image of any size
    images, runs, file = bad_images(tmp_path, sizes), iter(range(10**9)), tmp_path / "table-0.parquet"
    options = {"kind": "table", "columns": COLUMNS} if kind == "columns" else {"kind": kind}

    @FUZZ
    @given(st.lists(changes(BAD[kind]), min_size=RECORDS, max_size=RECORDS))
    def fuzz(mutations):
        records, wanted = [], {}
        for number, (place, value) in enumerate(mutations):
            if place == "image":
                place, value = "photo" if kind == "columns" else place, images[(value * 7 + number) % len(images)]
            records.append(changed(named(kind, 2 * number), place, value))
            wanted[len(records)] = f"cat {2 * number + 1}"
            records.append(named(kind, 2 * number + 1))
        pq.write_table(pa.Table.from_pylist(records, schema=schema_of(kind)), file)
        output = tmp_path / f"out{next(runs)}"
        with not_waiting(60):
            prepare.prepare(open_records(path=file, **options), output, num_proc=1)
        problems = problems_of(output)
        kept = [index for index in range(len(records)) if index not in problems]
        assert kept == list(wanted), [records[index] for index in set(kept) ^ set(wanted)][:1]
        assert all(isinstance(reason, str) and 10 < len(reason) < 2000 for reason in problems.values())
        rows = load_prepared(output, tmp_path)["table"].cast_column("image", datasets.Image(decode=False))
        assert [row["sentences"] for row in rows] == [[phrase] for phrase in wanted.values()]
        for row in rows:
            np.testing.assert_array_equal(row["mask"], pixels(A))
        CASES[kind] += len(problems)

    fuzz()
    assert canary.read_text() == "" and not (tmp_path / "ran").exists()
    assert CASES[kind] == CALLS * RECORDS


BYTES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_changed_bytes_of_files(tmp_path, canary, form):
    """Whatever stands in the file, it is refused with its name, or its records are read or refused one by one."""
    records = [named("refcoco_m", number) for number in range(20)]
    rows = {"train": records}
    path = write(SCHEMAS["refcoco_m"], rows, tmp_path / "sound", form)
    (file,) = [file for file in path.rglob("*") if file.suffix in (".parquet", ".arrow")]
    content, outcomes, runs = file.read_bytes(), Counter(), iter(range(10**9))

    @settings(FUZZ, max_examples=60)
    @given(BYTES, st.sampled_from(["set", "set", "cut", "insert", "end"]))
    def fuzz(places, how):
        changed = bytearray(content)
        for share, byte in places:
            # Half of the changes are in the last tenth, where Parquet says what is where.
            place = int((share if byte % 2 else 0.9 + share / 10) * 0.9999 * len(changed))
            if how == "set":
                changed[place] = byte
            elif how == "cut":
                del changed[max(place, 1) : place + byte + 1]
            elif how == "insert":
                changed[place:place] = bytes([byte]) * 9
            else:
                del changed[max(place, 1) :]
        folder = tmp_path / f"changed{next(runs)}"
        shutil.copytree(path, folder)
        (folder / file.relative_to(path)).write_bytes(changed)
        try:
            opened = open_records("refcoco_m", folder)
        except (OSError, ValueError) as error:
            assert str(folder) in str(error) and len(str(error)) < 2000
            outcomes["refused"] += 1
            return
        for index in range(len(opened)):
            try:
                _, row = opened.read(index)
                opened.check(row)
                outcomes["row"] += 1
            except (OSError, ValueError) as error:
                assert "split train" in str(error) or "ref_id" in str(error)
                outcomes["broken"] += 1

    fuzz()
    assert outcomes["refused"] and outcomes["row"], outcomes
    assert canary.read_text() == ""


def test_the_calls_are_2000_records():
    assert CALLS * RECORDS * len(BAD) >= 2000
