"""DetrisTrainer: optimizer and schedule, training, streamed rows, evaluation."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
from helpers.models import randomize
from helpers.runs import losses
from huggingface_hub.utils import httpx
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from data.streaming import StreamedRows, parquet_files
from train_hf import main

pytestmark = pytest.mark.usefixtures("one_thread")


# --- optimizer and schedule -----------------------------------------------------------------------------------------


def test_adam_trains_adapters_and_head_in_two_groups(make_trainer):
    trainer = make_trainer(adapter_learning_rate_multiplier=0.25)
    optimizer, model = trainer.create_optimizer(), trainer.model
    assert type(optimizer) is torch.optim.Adam
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head, adapters = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.25e-3]
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    assert head and all(name.startswith(("neck.", "decoder.", "mask_head.")) for name in head)
    assert adapters and all("adapter" in name for name in adapters)
    assert head | adapters == {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.args.max_steps = 2
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert not moved & frozen
    assert any("detris_adapter" in name and "running_mean" in name for name in moved)
    assert moved & head and moved & adapters


@pytest.mark.parametrize("milestones", [[1, 3], [0.5, 2.25], []])
def test_the_schedule_is_torchs_multi_step_by_epochs(make_trainer, milestones):
    trainer = make_trainer(rows=30, gradient_accumulation_steps=2, milestones=milestones, milestone_factor=0.5)
    steps_per_epoch = 4  # 30 rows are 8 batches of 4
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(num_training_steps=4 * steps_per_epoch)
    reference_optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    quarters = [4 * epoch for epoch in milestones]  # the reference is stepped each quarter of an epoch
    reference = torch.optim.lr_scheduler.MultiStepLR(reference_optimizer, quarters, gamma=0.5)
    for _ in range(4 * steps_per_epoch):
        assert scheduler.get_last_lr() == [reference.get_last_lr()[0]] * 2
        optimizer.step()
        reference_optimizer.step()
        scheduler.step()
        reference.step()


def test_another_schedule_of_transformers_takes_the_place_of_milestones(make_trainer):
    trainer = make_trainer(lr_scheduler_type="linear", max_steps=10)
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(num_training_steps=10)
    for _ in range(5):
        trainer.optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.5e-3)


def test_a_step_that_overflows_in_fp16_moves_neither_weights_nor_schedule(make_trainer, monkeypatch):
    """On a CPU accelerate refuses fp16, so the trainer gets what fp16 brings with it: a scaler of gradients."""
    build = Trainer._build_accelerator_args
    monkeypatch.setattr(Trainer, "_build_accelerator_args", lambda *a, **k: build(*a, **k) | {"mixed_precision": "no"})
    trainer = make_trainer(rows=4, max_steps=5, milestones=[3], fp16=True)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight, seen = trainer.model.mask_head.output_projection.weight, []

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if len(seen) in (1, 2):
                weight.grad[0, 0] = torch.inf

        def on_step_end(self, args, state, control, **kwargs):
            scale, schedule = trainer.accelerator.scaler.get_scale(), trainer.lr_scheduler
            seen.append((weight.detach().clone(), scale, schedule.last_epoch, schedule.get_last_lr()[0]))

    trainer.add_callback(Record())
    trainer.train()
    weights, scales, steps, learning_rates = zip(*seen)
    assert [not torch.equal(*pair) for pair in itertools.pairwise(weights)] == [False, False, True, True]
    assert scales == (1024, 512, 256, 256, 256)
    assert steps == (1, 1, 1, 2, 3) and learning_rates == pytest.approx([1e-3] * 4 + [1e-4])


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rows, batch_size", [(32, 4), (40, 8)], ids=["within an epoch", "between epochs"])
@pytest.mark.parametrize("adapter_only", [False, True])
def test_resuming_repeats_an_uninterrupted_run_bit_for_bit(make_trainer, tmp_path, rows, batch_size, adapter_only):
    options = {
        "save_adapter_only": adapter_only,
        "rows": rows,
        "per_device_train_batch_size": batch_size,
        "milestones": [1.6],
        "milestone_factor": 0.3,
        "eval_strategy": "steps",  # which uses random numbers up
        "eval_steps": 7,
        "save_strategy": "steps",
        "save_steps": 10,
    }
    straight = make_trainer(max_steps=20, output_dir=str(tmp_path / "straight"), **options)
    straight.train()
    first = make_trainer(max_steps=10, output_dir=str(tmp_path / "parts"), **options)
    first.train()
    assert losses(first) == losses(straight)[:10]
    checkpoint = {path.name for path in (tmp_path / "parts" / "checkpoint-10").glob("*model.safetensors")}
    assert checkpoint == {"adapter_model.safetensors" if adapter_only else "model.safetensors"}
    second = make_trainer(max_steps=20, output_dir=str(tmp_path / "parts"), **options)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(straight) and len(losses(straight)) == 20
    resumed = second.model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.model.state_dict().items())


def test_worker_processes_that_live_on_draw_the_same_phrases(make_trainer):
    options = {"max_steps": 8, "model_config": {"aligner_dropout": 0.0, "decoder_dropout": 0.0}}
    alone = make_trainer(**options)
    alone.train()
    helped = make_trainer(**options, dataloader_num_workers=1, dataloader_persistent_workers=True)
    helped.train()
    assert losses(helped) == losses(alone)


@pytest.mark.slow
def test_the_checkpoint_with_the_best_mean_iou_is_kept(make_trainer):
    trainer = make_trainer(
        rows=8, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True
    )
    weights, figures = [], iter([0.2, 0.5, 0.4])

    def compute_metrics(results) -> dict[str, float]:
        weights.append(trainer.model.mask_head.output_projection.weight.detach().clone())
        return {"mean_iou": next(figures)}

    trainer.compute_metrics = compute_metrics
    trainer.train()
    assert torch.equal(trainer.model.mask_head.output_projection.weight, weights[1])
    assert not torch.equal(weights[1], weights[0]) and not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_step(make_trainer, tmp_path, value):
    trainer = make_trainer(max_steps=6, save_strategy="steps", save_steps=2)
    model, forward, calls = trainer.model, trainer.model.forward, []

    def failing_forward(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append(model.mask_head.output_projection.weight.detach().clone())
        if len(calls) == 4:
            output.loss = output.loss * value
        return output

    model.forward = failing_forward
    with pytest.raises(FloatingPointError, match="step 4"):
        trainer.train()
    assert torch.equal(model.mask_head.output_projection.weight, calls[-1])
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert torch.equal(saved["mask_head.output_projection.weight"], calls[2])


def test_activation_checkpointing_and_bfloat16_are_trainers_own_switches(make_trainer):
    def train(**options) -> list[float]:
        trainer = make_trainer(max_steps=3, **options)
        trainer.train()
        return losses(trainer)

    plain, checkpointed, half = train(), train(activation_checkpointing=True), train(bf16=True, use_cpu=True)
    assert checkpointed == pytest.approx(plain, rel=1e-5)
    assert half != plain and half == pytest.approx(plain, rel=0.05)


def test_an_empty_mask_is_trained_on_as_zeros(make_trainer, generalized):
    trainer = make_trainer(max_steps=2)
    rows = list(generalized["train"].take(2))
    assert rows[0]["mask"].any() and not rows[1]["mask"].any()
    batch = trainer.data_collator(rows)
    assert batch["labels"][0].any() and not batch["labels"][1].any()
    alone = trainer.data_collator(rows[1:])
    with torch.no_grad():
        output = trainer.model.eval()(**alone)
    # Binary cross-entropy to zeros is the mean of log(1 + exp(logit)).
    assert output.loss.item() == pytest.approx(torch.log1p(output.logits.exp()).mean().item(), rel=1e-5)
    trainer.train_dataset = generalized["train"]
    trainer.train()
    assert len(losses(trainer)) == 2 and np.isfinite(losses(trainer)).all()


# --- streamed rows --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_training_resumes_bit_for_bit(make_trainer, prepared, tmp_path, workers):
    files = parquet_files(str(prepared))["train"]
    assert len(files) == 3
    options = {
        "rows": StreamedRows(files, 8),
        "milestones": [1.5],
        "dataloader_num_workers": workers,
        "save_strategy": "steps",
        "save_steps": 7,
        "save_total_limit": 3,
    }
    straight = make_trainer(num_train_epochs=2, output_dir=str(tmp_path / "straight"), **options)
    result = straight.train()
    assert straight.state.max_steps == straight.state.global_step == 20 and straight.state.epoch == 2
    assert straight.num_examples(straight.get_train_dataloader()) == 38
    assert result.metrics["train_samples_per_second"] == pytest.approx(
        2 * 38 / result.metrics["train_runtime"], rel=0.01
    )
    assert [entry["learning_rate"] for entry in straight.state.log_history if "learning_rate" in entry] == (
        pytest.approx([1e-3] * 15 + [1e-4] * 5)
    )
    resumed = make_trainer(num_train_epochs=2, output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-7"))
    assert losses(resumed) == losses(straight) and len(losses(straight)) == 20
    weights = resumed.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in straight.model.state_dict().items())


def test_streamed_batches_hold_each_row_once_an_epoch(make_trainer, prepared):
    trainer = make_trainer(rows=StreamedRows(parquet_files(str(prepared))["train"]), num_train_epochs=3)
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda rows: seen.append([row["ref_id"] for row in rows]) or collate(rows)
    trainer.train()
    expected = [number for number in range(41) if number % 14 != 2]
    epochs = [[ref_id for batch in seen[first : first + 10] for ref_id in batch] for first in (0, 10, 20)]
    assert len(seen) == 30 and all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.slow
def test_a_streamed_run_is_not_resumed_by_another_number_of_workers(make_trainer, prepared, tmp_path):
    options = {"rows": StreamedRows(parquet_files(str(prepared))["train"]), "save_strategy": "steps", "save_steps": 2}
    make_trainer(max_steps=2, **options).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    make_trainer(max_steps=3, dataloader_num_workers=1, **options).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="to 1 workers in all processes, this one does to 2"):
        make_trainer(max_steps=3, dataloader_num_workers=2, **options).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="to 1 workers in all processes, this one does to 0"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=checkpoint)


# --- evaluation -----------------------------------------------------------------------------------------------------


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
        outputs[size] = (trainer.predict(talkative).predictions, trainer.predicted_masks)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"eval_do_concat_batches": False}, {"eval_accumulation_steps": 1}, {"eval_use_gather_object": True}],
    ids=lambda options: next(iter(options)),
)
def test_ways_of_gathering_change_nothing(config_file, make_trainer, talkative, tmp_path, options):
    plain, other = make_trainer(), make_trainer(**options)
    expected, found = plain.predict(talkative), other.predict(talkative)
    assert np.array_equal(found.predictions, expected.predictions)
    assert other.predicted_masks == plain.predicted_masks
    figures = {name for name in expected.metrics if "iou" in name or "precision" in name}
    assert figures and all(found.metrics[name] == expected.metrics[name] for name in figures)
    assert other.evaluate(talkative)["eval_mean_iou"] == expected.metrics["test_mean_iou"]
    arguments = [config_file, "--do_predict", "--test_splits", "val", "--do_eval"]
    arguments += [f"--{name}={value}" for name, value in options.items()]
    main(arguments)
    assert json.loads((tmp_path / "run" / "table.json").read_text())[0]["phrases"] > 0


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


def test_a_hub_that_is_out_of_reach_refuses_the_run_in_one_sentence(make_trainer, monkeypatch):
    def fail(*args, **kwargs):
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.create_repo", fail)
    with pytest.raises(OSError, match="The Hub cannot be reached .Connection refused.: check the network"):
        make_trainer(push_to_hub=True, hub_model_id="someone/x")
