"""Arguments: read from a file and the command line, and refused by name and value."""

import json
import re

import pytest
import torch
import yaml
from helpers.runs import MODEL_CONFIG

from configuration_detris import DetrisConfig
from training.arguments import DetrisTrainingArguments, ModelArguments, check_fits_model, parse_arguments

NAN, INF = float("nan"), float("inf")
WRONG_NUMBERS = {
    "learning_rate": [NAN, INF, -1e-4, "fast"],
    "adapter_learning_rate_multiplier": [NAN, -1],
    "weight_decay": [NAN, -1],
    "adam_beta1": [NAN, 1, -0.1],
    "adam_beta2": [NAN, 1.5],
    "adam_epsilon": [NAN, 0, -1e-8],
    "max_grad_norm": [NAN, INF, -1],
    "milestone_factor": [NAN, INF, 0, -0.1],
    "num_train_epochs": [NAN, INF, 0, -3],
    "max_steps": [0, -2, 1.5],
    "warmup_steps": [NAN, INF, -1],
    "per_device_train_batch_size": [0, -4, 2.5],
    "per_device_eval_batch_size": [0, -4],
    "global_batch_size": [0, -8],
    "gradient_accumulation_steps": [0, -1],
    "dataloader_num_workers": [-1, 0.5],
    "dataloader_prefetch_factor": [0],
    "logging_steps": [0, -1, NAN],
    "save_steps": [0, -1, INF],
    "eval_steps": [0, -1, NAN],
    "eval_delay": [-1, NAN],
    "eval_accumulation_steps": [0, -1],
    "save_total_limit": [0, -1],
    "early_stopping_patience": [0, -1],
    "seed": [-1, 2**32, 1.5, 10**400],
    "data_seed": [-1, 2**32, 10**400],
    "image_size": [0, -32, 32.5],
    "max_text_length": [0, -1],
    "max_train_samples": [0, -1],
    "max_eval_samples": [0, -1],
    "shuffle_buffer_size": [0, -1, 2.5],
}


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
        ({"test_splits": ["val", "a:b:c:val"]}, "'a:b:c:val'.*'refcoco\\+:unc:testA'"),
        ({"test_splits": "val"}, "test_splits is 'val': give a list"),
        ({"max_eval_samples": 0}, "max_eval_samples is 0: give a whole number of at least 1, or leave it out"),
        ({"max_train_samples": -1}, "max_train_samples is -1: give a whole number of at least 1"),
        ({"metric_for_best_model": "miou"}, "metric_for_best_model is 'miou': give one of mean_iou"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        (
            {"bf16_full_eval": True, "push_to_hub": True},
            "bf16_full_eval rounds the weights .* or evaluate by autocast",
        ),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter is true, .* leave it out"),
    ],
)
def test_an_invalid_argument_is_refused_by_name(config, tmp_path, changes, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(path)])


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG_NUMBERS.items() for value in values])
def test_a_number_that_is_invalid_is_refused_by_name_and_value(config, tmp_path, name, value):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | {name: value, "do_train": True, "output_dir": str(tmp_path / "run")}))
    written = str(value) if isinstance(value, str) or int(value if abs(value) < INF else 0) != value else repr(value)
    if value == 10**400:  # of which not all digits are printed
        written = "1" + "0" * 30
    with pytest.raises(
        ValueError, match=rf"(?s){name}.* {re.escape(written)}|{name}.*'{re.escape(written)}'"
    ) as refused:
        parse_arguments([str(path)])
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"milestones": [35, 25]}, r"milestones is \[35, 25\]: give each epoch once, in their order"),
        ({"milestones": [35, 35]}, "milestones is .*once"),
        ({"milestones": [NAN]}, "A milestone is nan: give a finite number above 0"),
        ({"milestones": [-1]}, "A milestone is -1"),
        ({"milestones": 35}, "milestones is 35.0: give a list"),
        ({"warmup_steps": 100}, "warmup_steps is 100.0, but .* such as constant_with_warmup"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics is true"),
        (
            {"parallelism_config": {"tp_size": 2}},
            "parallelism_config is given, but .* data parallelism alone",
        ),
        ({"prediction_loss_only": True}, "prediction_loss_only is true, but an evaluation gives metrics"),
        ({"include_for_metrics": ["inputs"]}, r"include_for_metrics is \['inputs'\], .* leave it out"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers is true, .* dataloader_num_workers"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config sets split_batches to true, .* leave"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config sets dispatch_batches to true"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config sets even_batches to false"),
        ({"learning_rate": True}, "learning_rate is True: give a finite number"),
        ({"learning_rate": [1e-4]}, r"learning_rate is \[0.0001\]: give a finite number"),
        ({"learning_rate": None}, "learning_rate is None"),
        ({"model_config": 0}, "model_config is 0: give a mapping"),
        ({"vision_backbone": "a/b/nosuch"}, "vision_backbone is a/b/nosuch: there is no such file or folder"),
        ({"test_splits": ["path/own"]}, "test_splits has 'path/own', a data set without a split: .*path/own:val"),
        ({"shapes_config": []}, r"shapes_config is \[\]: give a mapping"),
        ({"tokenizer": ""}, "tokenizer is empty: give a value, or leave it out"),
        ({"peft_method": ""}, "peft_method is empty"),
        ({"metric_for_best_model": ""}, "metric_for_best_model is ''"),
        ({"data_root": ""}, "data_root is empty"),
        ({"resume_from_checkpoint": True}, "resume_from_checkpoint is True: give text"),
        ({"dataset": ["refcoco/unc"]}, r"dataset is \['refcoco/unc'\]: give text"),
        ({"train_split": None}, "train_split is None: give text"),
        ({"output_dir": ["a"]}, r"output_dir is \['a'\]: give text"),
        ({"model_name_or_path": {"a": 1}}, "model_name_or_path is {'a': 1}: give text"),
        ({"metric_for_best_model": ["x"]}, r"metric_for_best_model is \['x'\]: give text"),
        ({"eval_strategy": False}, "eval_strategy is False: give text, between quotes"),
        ({"model_config": "[" * 50_000}, "model_config is .*which is not valid JSON"),
        ({1: 2, "learning_rat": 3}, r"sets \[1, 'learning_rat'\], which are no arguments"),
        ({"test_splits": [1]}, r"test_splits is \[1\]: give a list"),
        ({"test_splits": ["hub:someone/x"]}, "'hub:someone/x': give .* such as .* 'hub:someone/mine:val'"),
        ({"columns": ["photo"]}, "columns has 'photo': write <key>=<column>, such as image=picture"),
        ({"columns": ["image="]}, "columns has 'image=': write <key>"),
        ({"columns": {"image": 1}}, r"columns is {'image': 1}: give what each"),
        ({"columns": "image=photo"}, "columns is 'image=photo': give what each"),
        ({"columns": ["image=a", "image=b"]}, "columns names image twice, as a and b"),
    ],
)
def test_nothing_that_is_given_is_ignored(config, tmp_path, changes, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(path)])


