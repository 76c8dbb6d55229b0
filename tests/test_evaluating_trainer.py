"""The evaluation: counts and masks of every object, what the host waits for, and what it refuses."""

import io

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from helpers.models import randomize
from PIL import Image
from torch.utils.data import BatchSampler

from benchmarks.counting import Operations

pytestmark = pytest.mark.usefixtures("one_thread")


def predict(trainer, rows) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Counts `(R, K, 3)`, and for each row its masks as lists of pixels."""
    masks = {}

    def receive(index, one):
        masks[index] = [one.mask(phrase).tolist() for phrase in range(len(one.counts))]

    counts = trainer.predict(rows, receive=receive).predictions
    return counts, [masks[index] for index in range(len(rows))]


@torch.no_grad()
def test_counts_equal_those_of_one_phrase_at_a_time(make_trainer, shapes):
    trainer = make_trainer(model_config={"mask_threshold": 0.25})  # untrained, it segments half of the images
    output = trainer.predict(shapes["val"])
    model, processor = trainer.model.eval(), trainer.processing_class
    assert output.label_ids.tolist() == shapes["val"]["ref_id"]
    ious = []
    for row, counts in zip(shapes["val"], output.predictions, strict=True):
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert (counts[len(row["sentences"]) :] == -100).all()
        for sentence, count in zip(row["sentences"], counts.tolist()):
            inputs = processor(images=image, text=sentence, return_tensors="pt")
            logits = model(inputs["pixel_values"], inputs["input_ids"])
            (mask,) = processor.post_process_referring_segmentation(logits, [image.size[::-1]])
            mask, truth = mask.numpy(), row["mask"] == 1
            assert count == pytest.approx([(mask & truth).sum(), (mask | truth).sum(), truth.sum()], abs=2)
            ious.append((mask & truth).sum() / (mask | truth).sum())
    assert 0.01 < np.mean(ious) < 0.99
    assert output.metrics["test_mean_iou"] == pytest.approx(np.mean(ious), abs=1e-3)
    assert trainer.evaluate()["eval_mean_iou"] == output.metrics["test_mean_iou"]


@pytest.fixture
def talkative(shapes):
    """Val, in which the second object has 101 phrases, all others at most 3."""
    phrases = [f"the {number} thing" for number in range(101)]
    return shapes["val"].map(lambda row, index: {"sentences": phrases if index == 1 else row["sentences"]}, True)


def test_phrases_go_through_in_chunks_to_the_same_counts_and_masks(make_trainer, talkative):
    """Of at most `per_device_eval_batch_size` phrases, whose images alone go through with them."""
    outputs = {}
    for size in (1, 8, 1000):
        trainer = make_trainer(model_config={"mask_threshold": 0.35}, per_device_eval_batch_size=size)
        randomize(trainer.model)  # so that each phrase gets a mask of its own
        forward, sizes = trainer.model.forward, []

        def recording_forward(*args, forward=forward, sizes=sizes, **inputs):
            sizes.append((len(inputs["input_ids"]), len(inputs["pixel_values"])))
            return forward(*args, **inputs)

        trainer.model.forward = recording_forward
        outputs[size] = predict(trainer, talkative)
        phrases = sum(map(len, talkative["sentences"]))
        assert sum(number for number, _ in sizes) == phrases and max(number for number, _ in sizes) == min(
            size, phrases
        )
        if size == 1:
            assert len(sizes) == phrases
        assert all(images <= number for number, images in sizes) or size == 1000
    whole_counts, whole_masks = outputs.pop(1000)
    for counts, masks in outputs.values():
        assert np.array_equal(counts, whole_counts) and masks == whole_masks
    segmented = whole_counts[..., 1][whole_counts[..., 0] >= 0]
    assert len(segmented) == phrases and len(set(segmented.tolist())) > 9


def test_arguments_about_gathering_change_nothing(make_trainer, talkative):
    options = {"eval_do_concat_batches": False, "eval_accumulation_steps": 1, "eval_use_gather_object": True}
    plain, other = make_trainer(), make_trainer(**options)
    expected, found = plain.predict(talkative), other.predict(talkative)
    assert np.array_equal(found.predictions, expected.predictions)
    assert np.array_equal(found.label_ids, expected.label_ids)
    figures = {name for name in expected.metrics if "iou" in name or "precision" in name}
    assert figures and all(found.metrics[name] == expected.metrics[name] for name in figures)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_logits_that_are_not_finite_stop_an_evaluation_and_name_the_object(make_trainer, shapes, value, command):
    """As masks they would be empty: mIoU 0, and right for every phrase that names nothing."""
    trainer, rows = make_trainer(), shapes["val"]
    forward, seen = trainer.model.forward, []

    def failing_forward(*args, **inputs):
        output = forward(*args, **inputs)
        seen.extend(range(len(output.logits)))
        if len(seen) > len(rows[0]["sentences"]):
            output.logits[-1, 0, 0] = value
        return output

    trainer.model.forward = failing_forward
    with pytest.raises(FloatingPointError, match=f"logits are not finite .* with ref_id {rows[1]['ref_id']}:"):
        getattr(trainer, command)(rows)


@pytest.mark.parametrize("keeps_masks", [False, True])
def test_the_host_waits_once_a_batch(make_trainer, shapes, monkeypatch, keeps_masks):
    monkeypatch.setattr("input_checks_detris.can_be_read", lambda tensor: False)
    trainer = make_trainer(per_device_eval_batch_size=4, model_config={"mask_threshold": 0.25})
    received = {}
    trainer.receive, trainer.evaluated_rows = received.__setitem__ if keeps_masks else None, 3
    rows = [shapes["val"][index] | {"sentences": ["a", "b", "a b", "b a"][: 4 - index]} for index in range(3)]
    inputs, model = trainer._prepare_inputs(trainer.evaluation_collator(rows)), trainer.model.eval()
    on_device = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    with Operations([*on_device, *model.parameters(), *model.buffers()]) as operations:
        trainer.prediction_step(model, inputs, prediction_loss_only=False)
    assert operations.reads == ["torch.Tensor.cpu"]
    (segmented,) = trainer.segmented
    assert [one.ref_id for one in segmented] == [row["ref_id"] for row in rows]
    for one, row in zip(segmented, rows, strict=True):
        assert one.counts.shape == (len(row["sentences"]), 3) and (one.counts[:, 2] == row["mask"].sum()).all()
    assert list(received) == (list(range(3)) if keeps_masks else [])
    for index, one in received.items():
        truth = rows[index]["mask"] == 1
        for phrase, counts in enumerate(one.counts.tolist()):
            mask = one.mask(phrase) == 1
            assert counts == [(mask & truth).sum(), (mask | truth).sum(), truth.sum()]


def test_true_masks_reach_the_device_in_bits(make_trainer, shapes):
    rows = [shapes["val"][index] for index in range(3)]
    inputs = make_trainer().evaluation_collator(rows)
    expected = [np.packbits(row["mask"] != 0) for row in rows]
    assert inputs["truths"].dtype == torch.uint8 and np.array_equal(inputs["truths"], np.concatenate(expected))
    assert [(one.ref_id, one.phrases, one.size) for one in inputs["objects"]] == [
        (row["ref_id"], len(row["sentences"]), row["mask"].shape) for row in rows
    ]


def test_workers_that_live_on_are_kept_for_the_rows_that_are_evaluated_again(make_trainer, shapes):
    options = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    trainer = make_trainer(**options)
    state = torch.random.get_rng_state()
    figures, workers = [], set()
    for _ in range(3):
        metrics = trainer.evaluate()
        figures.append({name: value for name, value in metrics.items() if "iou" in name or "precision" in name})
        loader = trainer.callback_handler.eval_dataloader
        assert loader.prefetch_factor == 3
        workers |= {worker.pid for worker in loader._iterator._workers}
    assert len(workers) == 1 and figures[0] == figures[1] == figures[2]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert trainer.predict(shapes["testA"]).label_ids.tolist() == shapes["testA"]["ref_id"]
    assert not trainer.callback_handler.eval_dataloader.persistent_workers
    alone = make_trainer().evaluate()
    assert figures[0] == {name: alone[name] for name in figures[0]}


@pytest.mark.parametrize(
    "options", [{"bf16_full_eval": True}, {"bf16": True}], ids=lambda options: next(iter(options))
)
def test_in_bfloat16_masks_are_all_but_the_same(make_trainer, shapes, options):
    masks = []
    for arguments in ({}, options):
        trainer = make_trainer(do_train=False, model_config={"mask_threshold": 0.5}, **arguments)
        randomize(trainer.model)
        masks.append(predict(trainer, shapes["val"])[1])
        half = trainer.model.mask_head.output_projection.weight.dtype
        assert half == (torch.bfloat16 if "bf16_full_eval" in arguments else torch.float32)
    ours, theirs = (np.concatenate([np.ravel(row) for row in each]) == 1 for each in masks)
    assert 0.1 < theirs.mean() < 0.9 and 0.9 < (ours & theirs).sum() / (ours | theirs).sum() < 1


@pytest.mark.parametrize("processes, rows", [(2, 7), (2, 8), (3, 1), (3, 5), (3, 7), (4, 9)])
def test_objects_that_fill_up_the_last_batches_are_not_segmented(make_trainer, shapes, monkeypatch, processes, rows):
    """accelerate gives them to a process for a second time, or to several processes if there are fewer than these."""
    trainer, received, turns = make_trainer(per_device_eval_batch_size=2), [], []
    trainer.evaluated_rows, trainer.receive = rows, lambda index, one: received.append((index, one.ref_id))
    monkeypatch.setattr(type(trainer.args), "world_size", processes)
    for process in range(processes):
        monkeypatch.setattr(type(trainer.args), "process_index", process)
        trainer.segmented = []
        for batch in BatchSamplerShard(BatchSampler(range(rows), 2, drop_last=False), processes, process):
            inputs = trainer._prepare_inputs(trainer.evaluation_collator([shapes["train"][row] for row in batch]))
            trainer.prediction_step(trainer.model.eval(), inputs, prediction_loss_only=False)
        turns.append([[one.ref_id for one in batch] for batch in trainer.segmented])
    ref_ids = shapes["train"]["ref_id"][:rows]
    assert sorted(received) == list(enumerate(ref_ids))  # each row once, by its index
    assert [ref_id for turn in zip(*turns, strict=True) for batch in turn for ref_id in batch] == ref_ids
