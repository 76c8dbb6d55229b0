"""The reader of the REFER layout against masks known by arithmetic, and what it refuses."""

import copyreg
import importlib.util
import io
import json
import os
import pickle
import sys
import warnings

import datasets
import numpy as np
import PIL.features
import PIL.Image
import pyarrow.parquet
import pytest
import torch
from datasets.features.features import register_feature
from helpers.refer_folder import (
    HEIC,
    HEIGHT,
    HOSTILE_RLES,
    MASKS,
    MINI,
    ROOT,
    WIDTH,
    ReferFolder,
    cut,
    not_waiting,
    rle,
    runs,
    same_rows,
)
from pycocotools import mask as coco_mask

import data.refer
from configuration_detris import one_line
from data.refer import FEATURES, RleMask, load_refer, run_lengths
from untrusted_pickles import PlainUnpickler, load_plain_pickle

OFFICIAL = ROOT.parent / "shared" / "conformance" / "expected" / "refer_mini.json"

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools


@pytest.fixture
def refer(tmp_path):
    """A REFER folder in two parts: `refs` and `instances` to change, `load` to write them out and read them back."""
    return ReferFolder(tmp_path / "refer")


def by_annotation(loaded):
    return {row["ann_id"]: row for rows in loaded.values() for row in rows}


@pytest.mark.parametrize("protocol", [0, 2])
def test_rows(refer, protocol):
    loaded = refer.load(protocol=protocol)
    assert {split: rows["ann_id"][:] for split, rows in loaded.items()} == {
        "train": [10, 11, 14, 16],
        "val": [12],
        "testA": [13],
        "testB": [15],
    }
    assert all(rows.features == FEATURES for rows in loaded.values())
    for ann_id, row in by_annotation(loaded).items():
        assert row["mask"].dtype == np.uint8
        np.testing.assert_array_equal(row["mask"], MASKS[ann_id][1], err_msg=f"annotation {ann_id}")
        assert row["sentences"] == [f"cat {ann_id}", "l'été, left"]
        assert row["ref_id"] == 100 + ann_id and row["image_id"] == 1 + ann_id % 2
        assert row["category"] == ("cat" if ann_id % 2 else "remote")
        assert row["bbox"] == [1.25, 2, 3, ann_id]
        assert row["image"].size == (WIDTH, HEIGHT)
    with PIL.Image.open(refer.images / "second.png") as image:
        np.testing.assert_array_equal(np.asarray(by_annotation(loaded)[11]["image"]), np.asarray(image))


def test_images_stay_where_they_are_and_masks_are_small(refer):
    rows = refer.load()["train"]
    stored = rows.cast_column("image", datasets.Image(decode=False)).cast_column("mask", RleMask(decode=False))
    assert stored[0]["image"] == {"bytes": None, "path": str(refer.images / "first.jpg")}
    assert stored[0]["mask"]["size"] == [HEIGHT, WIDTH] and len(stored[0]["mask"]["counts"]) < 50


@pytest.mark.parametrize(("dataset", "split_by"), [("refcoco+", "unc"), ("refcocog", "umd"), ("refcocog", "google")])
def test_every_data_set_over_coco(refer, dataset, split_by):
    assert len(by_annotation(refer.load(dataset, split_by))) == len(MASKS)


def test_refclef_has_its_own_images(refer):
    refer.images.rename(refer.root / "images" / "saiapr_tc-12")
    assert len(by_annotation(refer.load("refclef", "berkeley"))) == len(MASKS)


def test_the_root_may_be_a_relative_path(refer, monkeypatch):
    refer.load()
    monkeypatch.chdir(refer.images)
    rows = load_refer("../..", "refcoco", "unc")["train"]
    monkeypatch.chdir("/")
    assert rows[0]["image"].size == (WIDTH, HEIGHT)


def test_arrow_gives_the_same_rows(refer, tmp_path):
    loaded = refer.load()
    loaded.save_to_disk(tmp_path / "arrow")
    back = datasets.load_from_disk(tmp_path / "arrow")
    assert list(back) == list(loaded)
    for split in loaded:
        same_rows(back[split], loaded[split])