def test_columns_come_as_pairs_or_as_a_mapping(config, tmp_path):
    path, columns = tmp_path / "config.yaml", {"image": "photo", "text": "caption = phrase"}
    path.write_text(yaml.safe_dump(config | {"columns": columns}))
    assert parse_arguments([str(path)])[1].columns == columns
    assert parse_arguments([str(path), "--columns", "image=file", "mask=rle"])[1].columns == {
        "image": "file",
        "mask": "rle",
    }
    path.write_text(yaml.safe_dump(config | {"columns": [f"{what}={name}" for what, name in columns.items()]}))
    assert parse_arguments([str(path)])[1].columns == columns
    path.write_text(yaml.safe_dump(config))
    assert parse_arguments([str(path)])[1].columns == {}


@pytest.mark.parametrize("name", ["best_model.pth", "ViT-B-16.pt", "model.safetensors", "weights"])
def test_a_file_of_weights_is_to_be_converted_first(tmp_path, name):
    path = tmp_path / name
    if name == "weights":
        path.touch()
    command = rf"convert it first, by `python convert_detris_checkpoint.py {path} <folder>`"
    with pytest.raises(ValueError, match=f"model_name_or_path is {path}, a file of weights: {command}"):
        ModelArguments(model_name_or_path=str(path))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no arguments"),
        (b"- 1", "holds no arguments"),
        (b"a: [", "is not YAML"),
        (b"\xff\xfe", "is not YAML"),
        (b"[" * 10**4, "is not YAML"),
        (b"model_config: {a: &a [1, 2]}\nshapes_config: {b: *a}", "is not YAML .*an alias, .a"),
        (b"seed: 1" + b"0" * 5000, "is not YAML"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_a_file_without_arguments_is_refused(tmp_path, content, message):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.yaml {message}"):
        parse_arguments([str(tmp_path / "config.yaml")])


def test_backbones_that_are_trained_must_be_saved():
    args = DetrisTrainingArguments(do_train=True, save_adapter_only=True, report_to="none")
    check_fits_model(args, DetrisConfig())
    with pytest.raises(ValueError, match="but freeze_backbones is false: leave save_adapter_only out"):
        check_fits_model(args, DetrisConfig(freeze_backbones=False))


def test_one_backbone_beside_a_saved_model_is_refused():
    with pytest.raises(ValueError, match="either model_name_or_path, or both"):
        ModelArguments(model_name_or_path="saved", vision_backbone="vision")


def test_arguments_are_not_abbreviated(config_file, capsys):
    with pytest.raises(ValueError, match="--learning_rat"):
        parse_arguments([config_file, "--learning_rat", "1"])


@pytest.mark.parametrize(
    "processes, accumulated, global_batch_size, of_a_process",
    [(1, 1, None, 6), (1, 1, 32, 32), (2, 1, 32, 16), (8, 1, 32, 4), (8, 4, 32, 1), (2, 3, 12, 2)],
)
def test_the_global_batch_is_shared_out(monkeypatch, processes, accumulated, global_batch_size, of_a_process):
    monkeypatch.setattr(DetrisTrainingArguments, "world_size", processes)
    args = DetrisTrainingArguments(
        per_device_train_batch_size=6,
        gradient_accumulation_steps=accumulated,
        global_batch_size=global_batch_size,
        report_to="none",
    )
    args._n_gpu = 8  # that one process sees are not its own
    assert args.per_device_train_batch_size == args.train_batch_size == of_a_process


@pytest.mark.parametrize(
    "device, pinned, expected", [("cuda", True, True), ("cuda", False, False), ("mps", True, False)]
)
def test_batches_are_copied_without_a_wait_where_that_is_safe(monkeypatch, device, pinned, expected):
    monkeypatch.setattr(DetrisTrainingArguments, "device", torch.device(device))
    args = DetrisTrainingArguments(use_cpu=False, dataloader_pin_memory=pinned, report_to="none")
    assert args.accelerator_config.non_blocking is expected


def test_a_global_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(DetrisTrainingArguments, "world_size", 4)
    with pytest.raises(ValueError, match="global_batch_size is 20: .* multiple of 8, .* 4 processes"):
        DetrisTrainingArguments(global_batch_size=20, gradient_accumulation_steps=2, report_to="none")


@pytest.mark.parametrize(
    "available, arguments, message",
    [
        (False, {"quantize_backbones": "4bit"}, "needs bitsandbytes: install it"),
        (True, {"quantize_backbones": "2bit"}, "quantize_backbones is '2bit': give one of 4bit, 8bit"),
    ],
)
def test_quantised_backbones_are_refused_early(model_arguments, monkeypatch, available, arguments, message):
    monkeypatch.setattr("training.arguments.is_bitsandbytes_available", lambda: available)
    with pytest.raises(ValueError, match=message):
        ModelArguments(**model_arguments, **arguments)
