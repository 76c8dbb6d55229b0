"""The check of a download: what it counts, what it names, and its status, on a small set broken in known ways."""

import json
import re
from pathlib import Path

import PIL.Image
import pytest
from helpers.refer_folder import HEIGHT, WIDTH, ReferFolder, truncate

from data import check
from data.check import PUBLISHED, Counts

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT.parent / "shared" / "refer_mini"
NAME = "refcoco/unc"
WHOLE = {"train": Counts(4, 8, 2), "val": Counts(1, 2, 1), "testA": Counts(1, 2, 1), "testB": Counts(1, 2, 1)}


@pytest.fixture
def refer(tmp_path, monkeypatch):
    """A complete set of seven objects, whose numbers are the published ones."""
    monkeypatch.setattr(check, "PUBLISHED", {NAME: WHOLE})
    folder = ReferFolder(tmp_path / "refer")
    folder.write()
    return folder


def run(capsys, *arguments):
    status = check.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().out


def problems(text):
    return [line for line in text.splitlines() if line.startswith("- ")]


def test_a_complete_set_is_ok(refer, capsys):
    status, text = run(capsys, refer.root)
    assert status == 0 and not problems(text)
    assert f"{NAME}: ok" in text and "differs" not in text
    assert re.search(r"^train +4 / 4 +8 / 8 +2 / 2$", text, re.MULTILINE)


def test_images_are_counted_without_their_files(refer, capsys):
    for path in refer.images.iterdir():
        path.unlink()
    status, text = run(capsys, refer.root, NAME)
    assert status == 1 and "differs" not in text
    (line,) = problems(text)
    assert line == f"- 2 of 2 images are missing in {refer.images}: first.jpg, second.png"


def test_only_the_first_of_many_missing_images_are_named(refer, capsys):
    for number in range(3, 10):
        refer.instances["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 30, "width": 40})
        annotation = refer.instances["annotations"][0] | {"id": 100 + number, "image_id": number}
        refer.instances["annotations"].append(annotation)
        refer.refs.append(refer.refs[0] | {"ref_id": number, "ann_id": 100 + number, "image_id": number})
    refer.write()
    status, text = run(capsys, refer.root)
    assert status == 1
    assert problems(text) == [f"- 7 of 9 images are missing in {refer.images}: 3.jpg, 4.jpg, 5.jpg, 6.jpg, 7.jpg …"]
    assert re.search(r"^train +11 / 4 +22 / 8 +9 / 2 +differs$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        (["refcoco/refs(unc).p"], ["refs(unc).p"]),
        (["refcoco/instances.json"], ["instances.json"]),
        (["refcoco/refs(unc).p", "refcoco/instances.json"], ["refs(unc).p", "instances.json"]),
        (["images"], ["train2014", "2 of 2 images are missing"]),
        (["images", "refcoco"], ["train2014", "refs(unc).p", "instances.json"]),
    ],
)
def test_missing_files_and_folders_are_all_named(refer, capsys, gone, named):
    for number, path in enumerate(gone):
        (refer.root / path).rename(refer.root / f"away{number}")
    status, text = run(capsys, refer.root)
    assert status == 1 and f"{NAME}: incomplete" in text
    lines = problems(text)
    assert len(lines) == len(named)
    for line, name in zip(lines, named):
        assert name in line
        assert "does not exist; the REFER layout is" in line or "images are missing in" in line
    if "refcoco" in str(gone):
        assert re.search(r"^train +0 / 4 +0 / 8 +0 / 2 +differs$", text, re.MULTILINE)


