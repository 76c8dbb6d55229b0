"""The page of a run: its figures, curves and pictures, its size, and what strangers' phrases cannot do to it."""

import base64
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import datasets
import evaluate
import numpy as np
import pytest
import yaml
from helpers.pages import HOSTILE, Page, read
from helpers.rows import make_row
from helpers.rows import make_rows as make_decoded_rows
from PIL import Image

import train_hf
from data.mixture import Member
from gallery import PREDICTION_COLOR, TRUTH_COLOR
from train_hf import main
from training.report import choose_phrases, curve, split_results, write_page
from training.rows import Rows
from training.run_folder import clear

ROOT = Path(__file__).parents[1]
MEGABYTES = 1_000_000
pytestmark = pytest.mark.usefixtures("one_thread")


def drawn_curve(page: Page, title: str) -> np.ndarray:
    """The points (P, 2) of a curve in its picture, as horizontal and vertical positions."""
    ((source, _),) = page.images[title]
    picture = ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))
    (line,) = [group for group in picture.iter() if group.get("id") == "curve"]
    path = next(element.get("d") for element in line.iter() if element.get("d"))
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path), float)


def assert_draws(page: Page, title: str, expected: list[tuple[float, float]]) -> None:
    """The positions in the picture are steps and values in other units."""
    drawn, expected = drawn_curve(page, title), np.array(expected)
    assert drawn.shape == expected.shape and len(drawn) > 2
    for axis in (0, 1):
        scale, offset = np.polyfit(expected[:, axis], drawn[:, axis], 1)
        assert drawn[:, axis] == pytest.approx(scale * expected[:, axis] + offset, abs=1e-2)
        assert scale < 0 if axis else scale > 0  # the vertical positions of SVG begin at the top


