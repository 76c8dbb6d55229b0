"""The metric against the official implementation's figures and against plain arithmetic."""

import json
import subprocess
import tracemalloc
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from helpers.warm_python import warm_python

from benchmarks.counting import Operations

ROOT = Path(__file__).resolve().parent.parent
METRIC = str(ROOT / "metrics" / "referring_iou")
EMPTY, FULL, HALF = [[0, 0]], [[1, 1]], [[1, 0]]


@pytest.fixture
def metric(tmp_path):
    return evaluate.load(METRIC, cache_dir=str(tmp_path))


def random_pairs(number, seed=0):
    generator = np.random.default_rng(seed)
    for _ in range(number):
        shape = generator.integers(1, 20, 2)
        yield generator.random(shape) < generator.random(), generator.random(shape) < generator.random()


def test_official_figures(metric):
    official = json.loads((ROOT / "tests" / "fixtures" / "metrics.json").read_text())
    for pair in official["pairs"]:
        metric.add(prediction=pair["prediction"], reference=pair["reference"])
        counts = metric.count(pair["prediction"], pair["reference"])
        assert metric.iou(*counts[:2]) == pytest.approx(pair["iou"], abs=1e-6)
    ours = metric.compute()
    assert 100 * ours.pop("mean_iou") == pytest.approx(official["mean_iou"], abs=1e-4)
    assert 100 * ours.pop("overall_iou") == pytest.approx(official["overall_iou"], abs=1e-4)
    percent = {
        f"Pr@{round(100 * float(name.split('@')[1]))}": 100 * value for name, value in ours.items() if "@" in name
    }
    assert percent == pytest.approx(official["precision"], abs=1e-4)


def test_agrees_with_sets_of_pixels(metric):
    pairs = list(random_pairs(200))
    ious, intersections, unions = [], 0, 0
    for prediction, reference in pairs:
        ours, theirs = ({tuple(pixel) for pixel in np.argwhere(mask)} for mask in (prediction, reference))
        ious.append(len(ours & theirs) / (len(ours | theirs) + 1e-6))
        intersections, unions = intersections + len(ours & theirs), unions + len(ours | theirs)
    result = metric.compute(predictions=[p for p, _ in pairs], references=[r for _, r in pairs])
    assert result["mean_iou"] == pytest.approx(sum(ious) / len(ious), abs=1e-12)
    assert result["overall_iou"] == pytest.approx(intersections / unions, abs=1e-12)
    for percent in (50, 60, 70, 80, 90):
        share = sum(iou > percent / 100 for iou in ious) / len(ious)
        assert result[f"precision@{percent / 100}"] == pytest.approx(share, abs=1e-12)


def test_every_way_of_adding_gives_the_same(metric):
    pairs = list(random_pairs(7))
    predictions, references = zip(*pairs, strict=True)
    for prediction, reference in pairs:
        metric.add(prediction=prediction, reference=reference)
    expected = metric.compute()
    metric.add_batch(predictions=predictions[:3], references=references[:3])
    metric.add_batch(predictions=predictions[3:], references=references[3:])
    assert metric.compute() == expected
    intersection, union, reference_area = torch.tensor([metric.count(*pair) for pair in pairs]).T
    metric.add_batch(intersection=intersection[:4], union=union[:4], reference_area=reference_area[:4])
    metric.add_batch(predictions=predictions[4:], references=references[4:])
    assert metric.compute() == expected
    counts = {"intersection": intersection, "union": union.numpy(), "reference_area": reference_area.tolist()}
    assert metric.compute(**counts) == expected


def test_kinds_of_masks_agree(metric):
    prediction, reference = next(random_pairs(1, seed=3))
    expected = (int(np.sum(prediction & reference)), int(np.sum(prediction | reference)), int(np.sum(reference)))
    kinds = [
        lambda mask: mask,
        lambda mask: mask.tolist(),
        lambda mask: mask.astype(np.uint8) * 255,
        lambda mask: mask.astype(np.float32),
        lambda mask: np.asfortranarray(mask.astype(np.int64)),
        lambda mask: np.ascontiguousarray(mask[::-1])[::-1],
        torch.from_numpy,
        lambda mask: torch.from_numpy(mask).to(torch.bfloat16),
    ]
    for ours in kinds:
        for theirs in kinds:
            assert metric.count(ours(prediction), theirs(reference)) == expected


def test_masks_on_a_device_are_counted_there(metric):
    generator = np.random.default_rng(5)
    predictions, reference = generator.random((4, 9, 7)) < 0.4, generator.random((9, 7)) < 0.6
    expected = [[(mask & reference).sum(), (mask | reference).sum(), reference.sum()] for mask in predictions]
    on_device = torch.from_numpy(predictions), torch.from_numpy(reference)
    with Operations(on_device) as operations:
        counts = metric.count_on_device(*on_device)
    assert operations.reads == [] and counts.tolist() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_on_a_gpu(metric):
    prediction, reference = next(random_pairs(1))
    expected = metric.count(prediction, reference)
    assert metric.count(torch.from_numpy(prediction).cuda(), reference) == expected
    assert metric.count(prediction, torch.from_numpy(reference).cuda()) == expected


