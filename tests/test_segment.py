"""segment.py as people run it: what it writes, and what it refuses."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pictures import picture
from helpers.segmenting import PHRASES, make_folder, results_in, save_picture, tree
from PIL import Image
from pycocotools import mask as coco_mask

import segment
import segment_results
from gallery import draw_masks

pytestmark = pytest.mark.usefixtures("one_thread")


# --- what one picture leaves --------------------------------------------------------------------------------------


def test_masks_are_the_pipelines(run_segment, segment_pipe, place, capsys):
    pixels = save_picture(place / "photo.png")
    assert run_segment("photo.png", *PHRASES, "--output", "found") == 0
    names = ["1_the-bed.png", "2_left-cat.png"]
    files = {"results.json", ".lock", *(f"photo.png/{name}" for name in [*names, "overlay.jpg", "result.json"])}
    assert set(tree(place / "found")) == files
    (entry,) = results_in("found")["pictures"]
    assert (entry["image"], entry["folder"], entry["width"], entry["height"]) == ("photo.png", "photo.png", 80, 60)
    expected = segment_pipe(Image.fromarray(pixels), PHRASES)
    assert expected[0]["box"] and not expected[1]["box"]  # a mask that is empty, and one that is not
    for result, wanted, name in zip(entry["results"], expected, names, strict=True):
        assert result["mask"] == name and result["label"] == wanted["label"]
        with Image.open(place / "found" / "photo.png" / name) as mask:
            assert mask.mode == "L" and mask.size == (80, 60)
            np.testing.assert_array_equal(mask, wanted["mask"])
        decoded = coco_mask.decode(result["rle"])
        np.testing.assert_array_equal(decoded * 255, wanted["mask"])
        assert isinstance(result["rle"]["counts"], str) and result["rle"]["size"] == [60, 80]
        assert result["score"] == pytest.approx(wanted["score"], abs=1e-6) and result["box"] == wanted["box"]
    masks, scores = [result["mask"] for result in expected], [result["score"] for result in expected]
    drawn = np.asarray(draw_masks(Image.fromarray(pixels), masks, PHRASES, scores=scores)).astype(int)
    with Image.open(place / "found" / "photo.png" / "overlay.jpg") as overlay:
        assert np.abs(np.asarray(overlay) - drawn).mean() < 4  # JPEG
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["phrase", "score", "xmin", "ymin", "xmax", "ymax", "mask"]
    box = list(map(str, expected[0]["box"].values()))
    assert table[1].split() == ["the", "bed", f"{scores[0]:.3f}", *box, names[0]]
    assert table[2].split() == ["left", "cat", "0.000", "-", "-", "-", "-", names[1]]
    assert table[3] == "Masks and overlay.jpg are in found/photo.png, all results in found/results.json."


def test_results_tell_model_threshold_and_time(run_segment, segment_model, place):
    save_picture(place / "photo.png")
    assert run_segment("photo.png", "the bed", "--threshold", "0.5") == 0
    results = results_in("out")
    settings = results["settings"]
    assert (settings["model"], settings["revision"], settings["threshold"]) == (str(segment_model), None, 0.5)
    assert 0 < results["pictures"][0]["seconds"] <= results["seconds"] < 60


def test_threshold_decides(run_segment, segment_pipe, place):
    pixels = save_picture(place / "photo.png")
    for threshold in (None, 0.1, 0.6):
        assert run_segment("photo.png", "the bed", *([] if threshold is None else ["--threshold", threshold])) == 0
        (wanted,) = segment_pipe(Image.fromarray(pixels), "the bed", threshold=threshold)
        np.testing.assert_array_equal(Image.open("out/photo.png/1_the-bed.png"), wanted["mask"])
        assert results_in("out")["settings"]["threshold"] == (threshold or 0.35)


def test_photographs_are_upright_and_any_kind_of_picture_is_read(run_segment, segment_pipe, place):
    pixels = picture(60, 80)
    turned = Image.fromarray(np.rot90(pixels))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(place / "turned.png", exif=exif)
    assert run_segment("turned.png", "the bed") == 0
    (wanted,) = segment_pipe(Image.fromarray(pixels), "the bed")
    with Image.open("out/turned.png/1_the-bed.png") as mask:
        np.testing.assert_array_equal(mask, wanted["mask"])
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        Image.fromarray(pixels).convert(mode).save(place / f"{mode}.tif")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(place / "16.png")
    assert run_segment("*.*", "the bed") == 0
    assert len(results_in("out")["pictures"]) == 8


def test_phrases_of_all_kinds_make_safe_names(run_segment, place):
    save_picture(place / "photo.png")
    phrases = ["../../a/b\\c", "x" * 400, "the bed", "the bed", "החתול השמאלי", "NUL", "a\nb\x1b[31m"]
    assert run_segment("photo.png", *phrases) == 0
    (entry,) = results_in("out")["pictures"]
    assert [result["label"] for result in entry["results"]] == phrases
    masks = [result["mask"] for result in entry["results"]]
    assert masks[:1] + masks[2:] == [
        "1_a-b-c.png",
        "3_the-bed.png",
        "4_the-bed.png",
        "5.png",
        "6_nul.png",
        "7_a-b-31m.png",
    ]
    assert masks[1] == f"2_{'x' * 40}.png"
    assert sorted(path.name for path in Path("out/photo.png").iterdir()) == sorted(
        [*masks, "overlay.jpg", "result.json"]
    )
    assert [path.name for path in place.iterdir()] and {path.name for path in place.iterdir()} == {"out", "photo.png"}


def test_terminal_gets_no_control_characters_and_no_long_lines(run_segment, place, capsys):
    save_picture(place / "photo.png")
    assert run_segment("photo.png", "a\x1b[31m", "the bed " * 50) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and max(map(len, out.splitlines())) < 200


# --- many pictures ------------------------------------------------------------------------------------------------


def test_folder_with_names_that_clash(run_segment, segment_pipe, place, capsys):
    names = ["a.jpg", "a.png", "sub/a.jpg", "sub/deeper/b.webp", "UPPER.PNG", "results.json.png"]
    for seed, name in enumerate(names):
        save_picture(place / "photos" / name, seed)
    (place / "photos" / "notes.txt").write_text("no picture")
    save_picture(place / "photos" / ".hidden" / "c.png")
    save_picture(place / "photos" / ".c.png")
    assert run_segment("photos", *PHRASES) == 0
    results = results_in("out")
    assert [entry["folder"] for entry in results["pictures"]] == sorted(names)
    assert [entry["image"] for entry in results["pictures"]] == [f"photos/{name}" for name in sorted(names)]
    for entry in results["pictures"]:
        with Image.open(entry["image"]) as image:
            (wanted, _) = segment_pipe(image, PHRASES)
        with Image.open(Path("out", entry["folder"], "1_the-bed.png")) as mask:
            np.testing.assert_array_equal(mask, wanted["mask"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "picture" and len(lines) == 1 + 2 * len(names) + 1


def test_table_of_many_is_short(run_segment, place, capsys):
    make_folder(place / "photos", 15)
    assert run_segment("photos", *PHRASES) == 0
    out = capsys.readouterr().out
    assert "… and 10 more" in out and len(out.splitlines()) == 23


def test_bad_pictures_do_not_end_the_rest(run_segment, place, capsys, monkeypatch):
    make_folder(place / "photos")
    content = (place / "photos" / "01.png").read_bytes()
    (place / "photos" / "broken.png").write_bytes(content[: len(content) // 2])
    (place / "photos" / "empty.jpg").touch()
    (place / "photos" / "text.jpg").write_text("no picture")
    os.mkfifo(place / "photos" / "pipe.png")
    Image.new("1", (20_000, 20_000)).save(place / "photos" / "bomb.png")
    Image.new("1", (40_000, 1)).save(place / "photos" / "long.png")
    (place / "photos" / "nowhere.png").symlink_to(place / "none.png")
    (place / "photos" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 100)
    assert run_segment("photos", *PHRASES, "--batch_size", 3) == 1
    results = results_in("out")
    assert [entry["folder"] for entry in results["pictures"]] == [f"{seed:02}.png" for seed in range(5)]
    failed = {entry["image"].removeprefix("photos/"): entry["error"] for entry in results["failed"]}
    reasons = {
        "bomb.png": "decompression bomb",
        "broken.png": "truncated",
        "empty.jpg": "is empty",
        "long.png": "32,766",
        "nowhere.png": "does not exist",
        "photo.heic": "HEIC",
        "pipe.png": "no regular file",
        "text.jpg": "it is no JPEG",
    }
    assert failed.keys() == reasons.keys()
    error = capsys.readouterr().err
    for name, reason in reasons.items():
        assert reason in failed[name] and f"photos/{name}" in error and "\n" not in failed[name]


def test_batches_come_to_the_same(run_segment, place):
    make_folder(place / "photos")
    assert run_segment("photos", *PHRASES, "--output", "one") == 0
    assert run_segment("photos", *PHRASES, "--output", "three", "--batch_size", 3) == 0
    one, three = tree(place / "one"), tree(place / "three")
    assert one.keys() == three.keys()
    assert all(one[name] == three[name] for name in one if name.endswith(".png"))


def test_picture_that_the_pipeline_refuses_does_not_end_its_batch(run_segment, segment_pipe, place, monkeypatch):
    make_folder(place / "photos")
    save_picture(place / "photos" / "02.png", size=(50, 50))

    def refusing(items, **options):
        if any(item["image"].size == (50, 50) for item in items):
            raise ValueError("The logits of phrase 0 are not finite.")
        return segment_pipe(items, **options)

    refusing.model, refusing.processor = segment_pipe.model, segment_pipe.processor
    monkeypatch.setattr(segment, "load_pipeline", lambda *_: refusing)
    assert run_segment("photos", *PHRASES, "--batch_size", 4) == 1
    results = results_in("out")
    assert [entry["folder"] for entry in results["pictures"]] == ["00.png", "01.png", "03.png", "04.png"]
    assert results["failed"] == [{"image": "photos/02.png", "error": "The logits of phrase 0 are not finite."}]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name a picture and at least one phrase"),
        (["a.png"], "name a picture and at least one phrase"),
        (["a.png", "b.png", "the bed"], "b.png is a picture, not a phrase"),
        (["the bed", "a.png"], "a.png is a picture, not a phrase"),
        (["a.png", "the bed", ""], "a phrase is empty"),
        (["a.png", "the bed", "--phrases", "x.jsonl"], "not both"),
        (["a.png", "the bed", "--threshold", "1.5"], "--threshold"),
        (["a.png", "the bed", "--threshold", "nan"], "--threshold"),
        (["a.png", "the bed", "--batch_size", "0"], "--batch_size"),
        (["a.png", "the bed", "--dtype", "int8"], "--dtype"),
        (["a.png", "the bed", "--adapter", "x=a", "--adapter", "y=b"], "several adapters need --phrases"),
        (["a.png", "the bed", "--adapter", "x=a", "--adapter", "x=b"], "Two adapters are called 'x'"),
        (["a.png", "the bed", "--treshold", "0.5"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_have_status_2(run_segment, place, capsys, arguments, message):
    save_picture(place / "a.png")
    save_picture(place / "b.png")
    with pytest.raises(SystemExit) as ended:
        run_segment(*arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


def test_model_must_be_named(place, capsys):
    save_picture(place / "a.png")
    with pytest.raises(SystemExit) as ended:
        segment.main(["a.png", "the bed"])
    assert ended.value.code == 2 and "--model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.png", "the bed"], "There is no picture or folder none.png"),
        (["none-*.png", "the bed"], "No file is called as the pattern none-*.png says"),
        (["empty", "the bed"], "The folder empty holds no picture"),
        (["a.png", "&nbsp;"], "has no words"),
        (["a.png", "the bed", "--output", "a.png"], "a.png cannot be written"),
        (["a.png", "the bed", "--output", "a.png/out"], "out cannot be written"),
        (["--phrases", "none.jsonl"], "none.jsonl"),
        (["--phrases", "empty"], "empty"),
    ],
)
def test_other_errors_have_status_1_and_one_line(run_segment, place, capsys, arguments, message):
    save_picture(place / "a.png")
    (place / "empty").mkdir()
    assert run_segment(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and line.startswith("segment.py: ")
    assert not Path("out").exists()  # nothing is left of a run that came to nothing


def test_model_that_is_missing(place, capsys):
    save_picture(place / "a.png")
    assert segment.main(["a.png", "the bed", "--model", "runs/none"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs/none" in line and not Path("out").exists()


@pytest.mark.parametrize("error", [MemoryError("no more"), torch.OutOfMemoryError("no more")])
def test_lack_of_memory_is_no_broken_picture(run_segment, segment_pipe, place, monkeypatch, capsys, error):
    def out_of_memory(*_, **__):
        raise error

    make_folder(place / "photos", 2)
    out_of_memory.model, out_of_memory.processor = segment_pipe.model, segment_pipe.processor
    monkeypatch.setattr(segment, "load_pipeline", lambda *_: out_of_memory)
    assert run_segment("photos", "the bed") == 1
    assert "not enough memory (no more)" in capsys.readouterr().err


def test_disk_that_is_full_ends_the_run(run_segment, place, monkeypatch, capsys):
    make_folder(place / "photos", 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_results, "write_json", full)
    assert run_segment("photos", "the bed") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_output_folder_that_was_there_stays(run_segment, place):
    (place / "mine").mkdir()
    save_picture(place / "a.png")
    assert run_segment("a.png", "&nbsp;", "--output", "mine") == 1
    assert Path("mine").is_dir()


def test_help_has_the_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        segment.main(["--help"])
    assert ended.value.code == 0 and 'segment.py photo.jpg "left cat"' in capsys.readouterr().out
