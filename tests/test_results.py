"""What a run leaves behind: metrics, predictions, the table, and the model card."""

import json
import re
import statistics

import numpy as np
import pytest
import torch
import yaml
from helpers.runs import SIZES
from huggingface_hub import ModelCard
from PIL import Image

import train_hf
from configuration_detris import DetrisConfig
from data.mixture import Member
from data.shapes import load_shapes
from model_card import make_model_card
from modeling_detris import DetrisForReferringSegmentation
from train_hf import build_model, main
from training.arguments import ModelArguments
from training.results import write_table
from training.rows import Rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_training_leaves_the_best_model_its_processor_metrics_and_predictions(config_file, tmp_path):
    metrics = main(
        [config_file, "--do_train", "--do_predict", "--test_splits", "testA", "--num_train_epochs", "2"]
        + ["--max_train_samples", "9", "--max_eval_samples", "5", "--early_stopping_patience", "3"]
    )
    run = tmp_path / "run"
    saved = json.loads((run / "all_results.json").read_text())
    assert {name for name in saved if name.endswith("mean_iou")} == {"eval_mean_iou", "testA_mean_iou"}
    assert saved["testA_mean_iou"] == metrics["testA_mean_iou"]
    assert all((run / name / "processor_config.json").exists() for name in (".", "checkpoint-3", "checkpoint-6"))
    state = json.loads((run / "trainer_state.json").read_text())
    assert saved["eval_mean_iou"] == state["best_metric"]

    folder = run / "predictions" / "testA"
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    rows = {row["ref_id"]: row for row in load_shapes(sizes=SIZES, image_size=48)["testA"].take(5)}
    assert [result["sentence"] for result in results] == [text for row in rows.values() for text in row["sentences"]]
    for result in results:
        mask = np.asarray(Image.open(folder / result["mask"]))
        assert set(np.unique(mask)) <= {0, 255}
        truth = rows[result["ref_id"]]["mask"] == 1
        assert result["intersection"] == ((mask == 255) & truth).sum()
        assert result["union"] == ((mask == 255) | truth).sum()
        assert result["reference_area"] == truth.sum()
        assert result["iou"] == pytest.approx(result["intersection"] / max(result["union"], 1), abs=1e-6)
    assert 0 < metrics["testA_mean_iou"] == pytest.approx(np.mean([result["iou"] for result in results]))
    assert len(list((folder / "masks").iterdir())) == len(list((folder / "overlays").iterdir())) == len(results)

    # What was saved can be evaluated, and fine-tuned at another size with a processor that fits.
    common = ["--model_name_or_path", str(run), "--output_dir", str(tmp_path / "again"), "--report_to", "none"]
    common += ["--shapes_config", json.dumps({"sizes": SIZES, "image_size": 48}), "--max_eval_samples", "5"]
    common += ["--per_device_eval_batch_size", "2", "--disable_tqdm", "true"]
    assert main([*common, "--do_eval"])["eval_mean_iou"] == metrics["eval_mean_iou"]
    common += ["--overwrite_output_dir"]
    main([*common, "--do_train", "--max_steps", "1", "--image_size", "48", "--max_text_length", "30"])
    model, processor = build_model(ModelArguments(model_name_or_path=str(tmp_path / "again")))
    assert (model.config.image_size, processor.image_processor.size["height"]) == (48, 48)
    assert (model.config.max_text_length, processor.max_text_length) == (30, 30)
    assert processor.mask_threshold == 0.1


def test_the_table_is_that_of_the_phrases_with_or_without_masks(config_file, tmp_path, capsys):
    arguments = [config_file, "--do_predict", "--test_splits", "val", "testA", "--max_eval_samples", "6"]
    run, tables = tmp_path / "run", []
    for save_masks in (True, False):
        metrics = main([*arguments, "--save_masks", str(save_masks), "--output_dir", str(run / str(save_masks))])
        tables.append((run / str(save_masks) / "table.json").read_text())
    assert {path.name for path in (run / "False" / "predictions" / "val").iterdir()} == {"results.jsonl"}
    assert tables[0] == tables[1]
    *lines, mean = json.loads(tables[1])
    assert [line["split"] for line in lines] == ["val", "testA"]
    for line in lines:
        path = run / "False" / "predictions" / line["split"] / "results.jsonl"
        results = [json.loads(result) for result in path.read_text().splitlines()]
        ious = np.array([result["iou"] for result in results])
        overall = sum(result["intersection"] for result in results) / sum(result["union"] for result in results)
        assert (line["objects"], line["phrases"]) == (6, len(results))
        figures = [ious.mean(), overall, *((ious > threshold).mean() for threshold in (0.5, 0.6, 0.7, 0.8, 0.9))]
        heads = ["mIoU", "oIoU", "Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9"]
        assert [line[head] for head in heads] == pytest.approx([100 * figure for figure in figures])
        assert line["mIoU"] == pytest.approx(100 * metrics[f"{line['split']}_mean_iou"]) and line["mIoU"] > 0
        assert mean.keys() == {"split", *heads}
    assert all(mean[head] == pytest.approx(statistics.mean(line[head] for line in lines)) for head in heads)

    text = (run / "False" / "table.txt").read_text()
    assert text in capsys.readouterr().out
    val, markdown = lines[0], (run / "False" / "table.md").read_text().splitlines()
    cells = ["val", "6", str(val["phrases"]), *(f"{val[head]:.2f}" for head in heads)]
    assert text.splitlines()[1].split() == cells and markdown[2] == f"|{'|'.join(cells)}|"
    assert markdown[0] == f"|{'|'.join(['split', 'objects', 'phrases', *heads])}|"
    assert set(markdown[1]) == set("|-:") and len({line.count("|") for line in markdown}) == 1