def results_of(run: Path, split: str) -> list[dict]:
    lines = (run / "predictions" / split / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_phrases(config, shapes, generalized, tmp_path, monkeypatch):
    """Compare all bins with a brute-force computation from `results.jsonl`, also where phrases name nothing."""
    run, path = tmp_path / "run", tmp_path / "config.yaml"
    tests = {"classic": shapes["val"], "generalized": generalized["train"], "one": shapes["val"].take(1)}
    tests["one"] = tests["one"].map(lambda row: {"sentences": row["sentences"][:1]}, load_from_cache_file=False)
    members = [Member(1, "shapes", "train")]
    monkeypatch.setattr(train_hf, "load_rows", lambda *args: Rows(members, None, None, tests))
    path.write_text(yaml.safe_dump(config | {"output_dir": str(run), "save_masks": False, "test_splits": [*tests]}))
    main([str(path), "--do_predict"])
    page = read(run / "report.html")

    assert not page.images.keys() & {"Loss", "mIoU on val"}
    table = json.loads((run / "table.json").read_text())
    head, *lines = page.tables["Results"]
    assert [line[0] for line in lines] == ["classic", "generalized", "one", "mean of the rows"]
    for line, expected in zip(lines, table):
        cells = [expected.get(name, "–") for name in head]
        assert line == [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]

    found = {"IoU histogram": {}, "Mean IoU by mask size": {}, "Mean IoU by words of the phrase": {}}
    for number, (split, rows) in enumerate(tests.items()):
        truths = {row["ref_id"]: row["mask"] for row in rows}
        bins = {title: {} for title in found}
        for result in results_of(run, split):
            iou = result["intersection"] / result["union"] if result["union"] else 1.0
            tenth = min(int(iou * 10), 9)
            share = 100 * (truths[result["ref_id"]] == 1).mean()
            sizes = ["under 1 %", "1 to 3 %", "3 to 10 %", "10 to 30 %", "30 % or more"]
            size = sizes[sum(share >= bound for bound in (1, 3, 10, 30))] if share else "no target"
            words = len(result["sentence"].split(" "))
            length = {5: "5 to 6", 6: "5 to 6", 7: "7 to 9", 8: "7 to 9", 9: "7 to 9"}.get(words, str(words))
            names = (f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}", size, length if words < 10 else "10 or more")
            for title, name in zip(found, names):
                bins[title].setdefault(name, []).append(iou)
        for title, expected in bins.items():
            head, *lines = page.tables[title]
            assert lines[number][0] == split
            phrases = sum(map(len, expected.values()))
            for name, cell in zip(head[1:], lines[number][1:], strict=True):
                ious = expected.pop(name, [])
                mean = f"{np.mean(ious):.3f}" if ious else "–"
                value = f"{100 * len(ious) / phrases:.1f} %" if title == "IoU histogram" else mean
                assert cell.split(" ") == [*value.split(" "), str(len(ious))]
            assert not expected  # each of them has its place on the page
    assert len({cell for line in page.tables["Mean IoU by mask size"] for cell in line}) > 10
    assert page.images["Best"] and "a phrase that names nothing has an IoU of 1 if nothing is predicted" in page.text


def test_a_resumed_run_has_the_whole_curve(config_file, tmp_path):
    arguments = [config_file, "--do_train", "--do_eval", "--max_eval_samples", "2", "--logging_steps", "1"]
    arguments += ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    arguments += ["--load_best_model_at_end", "false", "--learning_rate", "1e-2"]
    run = tmp_path / "run"
    main([*arguments, "--max_steps", "2"])
    assert len(drawn_curve(read(run / "report.html"), "Loss")) == 2
    main([*arguments, "--max_steps", "4", "--resume_from_checkpoint", "last"])
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    page = read(run / "report.html")
    for title, name in (("Loss", "loss"), ("mIoU on val", "eval_mean_iou")):
        expected = [(entry["step"], entry[name]) for entry in history if name in entry]
        assert [step for step, _ in expected] == [1, 2, 3, 4]
        assert_draws(page, title, expected)
        assert f"4 values, from {expected[0][1]:.3f} at step 1 to {expected[-1][1]:.3f} at step 4" in page.text
    figure = 100 * json.loads((run / "eval_results.json").read_text())["eval_mean_iou"]
    assert page.tables["Results"][1][:2] == ["shapes:val, first 2 objects", f"{figure:.2f}"]

    # To predict with the trained model in its own folder keeps the curves. Another folder has none.
    data = yaml.safe_load(Path(config_file).read_text())["shapes_config"]
    common = ["--model_name_or_path", str(run), "--shapes_config", json.dumps(data), "--report_to", "none"]
    common += ["--do_predict", "--test_splits", "val", "--max_eval_samples", "2", "--disable_tqdm", "true"]
    for folder in (run, tmp_path / "elsewhere"):
        main([*common, "--output_dir", str(folder)])
        page = read(folder / "report.html")
        assert ("Loss" in page.images) == (folder == run)
        assert page.tables["Results"][1][0] == "val" and page.images["Best"]


def test_a_new_run_deletes_the_page_of_the_older_one(tmp_path):
    write_page(tmp_path, [], "val", [], [], None)
    clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_report_that_fails_loses_nothing_else(config_file, tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr("pages.svg", fail)
    metrics = main([config_file, "--do_predict", "--test_splits", "val", "--max_eval_samples", "2"])
    assert 0 <= metrics["val_mean_iou"] <= 1
    assert "report.html could not be made; all other results are whole" in caplog.text and "no font" in caplog.text
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"table.txt", "README.md", "predictions"} <= left and not {name for name in left if "report" in name}


def test_what_is_segmented_for_the_page_is_what_was_counted(make_trainer, shapes):
    trainer, predicted = make_trainer(), {}
    trainer.predict(shapes["val"], receive=predicted.__setitem__)
    for index, row in enumerate(shapes["val"]):
        for phrase, sentence in enumerate(row["sentences"]):
            again, mask = trainer.segment(row | {"sentences": [sentence]}).mask(0), predicted[index].mask(phrase)
            assert again.any() and (again != mask).sum() <= 2  # other batches round otherwise


# --- pages of made-up results ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(ROOT / "metrics" / "referring_iou"), keep_in_memory=True)


def make_rows(*rows: dict) -> datasets.Dataset:
    """Rows as runs have them: images as they are stored."""
    return make_decoded_rows(*rows).cast_column("image", datasets.Image(decode=False))


def noise(path: Path, width: int, height: int) -> str:
    """A picture that compresses badly; returns its path."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", quality=95)
    return str(path)


def made_up(name: str, rows: datasets.Dataset, metric, seed: int = 0):
    """Results of a split with random counts."""
    random = np.random.default_rng(seed)
    counts = np.full((len(rows), max(map(len, rows["sentences"])), 3), -100)
    for row, (sentences, mask) in enumerate(zip(rows["sentences"], rows["mask"])):
        area = int(mask.sum())
        for phrase in range(len(sentences)):
            intersection = random.integers(0, area + 1)
            counts[row, phrase] = intersection, area + random.integers(0, area + 1), area
    return split_results(name, rows, counts, metric)


def test_strangers_texts_stay_texts(metric, tmp_path):
    folder = tmp_path / "<b onclick=x>"
    folder.mkdir()
    rows = make_rows(*(make_row(number, sentences=[text], size=(40, 60)) for number, text in enumerate(HOSTILE)))
    splits = [made_up(name, rows, metric, seed) for seed, name in enumerate(HOSTILE)]
    table = [{"split": name, "objects": 7, "<i>": 1.5} for name in [*HOSTILE, "\ud800"]]
    history = [{"step": step, "loss": 1 / step, "eval_mean_iou": 0.5} for step in (1, 2, 3)]
    page = read(write_page(folder, history, "<u>$\\frac{", table, splits, lambda row: np.ones((40, 60))))
    assert page.headings[0] == "<b onclick=x>" and "mIoU on <u>$\\frac{" in page.images
    assert [line[0] for line in page.tables["Results"][1:]] == [*HOSTILE, "?"]
    assert {caption.rstrip("\n") for caption in page.captions} == {f"“{text}”" for text in HOSTILE}
    assert [line[0] for line in page.tables["IoU histogram"][1:]] == HOSTILE
    assert "Content-Security-Policy" in page.source and "default-src 'none'" in page.source


@pytest.mark.slow
@pytest.mark.parametrize("splits", [8, 30])
def test_ten_thousand_phrases_take_five_megabytes_at_most(metric, tmp_path, splits):
    """Pictures and masks of noise are the largest there are."""
    image, sentences = noise(tmp_path / "noise.jpg", 400, 400), ["word " * 400] * 25
    mask = np.random.default_rng(1).integers(0, 2, (40, 40)).repeat(10, axis=0).repeat(10, axis=1)
    of_one = 400 // splits
    rows = make_rows(
        *(make_row(number, (400, 400), image=image, mask=mask, sentences=sentences) for number in range(of_one))
    )
    asked = []

    def segment(row: dict) -> np.ndarray:
        asked.append(row["ref_id"])
        assert row["sentences"] == sentences[:1]
        return 1 - mask

    results = [made_up(f"split {number}", rows, metric, number) for number in range(splits)]
    history = [{"step": step, "loss": float(np.sin(step)), "eval_mean_iou": 0.5} for step in range(1, 100_000)]
    path = write_page(tmp_path, history, "val", [{"split": "all", "mIoU": 1.0}], results, segment)
    assert 1 * MEGABYTES < path.stat().st_size <= 5 * MEGABYTES
    page = read(path)
    assert len(page.captions) == len(asked) <= 72 and len(asked) == {8: 72, 30: 72}[splits]
    assert len(page.tables["IoU histogram"]) == 1 + splits
    assert ("Only the first 24 splits have pictures." in page.text) == (splits == 30)
    assert len(drawn_curve(page, "Loss")) <= 500
    assert sum(int(cell.split()[-1]) for line in page.tables["IoU histogram"][1:] for cell in line[1:]) == (
        splits * of_one * 25
    )


def test_of_a_large_photograph_only_those_in_the_gallery_are_decoded(metric, tmp_path, monkeypatch):
    image, mask = noise(tmp_path / "large.jpg", 2000, 1200), np.zeros((1200, 2000), np.uint8)
    mask[300:900, 200:800] = 1
    rows = make_rows(*(make_row(number, (1200, 2000), image=image, mask=mask) for number in range(30)))
    decoded = []
    decode = datasets.Image.decode_example
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args: decoded.append(1) or decode(*args))
    results = split_results(
        "val", rows.cast_column("image", datasets.Image(decode=False)), counts_of(mask, 30), metric
    )
    path = write_page(tmp_path, [], "val", [], [results], lambda row: np.roll(mask, 1000, axis=1))
    assert len(decoded) == 12
    for source, _ in read(path).images["Worst"]:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert picture.size == (400, 240)
        pixels = np.asarray(picture).astype(int)
        for (row, column), color in (((60, 100), TRUTH_COLOR), ((60, 300), PREDICTION_COLOR)):
            distance = np.abs(pixels[row - 3 : row + 4, column] - color).sum(-1)
            assert distance.min() < 120, color
        assert pixels[90:150, 260:340, 0].mean() > 1.3 * pixels[90:150, 60:140, 0].mean()  # the rest is dimmed


def counts_of(mask: np.ndarray, rows: int) -> np.ndarray:
    """Counts (R, 1, 3) of predictions that cover 0, 1 … rows of the truth."""
    area = int(mask.sum())
    return np.array([[[row * area // rows, area, area]] for row in range(rows)])


def test_the_gallery_has_the_best_the_middle_and_the_worst_each_of_another_object(metric):
    mask = np.ones((10, 10), np.uint8)
    sentences = [["a", "b", "c"], ["d"], ["e", "f"], ["g"], ["h"], ["i"], ["j"]]
    rows = make_rows(
        *(make_row(number, (10, 10), mask=mask, sentences=list_) for number, list_ in enumerate(sentences))
    )
    # IoU in percent; the same objects have several of the highest and of the lowest.
    percent = {"a": 99, "b": 98, "c": 97, "d": 90, "e": 1, "f": 2, "g": 50, "h": 55, "i": 60, "j": 20}
    counts = np.full((7, 3, 3), -100)
    for row, texts in enumerate(sentences):
        for phrase, text in enumerate(texts):
            counts[row, phrase] = percent[text], 100, 100
    split = split_results("val", rows, counts, metric)
    texts = np.array(sum(sentences, []))
    chosen = {kind: texts[numbers].tolist() for kind, numbers in choose_phrases(split, 2).items()}
    assert chosen == {"best": ["a", "d"], "middle": ["i", "h"], "worst": ["j", "e"]}
    assert {kind: len(numbers) for kind, numbers in choose_phrases(split, 100).items()} == dict.fromkeys(chosen, 3)
    one = split._replace(places=split.places[:1], ious=split.ious[:1], mask_sizes=split.mask_sizes[:1])
    assert choose_phrases(one, 4) == {"best": [0]}
    # Of two phrases that name nothing, the one for which nothing was predicted has no picture.
    none = split_results("val", rows.take(2), np.array([[[0, 0, 0]], [[0, 9, 0]]]), metric)
    assert none.ious.tolist() == [1, 0] and choose_phrases(none, 4) == {"best": [1]}
    assert choose_phrases(split_results("val", rows.take(2), np.zeros((2, 1, 3), int), metric), 4) == {}


def test_pages_without_training_phrases_or_figures(tmp_path):
    page = read(write_page(tmp_path, [], "val", [], [], None))
    assert "The run has logged no figures." in page.text and not page.images
    history = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}, {"loss": 1.0}, {"step": 3, "loss": 2.0}]
    history += [{"step": 3, "train_loss": 1.0}, {"step": 0, "streamed_runs": 4}, {"step": 0, "eval_mean_iou": 0.5}]
    table = [{"split": "val", "mIoU": float("nan"), "oIoU": None}, {"split": "testA", "gIoU": float("inf")}]
    page = read(write_page(tmp_path, history, "val", table, [], None))
    assert page.images.keys() == {"Loss"} and "1 value, from 2.000 at step 3" in page.text
    assert page.tables == {
        "Results": [["split", "mIoU", "oIoU", "gIoU"], ["val", "–", "–", "–"], ["testA", "–", "–", "–"]]
    }


def test_a_curve_keeps_a_steps_first_value():
    """The last step's second evaluation is that of the best checkpoint."""
    history = [{"step": 2, "eval_mean_iou": 0.5}, {"step": 1, "eval_mean_iou": 0.4}, {"step": 2, "eval_mean_iou": 0.9}]
    assert curve(history, "eval_mean_iou").tolist() == [[1, 0.4], [2, 0.5]]
    assert curve(history, "loss").shape == (0, 2)


def test_an_older_page_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    write_page(tmp_path, [], "val", [], [], None)
    before = (tmp_path / "report.html").read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_page(tmp_path, [], "val", [{"split": "x"}], [], None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before