def test_parquet_gives_the_same_rows(refer, tmp_path):
    rows = refer.load()["train"]
    rows.to_parquet(tmp_path / "rows.parquet")
    same_rows(datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache")), rows)
    stored = pyarrow.parquet.read_table(tmp_path / "rows.parquet")["mask"].to_pylist()  # what others see
    np.testing.assert_array_equal(coco_mask.decode(stored[1]), MASKS[11][1])


def test_map_and_selection_keep_masks(refer):
    rows = refer.load()["train"]
    counted = rows.map(lambda row: {"area": int(row["mask"].sum())})
    assert counted["area"][:] == [int(MASKS[ann_id][1].sum()) for ann_id in (10, 11, 14, 16)]
    same_rows(counted.remove_columns("area"), rows)
    same_rows(
        rows.select([3, 2, 1, 0]).filter(lambda row: row["mask"].any()).select([2, 1, 0]), rows.select([0, 1, 2])
    )
    np.testing.assert_array_equal(rows[:]["mask"][1], MASKS[11][1])


def test_masks_as_a_plain_struct_and_back(refer):
    rows = refer.load()["train"]
    plain = {"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("string")}
    shared = rows.cast_column("mask", plain)
    np.testing.assert_array_equal(coco_mask.decode(shared[1]["mask"]), MASKS[11][1])
    same_rows(shared.cast_column("mask", RleMask()), rows)


def test_rows_can_be_made_from_arrays():
    masks = [np.eye(3), np.ones((2, 5), dtype=bool), [[0, 255], [0, 0]], None]
    rows = datasets.Dataset.from_dict({"mask": masks}, features=datasets.Features({"mask": RleMask()}))
    for mask, row in zip(masks[:3], rows, strict=False):
        np.testing.assert_array_equal(row["mask"], np.asarray(mask) != 0)
    assert rows[3]["mask"] is None


def test_python_2_pickles(tmp_path):
    path = tmp_path / "refs.p"
    for text in (
        b"(lp0\nS'caf\\xe9'\np1\naL12L\naF1.5\nag1\na.",
        b"\x80\x02](U\x04caf\xe9q\x01\x8a\x01\x0cF1.5\nh\x01e.",
    ):
        path.write_bytes(text)
        assert load_plain_pickle(path) == ["café", 12, 1.5, "café"]


class Hostile:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_with_code_are_refused_by_name(refer, tmp_path, protocol):
    refer.refs[1]["sentences"][0]["sent"] = Hostile(os.mkdir, str(tmp_path / "was_here"))
    with pytest.raises(ValueError, match=rf"refs\(unc\)\.p is not .*\(it asks for {os.mkdir.__module__}\.mkdir"):
        refer.load(protocol=protocol)
    assert not (tmp_path / "was_here").exists()
    path = tmp_path / "other.p"
    for value, name in (
        (np.arange(3), "numpy"),
        (bytearray(b"a"), "bytearray"),
        (datasets.Value, "datasets.features"),
    ):
        path.write_bytes(pickle.dumps([value], min(protocol, 3)))
        with pytest.raises(ValueError, match=rf"other.p is not .*\(it asks for .*{name}"):
            load_plain_pickle(path)


def test_pickles_with_external_objects_are_refused(tmp_path):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return "key" if isinstance(value, float) else None

    file = io.BytesIO()
    Pickler(file, 2).dump([1.5])
    (tmp_path / "refs.p").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="external object 'key'"):
        load_plain_pickle(tmp_path / "refs.p")


def test_pickles_with_extension_codes_are_refused(tmp_path):
    path, code = tmp_path / "refs.p", 240
    copyreg.add_extension(os.mkdir.__module__, "mkdir", code)
    try:
        path.write_bytes(pickle.dumps([os.mkdir], 2))
        assert pickle.loads(path.read_bytes()) == [os.mkdir]  # the function is now cached
        with pytest.raises(ValueError, match=r"it asks for \w+\.mkdir"):
            load_plain_pickle(path)
    finally:
        copyreg.remove_extension(os.mkdir.__module__, "mkdir", code)
    with pytest.raises(ValueError, match="refs.p is not a pickle"):
        load_plain_pickle(path)


def test_broken_pickles_are_named(refer, tmp_path):
    path = tmp_path / "refs.p"
    whole = pickle.dumps(refer.refs[:1], 2)
    for broken in (
        *(whole[:end] for end in range(0, len(whole), 7)),
        b"<html>404</html>",
        b"\x80\x63.",
        b"cos\n",
        b"0.",
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="refs.p is not a pickle of lists"):
            load_plain_pickle(path)


SAME_HASHES = [n * sys.hash_info.modulus for n in range(2, 50_000)]


def test_numbers_given_to_objects_take_no_memory(tmp_path):
    """C's unpickler would make room for 4 billion objects, twice."""
    (tmp_path / "refs.p").write_bytes(b"\x80\x02]r\xff\xff\xff\xff.")
    assert load_plain_pickle(tmp_path / "refs.p") == []


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05]})" + b"\x85" * 2_000_000 + b"K\x01sa.",  # a key that is a tuple in a tuple in a tuple …
        b"\x80\x05})" + b"2\x86" * 64 + b"K\x01s.",  # one whose hash takes 2 ** 64 steps
        b"\x80\x05(t" + b"2\x86" * 28 + b"Q.",  # an external object that would be printed so often
        b"\x80\x05\x96" + (3 << 30).to_bytes(8, "little") + b".",  # bytes that are not there
        b"c" + b"A" * 5_000_000 + b"\nfoo\n.",
        # Keys and numbers of objects whose hashes are equal: each is compared with all before it.
        b"\x80\x02}(" + b"".join(b"\x8a\x0b" + n.to_bytes(11, "little") + b"N" for n in SAME_HASHES) + b"u.",
        b"]" + b"".join(b"p%d\n" % n for n in SAME_HASHES) + b".",
    ],
)
def test_small_pickles_of_great_things_are_refused(tmp_path, content):
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(ValueError, match="refs.p is not a pickle of lists") as error:
        load_plain_pickle(tmp_path / "refs.p")
    assert len(str(error.value)) < 2000