def test_empty_masks(metric):
    result = metric.compute(predictions=[EMPTY, EMPTY, FULL], references=[EMPTY, FULL, EMPTY])
    assert result["mean_iou"] == 0 and result["overall_iou"] == 0
    assert metric.compute(predictions=[EMPTY], references=[EMPTY])["overall_iou"] == 0


NOTHING, LEFT, RIGHT, BOTH = [[0, 0, 0, 0]], [[1, 1, 0, 0]], [[0, 0, 1, 1]], [[1, 1, 1, 1]]
ONE, THREE = [[1, 0, 0, 0]], [[1, 1, 1, 0]]

# What gRefCOCO's definitions give, worked out by hand: pairs of prediction and reference, then the figures.
GENERALIZED = {
    "no target, none predicted": ([(NOTHING, NOTHING)], {"giou": 1, "n_acc": 1}),
    "no target, one predicted": ([(ONE, NOTHING)], {"giou": 0, "ciou": 0, "n_acc": 0}),
    "no target, once right and once wrong": (
        [(NOTHING, NOTHING), (BOTH, NOTHING)],
        {"giou": 1 / 2, "ciou": 0, "n_acc": 1 / 2},
    ),
    "a target, none predicted": (
        [(NOTHING, LEFT), (NOTHING, NOTHING)],  # I: 0 + 0, U: 2 + 0
        {"giou": 1 / 2, "ciou": 0, "n_acc": 1, "t_acc": 0},
    ),
    "a target, another place predicted, is not a refusal": (
        [(RIGHT, LEFT), (NOTHING, NOTHING)],
        {"giou": 1 / 2, "ciou": 0, "n_acc": 1, "t_acc": 1},
    ),
    "two targets, one found": (
        [(LEFT, BOTH), (NOTHING, NOTHING)],  # IoU 2/4 and 1
        {"giou": 3 / 4, "ciou": 1 / 2, "n_acc": 1, "t_acc": 1},
    ),
    "two targets, both found, and something for nothing": (
        [(BOTH, BOTH), (THREE, NOTHING)],  # I: 4 + 0, U: 4 + 3
        {"giou": 1 / 2, "ciou": 4 / 7, "n_acc": 0, "t_acc": 1},
    ),
    "a mixture": (
        [
            (NOTHING, NOTHING),  # IoU 1, I 0, U 0
            (NOTHING, NOTHING),  # IoU 1, I 0, U 0
            (ONE, NOTHING),  #     IoU 0, I 0, U 1
            (NOTHING, LEFT),  #    IoU 0, I 0, U 2
            (LEFT, BOTH),  #       IoU 1/2, I 2, U 4
            (LEFT, LEFT),  #       IoU 1, I 2, U 2
            (THREE, RIGHT),  #     IoU 1/4, I 1, U 4
            (RIGHT, RIGHT),  #     IoU 1, I 2, U 2
        ],
        {"giou": 4.75 / 8, "ciou": 7 / 15, "n_acc": 2 / 3, "t_acc": 4 / 5},
    ),
}


@pytest.mark.parametrize(("pairs", "expected"), GENERALIZED.values(), ids=GENERALIZED)
def test_generalized_figures_are_those_worked_out_by_hand(metric, pairs, expected):
    for prediction, reference in pairs:
        metric.add(prediction=prediction, reference=reference)
    figures = metric.compute()
    classic = {"mean_iou", "overall_iou", *(f"precision@0.{x}" for x in range(5, 10))}
    assert {name: value for name, value in figures.items() if name not in classic} == pytest.approx(
        expected, abs=1e-12
    )
    assert classic <= figures.keys()


def test_no_target_phrases_leave_the_classic_figures_as_they_are(metric):
    pairs, _ = GENERALIZED["a mixture"]
    predictions, references = zip(*pairs, strict=True)
    figures = metric.compute(predictions=predictions, references=references)
    assert figures["mean_iou"] == pytest.approx(2.75 / 8, abs=1e-6)  # of both masks empty 0, and not 1
    assert figures["overall_iou"] == 7 / 15
    assert (figures["precision@0.5"], figures["precision@0.9"]) == (2 / 8, 2 / 8)


def test_where_all_phrases_have_targets_there_are_no_generalized_figures(metric):
    figures = metric.compute(predictions=[NOTHING, LEFT], references=[LEFT, BOTH])
    assert figures.keys() == {"mean_iou", "overall_iou", *(f"precision@0.{x}" for x in range(5, 10))}


def test_half_is_not_more_than_half(metric):
    result = metric.compute(predictions=[HALF], references=[FULL])
    assert result["overall_iou"] == 0.5 and result["precision@0.5"] == 0
    assert metric.compute(predictions=[[[1, 1, 0]]], references=[[[1, 1, 1]]])["precision@0.5"] == 1


def test_no_masks_are_stored(metric, tmp_path):
    """500 masks of 640 x 480 are 154 MB as bytes; their counts are 8 kB."""
    mask = np.zeros((480, 640), dtype=bool)
    tracemalloc.start()
    for column in range(500):
        mask[:, column] = True
        metric.add(prediction=mask, reference=~mask)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    metric.writer.write_examples_on_file()
    assert kept < 1_000_000
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 20_000
    assert metric.compute()["mean_iou"] == 0
    assert not list(tmp_path.rglob("*.arrow"))


