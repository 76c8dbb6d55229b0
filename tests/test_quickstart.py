"""The quickstart on a few images: what it prints, what it leaves behind, and what its gallery shows."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTokenizer

import quickstart
from data.decoding import read_image, read_whole_mask
from data.opening import load_splits
from data.shapes import load_shapes
from modeling_detris import DetrisForReferringSegmentation
from processing_detris import DetrisProcessor

ROOT = Path(__file__).parents[1]
SHAPES = {
    "image_size": 96,
    "max_objects": 3,
    "object_scale": 1.2,
    "sizes": {"train": 16, "val": 8, "testA": 2, "testB": 2, "unseen": 2},
}
TRAINED = {"detris": 377_805, "none": 298_625}  # parameters, as in README.md
COLUMNS = [
    *("mIoU val", "mIoU testA", "mIoU testB", "mIoU unseen"),
    *("oIoU val", "Pr@0.5 val", "trained parameters"),
]
# Of the first eight scenes of val: each image's first phrase of the family, at most six images. Image 7 has "little
# plain black ring" as well, but six images before it have attributes.
PICKED = {
    "attribute": [
        (0, "plain green star"),
        (1, "the white ring with stripes"),
        (2, "the circle"),
        (3, "little blue square"),
        (4, "the small triangle"),
        (6, "ring"),
    ],
    "position": [
        (0, "the star at top"),
        (1, "plain ring on the top right"),
        (2, "circle in the middle of the image"),
        (3, "the plain square on the left"),
        (6, "center triangle"),
        (7, "object on the right side"),
    ],
    "relation": [
        (0, "one below the green star"),
        (3, "the square right of blue square"),
        (6, "the green shape to the right of white cross"),
    ],
    "superlative": [
        (1, "bottommost white ring"),
        (5, "topmost triangle"),
        (6, "bottommost object"),
        (7, "lowest thing"),
    ],
    "ordinal": [(3, "the second shape from bottom"), (4, "first plain object from the top")],
}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def run(one_thread, tmp_path_factory) -> tuple[Path, str]:
    """Six steps with adapters, and six without: the folder, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("quickstart") / "run", io.StringIO()
    arguments = {"shapes_config": json.dumps(SHAPES), "output_dir": folder, "disable_tqdm": True, "report_to": "none"}
    arguments |= {"max_steps": 6, "per_device_train_batch_size": 4, "warmup_steps": 0}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(ROOT)  # where its argument file lies
        quickstart.main([*(f"--{name}={value}" for name, value in arguments.items()), "--methods", "detris", "none"])
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    """What the splits hold, objects by `ref_id`."""
    return {split: {row["ref_id"]: row for row in rows} for split, rows in load_shapes(**SHAPES).items()}


def predictions(folder: Path, split: str) -> list[dict]:
    lines = (folder / "predictions" / split / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_printed_table_says_what_the_masks_left_behind_reach(run, rows):
    output, printed = run
    table = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    assert COLUMNS in table
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics) == list(TRAINED)
    for method, folder in (("detris", output), ("none", output / "none")):
        figures = {}
        for split in ("val", "testA", "testB", "unseen"):
            results, areas = predictions(folder, split), []
            phrases = [(ref_id, phrase) for ref_id, row in rows[split].items() for phrase in row["sentences"]]
            assert [(result["ref_id"], result["sentence"]) for result in results] == phrases
            for result in results:
                mask = np.asarray(Image.open(folder / "predictions" / split / result["mask"])) != 0
                truth = np.asarray(rows[split][result["ref_id"]]["mask"]) != 0
                areas.append(((mask & truth).sum(), (mask | truth).sum()))
            intersections, unions = np.array(areas).T
            figures[f"{split}_mean_iou"] = (intersections / unions).mean()
            figures[f"{split}_overall_iou"] = intersections.sum() / unions.sum()
            figures[f"{split}_precision@0.5"] = (intersections / unions > 0.5).mean()
        assert {name: metrics[method][name] for name in figures} == pytest.approx(figures, abs=1e-6)
        printed_figures = [f"{figures[f'{split}_mean_iou']:.3f}" for split in ("val", "testA", "testB", "unseen")]
        printed_figures += [f"{figures['val_overall_iou']:.3f}", f"{figures['val_precision@0.5']:.3f}"]
        assert [method, *printed_figures, f"{TRAINED[method]:,}"] in table