def test_everything_wrong_is_named_in_one_run(refer, capsys):
    refer.refs[1]["ann_id"] = 99
    refer.refs[2]["sentences"][0]["sent"] = " "
    del refer.refs[3]["image_id"]
    refer.refs[4] = "a word"
    refer.instances["annotations"][5]["segmentation"] = []
    refer.write()
    truncate(refer.images / "first.jpg", -200)
    status, text = run(capsys, refer.root)
    assert status == 1
    expected = [
        r"refs\(unc\)\.p, ref_id 111: ann_id 99 is not in instances\.json",
        r"refs\(unc\)\.p, ref_id 112: one of the phrases .* is empty",
        r"refs\(unc\)\.p, ref_id 113: a field is missing .*image_id",
        r"refs\(unc\)\.p, entry 4: a field is missing or not of REFER's type",
        r"refs\(unc\)\.p, ref_id 115: ann_id 15 has no mask",
        r"image .*first\.jpg cannot be read .*truncated",
    ]
    assert len(problems(text)) == len(expected)
    for line, pattern in zip(problems(text), expected):
        assert re.search(pattern, line), line
    assert re.search(r"^train +2 / 4 +4 / 8 +1 / 2 +differs$", text, re.MULTILINE)  # 110 and 116 are left
    assert re.search(r"^val +0 / 1 +0 / 2 +0 / 1 +differs$", text, re.MULTILINE)


def test_both_broken_annotation_files_are_named(refer, capsys):
    for name in ("refs(unc).p", "instances.json"):
        (refer.root / "refcoco" / name).write_text("<html>404</html>")
    status, text = run(capsys, refer.root)
    assert status == 1
    first, second = problems(text)
    assert "refs(unc).p is not a pickle" in first and "instances.json is not a COCO annotation file" in second


def test_images_of_another_size_are_named(refer, capsys):
    PIL.Image.new("RGB", (HEIGHT, WIDTH)).save(refer.images / "second.png")
    status, text = run(capsys, refer.root)
    (line,) = problems(text)
    assert status == 1 and f"second.png is {WIDTH} x {HEIGHT} pixels" in line
    assert f"its record says {HEIGHT} x {WIDTH}" in line


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (lambda refs: refs.pop(), r"train +3 / 4 +6 / 8 +2 / 2"),
        (lambda refs: refs[0]["sentences"].pop(), r"train +4 / 4 +7 / 8 +2 / 2"),
        (lambda refs: refs[2].update(split="dev"), r"dev +1 / 0 +2 / 0 +1 / 0"),
        (lambda refs: refs[2].update(split="dev"), r"val +0 / 1 +0 / 2 +0 / 1"),
    ],
)
def test_other_numbers_are_no_download_of_that_set(refer, capsys, change, row):
    change(refer.refs)
    refer.write()
    status, text = run(capsys, refer.root)
    assert status == 1 and not problems(text)
    assert re.search(rf"^{row} +differs$", text, re.MULTILINE)


def test_all_sets_are_checked_unless_some_are_named(refer, capsys, monkeypatch):
    monkeypatch.setattr(check, "PUBLISHED", {NAME: WHOLE, "refcocog/google": WHOLE})
    status, text = run(capsys, refer.root)
    assert status == 1 and "refcoco/unc: ok" in text and "refcocog/google: incomplete" in text
    status, text = run(capsys, refer.root, NAME)
    assert status == 0 and "refcocog" not in text


def test_unknown_sets_are_refused_with_the_known_ones(refer, capsys):
    with pytest.raises(SystemExit) as caught:
        check.main([str(refer.root), "refcoko"])
    assert caught.value.code == 2
    assert "no data set 'refcoko' split by ''; known are refcoco (unc or google)" in capsys.readouterr().err


def as_grefcoco(refer):
    """gRefCOCO's layout, in which two objects have no phrases."""
    for ref in refer.refs[1], refer.refs[4]:
        ref["sentences"] = []
    refer.write("grefcoco")
    (refer.root / "grefcoco" / "refs(unc).p").unlink()
    (refer.root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refer.refs))


def test_grefcoco_is_checked_without_counts_and_its_silent_objects_are_counted(refer, capsys):
    as_grefcoco(refer)
    status, text = run(capsys, refer.root, "grefcoco/unc")
    assert status == 0 and not problems(text) and "differs" not in text
    assert "grefcoco/unc (found, published counts unknown)" in text and "grefcoco/unc: ok" in text
    assert "2 objects have no phrases and are skipped" in text
    assert re.search(r"^train +2 +4 +1$", text, re.MULTILINE) and re.search(r"^testB +1 +2 +1$", text, re.MULTILINE)
    (refer.images / "first.jpg").unlink()
    status, text = run(capsys, refer.root, "grefcoco/unc")
    assert status == 1 and len(problems(text)) == 1 and "grefcoco/unc: incomplete" in text