def test_a_pickle_of_something_else_is_named(refer):
    refer.refs = refer.refs[0]
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p holds a dict, not a list of refs"):
        refer.load()


def test_unknown_data_sets_are_refused(tmp_path):
    for dataset, split_by in (("refcocos", "unc"), ("refcoco+", "umd"), ("../refcoco", "unc"), ("refcoco", "../unc")):
        with pytest.raises(
            ValueError, match=r"refcoco \(unc or google\), refcoco\+ \(unc\), refcocog \(umd or google\)"
        ):
            load_refer(tmp_path, dataset, split_by)


def test_missing_files_are_named_with_the_layout(refer):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; the REFER layout is <root>"):
        load_refer(refer.root / "nowhere", "refcoco", "unc")
    refer.load()
    for path in ("refcoco/instances.json", "refcoco/refs(unc).p", "images/train2014"):
        (refer.root / path).rename(refer.root / "away")
        with pytest.raises(FileNotFoundError) as caught:
            load_refer(refer.root, "refcoco", "unc")
        assert f"{refer.root / path} does not exist; the REFER layout is <root>/<dataset>/refs(" in str(caught.value)
        (refer.root / "away").rename(refer.root / path)


def test_broken_instances_are_named(refer):
    for text in ("{", "[]", '{"images": []}', '{"images": [3], "annotations": [], "categories": []}'):
        refer.load()
        (refer.root / "refcoco" / "instances.json").write_text(text)
        with pytest.raises(ValueError, match="instances.json is not a COCO annotation file"):
            load_refer(refer.root, "refcoco", "unc")


@pytest.mark.parametrize(
    ("break_image", "error", "message"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "does not exist; the REFER layout"),
        (lambda path: cut(path, -200), OSError, r"cannot be read \(.*truncated.*\); copy or download it again"),
        (lambda path: cut(path, 300), OSError, "cannot be read"),
        (lambda path: cut(path, 0), OSError, "cannot be read"),
        (lambda path: path.write_text("404: not found"), OSError, r"cannot be read \(it is no JPEG or PNG"),
        (
            lambda path: PIL.Image.new("RGB", (HEIGHT, WIDTH)).save(path),
            ValueError,
            f"is {WIDTH} x {HEIGHT} pixels .height x width., but its record says {HEIGHT} x {WIDTH}: take the image",
        ),
    ],
)
@pytest.mark.parametrize(("name", "ref_id"), [("first.jpg", 110), ("second.png", 111)])
def test_bad_images_are_named_with_the_row(refer, break_image, error, message, name, ref_id):
    break_image(refer.images / name)
    with pytest.raises(error, match=rf"refs\(unc\)\.p, ref_id {ref_id}: image .*{name} {message}"):
        refer.load()