def test_a_name_ends_no_cell_of_the_table(tmp_path):
    line = {"split": "a|b:val", "objects": 1, "phrases": 2, "mIoU": 50.0}
    write_table(tmp_path, [line, {"split": "mean of the rows", "mIoU": 50.0}])
    assert (tmp_path / "table.md").read_text().splitlines()[2] == "|a\\|b:val|1|2|50.00|"
    result = {"dataset": "a|b", "split": "val", "mean_iou": 0.5}
    card = make_model_card(DetrisConfig(), "x", "", ["a|b"], [result]).text
    assert "| a\\|b | val | 50.00 |" in card and "| trained on | a\\|b |" in card


@pytest.mark.parametrize("logit", [100, -100], ids=["everything", "nothing"])
def test_no_target_phrases_reach_figures_files_table_and_card(
    config, shapes, generalized, tmp_path, monkeypatch, logit
):
    """Of a model that segments all of each image, or nothing, the figures are known without it."""
    rows, path, run = generalized["val"], tmp_path / "config.yaml", tmp_path / "run"
    members, tests = [Member(1, "shapes", "train")], {"classic": shapes["val"], "val": rows}
    monkeypatch.setattr(train_hf, "load_rows", lambda *args: Rows(members, None, rows, tests))
    forward = DetrisForReferringSegmentation.forward

    def constant(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = torch.full_like(output.logits, logit)
        return output

    monkeypatch.setattr(DetrisForReferringSegmentation, "forward", constant)
    path.write_text(yaml.safe_dump(config | {"output_dir": str(run)}))
    metrics = main([str(path), "--do_eval", "--do_predict", "--test_splits", "classic", "val"])

    truths = [row["mask"] == 1 for row in rows for _ in row["sentences"]]
    without = sum(not truth.any() for truth in truths) / len(truths)
    assert 0 < without < 1
    covered = sum(truth.mean() for truth in truths) / len(truths)
    expected = {"giou": without, "ciou": 0, "n_acc": 1, "t_acc": 0}
    if logit > 0:
        expected = {"giou": covered, "ciou": covered, "n_acc": 0, "t_acc": 1}  # all images are of one size
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == metrics[f"val_{name}"] == pytest.approx(value)
        assert f"classic_{name}" not in metrics

    folder = run / "predictions" / "val"
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [result["reference_area"] for result in results] == [truth.sum() for truth in truths]
    for result in results:
        assert (np.asarray(Image.open(folder / result["mask"])) == (255 if logit > 0 else 0)).all()

    classic, generalized_line, mean = json.loads((run / "table.json").read_text())
    heads = {"gIoU": "giou", "cIoU": "ciou", "N-acc": "n_acc", "T-acc": "t_acc"}
    assert not heads.keys() & classic.keys()
    for head, name in heads.items():
        assert mean[head] == generalized_line[head] == pytest.approx(100 * expected[name])
    lines = (run / "table.txt").read_text().splitlines()
    assert lines[0].split()[-4:] == list(heads) and lines[1].split()[-4:] == ["-"] * 4
    card = (run / "README.md").read_text()
    assert f"{100 * expected['giou']:.2f}" in card and "N-acc" in card


@pytest.mark.parametrize("keep_leaks", [False, True])
def test_the_card_of_a_mixture_says_what_left_or_stayed(config_file, two_sets, tmp_path, keep_leaks):
    arguments = ["--dataset", "refcoco+/unc + 0.5*refcocog/umd", "--data_root", "unused", "--test_splits", "val"]
    arguments += ["--do_train", "--do_predict", "--max_steps", "1", "--load_best_model_at_end", "false"]
    arguments += ["--eval_strategy", "no", "--save_strategy", "no", "--keep_leaks", str(keep_leaks)]
    main([config_file, *arguments])
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.trained_on == ["refcoco+/unc", "0.5*refcocog/umd"] and card.data.datasets is None
    assert "refcoco+/unc + 0.5*refcocog/umd" in card.text
    for name in ("refcoco+/unc", "refcocog/umd"):
        what = "STAY in training, although" if keep_leaks else "leave training, because"
        assert re.search(rf"{re.escape(name)}: \d+ of \d+ objects \(\d+ phrases\) {what} their images", card.text)
    assert {result.dataset_name for result in card.data.eval_results} == {"refcoco+/unc"}
    if not keep_leaks:  # a model that is only evaluated has still been trained on these
        tested = ["--dataset", "refcoco+/unc", "--data_root", "unused", "--test_splits", "val", "--do_predict"]
        tested += ["--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "tested")]
        main([*tested, "--report_to", "none", "--use_cpu"])
        again = ModelCard.load(tmp_path / "tested" / "README.md")
        assert again.data.trained_on == card.data.trained_on and again.data.datasets is None