def test_the_folder_holds_two_models_the_second_without_adapters(run):
    output, printed = run
    assert f"are in {output}.\n" in printed
    for method, folder in (("detris", output), ("none", output / "none")):
        with safe_open(folder / "model.safetensors", "pt") as weights:
            names = set(weights.keys())
        assert any("adapter" in name for name in names) == (method == "detris")
        model = DetrisForReferringSegmentation.from_pretrained(folder)
        assert model.config.peft_method == method
        assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == TRAINED[method]
        for split, count in SHAPES["sizes"].items():
            if split != "train":
                images = {result["image_id"] for result in predictions(folder, split)}
                assert 0 < len(images) <= count


@torch.no_grad()
def test_the_saved_model_segments_as_the_run_did(run, rows):
    output, _ = run
    model = DetrisForReferringSegmentation.from_pretrained(output).eval()
    processor = DetrisProcessor.from_config(model.config, CLIPTokenizer.from_pretrained(output))
    results = predictions(output, "val")[:4]
    images = [rows["val"][result["ref_id"]]["image"] for result in results]
    inputs = processor(images=images, text=[result["sentence"] for result in results], return_tensors="pt")
    sizes = inputs.pop("original_sizes")
    for result, mask in zip(results, processor.post_process_referring_segmentation(model(**inputs), sizes)):
        expected = np.asarray(Image.open(output / "predictions/val" / result["mask"])) != 0
        assert (mask.numpy() != expected).mean() < 1e-3


def test_the_gallery_shows_the_first_phrases_of_each_family(run, rows):
    output, _ = run
    families = quickstart.family_samples(output / "predictions", "val", SHAPES)
    first_image = min(row["image_id"] for row in rows["val"].values())
    results = {(result["image_id"] - first_image, result["sentence"]): result for result in predictions(output, "val")}
    assert {family: [sample.sentence for sample in samples] for family, samples in families.items()} == {
        family: [sentence for _, sentence in picked] for family, picked in PICKED.items()
    }
    for family, samples in families.items():
        for sample, picked in zip(samples, PICKED[family], strict=True):
            result = results[picked]
            row = rows["val"][result["ref_id"]]
            assert sample.iou == result["iou"]
            np.testing.assert_array_equal(sample.image, row["image"])
            np.testing.assert_array_equal(sample.truth != 0, np.asarray(row["mask"]) != 0)
            mask = np.asarray(Image.open(output / "predictions/val" / result["mask"]))
            np.testing.assert_array_equal(sample.prediction != 0, mask != 0)
    gallery = np.asarray(Image.open(output / "gallery.png"))
    # In three columns: five titles over two, two, one, two and one rows of samples.
    assert gallery.shape[0] > 8 * 200 and gallery.shape[1] > 3 * 3 * 200 and gallery.std() > 10


def test_the_examples_are_a_data_set_of_their_own(run, rows):
    output, _ = run
    examples = load_splits(str(output / "examples"))["train"]
    expected = [row for row in rows["val"].values()]
    assert examples["sentences"][:] == [row["sentences"] for row in expected]
    for example, row in zip(examples, expected, strict=True):
        np.testing.assert_array_equal(read_image(example), row["image"])
        np.testing.assert_array_equal(read_whole_mask(example) != 0, np.asarray(row["mask"]) != 0)


def test_it_trains_with_adapters_alone_unless_more_methods_are_asked_for():
    assert quickstart.QuickstartArguments().methods == ["detris"]


def test_methods_that_do_not_exist_are_refused(capsys):
    with pytest.raises(SystemExit):
        quickstart.main(["--methods", "adapters"])
    assert "invalid choice: 'adapters'" in capsys.readouterr().err


def test_a_folder_of_examples_elsewhere_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="examples exists, and the quickstart would replace it"):
        quickstart.main([f"--output_dir={tmp_path}"])
    assert (tmp_path / "examples" / "mine.txt").exists()