def test_images_with_odd_files_are_read(refer):
    """Bytes after the end are no fault, and a photograph on its side counts with the size it is seen in."""
    photograph = refer.images / "first.jpg"
    photograph.write_bytes(photograph.read_bytes() + b"trailing bytes")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (HEIGHT, WIDTH)).save(refer.images / "turned.jpg", exif=exif)
    refer.instances["images"][1]["file_name"] = "turned.jpg"
    rows = by_annotation(refer.load())
    assert rows[11]["image"].size == rows[10]["image"].size == (WIDTH, HEIGHT)


def test_exif_is_mentioned_only_where_there_is_one(refer):
    for orientation, mentioned in ((None, False), (1, False), (3, False), (6, True)):
        exif = PIL.Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        size = (WIDTH, HEIGHT) if mentioned else (HEIGHT, WIDTH)
        PIL.Image.new("RGB", size).save(refer.images / "first.jpg", exif=exif)
        with pytest.raises(ValueError, match=f"is {WIDTH} x {HEIGHT} pixels .*its record says {HEIGHT} x") as error:
            refer.load()
        assert ("EXIF" in str(error.value)) == ("upright" in str(error.value)) == mentioned


@pytest.mark.parametrize(
    "content, name",
    [
        (HEIC, "HEIC or AVIF"),
        (HEIC.replace(b"heic", b"avif"), "HEIC or AVIF"),
        (HEIC.replace(b"heic", b"mif1"), "HEIC or AVIF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200), "JPEG XL"),
        (b"\xff\x0a" + bytes(200), "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(200), "JPEG 2000"),
    ],
)
def test_formats_that_are_not_read_are_to_be_converted(refer, content, name):
    (refer.images / "first.jpg").write_bytes(content)
    with pytest.raises(OSError, match=rf"first.jpg cannot be read \(it is {name}\); convert it to JPEG or PNG"):
        refer.load()


def test_avif_as_pillow_writes_it_is_to_be_converted(refer):
    if not PIL.features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(refer.images / "first.jpg", "AVIF")
    with pytest.raises(OSError, match=r"first.jpg cannot be read \(it is HEIC or AVIF\); convert it"):
        refer.load()


def test_pixels_of_32_bits_are_no_broken_file(refer):
    PIL.Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(refer.images / "first.jpg", "TIFF")
    with pytest.raises(ValueError, match=r"first.jpg has pixels of 32 bits \(mode F\); write 8 bits a channel.$"):
        refer.load()


# Any data set in the layout


def as_rrsisd(refer):
    """As RRSIS-D is published: `rrsisd/refs(unc).p`, images elsewhere, and a list of one compressed RLE a mask."""
    for annotation in refer.instances["annotations"]:
        annotation["segmentation"] = [rle(MASKS[annotation["id"]][1], compressed=True)]
    refer.write("rrsisd")
    return refer.images.rename(refer.root / "images" / "JPEGImages")


def test_any_set_in_the_layout_is_read_with_its_images(refer):
    images = as_rrsisd(refer)
    for given in (images, os.path.relpath(images)):
        rows = by_annotation(load_refer(refer.root, "rrsisd", "unc", images=given))
        assert set(rows) == set(MASKS)
        for ann_id, row in rows.items():
            np.testing.assert_array_equal(row["mask"], MASKS[ann_id][1])
            assert row["image"].size == (WIDTH, HEIGHT)
    with pytest.raises(ValueError, match="no data set 'rrsisd' split by 'unc'; known are .*`images` says where"):
        load_refer(refer.root, "rrsisd", "unc")
    refer.write("refcoco", "mine")  # another division of a published set
    assert len(by_annotation(load_refer(refer.root, "refcoco", "mine", images))) == len(MASKS)
    with pytest.raises(FileNotFoundError, match=r"rrsisd/refs\(umd\).p does not exist; the REFER layout"):
        load_refer(refer.root, "rrsisd", "umd", images)


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../rrsisd", "/rrsisd", "a/b", "a\0b", "a\nb", "a::b", "~", ".hidden", "x" * 101]
)
def test_no_name_leads_out_of_the_root(refer, name):
    images = as_rrsisd(refer)
    for dataset, split_by in ((name, "unc"), ("rrsisd", name), ("rrsisd", f"{name}/../x")):
        with pytest.raises(ValueError, match="There is no data set"):
            load_refer(refer.root, dataset, split_by, images)


def test_a_set_without_refs_is_told_as_such(refer):
    refer.refs = []
    with pytest.raises(ValueError, match=r"refs\(unc\).p has no records"):
        refer.load()


def test_lmdb_folders_are_told_what_to_give_instead(refer):
    refer.write()
    (refer.root / "refcoco" / "refs(unc).p").unlink()
    for name in ("train.lmdb", "refcoco/val.lmdb", "refcoco/data.mdb", "lmdb/refcoco/testA.lmdb"):
        path = refer.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(8192))
        with pytest.raises(
            FileNotFoundError, match="does not exist; .*LMDB files.*anns/ and masks/ .*data.prepare cris"
        ):
            load_refer(refer.root, "refcoco", "unc")
        path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_refer(refer.root, "refcoco", "unc")
    assert "LMDB" not in str(error.value)


