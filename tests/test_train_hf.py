"""`train_hf.py` from arguments to predictions, on backbones of two random layers and a few synthetic images."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from data.shapes import load_shapes
from train_hf import (
    DataArguments,
    DetrisTrainer,
    DetrisTrainingArguments,
    ModelArguments,
    TrainingCollator,
    build_model,
    load_splits,
    main,
    parse_arguments,
    read_image,
    select_split,
)

ROOT = Path(__file__).parents[1]
SIZES = {"train": 14, "val": 4, "testA": 3, "testB": 0, "unseen": 0}
MODEL_CONFIG = {
    "vision_adapter_layers": [1],
    "vision_adapter_dim": 16,
    "text_adapter_layers": [0],
    "text_adapter_dim": 16,
    "aligner_attention_dim": 16,
    "aligner_attention_heads": 2,
    "feature_layers": [0, 1],
    "decoder_dim": 16,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "decoder_ffn_dim": 16,
    "mask_threshold": 0.1,  # after a few steps the model then segments parts of the images
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model_arguments(tiny_backbones):
    return {
        "vision_backbone": str(tiny_backbones / "vision"),
        "text_backbone": str(tiny_backbones / "text"),
        "image_size": 32,
        "max_text_length": 24,
    }


@pytest.fixture(scope="module")
def config(model_arguments):
    """What an argument file for the tiny model holds."""
    return model_arguments | {
        "model_config": MODEL_CONFIG,
        "shapes_config": {"sizes": SIZES, "image_size": 48},
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "disable_tqdm": True,
        "report_to": "none",
    }


@pytest.fixture
def config_file(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"output_dir": str(tmp_path / "run")}))
    return str(path)


@pytest.fixture(scope="module")
def shapes():
    splits = load_shapes(sizes=SIZES, image_size=48)
    return splits.cast_column("image", datasets.Image(decode=False))


@pytest.fixture
def make_trainer(model_arguments, shapes, tmp_path):
    """Builds a trainer over the first `rows` objects of train; further arguments go to DetrisTrainingArguments."""

    def make(rows: int = 20, model_config: dict | None = None, **arguments) -> DetrisTrainer:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "do_train": True,
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "report_to": "none",
        }
        args = DetrisTrainingArguments(**defaults | arguments)
        torch.manual_seed(args.seed)
        model, processor = build_model(
            ModelArguments(**model_arguments, model_config=MODEL_CONFIG | (model_config or {}))
        )
        return DetrisTrainer(model, args, processor, shapes["train"].take(rows), shapes["val"])

    return make


def losses(trainer: DetrisTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, dump", [(".yaml", yaml.safe_dump), (".json", json.dumps)])
def test_arguments_come_from_a_file_and_the_command_line_wins(config, tmp_path, suffix, dump):
    path = tmp_path / f"config{suffix}"
    path.write_text(dump(config | {"learning_rate": "5e-4", "milestones": [3, 4.5], "seed": 7}))
    model_args, data_args, training_args = parse_arguments(
        [str(path), "--seed", "8", "--shapes_config", '{"seed": 3}', "--test_splits", "val", "testA"]
    )
    assert (training_args.learning_rate, training_args.milestones, training_args.seed) == (5e-4, [3, 4.5], 8)
    assert model_args.model_config == MODEL_CONFIG
    assert (data_args.shapes_config, data_args.test_splits) == ({"seed": 3}, ["val", "testA"])


def test_the_defaults_are_the_papers(model_arguments):
    _, _, args = parse_arguments(
        [f"--{name}={value}" for name, value in model_arguments.items()] + ["--do_train", "--output_dir", "unused"]
    )
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (1e-4, 0, 0)
    assert (args.milestones, args.milestone_factor, args.num_train_epochs) == ([35, 55], 0.1, 65)
    assert args.load_best_model_at_end and args.metric_for_best_model == "mean_iou" and args.greater_is_better
    assert args.eval_strategy == args.save_strategy == "epoch"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rat": 1}, "learning_rat"),
        ({"model_config": {"decoder_width": 8}}, "decoder_width"),
        ({"model_name_or_path": "elsewhere"}, "either model_name_or_path"),
        ({"model_config": [1]}, "model_config"),
    ],
)
def test_what_no_argument_can_be_is_refused_by_name(config, tmp_path, changes, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(path)])


def test_nothing_to_do_is_an_error(config_file):
    with pytest.raises(ValueError, match="--do_train"):
        main([config_file])


# --- data ---------------------------------------------------------------------------------------------------------


def test_a_split_that_is_missing_or_empty_is_refused_with_those_there_are(shapes):
    with pytest.raises(ValueError, match="'test' does not exist.*'val': "):
        select_split(shapes, "test", None)
    with pytest.raises(ValueError, match="'testB' is empty"):
        select_split(shapes, "testB", None)
    assert len(select_split(shapes, "val", 3)) == 3
    assert len(select_split(shapes, "val", 10**6)) == len(shapes["val"])


def test_an_unknown_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="refcoco/unc"):
        load_splits(DataArguments(dataset="refcocoo"))
    with pytest.raises(ValueError, match="refcocoo"):
        load_splits(DataArguments(dataset="refcocoo/unc", data_root=str(tmp_path)))


def test_a_saved_folder_gives_the_same_rows(shapes, tmp_path):
    datasets.DatasetDict({name: shapes[name] for name in ("train", "val")}).save_to_disk(tmp_path / "saved")
    loaded = load_splits(DataArguments(dataset=str(tmp_path / "saved")))
    assert loaded["val"]["sentences"] == shapes["val"]["sentences"]
    assert np.array_equal(read_image(loaded["val"][2]), read_image(shapes["val"][2]))


@pytest.mark.parametrize("content", [None, b"no image", "truncated"])
def test_a_missing_or_broken_image_is_named_with_its_row(shapes, tmp_path, content):
    row = dict(shapes["val"][0])
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(row["image"]["bytes"][:-300] if content == "truncated" else content)
    row["image"] = {"path": str(path), "bytes": None}
    with pytest.raises(OSError, match=rf"broken\.png.*{row['ref_id']}"):
        read_image(row)


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


# --- optimizer and schedule ---------------------------------------------------------------------------------------


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


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, batch_size", [(32, 4), (40, 8)], ids=["within an epoch", "between epochs"])
def test_resuming_repeats_an_uninterrupted_run_bit_for_bit(make_trainer, tmp_path, rows, batch_size):
    options = {
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


# --- evaluation and prediction ------------------------------------------------------------------------------------


@torch.no_grad()
def test_counts_equal_those_of_one_phrase_at_a_time(make_trainer, shapes):
    trainer = make_trainer(model_config={"mask_threshold": 0.25})  # untrained, it segments half of the images
    output = trainer.predict(shapes["val"])
    model, processor = trainer.model.eval(), trainer.processing_class
    assert output.label_ids.tolist() == shapes["val"]["ref_id"]
    ious = []
    for row, counts in zip(shapes["val"], output.predictions, strict=True):
        image = read_image(row)
        assert (counts[len(row["sentences"]) :] == -100).all()
        for sentence, count in zip(row["sentences"], counts.tolist()):
            inputs = processor(images=image, text=sentence, return_tensors="pt")
            logits = model(inputs["pixel_values"], inputs["input_ids"])
            (mask,) = processor.post_process_referring_segmentation(logits, [image.size[::-1]])
            mask, truth = mask.numpy(), row["mask"] == 1
            assert count == pytest.approx([(mask & truth).sum(), (mask | truth).sum()], abs=2)
            ious.append((mask & truth).sum() / (mask | truth).sum())
    assert 0.01 < np.mean(ious) < 0.99
    assert output.metrics["test_mean_iou"] == pytest.approx(np.mean(ious), abs=1e-3)
    assert trainer.evaluate()["eval_mean_iou"] == output.metrics["test_mean_iou"]


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
        assert result["iou"] == pytest.approx(result["intersection"] / max(result["union"], 1), abs=1e-6)
    assert 0 < metrics["testA_mean_iou"] == pytest.approx(np.mean([result["iou"] for result in results]))
    assert len(list((folder / "masks").iterdir())) == len(list((folder / "overlays").iterdir())) == len(results)

    # What was saved can be evaluated, and fine-tuned at another size with a processor that fits.
    common = ["--model_name_or_path", str(run), "--output_dir", str(tmp_path / "again"), "--report_to", "none"]
    common += ["--shapes_config", json.dumps({"sizes": SIZES, "image_size": 48}), "--max_eval_samples", "5"]
    common += ["--per_device_eval_batch_size", "2", "--disable_tqdm", "true"]
    assert main([*common, "--do_eval"])["eval_mean_iou"] == metrics["eval_mean_iou"]
    main([*common, "--do_train", "--max_steps", "1", "--image_size", "48", "--max_text_length", "30"])
    model, processor = build_model(ModelArguments(model_name_or_path=str(tmp_path / "again")))
    assert (model.config.image_size, processor.image_processor.size["height"]) == (48, 48)
    assert (model.config.max_text_length, processor.max_text_length) == (30, 30)
    assert processor.mask_threshold == 0.1


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_does(config_file, tmp_path):
    """On 7 objects in batches of 2 for each of two processes, the last batch is filled up with 1 that must not count.

    `accelerate launch --cpu --num_processes 2` starts a single process unless MPI does the launching, hence the other
    two switches.
    """
    arguments = ["--max_eval_samples", "7", "--test_splits", "val"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    subprocess.run(
        [*accelerate, "train_hf.py", config_file, *arguments, "--do_train", "--do_predict", "--max_steps", "6"]
        + ["--per_device_train_batch_size", "2", "--use_cpu"],
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    run, alone = tmp_path / "run", tmp_path / "alone"
    assert json.loads((run / "trainer_state.json").read_text())["epoch"] == pytest.approx(6 / 10, rel=0.3)
    main(
        ["--model_name_or_path", str(run), "--output_dir", str(alone), "--do_eval", "--do_predict", *arguments]
        + ["--shapes_config", json.dumps({"sizes": SIZES, "image_size": 48}), "--disable_tqdm", "true"]
        + ["--per_device_eval_batch_size", "2", "--report_to", "none"]
    )
    timing = ("runtime", "per_second", "epoch", "preparation_time")
    for name in ("eval_results.json", "val_results.json"):
        of_two, of_one = (
            {key: value for key, value in json.loads((folder / name).read_text()).items() if not key.endswith(timing)}
            for folder in (run, alone)
        )
        assert of_two == of_one and any(0 < value < 1 for value in of_one.values())
    for name in ("results.jsonl", "masks"):
        of_two, of_one = (folder / "predictions" / "val" / name for folder in (run, alone))
        if of_two.is_dir():
            assert {path.name: path.read_bytes() for path in of_two.iterdir()} == {
                path.name: path.read_bytes() for path in of_one.iterdir()
            }
        else:
            assert of_two.read_text() == of_one.read_text() != ""