def test_objects_without_phrases_are_a_problem_elsewhere(refer, capsys):
    refer.refs[1]["sentences"] = []
    refer.write()
    status, text = run(capsys, refer.root, NAME)
    (line,) = problems(text)
    assert status == 1 and "ref_id 111: there are no phrases; write at least one" in line and "skipped" not in text


def test_any_set_in_the_layout_is_checked_with_its_images(refer, capsys):
    refer.write("rrsisd")
    images = refer.images.rename(refer.root / "elsewhere")
    status, text = run(capsys, refer.root, "rrsisd/unc", "--images", images)
    assert status == 0 and re.search(r"^train +4 +8 +2$", text, re.MULTILINE)
    refer.refs = []
    refer.write("rrsisd")
    status, text = run(capsys, refer.root, "rrsisd/unc", "--images", images)
    assert status == 1 and "refs(unc).p has no records" in text
    for name in ("../refer/rrsisd/unc", "rrsisd/../unc", "aerial"):
        with pytest.raises(SystemExit):
            check.main([str(refer.root), NAME, name, "--images", str(images)])
        captured = capsys.readouterr()
        assert "There is no data set" in captured.err and not captured.out


def test_sums_are_those_of_the_literature():
    """Objects, phrases: RefCOCO and RefCOCO+ of Yu et al. 2016 (their 142,209 is one short), RefCOCOg as released."""
    sums = {name: tuple(map(sum, zip(*splits.values())))[:2] for name, splits in PUBLISHED.items()}
    assert sums == {
        "refcoco/unc": (50_000, 142_210),
        "refcoco+/unc": (49_856, 141_564),
        "refcocog/umd": (49_822, 95_010),
        "refcocog/google": (49_822, 95_010),
    }


def test_the_readme_has_the_same_numbers():
    pattern = r"^\| `([\w+]+/\w+)` \| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$"
    table = {}
    for name, split, *counts in re.findall(pattern, (ROOT / "docs" / "data.md").read_text(), re.MULTILINE):
        table.setdefault(name, {})[split] = tuple(int(count.replace(",", "")) for count in counts)
    assert table == PUBLISHED


@pytest.mark.skipif(not MINI.exists(), reason="needs the photographs of ../shared/refer_mini")
def test_five_photographs_are_sound_but_few(capsys):
    status, text = run(capsys, MINI)
    assert status == 1 and not problems(text)
    assert [line.split(":")[0] for line in text.splitlines() if line.endswith("incomplete")] == list(PUBLISHED)
    assert text.count("differs") == sum(map(len, PUBLISHED.values()))


def test_refs_that_share_a_number_are_named(refer, capsys):
    refer.refs[1]["ref_id"] = refer.refs[0]["ref_id"]
    refer.write()
    status, text = run(capsys, refer.root)
    (line,) = problems(text)
    assert status == 1 and "1 ref_ids stand at several refs, such as 110" in line


def test_a_thousand_problems_are_counted_not_printed(refer, capsys):
    refer.refs += [{"ref_id": number} for number in range(200, 1200)]
    refer.write()
    status, text = run(capsys, refer.root)
    assert status == 1 and len(problems(text)) == 100 and "… and 900 more problems" in text


def test_names_without_who_split_them_and_folders_that_do_not_exist(tmp_path, capsys):
    for arguments, message in (
        (
            [str(tmp_path), "refcoco"],
            "'refcoco' does not say who split the data set: write refcoco/unc or refcoco/google",
        ),
        ([str(tmp_path / "nowhere")], "nowhere is no folder: name the one that holds images/"),
    ):
        with pytest.raises(SystemExit):
            check.main(arguments)
        assert message in capsys.readouterr().err