# Memory, pipes and devices


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory")])
def test_want_of_memory_is_not_told_as_a_broken_file(refer, monkeypatch, error):
    refer.write()

    def fail(*_, **__):
        raise error

    for target, name in (
        (PlainUnpickler, "load"),
        (PIL.Image, "open"),
        (coco_mask, "merge"),
        (json, "loads"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(type(error)) as caught:
                load_refer(refer.root, "refcoco", "unc")
            assert caught.value is error


def test_a_pickle_takes_no_room_for_what_is_not_there(tmp_path):
    (tmp_path / "refs.p").write_bytes(b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a")
    with pytest.raises(ValueError, match="refs.p is not a pickle of lists"):
        load_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/stdin"])
@pytest.mark.parametrize("name", ["refcoco/refs(unc).p", "refcoco/instances.json", "images/train2014/first.jpg"])
def test_pipes_and_devices_are_not_read(refer, name, kind):
    refer.write()
    path = refer.root / name
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(kind)
    with not_waiting(), pytest.raises((ValueError, OSError), match="is no regular file|link that leads out"):
        load_refer(refer.root, "refcoco", "unc")
    for read in (load_plain_pickle, data.refer.load_json, data.refer.load_yaml):
        with not_waiting(), pytest.raises(ValueError, match="is no regular file"):
            read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &x [1]\nb: *x", r"file\.yaml is not YAML \(an alias, \*x, stands .* line 2, column 4"),
        ("a: &x [*x]", r"an alias, \*x"),
        ("a: &x {b: 1}\nc: {<<: *x}", r"an alias, \*x"),
        ("a: [", "is not YAML"),
        ("[" * 10_000, "is not YAML"),
        ("a: !!int ''", "is not YAML"),  # IndexError, AttributeError, KeyError and OverflowError of PyYAML
        ("a: !!timestamp ''", "is not YAML"),
        ("a: !!bool ''", "is not YAML"),
        ("a: 1" + ":59" * 1_000 + ".5", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("a: b\n" * 50_000, "has over 100,000 bytes"),
    ],
)
def test_yaml_is_plain(tmp_path, content, message):
    path = tmp_path / "file.yaml"
    path.write_text("a: {b: [1, 2.5, text, null]}")
    assert data.refer.load_yaml(path) == {"a": {"b": [1, 2.5, "text", None]}}
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        data.refer.load_yaml(path)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("one\n  two\tthree\r\n", "one two three"),
        (OSError("a\x1b[31m\0b\udcff"), "a\\x1b[31m\\x00b\\udcff"),
        ("x" * 1000, "x" * 1000),
        ("x" * 1001, "x" * 1000 + " …"),
        ("\0" * 1000, "\\x00" * 250 + " …"),
        (" " * 2000, " …"),
    ],
)
def test_messages_are_cut_to_one_line(message, line):
    assert one_line(message) == line


def set_segmentation(value):
    return lambda refs, instances: instances["annotations"][0].update(segmentation=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda refs, _: refs[0].update(ann_id=99), "ref_id 110: ann_id 99 is not in instances.json"),
        (lambda refs, _: refs[0].update(image_id=99), "ref_id 110: image_id 99 is not in instances.json"),
        (lambda refs, _: refs[0].update(category_id=99), "ref_id 110: category_id 99 is not in instances.json"),
        (lambda refs, _: refs[0].update(image_id=2), "ref_id 110: ann_id 10 is of image 1, not 2"),
        (lambda refs, _: refs[0]["sentences"][1].update(sent=" \t"), r"ref_id 110: one of the phrases .* is empty"),
        (lambda refs, _: refs[0].update(sentences=[]), "ref_id 110: there are no phrases"),
        (lambda refs, _: refs[0].update(split="../train"), "ref_id 110: '../train' cannot name a split"),
        (lambda refs, _: refs[0].pop("ref_id"), "entry 0: a field is missing"),
        (lambda refs, _: refs[0].update(ref_id=[1]), "ref_id is \\[1\\]"),
        (lambda refs, _: refs[1].update(ref_id=110), ": 1 ref_ids stand at several refs, such as 110"),
        (lambda refs, _: refs[0].pop("sentences"), "ref_id 110: a field is missing .*'sentences'"),
        (lambda refs, _: refs.insert(0, 5), "entry 0: a field is missing or not of REFER's type"),
        (lambda _, instances: instances["annotations"][0].update(bbox=[1]), r"ann_id 10 has the bbox \[1\]; give x"),
        (set_segmentation([]), "ref_id 110: ann_id 10 has no mask"),
        (set_segmentation(None), "ref_id 110: its mask is null; give polygons or RLE"),
        (set_segmentation([[1, 1, 5, 5]]), "ref_id 110: ann_id 10: .* is no polygon"),
        (set_segmentation([[1, 1, 5, 5, 6, 6, 7]]), "is no polygon"),
        (set_segmentation([1, 1, 5, 5, 6, 6]), "is no polygon"),
        (set_segmentation([[1, 1, 1e9, 1, 1e9, 1e9]]), "is no polygon"),
        (set_segmentation([[1, 1, float("nan"), 1, 5, 5]]), "is no polygon"),
        (set_segmentation([[1, 1, 5, 5, "x", 6]]), "ref_id 110: "),
        (set_segmentation({"size": [WIDTH, HEIGHT], "counts": [1200]}), r"ann_id 10: the mask is \[40, 30\], but its"),
        (set_segmentation({"size": [HEIGHT, WIDTH], "counts": [10, 5]}), "runs are fewer than 30 x 40 pixels"),
        (set_segmentation({"size": [HEIGHT, WIDTH], "counts": [1199]}), "runs are fewer than 30 x 40 pixels"),
        (set_segmentation({"size": [HEIGHT, WIDTH], "counts": [1201]}), "runs are more than 30 x 40 pixels"),
        (set_segmentation({"size": [HEIGHT, WIDTH], "counts": "oooooooo"}), "are not COCO's compressed counts"),
        (set_segmentation({"size": [HEIGHT, WIDTH], "counts": [1, -2, 1201]}), "110: .* are no numbers of pixels"),
        (
            set_segmentation({"size": [HEIGHT, WIDTH], "counts": [2**32 - 1, 2**32 - 1, 0, 0] * 1000}),
            "ref_id 110: ann_id 10: .* are no numbers of pixels",
        ),
        (set_segmentation([[1, 1, 40, 30] * 100] * 10**3), "the outline of .* is over 2,000,000 pixels long"),
        (set_segmentation({"counts": [1200]}), "ref_id 110: a field is missing .*'size'"),
        (
            lambda _, instances: instances["images"][0].update(height=10**9),
            "ref_id 110: image_id 1 is recorded as 1000",
        ),
        (
            lambda _, instances: instances["images"][0].update(width="40"),
            "ref_id 110: image_id 1 is recorded as 30 x '40'",
        ),
        (lambda _, instances: instances["images"][0].update(width=0), "ref_id 110: image_id 1 is recorded as 30 x 0"),
        (lambda _, instances: instances["images"][0].update(file_name="../train2014/first.jpg"), "is not inside"),
        (lambda _, instances: instances["images"][0].update(file_name="/etc/passwd"), "'/etc/passwd' is not inside"),
        (lambda _, instances: instances["images"][0].update(file_name="a.jpg::first.jpg"), "taken for an address"),
        (lambda _, instances: instances["images"][0].update(file_name="file://first.jpg"), "taken for an address"),
        (
            lambda _, instances: instances["images"][0].update(width=32_767),
            "recorded as 30 x 32767 pixels; a side has",
        ),
        (lambda refs, _: refs[0].update(sentences=[{"sent": "x" * 10_000}] * 11), "have over 100,000 characters"),
        (lambda refs, _: refs[0].update(split="\U00020000" * 64), "cannot name a split"),
    ],
)
def test_bad_rows_are_named(refer, change, message):
    change(refer.refs, refer.instances)
    with pytest.raises(ValueError, match=rf"refs\(unc\)\.p.*{message}"):
        refer.load()


