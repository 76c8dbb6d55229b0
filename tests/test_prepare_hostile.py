"""Preparing what strangers may have made hostile: broken records are listed, others kept, nothing is run or opened.

In a call, each of `RECORDS` records is one case, and after it stands a sound record, which must be kept.
"""

import os
import pickle
from collections import Counter

import datasets
import numpy as np
import PIL.Image
import pytest
from helpers.canary import Code, fuzz_settings, guarded
from helpers.other_layouts import open_lines
from helpers.prepared import entries, load_prepared, open_refer, problems_of
from helpers.refer_folder import HEIGHT, WIDTH, A, B, ReferFolder, pixels, rectangle, rle
from hypothesis import given
from hypothesis import strategies as st

from data import prepare
from data.records import FEATURES

CALLS, RECORDS = 25, 81
CASES = Counter()
FUZZ = fuzz_settings(CALLS)


@pytest.fixture
def canary(tmp_path):
    """The file that tells whether somebody has opened what lies in `tmp_path / "canary"`."""
    with guarded(tmp_path / "canary", tmp_path / "opened") as opened:
        yield opened


def traps(folder, tmp_path):
    """Image files that no record may have: cut short, other sizes, code, links out; the names of all."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    whole = {}
    for suffix in ("jpg", "png"):
        PIL.Image.fromarray(noise).save(folder / f"whole.{suffix}")
        whole[suffix] = (folder / f"whole.{suffix}").read_bytes()
    names = []
    for suffix, content in whole.items():
        for length in range(0, len(content) - 99, 99):
            names.append(f"cut{length}.{suffix}")
            (folder / names[-1]).write_bytes(content[:length])
    (folder / "code.jpg").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "file.jpg").symlink_to(tmp_path / "canary" / "canary.jpg")
    (folder / "relative.jpg").symlink_to(os.path.relpath(tmp_path / "canary" / "canary.jpg", folder))
    (folder / "up").symlink_to(tmp_path / "canary")
    (folder / "link.jpg").symlink_to("file.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    up = os.path.relpath(tmp_path / "canary" / "canary.jpg", folder)
    links = ["file.jpg", "relative.jpg", "up/canary.jpg", "link.jpg", "loop.jpg", "up/../canary/canary.jpg"]
    paths = [str(tmp_path / "canary" / "canary.jpg"), up, f"./{up}", f"folder.jpg/../{up}", "..", "/", "", ".", "\0"]
    return [*names, *links, *paths, "code.jpg", "folder.jpg", "pipe.jpg", "none.jpg", "x" * 5000, "\ud800.jpg"]


NUMBERS = [float("nan"), float("inf"), -float("inf"), 1e300, 10**400, -(10**9), 2**63]
JUNK = st.one_of(  # of no field's type
    st.sampled_from([None, True, {}, {"a": []}, [[]], [None], "\ud800", "x" * 10**4, *NUMBERS]),
    st.recursive(st.text(max_size=3), lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=2)),
)
BAD_IDS = st.sampled_from(["7", "", 7.5, 1.0, True, [], [7], {}, {"id": 7}, 2**63, -(2**63) - 1, 10**400])
CORNERS = st.floats(-20, 60, allow_nan=False)
BAD_POLYGONS = st.one_of(
    st.lists(CORNERS, max_size=5),  # up to 2 corners and a half
    st.lists(CORNERS, min_size=3, max_size=9).map(lambda sides: [*sides, *sides[:-1]]),  # an odd number
    st.tuples(st.lists(CORNERS, min_size=5, max_size=5), st.sampled_from(NUMBERS)).map(lambda it: [*it[0], it[1]]),
    st.lists(st.floats(1e3, 1e12), min_size=6, max_size=6),
    st.lists(JUNK, min_size=6, max_size=6).filter(lambda part: not all(isinstance(it, bool) for it in part)),
).map(lambda polygon: [rectangle(*A), polygon])
BAD_RLES = st.one_of(
    st.tuples(st.integers(0, 99), st.integers(0, 99))
    .filter(lambda size: size != (HEIGHT, WIDTH))
    .map(lambda size: {"size": list(size), "counts": [size[0] * size[1]]}),
    st.lists(st.integers(0, 300), max_size=9)
    .filter(lambda runs: sum(runs) != HEIGHT * WIDTH)
    .map(lambda runs: {"size": [HEIGHT, WIDTH], "counts": runs}),
    st.lists(st.integers(0, 2**33), min_size=1, max_size=99).map(
        lambda runs: {"size": [HEIGHT, WIDTH], "counts": [*runs, HEIGHT * WIDTH + 1]}
    ),
    st.tuples(st.integers(1, 2**40), st.integers(0, 10**6)).map(
        lambda it: {"size": [HEIGHT, WIDTH], "counts": [-it[0], HEIGHT * WIDTH + it[0], it[1] + 1]}
    ),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=3).map(
        lambda counts: {"size": [HEIGHT, WIDTH], "counts": counts + "~"}
    ),
    st.sampled_from([{}, {"size": [HEIGHT, WIDTH]}, {"counts": [1200]}, {"size": None, "counts": None}]),
)
BAD_BOXES = st.one_of(
    st.tuples(st.integers(0, 3), st.sampled_from([*NUMBERS[:3], 10**400, "1", None, True, [1]])).map(
        lambda it: [*[1.0] * it[0], it[1], *[1.0] * (3 - it[0])]
    ),
    st.lists(st.integers(0, 9), max_size=8).filter(lambda box: len(box) != 4),
    st.sampled_from(["abcd", {}, 4, float("nan")]),
)
BAD_PHRASES = st.one_of(
    st.lists(st.sampled_from(["", " ", "\t\n", "\u2003"]), min_size=1, max_size=2),
    st.just([]),
    st.integers(10_001, 10**5).map(lambda length: ["a cat", "x" * length]),
    st.sampled_from([None, 7, float("nan"), ["a cat"], {}, "half \ud83d"]).map(lambda phrase: ["a cat", phrase]),
)
BAD_SPLITS = st.sampled_from(["", "../up", "a/b", "a b", "x" * 65, "tr\nain", None, 3, ["train"], "\ud800"])
LONG = 10**7  # characters of one phrase of each call


@st.composite
def changes(draw, bad, removable):
    """Parts of a record to replace, or, as `...`, to remove; none will do."""
    kind = draw(st.sampled_from(["remove", *bad]))
    return (draw(st.sampled_from(removable)), ...) if kind == "remove" else (kind, draw(bad[kind]))


def apply(record, key, value):
    record.pop(key, None)
    return record if value is ... else record | {key: value}


def run_fuzz(records, output, tmp_path, canary, root, sound):
    """All but the sound records are listed, and nothing outside was opened or run."""
    prepare.prepare(records, output, num_proc=1)
    problems = problems_of(output)
    assert list(problems) == [index for index in range(len(records)) if index not in sound]
    assert all(isinstance(reason, str) and 10 < len(reason) < 2000 for reason in problems.values())
    loaded = load_prepared(output, tmp_path).cast_column("image", datasets.Image(decode=False))
    rows = {row["ref_id"]: row for split in loaded.values() for row in split}
    assert set(rows) == set(sound.values())
    for row in rows.values():
        assert os.path.realpath(row["image"]["path"]).startswith(os.path.realpath(root))
        np.testing.assert_array_equal(row["mask"], pixels(A))
    assert canary.read_text() == "" and not (tmp_path / "ran").exists()
    assert entries(output) == ["README.md", "problems.jsonl", "summary.json", "train-00000-of-00001.parquet"]
    CASES[type(records).__name__] += len(problems)


BAD_LINES = {
    "file_name": st.one_of(st.integers(0, 99), st.sampled_from([None, 7, ["whole.jpg"], {}])),
    "mask": st.one_of(BAD_POLYGONS, BAD_RLES, st.sampled_from([7, True, [], "whole.jpg", "whole.png", ""])),
    "sentences": st.one_of(BAD_PHRASES, st.sampled_from(["a cat", None, 7])),
    "ref_id": BAD_IDS,
    "ann_id": BAD_IDS,
    "image_id": BAD_IDS,
    "bbox": BAD_BOXES,
    "category": st.sampled_from([["cat"], 7, "x" * 5000, "\ud800"]),
    "split": BAD_SPLITS.filter(lambda split: split is not None),  # that is train
    "line": st.one_of(st.binary(min_size=1, max_size=9).map(lambda line: b"{" + b"".join(line.splitlines())), JUNK),
}


@pytest.mark.slow
def test_hostile_folders(tmp_path, canary):
    root = tmp_path / "mine"
    names = traps(root, tmp_path)
    masks = [name.replace(".jpg", ".png") for name in names if "canary" in name or name.endswith(".png")]
    sound_line = {"file_name": "whole.jpg", "sentences": ["a cat"], "mask": [rectangle(*A)]}
    PIL.Image.fromarray(pixels(A)).save(root / "sound.png")
    PIL.Image.fromarray(pixels(A)[1:]).save(root / "small.png")
    runs = iter(range(10**9))

    @FUZZ
    @given(st.lists(changes(BAD_LINES, ["file_name", "mask", "sentences"]), min_size=RECORDS, max_size=RECORDS))
    def fuzz(mutations):
        lines, sound = [], {}
        for number, (key, value) in enumerate(mutations):
            if key == "file_name" and type(value) is int and number % 3:
                value = names[(value * 7 + number) % len(names)]
            elif key == "mask" and value in ("", True):
                key, value = "mask", [*masks, "small.png"][number % (len(masks) + 1)]
            if key == "sentences" and number == 0:
                value = ["x" * LONG]
            bad = apply(sound_line | {"file_name": "whole.png"}, key, value)
            lines.append(bad if key != "line" else value)
            sound[len(lines)] = 10**6 + number
            mask = ([rectangle(*A)], rle(pixels(A)), "sound.png")[number % 3]
            lines.append(sound_line | {"ref_id": 10**6 + number, "mask": mask})
        run_fuzz(open_lines(root, *lines), tmp_path / f"out{next(runs)}", tmp_path, canary, root, sound)

    fuzz()
    assert CASES["FolderRecords"] >= 2000


BAD_REFS = {
    ("ref", "ref_id"): BAD_IDS,
    ("ref", "ann_id"): st.one_of(BAD_IDS, st.sampled_from([-1, [], [10**4], [-1, 3], 10**5000])),
    ("ref", "image_id"): BAD_IDS,
    ("ref", "category_id"): st.one_of(BAD_IDS.filter(lambda key: key != []), st.sampled_from([99, [99], 10**5000])),
    ("ref", "split"): BAD_SPLITS,
    ("ref", "sentences"): st.one_of(
        BAD_PHRASES.map(lambda phrases: [{"sent": phrase} for phrase in phrases]),
        st.sampled_from([None, 7, "a cat", ["a cat"], [{}], {"sent": "a cat"}]),
    ),
    ("ref", "exist"): st.sampled_from(["false", None, 2, -1, 0.5, float("nan"), [], {}, [False]]),
    ("ref", "itself"): st.sampled_from([None, 7, "ref", [], {}, {"ref_id": 10**5000}]),
    ("image", "file_name"): st.one_of(st.integers(0, 99), st.sampled_from([None, 7, ["whole.jpg"], {}])),
    ("image", "height"): st.one_of(st.integers(-3, 999).filter(lambda side: side != HEIGHT), BAD_IDS),
    ("image", "width"): st.one_of(st.integers(-3, 999).filter(lambda side: side != WIDTH), BAD_IDS),
    ("annotation", "segmentation"): st.one_of(BAD_POLYGONS, BAD_RLES, st.sampled_from([None, [], 7, "x", [[]], [7]])),
    ("annotation", "bbox"): BAD_BOXES,
    ("annotation", "image_id"): BAD_IDS,
}
REF_PARTS = {
    "ref": ("ref_id", "ann_id", "image_id", "category_id", "split", "sentences"),
    "image": ("file_name", "height", "width"),
    "annotation": ("segmentation", "image_id"),
}
# Without these also the phrases of a ref that name nothing are no row.
NEEDED_BY_ALL = {
    ("ref", "ref_id"),
    ("ref", "image_id"),
    ("ref", "split"),
    *(("image", key) for key in REF_PARTS["image"]),
}


@pytest.mark.slow
def test_hostile_refer_sets(tmp_path, canary):
    """The refs are by turns those of REFER, of Ref-ZOM, and of R-RefCOCO, whose broken refs may be two records."""
    folder = ReferFolder(tmp_path / "refer")
    names = traps(folder.images, tmp_path)
    removable = [(part, key) for part, keys in REF_PARTS.items() for key in keys]
    runs = iter(range(10**9))

    @FUZZ
    @given(st.lists(changes(BAD_REFS, removable), min_size=RECORDS, max_size=RECORDS))
    def fuzz(mutations):
        folder.refs, folder.instances["images"], folder.instances["annotations"], sound = [], [], [], {}
        records = 0
        for number, ((part, key), value) in enumerate(mutations):
            if key == "file_name" and type(value) is int and number % 3:
                value = names[(value * 7 + number) % len(names)]
            if key == "sentences" and number == 0:
                value = [{"sent": "x" * LONG}]
            for id in (1000 + number, 2000 + number):
                record = {
                    "ref": {"ref_id": id, "ann_id": id, "image_id": id, "category_id": 17, "split": "train"},
                    "image": {"id": id, "file_name": "whole.jpg", "height": HEIGHT, "width": WIDTH},
                    "annotation": {"id": id, "image_id": id, "segmentation": [rectangle(*A)], "bbox": [3, 4, 17, 11]},
                }
                record["ref"]["sentences"] = [{"sent": "a cat"}]
                if number % 3 == 1:
                    record["ref"] |= {"source": "one", "ann_id": [id], "category_id": [17]}
                elif number % 3 == 2:
                    record["ref"]["sentences"][0]["exist"] = True
                if id >= 2000:
                    sound[records] = id
                elif key == "exist":
                    record["ref"]["sentences"][0]["exist"] = value
                elif number % 3 == 2 and (part, key) in NEEDED_BY_ALL:
                    record["ref"]["sentences"].append({"sent": "no dog", "exist": False})
                    records += 1
                if id < 2000 and key != "exist":
                    record[part] = value if key == "itself" else apply(record[part], key, value)
                records += 1
                folder.refs.append(record["ref"])
                folder.instances["images"].append(record["image"])
                folder.instances["annotations"].append(record["annotation"])
        run_fuzz(open_refer(folder), tmp_path / f"out{next(runs)}", tmp_path, canary, folder.images, sound)

    fuzz()
    assert CASES["ReferRecords"] >= 2000


def test_a_pickle_with_code_ends_it_before_it_begins(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    for place in (lambda code: code, lambda code: [*folder.refs, code], lambda code: [folder.refs[0] | {"x": code}]):
        folder.write()
        (folder.root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(place(Code(tmp_path / "ran"))))
        arguments = ["refer", str(folder.root), "--name", "refcoco/unc", "--output", str(tmp_path / "out")]
        with pytest.raises(SystemExit, match=r"posix.mkdir.*nothing in it was run"):
            prepare.main(arguments)
        assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("out*"))


def test_rows_of_hostile_polygons_stay_in_their_image(tmp_path):
    """Corners a little outside are COCO's own; they are cut off."""
    folder = ReferFolder(tmp_path / "refer")
    folder.instances["annotations"][0]["segmentation"] = [rectangle(-9, -9, B[2], B[3])]
    prepare.prepare(open_refer(folder), tmp_path / "out", num_proc=1)
    row = load_prepared(tmp_path / "out", tmp_path)["train"][0]
    assert load_prepared(tmp_path / "out", tmp_path)["train"].features == FEATURES
    np.testing.assert_array_equal(row["mask"], pixels((0, 0, B[2], B[3])))
