"""Rows to batches: the phrase that is drawn, and broken rows that are named."""

import subprocess
from collections import Counter

import pytest
from helpers.rows import SOUND

from data.mixture import Mixture
from training.collators import EvaluationCollator, TrainingCollator

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_training_batch_holds_one_phrase_for_each_object(make_trainer, shapes):
    trainer = make_trainer()
    rows = [shapes["train"][index] for index in range(4)]
    batch = trainer.data_collator(rows)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "pixel_values": (4, 3, 32, 32),
        "input_ids": (4, 24),
        "attention_mask": (4, 24),
        "labels": (4, 32, 32),
    }
    for row, ids, label in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        of_row = trainer.processing_class(text=row["sentences"], return_tensors="pt")["input_ids"]
        assert (of_row == ids).all(dim=1).any()
        assert label.mean().item() == pytest.approx(row["mask"].mean(), abs=0.01)
        assert ((label > 0) & (label < 1)).any()  # edges are soft


def test_one_phrase_of_an_object_is_drawn_each_epoch_and_all_of_them_over_time():
    collator, again = TrainingCollator(None, seed=3), TrainingCollator(None, seed=3)
    rows = [{"ref_id": ref_id, "sentences": ["a", "b", "c"]} for ref_id in range(30)]
    drawn = []
    for epoch in range(40):
        for one in (collator, again):
            one.epoch.fill_(epoch)
        drawn.append([collator.draw_phrase(row) for row in rows])
        # Neither the order of the rows nor who asks matters.
        assert drawn[-1] == [again.draw_phrase(row) for row in reversed(rows)][::-1]
    counts = Counter(phrase for epoch in drawn for phrase in epoch)  # 1,200 draws, 400 expected each, sigma 16
    assert all(abs(counts[phrase] - 400) < 5 * 16 for phrase in "abc")
    assert all({epoch[index] for epoch in drawn} == {"a", "b", "c"} for index in range(len(rows)))
    assert TrainingCollator(None, seed=4).draw_phrase(rows[0]) in "abc"


def test_repeated_rows_of_a_mixture_draw_phrases_of_their_own():
    collator, sentences = TrainingCollator(None, seed=3, has_repetitions=True), ["a", "b", "c"]
    rows = [{"ref_id": ref_id, "sentences": sentences, "repetition": 0} for ref_id in range(30)]
    first = [collator.draw_phrase(row) for row in rows]
    assert first == [collator.draw_phrase(row) for row in rows]
    again = [row | {"repetition": 1} for row in rows]
    assert first != [collator.draw_phrase(row) for row in again]
    # Outside a mixture, a column of that name is only the data set's own.
    alone = TrainingCollator(None, seed=3)
    assert [alone.draw_phrase(row) for row in rows] == [alone.draw_phrase(row) for row in again]


def test_a_trainer_draws_by_repetition_for_a_mixture_only(make_trainer, shapes):
    rows = shapes["train"].take(4)
    rows = rows.add_column("repetition", [0] * len(rows))
    mixture = Mixture(rows, [], leaks_stay=False)
    assert make_trainer(rows=mixture).data_collator.has_repetitions
    assert not make_trainer(rows=rows).data_collator.has_repetitions


PNG = SOUND["image"]["bytes"]
GREAT_HEADER = PNG[:16] + (60_000).to_bytes(4, "big") * 2 + PNG[24:]
BAD_ROWS = [
    ({"image": None}, OSError),
    ({"image": {"path": None, "bytes": None}}, OSError),
    ({"image": {"path": "/dev/zero", "bytes": None}}, OSError),
    ({"image": {"path": None, "bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n"}}, OSError),
    ({"image": {"path": None, "bytes": GREAT_HEADER}}, OSError),
    ({"mask": {"size": [48, 64], "counts": None}}, ValueError),
    ({"mask": {"size": [48, 64], "counts": "~"}}, ValueError),
    ({"sentences": []}, ValueError),
    ({"sentences": None}, ValueError),
    ({"sentences": [None]}, ValueError),
    ({"sentences": [" "]}, ValueError),
    ({"sentences": ["a cat", "x" * 10_001]}, ValueError),
]


@pytest.mark.parametrize("collator_class", [TrainingCollator, EvaluationCollator])
@pytest.mark.parametrize("part, error", BAD_ROWS)
def test_a_broken_row_of_a_stranger_is_named(make_trainer, monkeypatch, part, error, collator_class):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    processor = make_trainer().processing_class
    collator = collator_class(processor, 0) if collator_class is TrainingCollator else collator_class(processor)
    collator([SOUND])
    with pytest.raises(error, match="row with ref_id 7 cannot be read"):
        collator([SOUND | {"ref_id": 6}, SOUND | part])


def test_a_row_without_a_number_is_named(make_trainer):
    with pytest.raises(ValueError, match="row with ref_id None cannot be read .its ref_id is no whole number"):
        EvaluationCollator(make_trainer().processing_class)([SOUND | {"ref_id": None}])