def test_compressed_runs_are_read_as_cocos_own():
    """Random masks, from noise to a few long runs, through COCO's own compression and counted pixel by pixel."""
    random = np.random.default_rng(0)
    for _ in range(200):
        height, width = random.integers(1, 400), random.integers(1, 50)
        mask = (np.cumsum(random.random(height * width) < random.random() ** 3) % 2).reshape(width, height).T
        compressed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert run_lengths({"size": [int(height), int(width)], "counts": compressed["counts"]}).tolist() == runs(mask)


@pytest.mark.parametrize("size, start", [((1, 1), []), ((HEIGHT, WIDTH), [0, 5])])
def test_runs_of_no_length_do_not_reach_cocos_merge(refer, size, start):
    """There they would be written behind the memory for one run a pixel."""
    height, width = size
    PIL.Image.new("RGB", (width, height)).save(refer.images / "first.jpg")
    refer.instances["images"][0].update(height=height, width=width)
    counts = [*start, *[0] * 5000, height * width - sum(start)]
    parts = [{"size": [height, width], "counts": counts}, {"size": [height, width], "counts": [height * width]}]
    refer.instances["annotations"][0].update(segmentation=parts, bbox=[0, 0, 1, 1])
    refer.refs = refer.refs[:1]
    (row,) = refer.load()["train"]
    ones = np.arange(len(counts)) % 2
    np.testing.assert_array_equal(row["mask"], np.repeat(ones, counts).reshape(width, height).T)


