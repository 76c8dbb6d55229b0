"""Files of predictions: written while others are predicted, whole or not at all."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from training import predictions
from training.evaluating_trainer import SegmentedObject
from training.predictions import IN_WORK, RESULTS, PictureWriter, make_anew, write_results

pytestmark = pytest.mark.usefixtures("one_thread")


class Metric:
    @staticmethod
    def iou(intersection, union):
        return np.asarray(intersection) / np.asarray(union)


def segmented(row, masks) -> SegmentedObject:
    truth = row["mask"] == 1
    counts = np.array([[(mask & truth).sum(), (mask | truth).sum(), truth.sum()] for mask in masks])
    return SegmentedObject(row["ref_id"], truth.shape, counts, np.packbits(masks.reshape(len(masks), -1), axis=1))


def everything(row) -> SegmentedObject:
    return segmented(row, np.ones((len(row["sentences"]), *row["mask"].shape), bool))


def test_masks_and_pictures_are_whole_when_the_writer_ends(shapes, tmp_path):
    rows, generator = shapes["val"], np.random.default_rng(0)
    masks = [generator.random((len(row["sentences"]), *row["mask"].shape)) < 0.3 for row in rows]
    with PictureWriter(tmp_path, rows, Metric, shows_progress=False) as writer:
        for index in reversed(range(len(rows))):  # in any order
            writer.add(index, segmented(rows[index], masks[index]))
    expected = {f"{row['ref_id']}_{phrase}" for row in rows for phrase in range(len(row["sentences"]))}
    for folder, suffix in (("masks", ".png"), ("overlays", ".jpg")):
        assert {path.name for path in (tmp_path / folder).iterdir()} == {name + suffix for name in expected}
    for row, of_row in zip(rows, masks, strict=True):
        for phrase, mask in enumerate(of_row):
            written = np.asarray(Image.open(tmp_path / "masks" / f"{row['ref_id']}_{phrase}.png"))
            assert np.array_equal(written, 255 * mask)
            Image.open(tmp_path / "overlays" / f"{row['ref_id']}_{phrase}.jpg").load()


def test_the_writer_works_while_others_are_segmented_and_keeps_few_in_memory(shapes, tmp_path, monkeypatch):
    may_draw, main, drawn = threading.Event(), threading.get_ident(), []

    def draw(sample):
        assert may_draw.wait(timeout=60) and threading.get_ident() != main
        drawn.append(sample)
        return sample.image

    monkeypatch.setattr(predictions, "draw_sample", draw)
    one = everything(shapes["val"][0])
    with PictureWriter(tmp_path, shapes["val"], Metric, shows_progress=False) as writer:
        for _ in range(IN_WORK):
            writer.add(0, one)
        assert not drawn  # nobody has waited for a picture
        blocked = threading.Thread(target=writer.add, args=(0, one))
        blocked.start()
        blocked.join(timeout=0.3)
        assert blocked.is_alive()  # one more would take more memory
        may_draw.set()
        blocked.join()
    assert len(drawn) == (IN_WORK + 1) * len(one.counts)


@pytest.mark.parametrize("late", [False, True], ids=["while more are added", "at the end"])
def test_an_error_of_a_thread_is_raised(shapes, tmp_path, monkeypatch, late):
    def fail(sample):
        raise OSError("No space left on device")

    monkeypatch.setattr(predictions, "draw_sample", fail)
    one = everything(shapes["val"][0])
    added = []
    with pytest.raises(OSError, match="No space left"):
        with PictureWriter(tmp_path, shapes["val"], Metric, shows_progress=False) as writer:
            for number in range(1 if late else 2 * IN_WORK):
                writer.add(0, one)
                added.append(number)
    assert len(added) == (1 if late else IN_WORK)


def test_what_has_been_interrupted_is_not_taken_for_whole(shapes, tmp_path):
    rows, folder = shapes["val"], tmp_path / "predictions"
    counts = np.ones((len(rows), 9, 3), int)
    make_anew(folder)
    write_results(folder, rows, counts, Metric, with_masks=True)
    lines = [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]
    assert [line["sentence"] for line in lines] == [text for row in rows for text in row["sentences"]]
    make_anew(folder)
    with pytest.raises(KeyboardInterrupt):
        with PictureWriter(folder, rows, Metric, shows_progress=False):
            raise KeyboardInterrupt
    assert {path.name for path in folder.iterdir()} == {"masks", "overlays"}
    with pytest.raises(IndexError):
        write_results(folder, rows, counts[:, :1], Metric, with_masks=True)  # fails at the first row with two phrases
    assert not (folder / RESULTS).exists()
