"""DetrisTrainer: optimizer and schedule, training, losses that are not finite, streamed rows, the Hub."""

import itertools

import numpy as np
import pytest
import torch
from helpers.runs import losses
from huggingface_hub.utils import httpx
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from benchmarks.counting import Operations
from data.streaming import StreamedRows, parquet_files

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


def fail_at(trainer, step: int, value: float) -> list[torch.Tensor]:
    """Spoil the loss of a call of the model's; return a list that gets the mask head's weights before each call."""
    model, forward, seen = trainer.model, trainer.model.forward, []

    def failing_forward(*args, **kwargs):
        output = forward(*args, **kwargs)
        if model.training:
            seen.append(model.mask_head.output_projection.weight.detach().clone())
            if len(seen) == step:
                output.loss = output.loss * value
        return output

    model.forward = failing_forward
    return seen


@pytest.mark.parametrize(
    "options, last",
    [
        ({"logging_steps": 1}, 4),
        ({"logging_steps": 100, "save_steps": 2}, 4),  # found out when the next checkpoint is due
        ({"logging_steps": 3, "save_steps": 2, "save_total_limit": 1}, 4),
        ({"logging_steps": 5, "save_steps": 100}, 5),
        ({"logging_steps": 100, "save_steps": 100}, 7),  # when training ends
        ({"logging_steps": 100, "save_steps": 100, "eval_strategy": "steps", "eval_steps": 5}, 5),
        ({"logging_steps": 100, "save_steps": 100, "gradient_accumulation_steps": 2, "max_steps": 4}, 4),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_training_and_names_its_step(make_trainer, tmp_path, options, last):
    trainer = make_trainer(rows=8, **{"max_steps": 7, "save_strategy": "steps", "save_steps": 2} | options)
    accumulated = trainer.args.gradient_accumulation_steps
    weights = fail_at(trainer, 4, float("inf" if last == 5 else "nan"))
    bad = -(-4 // accumulated)
    with pytest.raises(FloatingPointError, match=f"^The loss of step {bad} is not finite: .* after step {last}. The"):
        trainer.train()
    assert trainer.state.global_step == last and len(weights) == last * accumulated
    assert all(np.isfinite(list(entry.values())).all() for entry in trainer.state.log_history)
    assert all(entry["step"] < bad for entry in trainer.state.log_history)
    checkpoints = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert checkpoints == ({"checkpoint-2"} if trainer.args.save_steps == 2 else set())
    for name in checkpoints:
        saved = load_file(tmp_path / "run" / name / "model.safetensors")
        assert torch.equal(saved["mask_head.output_projection.weight"], weights[2])
    with pytest.raises(FloatingPointError, match=f"step {bad}"):  # also if the program goes on
        trainer.save_model()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_nothing_is_read_from_the_device_between_two_logs(make_trainer, monkeypatch):
    """The CPU stands for a device: weights and batches are marked as lying on one."""
    monkeypatch.setattr("input_checks_detris.can_be_read", lambda tensor: False)
    trainer, steps = make_trainer(rows=8, max_steps=5, logging_steps=5, gradient_accumulation_steps=2), []
    on_device = torch.zeros((), dtype=torch.int64)
    operations = Operations([on_device, *trainer.model.parameters(), *trainer.model.buffers()])
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: {name: on_device + value for name, value in prepare(inputs).items()}

    class CountTwoSteps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)
            if state.global_step == 2:
                operations.__enter__()
            if state.global_step == 4:
                operations.__exit__()

    trainer.add_callback(CountTwoSteps())
    trainer.train()
    assert steps == [0, 1, 2, 3, 4] and operations.launches > 1000
    assert operations.reads == []


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


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_in_pinned_memory_are_copied_without_a_wait(make_trainer, prepared, pinned):
    streamed = StreamedRows(parquet_files(str(prepared))["train"])
    options = {"use_cpu": False, "dataloader_pin_memory": pinned}  # `use_cpu` would switch it off
    trainers = [make_trainer(rows=rows, **options) for rows in (8, streamed)]
    loaders = [trainer.get_train_dataloader() for trainer in trainers] + [trainers[0].get_eval_dataloader()]
    assert [loader.pin_memory for loader in loaders] == [pinned] * 3
    assert [loader._non_blocking for loader in loaders] == [pinned] * 3


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


# --- the Hub --------------------------------------------------------------------------------------------------------


def test_a_hub_that_is_out_of_reach_refuses_the_run_in_one_sentence(make_trainer, monkeypatch):
    def fail(*args, **kwargs):
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.create_repo", fail)
    with pytest.raises(OSError, match="The Hub cannot be reached .Connection refused.: check the network"):
        make_trainer(push_to_hub=True, hub_model_id="someone/x")