@pytest.mark.parametrize("mask, message", HOSTILE_RLES)
def test_stored_masks_of_strangers_are_checked_before_they_are_decoded(mask, message):
    plain = {"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("string")}
    rows = datasets.Dataset.from_list([{"mask": mask}], datasets.Features({"mask": plain}))
    rows = rows.cast(datasets.Features({"mask": RleMask()}))
    with pytest.raises(ValueError, match=message):
        rows[0]


def test_importing_warns_of_nothing():
    for name in ("data.masks", "data.refer"):
        spec = importlib.util.find_spec(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    with warnings.catch_warnings(action="ignore"):
        register_feature(RleMask, "RleMask")  # the copy that ran has put its own class there


@pytest.mark.skipif(not MINI.exists(), reason="needs the photographs of ../shared/refer_mini")
@pytest.mark.parametrize("name", ["refcoco/unc", "refcoco+/unc", "refcocog/umd", "refcocog/google"])
def test_photographs_as_the_official_reader_reads_them(name):
    official = json.loads(OFFICIAL.read_text())[name]
    loaded = load_refer(MINI, *name.split("/"))
    assert set(loaded) == set(official)
    for split, refs in official.items():
        rows = {row["ref_id"]: row for row in loaded[split]}
        assert len(rows) == len(loaded[split]) == len(refs)
        for ref in refs:
            row = rows[ref["ref_id"]]
            assert (row["sentences"], row["category"]) == (ref["sentences"], ref["category"])
            left, top, right, bottom = ref["bbox_xyxy"]
            assert row["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1)
            np.testing.assert_array_equal(row["mask"], coco_mask.decode(ref["mask_rle"]))
            assert row["image"].size == row["mask"].shape[::-1]