def test_metrics_loaded_at_once_do_not_mix(tmp_path):
    first, second = (evaluate.load(METRIC, cache_dir=str(tmp_path)) for _ in range(2))
    first.add(prediction=FULL, reference=FULL)
    second.add(prediction=EMPTY, reference=FULL)
    first.add(prediction=EMPTY, reference=FULL)
    assert second.compute()["overall_iou"] == 0
    assert first.compute()["overall_iou"] == 0.5


@pytest.mark.slow
def test_offline_in_another_process_at_the_same_time(metric, tmp_path):
    metric.add(prediction=FULL, reference=FULL)
    code = f"""
import socket
def refuse(*args, **kwargs):
    raise AssertionError("the metric asked for the network")
socket.socket.connect = socket.create_connection = refuse
import evaluate
metric = evaluate.load("metrics/referring_iou", cache_dir={str(tmp_path)!r})
print(metric.compute(predictions=[[[1, 0]]], references=[[[1, 1]]])["overall_iou"])
"""
    output = subprocess.run([warm_python(), "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert output.stdout.split() == ["0.5"], output.stderr
    assert metric.compute()["overall_iou"] == 1


def test_a_metric_starts_anew_after_compute(metric):
    assert metric.compute(predictions=[FULL], references=[FULL])["overall_iou"] == 1
    assert metric.compute(predictions=[EMPTY], references=[FULL])["overall_iou"] == 0
    with pytest.raises(ValueError, match="no pairs"):
        metric.compute()


def test_bad_input_is_refused_and_not_counted(metric):
    with pytest.raises(ValueError, match="no pairs of masks"):
        metric.compute()
    with pytest.raises(ValueError, match="no pairs of masks"):
        metric.compute(predictions=[], references=[])
    with pytest.raises(ValueError, match=r"prediction is \(1, 2\) and the reference \(2, 1\)"):
        metric.add(prediction=[[1, 1]], reference=[[1], [1]])
    with pytest.raises(ValueError, match=r"one mask \(height, width\), but its shape is \(1, 1, 2\)"):
        metric.add(prediction=[FULL], reference=FULL)
    for soft in (np.array([[0.3, 1.0]]), torch.tensor([[-4.2, 1.0]]), np.array([[np.nan, 1.0]])):
        with pytest.raises(ValueError, match="threshold it first"):
            metric.add(prediction=soft, reference=FULL)
    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        metric.add_batch(predictions=[FULL, FULL], references=[FULL])
    with pytest.raises(ValueError, match="2 of intersection, 1 of union, 2 of reference_area"):
        metric.add_batch(intersection=[1, 1], union=[2], reference_area=[1, 1])
    for text in ([["0", "1"]], np.array([[None, 1]])):
        with pytest.raises(ValueError, match="prediction holds .* values; give numbers"):
            metric.add(prediction=text, reference=FULL)
    with pytest.raises(ValueError, match="counts as intersection, union, reference_area"):
        metric.add_batch(intersection=[1], union=[2])
    with pytest.raises(ValueError, match="given as predictions and references"):
        metric.add_batch(predictions=[FULL], union=[2])
    with pytest.raises(ValueError, match="prediction is"):
        metric.add_batch(predictions=[FULL, [[1]]], references=[FULL, FULL])  # the good pair is not half added
    with pytest.raises(ValueError, match="no pairs of masks"):
        metric.compute()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (([1, 5], [2, 4], [1, 4]), "Pair 1 has 5 pixels in both masks, 4 in at least one and 4 in the reference"),
        (([3], [9], [2]), "Pair 0 has 3 pixels in both masks, 9 in at least one and 2"),
        (([1], [4], [5]), "Pair 0 has 1 .* 5 in the reference, which no two masks have"),
        (([-1], [4], [2]), "Pair 0 has -1 pixels"),
        (([1, 1], [4, -100], [2, -100]), "Pair 1 has 1 pixels in both masks, -100"),
        (([1], [2**62], [2]), "Pair 0 has .* which no two masks have"),
        (([1.0], [4], [2]), "intersection holds float64 values"),
        (([1], [float("nan")], [2]), "union holds float64 values"),
        (([1], [4], [True]), "reference_area holds bool values"),
        (([1], [4], ["2"]), "reference_area holds <U1 values"),
        (([1], [4], [10**30]), "reference_area holds object values"),
        ((torch.ones(1, 1, dtype=int), [4], [2]), r"intersection holds int64 values of shape \(1, 1\)"),
        ((1, 4, 2), r"intersection holds int64 values of shape \(\)"),
    ],
)
def test_counts_that_no_masks_have_are_refused_and_not_counted(metric, counts, message):
    metric.add(prediction=FULL, reference=FULL)
    with pytest.raises(ValueError, match=message):
        metric.add_batch(**dict(zip(("intersection", "union", "reference_area"), counts)))
    assert metric.compute()["mean_iou"] == pytest.approx(1, abs=1e-5)
