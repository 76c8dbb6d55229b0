"""`train_hf.py` from arguments to predictions, on backbones of two random layers and a few synthetic images."""

import io
import json
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers.models import randomize
from helpers.refer_folder import HOSTILE_RLES, ReferFolder
from helpers.runs import MODEL_CONFIG, SIZES, losses
from huggingface_hub import ModelCard
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, CLIPTokenizer

import train_hf
from convert_detris_checkpoint import from_official
from data import prepare
from data.decoding import read_image, read_mask, read_whole_mask
from data.refer import RleMask, check_image
from data.shapes import load_shapes
from data.sources import open_records
from data.streaming import StreamedBatches, StreamedRows, parquet_files
from modeling_detris import DetrisForReferringSegmentation
from train_hf import (
    DataArguments,
    DetrisTrainingArguments,
    ModelArguments,
    build_model,
    load_rows,
    main,
    parse_arguments,
)
from training.collators import EvaluationCollator, TrainingCollator
from training.rows import Mixture, load_splits, select_split

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

pytestmark = pytest.mark.usefixtures("one_thread")


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
        ({"test_splits": ["val", "a:b:c:val"]}, "'a:b:c:val'.*'refcoco\\+:unc:testA'"),
        ({"test_splits": "val"}, "test_splits is 'val': give a list"),
        ({"max_eval_samples": 0}, "max_eval_samples is 0: give a whole number of at least 1, or leave it out"),
        ({"max_train_samples": -1}, "max_train_samples is -1: give a whole number of at least 1"),
        ({"metric_for_best_model": "miou"}, "metric_for_best_model is 'miou': give one of mean_iou"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
    ],
)
def test_an_invalid_argument_is_refused_by_name(config, tmp_path, changes, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(path)])


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
        ({"learning_rate": True}, "learning_rate is True: give a finite number"),
        ({"learning_rate": [1e-4]}, r"learning_rate is \[0.0001\]: give a finite number"),
        ({"learning_rate": None}, "learning_rate is None"),
        ({"model_config": 0}, "model_config is 0: give a mapping"),
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
    ],
)
def test_nothing_that_is_given_is_ignored(config, tmp_path, changes, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(path)])


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


def test_one_backbone_beside_a_saved_model_is_refused():
    with pytest.raises(ValueError, match="either model_name_or_path, or both"):
        ModelArguments(model_name_or_path="saved", vision_backbone="vision")


def test_arguments_are_not_abbreviated(config_file, capsys):
    with pytest.raises(ValueError, match="--learning_rat"):
        parse_arguments([config_file, "--learning_rat", "1"])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--learning_rate", "nan"], "learning_rate is nan: give a finite number of at least 0."),
        (
            ["--learning_rate", "x"],
            "argument --learning_rate/--learning-rate: invalid float value: 'x' (`--help` lists all arguments)",
        ),
        (["--do_train", "--dataset", "refcocoo"], "The data set 'refcocoo' is neither 'shapes' nor a folder: "),
        (["--do_train", "--text_backbone", "nosuch/folder"], ""),  # said by transformers
    ],
)
def test_the_program_tells_what_a_person_did_wrong_in_a_sentence(config_file, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["train_hf.py", config_file, *arguments])
    with pytest.raises(SystemExit) as ended:
        train_hf.run_as_program()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert said in told.strip().splitlines()[-1]
    assert "Traceback" not in told and "usage" not in told


@pytest.mark.parametrize("met, local_rank, lines", [(True, "0", 1), (True, "1", 0), (False, "1", 1)])
def test_one_process_of_a_machine_tells_what_was_wrong(monkeypatch, capsys, met, local_rank, lines):
    """As soon as the processes have met; before, the launcher may end one that has not spoken yet."""

    def refuse(argv, stack):
        raise ValueError("It is wrong.")

    monkeypatch.setattr(train_hf, "prepare", refuse)
    monkeypatch.setattr(train_hf, "leave_process_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: met)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as ended:
        train_hf.run_as_program()
    assert ended.value.code == 2 and capsys.readouterr().err == "It is wrong.\n" * lines


def test_the_program_shows_where_a_fault_of_ours_is(config_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_hf.py", config_file, "--do_eval"])
    for module, name in ((train_hf, "build_model"), (train_hf, "evaluate_and_predict")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, None)
            with pytest.raises(TypeError, match="not callable"):
                train_hf.run_as_program()

    def fail(*args) -> None:
        raise FloatingPointError("The loss is nan.")

    monkeypatch.setattr(train_hf, "evaluate_and_predict", fail)
    with pytest.raises(SystemExit) as ended:
        train_hf.run_as_program()
    assert ended.value.code == 1 and capsys.readouterr().err.splitlines()[-1] == "The loss is nan."


def test_nothing_to_do_is_an_error(config_file):
    with pytest.raises(ValueError, match="--do_train"):
        main([config_file])
    with pytest.raises(ValueError, match="do_predict needs test_splits"):
        main([config_file, "--do_predict"])


def test_resuming_from_a_folder_that_is_no_checkpoint_is_refused_early(config_file, tmp_path):
    with pytest.raises(ValueError, match="saved is no folder: resume from a folder checkpoint-<step>"):
        main([config_file, "--do_train", "--resume_from_checkpoint", str(tmp_path / "saved")])


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


@pytest.mark.parametrize("name", ["refcoco+/unc + ", "refcoco+/unc + refcoco+/unc"])
def test_a_mixture_of_nothing_or_the_same_is_refused(two_sets, name):
    with pytest.raises(ValueError, match="names a data set twice|has the member"):
        load_rows(DataArguments(dataset=name, data_root="unused"), do_train=True, do_eval=False, do_predict=False)


def test_a_global_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(DetrisTrainingArguments, "world_size", 4)
    with pytest.raises(ValueError, match="global_batch_size is 20: .* multiple of 8, .* 4 processes"):
        DetrisTrainingArguments(global_batch_size=20, gradient_accumulation_steps=2, report_to="none")


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
        load_splits("refcocoo", DataArguments())
    with pytest.raises(ValueError, match="refcocoo"):
        load_splits("refcocoo/unc", DataArguments(data_root=str(tmp_path)))


def test_a_saved_folder_gives_the_same_rows(shapes, tmp_path):
    datasets.DatasetDict({name: shapes[name] for name in ("train", "val")}).save_to_disk(tmp_path / "saved")
    loaded = load_splits(str(tmp_path / "saved"), DataArguments())
    assert loaded["val"]["sentences"] == shapes["val"]["sentences"]
    loaded.remove_columns("mask").save_to_disk(tmp_path / "maskless")
    with pytest.raises(ValueError, match=r"'train' of .*maskless has no columns \['mask'\]"):
        load_splits(str(tmp_path / "maskless"), DataArguments())
    assert np.array_equal(read_image(loaded["val"][2]), read_image(shapes["val"][2]))


@pytest.fixture
def two_sets(shapes, monkeypatch):
    """Makes two data sets over the images a … f of the synthetic set, and gives their names as they are read."""
    rows = shapes["train"].map(
        lambda row: {"image": row["image"] | {"path": f"COCO_train2014_{row['image_id']:012d}.jpg"}}
    )
    numbers = dict(zip(dict.fromkeys(rows["image_id"]), "abcdef"))
    images = {
        letter: [index for index, image_id in enumerate(rows["image_id"]) if numbers.get(image_id) == letter]
        for letter in "abcdef"
    }
    sets = {
        ("refcoco+", "unc"): {"train": "abcd", "val": "e"},
        ("refcocog", "umd"): {"train": "cdef", "val": "a", "test": "b"},
    }
    read = []

    def load_refer(root: str, *name: str) -> datasets.DatasetDict:
        read.append(name[0])
        return datasets.DatasetDict(
            {split: rows.select(sum(map(images.get, letters), [])) for split, letters in sets[name].items()}
        )

    monkeypatch.setattr("training.rows.load_refer", load_refer)
    monkeypatch.setattr("training.rows.load_shapes", None)  # is not to be drawn in vain
    return rows, images, read


def test_a_mixture_trains_on_no_image_of_another_split(two_sets, caplog):
    rows, images, read = two_sets
    args = DataArguments(dataset="refcoco+/unc + refcocog/umd", data_root="unused", test_splits=["refcocog:umd:test"])
    train, val, tests = load_rows(args, do_train=True, do_eval=True, do_predict=True)

    def ref_ids(letters: str) -> list[int]:
        return [rows[index]["ref_id"] for letter in letters for index in images[letter]]

    assert list(train.rows["ref_id"]) == ref_ids("cd" + "cdf")
    assert list(val["ref_id"]) == ref_ids("e")
    assert list(tests["refcocog:umd:test"]["ref_id"]) == ref_ids("b")
    assert read == ["refcoco+", "refcocog"]
    for name, all_images, leaks in (("refcoco+/unc", "abcd", "ab"), ("refcocog/umd", "cdef", "e")):
        phrases = sum(len(rows[index]["sentences"]) for letter in leaks for index in images[letter])
        counts = f"{len(ref_ids(leaks))} of {len(ref_ids(all_images))} objects ({phrases} phrases)"
        assert f"{name}: {counts} leave training" in caplog.text


@pytest.mark.parametrize("keep_leaks", [False, True])
def test_the_card_of_a_mixture_says_what_left_or_stayed(config_file, two_sets, tmp_path, keep_leaks):
    arguments = ["--dataset", "refcoco+/unc + 0.5*refcocog/umd", "--data_root", "unused", "--test_splits", "val"]
    arguments += ["--do_train", "--do_predict", "--max_steps", "1", "--load_best_model_at_end", "false"]
    arguments += ["--eval_strategy", "no", "--save_strategy", "no", "--keep_leaks", str(keep_leaks)]
    main([config_file, *arguments])
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.datasets == ["refcoco+/unc", "refcocog/umd"]
    assert "refcoco+/unc + 0.5*refcocog/umd" in card.text
    for name in ("refcoco+/unc", "refcocog/umd"):
        what = "STAY in training, although" if keep_leaks else "leave training, because"
        assert re.search(rf"{re.escape(name)}: \d+ of \d+ objects \(\d+ phrases\) {what} their images", card.text)
    assert {result.dataset_name for result in card.data.eval_results} == {"refcoco+/unc"}


def test_a_data_set_is_read_once_and_only_when_it_is_asked_for(two_sets):
    rows, images, read = two_sets
    args = DataArguments(
        data_root="unused", test_splits=["refcocog:umd:val", "refcocog:umd:test", "refcocog:umd:train"]
    )
    train, val, tests = load_rows(args, do_train=False, do_eval=False, do_predict=True)
    assert train is None and val is None and read == ["refcocog"]
    assert [len(tests[name]) for name in args.test_splits] == [
        sum(len(images[letter]) for letter in letters) for letters in ("a", "b", "cdef")
    ]


def test_the_official_choice_of_a_checkpoint_is_by_first_phrases(two_sets):
    rows, images, _ = two_sets
    arguments = {"dataset": "refcocog/umd", "data_root": "unused", "test_splits": ["val"]}
    _, val, tests = load_rows(DataArguments(**arguments, eval_first_phrase_only=True), False, True, True)
    expected = [rows[index] for index in images["a"]]
    assert val["sentences"] == [row["sentences"][:1] for row in expected]
    assert all(np.array_equal(read_whole_mask(ours), row["mask"]) for ours, row in zip(val, expected, strict=True))
    for every_phrase in (tests["val"], load_rows(DataArguments(**arguments), False, True, False)[1]):
        assert every_phrase["sentences"] == [row["sentences"] for row in expected] != val["sentences"]


@pytest.mark.parametrize("name", ["broken.png", "broken.jpg"])
@pytest.mark.parametrize("content", [None, b"no image", b"", "truncated"])
def test_a_missing_or_broken_image_is_named_with_its_row(tmp_path, name, content):
    path = tmp_path / name
    if content == "truncated":
        Image.effect_noise((60, 50), 90).save(path)
        content = path.read_bytes()[:-300]
        path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OSError, match=rf"{name}.*ref_id 17"):
        read_image({"image": {"path": str(path), "bytes": None}, "mask": np.zeros((50, 60)), "ref_id": 17})


def test_an_image_of_another_size_than_its_mask_is_named(tmp_path):
    for name in ("other.jpg", "other.png"):
        Image.new("RGB", (60, 50)).save(tmp_path / name)
        row = {"image": {"path": str(tmp_path / name), "bytes": None}, "ref_id": 17}
        for mask in (np.zeros((60, 50)), {"size": [50, 61], "counts": ""}):
            with pytest.raises(OSError, match=rf"{name}.*ref_id 17.*50 x 60 pixels, .* but its mask"):
                read_image(row | {"mask": mask})


JPEGS = {
    "4:2:0": ("RGB", {}),
    "4:2:2": ("RGB", {"subsampling": "4:2:2"}),
    "4:4:4, best": ("RGB", {"subsampling": "4:4:4", "quality": 100}),
    "poor": ("RGB", {"quality": 5}),
    "progressive": ("RGB", {"progressive": True}),
    "as RGB": ("RGB", {"keep_rgb": True}),
    "grey": ("L", {}),
    "CMYK": ("CMYK", {}),
    "turned": ("RGB", {"exif": 6}),
    "not turned": ("RGB", {"exif": 1}),
}


@pytest.mark.parametrize("size", [(61, 47), (1, 9), (3, 200), (64, 64)])
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_are_read_as_pillow_reads_them(tmp_path, kind, embedded, size):
    mode, options = JPEGS[kind]
    if "exif" in options:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = options["exif"]
        options = {"exif": exif}
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((size[0] * 3, size[1] * 3), Image.Resampling.BICUBIC)
    path = tmp_path / "image.jpg"
    smooth.convert(mode).save(path, **options)
    image = {"path": None if embedded else str(path), "bytes": path.read_bytes() if embedded else None}
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    read = read_image({"image": image, "mask": np.zeros(expected.shape[:2]), "ref_id": 0})
    assert np.array_equal(read if isinstance(read, np.ndarray) else np.asarray(read.convert("RGB")), expected)
    assert isinstance(read, np.ndarray) == (kind not in ("CMYK", "turned") and min(smooth.size) > 4)


def png(mode="RGB", size=(64, 48)):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


SOUND = {
    "image": {"path": None, "bytes": png()},
    "mask": {"size": [48, 64], "counts": RleMask().encode_example(np.eye(48, 64))["counts"]},
    "sentences": ["a cat"],
    "ref_id": 7,
    "ann_id": 7,
    "image_id": 7,
    "category": "",
    "bbox": [0.0, 0.0, 9.0, 9.0],
}
GREAT_HEADER = png()[:16] + (60_000).to_bytes(4, "big") * 2 + png()[24:]
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


def test_a_turned_tiff_has_the_size_that_it_is_checked_for(tmp_path):
    """Pillow turns a TIFF while it reads it, so that the orientation must not turn it again."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "turned.tiff", exif=exif)
    image = {"path": str(tmp_path / "turned.tiff"), "bytes": None}
    check_image(image["path"], (64, 48))
    assert read_image({"image": image, "mask": np.zeros((64, 48)), "ref_id": 0}).size == (48, 64)


@pytest.mark.parametrize("column, values", [("sentences", ["a cat"]), ("ref_id", ["x"]), ("mask", ["x"])])
def test_columns_of_other_types_are_refused(tmp_path, column, values):
    table = pa.table({name: pa.array([value]) for name, value in SOUND.items()} | {column: pa.array(values)})
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"Column '{column}' in split 'train' of .* is not what data/README.md"):
        load_splits(str(tmp_path / "saved"), DataArguments())
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(OSError, match="train.parquet cannot be read"):
        list(StreamedRows([str(tmp_path / "train.parquet")]).read([0], 0, 1))


def test_columns_of_plain_types_are_taken_for_what_they_are(tmp_path):
    table = pa.table({name: pa.array([value]) for name, value in SOUND.items()})
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(tmp_path / "saved")
    (row,) = load_splits(str(tmp_path / "saved"), DataArguments())["train"]
    assert np.array_equal(read_whole_mask(row), np.eye(48, 64)) and read_image(row).size == (64, 48)


def test_a_saved_folder_that_leads_arrow_out_of_its_memory_is_refused(tmp_path):
    table = pa.table({name: pa.array([value] * 3) for name, value in SOUND.items()})
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved" / "train").glob("*.arrow")
    offsets = np.array([0, 5, 10, 15], np.int32).tobytes()  # of three phrases
    assert file.read_bytes().count(offsets) == 1
    file.write_bytes(file.read_bytes().replace(offsets, np.array([0, 2**30, 2**30, 2**30], np.int32).tobytes()))
    with pytest.raises(OSError, match="saved is broken .*save or copy it again"):
        load_splits(str(tmp_path / "saved"), DataArguments())


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"files": [1]}', "[" * 10**5])
def test_a_broken_summary_is_named(prepared, tmp_path, content):
    folder = shutil.copytree(prepared, tmp_path / "out")
    (folder / "summary.json").write_text(content)
    with pytest.raises(ValueError, match="summary.json (is not a JSON file|does not say)"):
        load_splits(str(folder), DataArguments())


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


def test_repeated_rows_draw_phrases_of_their_own():
    collator, sentences = TrainingCollator(None, seed=3), ["a", "b", "c"]
    rows = [{"ref_id": ref_id, "sentences": sentences, "repetition": 0} for ref_id in range(30)]
    first = [collator.draw_phrase(row) for row in rows]
    assert first == [collator.draw_phrase(row) for row in rows]
    assert first != [collator.draw_phrase(row | {"repetition": 1}) for row in rows]


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


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(model_arguments, clip_tokenizer, tmp_path):
    clip_tokenizer.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="clip has 49408 symbols, but the text backbone reads"):
        model_config = {"model_config": MODEL_CONFIG, "tokenizer": str(tmp_path / "clip")}
        build_model(ModelArguments(**model_arguments | model_config))


@pytest.mark.parametrize("content", [b"", b"{}", None], ids=["empty", "of no tokenizer", "pipe"])
def test_a_broken_tokenizer_is_named(model_arguments, tiny_tokenizer, tmp_path, content):
    folder = tmp_path / "broken"
    tiny_tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.unlink()
    path.write_bytes(content) if content is not None else os.mkfifo(path)
    with pytest.raises((ValueError, OSError), match="broken cannot be read|tokenizer.json is no regular file"):
        build_model(ModelArguments(**model_arguments, model_config=MODEL_CONFIG, tokenizer=str(folder)))


def test_the_tokenizer_is_the_one_named_or_the_models_own(model_arguments, tiny_tokenizer, tmp_path, monkeypatch):
    def vocabulary(**arguments) -> dict[str, int]:
        _, processor = build_model(ModelArguments(**model_arguments | arguments, model_config=MODEL_CONFIG))
        return processor.tokenizer.get_vocab()

    own, other = vocabulary(), tiny_tokenizer.get_vocab()
    assert own == CLIPTokenizer.from_pretrained(model_arguments["text_backbone"]).get_vocab() != other
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    assert vocabulary(tokenizer=str(tmp_path / "other")) == other

    # A file of weights has no tokenizer beside it.
    weights, from_backbones = tmp_path / "ViT-B-16.pt", DetrisForReferringSegmentation.from_backbones
    weights.touch()
    monkeypatch.setattr(
        DetrisForReferringSegmentation,
        "from_backbones",
        lambda vision, text, **fields: from_backbones(vision, model_arguments["text_backbone"], **fields),
    )
    assert train_hf.CLIP_TOKENIZER == "openai/clip-vit-base-patch16"
    monkeypatch.setattr(train_hf, "CLIP_TOKENIZER", str(tmp_path / "other"))
    assert vocabulary(text_backbone=str(weights)) == other
    assert vocabulary(text_backbone=str(weights), tokenizer=model_arguments["text_backbone"]) == own


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


def test_quantised_backbones_that_cannot_be_saved_are_refused_before_anything_is_loaded(config_file, monkeypatch):
    monkeypatch.setattr("training.arguments.is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(train_hf, "load_rows", None)
    with pytest.raises(ValueError, match="Quantised backbones cannot be saved: give --save_adapter_only"):
        main([config_file, "--do_train", "--quantize_backbones", "4bit"])


@pytest.mark.parametrize("bits, rounding", [("4bit", 0.5), ("8bit", 0.1)])
def test_adapters_are_trained_in_quantised_backbones(config_file, tmp_path, bits, rounding):
    pytest.importorskip("bitsandbytes", reason="quantises, and is no requirement")
    arguments = [config_file, "--do_train", "--max_steps", "2", "--quantize_backbones", bits, "--image_size", "80"]
    arguments += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    for part in ("vision", "text"):  # wide enough for the kernels
        arguments += [f"--{part}_backbone", str(ROOT / "backbones" / part)]
    with pytest.raises(ValueError, match="Quantised backbones cannot be saved: give --save_adapter_only"):
        main(arguments)
    main([*arguments, "--save_adapter_only", "--peft_method", "detris+lora"])
    inputs = {"pixel_values": torch.randn(1, 3, 80, 80), "input_ids": torch.tensor([[989, 5, 990]])}
    logits = {}
    for quantization in (BitsAndBytesConfig(**train_hf.QUANTIZATIONS[bits]), None):
        model = DetrisForReferringSegmentation.from_pretrained(tmp_path / "run", quantization_config=quantization)
        projection = model.vision_model.encoder.layer[0].attention.q_proj.get_base_layer()
        assert (type(projection) is torch.nn.Linear) == (quantization is None)
        logits[quantization is None] = model(**inputs).logits
    difference = (logits[True] - logits[False]).abs().max()
    assert 0 < difference < rounding * logits[True].std()


def test_fewer_objects_than_a_batch_are_trained_on_all_the_same(config_file, caplog):
    arguments = [config_file, "--do_train", "--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no"]
    arguments += ["--load_best_model_at_end", "false", "--dataloader_drop_last"]
    arguments += ["--overwrite_output_dir"]
    assert main([*arguments, "--max_train_samples", "3"])["epoch"] == 2
    assert "dataloader_drop_last is off: 3 objects fill no batch of 4" in caplog.text
    caplog.clear()
    assert main([*arguments, "--max_train_samples", "7"])["epoch"] == 2  # the last three are left out
    assert "dataloader_drop_last" not in caplog.text


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


@pytest.mark.parametrize("value", [NAN, INF])
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


@pytest.fixture
def official_end_to_end(clip_tokenizer, tmp_path):
    """The official evaluation of `refer_mini`, and the folder of the model that it was run with."""
    conformance = SHARED / "conformance"
    if not (SHARED / "refer_mini").exists() or not conformance.exists():
        pytest.skip("needs shared/refer_mini and shared/conformance beside the repository")
    expected = json.loads((conformance / "expected" / "evaluation_refer_mini.json").read_text())
    official, weights = expected["config"], runpy.run_path(str(conformance / "weights.py"))
    checkpoint = weights["synthesize"](
        weights["load_specs"](conformance / "checkpoints" / "e2e.json"), expected["seed"]
    )
    checkpoint["proj.txt.bias"][-1] = expected["proj.txt.bias[-1]"]
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in checkpoint.items()}}, tmp_path / "e2e.pth")
    clip_tokenizer.save_pretrained(tmp_path / "tokenizer")
    from_official(
        tmp_path / "e2e.pth",
        tmp_path / "model",
        tokenizer=str(tmp_path / "tokenizer"),
        image_size=official["input_size"],
        max_text_length=official["word_len"],
        vision_config={"num_attention_heads": official["dino_heads"]},
    )
    return expected, tmp_path / "model"


@pytest.mark.slow
def test_one_command_prints_the_papers_table_with_the_official_figures(
    official_end_to_end, tmp_path, monkeypatch, capsys
):
    expected, model = official_end_to_end
    refer_mini = {  # objects, phrases
        "refcoco:unc:train": (10, 22),
        "refcoco:unc:val": (3, 7),
        "refcoco:unc:testA": (2, 5),
        "refcoco:unc:testB": (1, 2),
        "refcoco+:unc:val": (3, 7),
        "refcocog:umd:val": (3, 7),
        "refcocog:umd:test": (3, 7),
        "refcocog:google:val": (4, 9),
    }
    run = tmp_path / "run"
    monkeypatch.setattr("training.rows.load_shapes", None)  # the default data set is not drawn
    arguments = {"model_name_or_path": model, "data_root": SHARED / "refer_mini", "output_dir": run}
    arguments |= {"save_masks": False, "disable_tqdm": True, "report_to": "none"}
    arguments = [f"--{name}={value}" for name, value in arguments.items()]
    main([*arguments, "--do_predict", "--test_splits", *refer_mini])
    assert (run / "table.txt").read_text() in capsys.readouterr().out
    *lines, _ = json.loads((run / "table.json").read_text())
    assert {line["split"]: (line["objects"], line["phrases"]) for line in lines} == refer_mini

    refcoco = [line for line in lines if line["split"].startswith("refcoco:")]
    folders = [run / "predictions" / line["split"].replace(":", "_") for line in refcoco]
    results = [
        json.loads(result) for folder in folders for result in (folder / "results.jsonl").read_text().splitlines()
    ]
    ours = {(result["ref_id"], result["sentence"]): result["iou"] for result in results}
    official = {(phrase["ref_id"], phrase["sentence"]): phrase["iou"] for phrase in expected["sentences"]}
    assert ours == pytest.approx(official, abs=5e-3)
    phrases = [line["phrases"] for line in refcoco]
    figures = {"mIoU": expected["mean_iou"]} | {f"Pr@0.{x}": expected["precision"][f"Pr@{x}0"] for x in range(5, 10)}
    for head, figure in figures.items():
        together = sum(line[head] * count for line, count in zip(refcoco, phrases)) / sum(phrases)
        assert together == pytest.approx(figure, abs=0.05)
    overall = sum(result["intersection"] for result in results) / sum(result["union"] for result in results)
    assert 100 * overall == pytest.approx(expected["overall_iou"], abs=0.05)


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_does(config_file, tmp_path):
    """On 7 objects in batches of 2 for each of two processes, the last batch is filled up with 1 that must not count.

    What is evaluated are the weights and batch-norm statistics that get saved: no checkpoint is loaded before, which
    would give both processes the same. `accelerate launch --cpu --num_processes 2` starts a single process unless MPI
    does the launching, hence the other two switches.
    """
    arguments = ["--max_eval_samples", "7", "--test_splits", "val"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    subprocess.run(
        [*accelerate, "train_hf.py", config_file, *arguments, "--do_train", "--do_eval", "--do_predict"]
        + ["--max_steps", "6", "--learning_rate", "1e-3", "--global_batch_size", "4", "--use_cpu"]
        + ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"],
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


# --- streaming ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a training split of 38 rows in three files, images inside, and three rows of val."""
    folder = tmp_path_factory.mktemp("prepared")
    refer = ReferFolder(folder / "refer")
    refer.refs = [
        {**ref, "ref_id": number, "split": "val" if number % 14 == 2 else "train"}
        for number, ref in enumerate(refer.refs * 6)
    ]
    refer.refs = [ref for ref in refer.refs if ref["ref_id"] < 41]
    refer.write()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "ROWS_PER_FILE_OF_IMAGES", 15)
        prepare.prepare(
            open_records("refer", refer.root, "refcoco/unc"), folder / "out", num_proc=1, embed_images=True
        )
    shutil.rmtree(refer.root)
    return folder / "out"


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
def test_two_processes_stream_in_step(config_file, prepared, tmp_path):
    """38 rows in batches of 4 for 2 processes of 2 workers: runs of 9 and 10 rows, each in 3 batches."""
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu", "train_hf.py"]
        + [config_file, "--dataset", str(prepared), "--streaming", "--do_train", "--do_eval", "--use_cpu"]
        + ["--num_train_epochs", "2", "--dataloader_num_workers", "2", "--dataloader_drop_last"]
        + ["--save_strategy", "epoch", "--eval_strategy", "epoch"],
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 12 and state["epoch"] == 2
    assert 0 <= json.loads((tmp_path / "run" / "eval_results.json").read_text())["eval_mean_iou"] <= 1


def test_a_streamed_run_is_not_resumed_by_another_number_of_workers(make_trainer, prepared, tmp_path):
    options = {"rows": StreamedRows(parquet_files(str(prepared))["train"]), "save_strategy": "steps", "save_steps": 2}
    make_trainer(max_steps=2, **options).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    make_trainer(max_steps=3, dataloader_num_workers=1, **options).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="to 1 workers in all processes, this one does to 2"):
        make_trainer(max_steps=3, dataloader_num_workers=2, **options).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="to 1 workers in all processes, this one does to 0"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("damage", ["missing", "all missing", "broken", "broken rows"])
def test_a_damaged_prepared_folder_is_refused(prepared, tmp_path, damage, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = shutil.copytree(prepared, tmp_path / "out")
    files = sorted(folder.glob("train-*.parquet"))
    for file in files if damage == "all missing" else files[1:2]:
        content = file.read_bytes()
        file.unlink()
        if damage == "broken":
            file.write_bytes(content[:-9])
        elif damage == "broken rows":
            file.write_bytes(content[:4] + bytes(3000) + content[3004:])
    missing = "lacks 3 of its 4 files" if damage == "all missing" else "lacks 1 of its 4 files, such as train-00001-of"
    message = missing if "missing" in damage else "cannot be read .*anew"
    with pytest.raises(OSError, match=message):
        train_rows, _, _ = load_rows(DataArguments(dataset=str(folder), streaming=streaming), True, False, False)
        list(StreamedBatches(train_rows, 4, 0, 1, 1, 0))  # only then are rows streamed


def test_what_is_no_prepared_folder_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="neither by data.prepare nor by save_to_disk.*data.prepare <kind>"):
        load_splits(str(tmp_path), DataArguments())
    with pytest.raises(OSError, match="'prepared/nosuch' is no folder here, nor to be had from the Hub"):
        load_splits("prepared/nosuch", DataArguments())


def test_folders_may_be_called_like_mixtures_and_tested_on_by_name(prepared, tmp_path):
    for name in ("val + x", "v:1", "2*x"):
        folder = shutil.copytree(prepared, tmp_path / name)
        train_rows, _, _ = load_rows(DataArguments(dataset=str(folder)), True, False, False)
        assert len(train_rows) == 38
    args = DataArguments(dataset="shapes", shapes_config={"sizes": SIZES}, test_splits=[f"{prepared}:val"])
    assert len(load_rows(args, False, False, True)[2][f"{prepared}:val"]) == 3


def test_images_of_a_split_tested_on_leave_a_single_sets_training_too(two_sets, caplog):
    rows, images, _ = two_sets
    args = DataArguments(dataset="refcoco+/unc", data_root="unused", test_splits=["refcocog:umd:val"])
    train, _, _ = load_rows(args, do_train=True, do_eval=False, do_predict=True)
    assert isinstance(train, Mixture)
    assert list(train.rows["ref_id"]) == [rows[index]["ref_id"] for letter in "bcd" for index in images[letter]]
    assert "leave training" in caplog.text and train.describe_leaks() in caplog.text


def test_streaming_reads_no_other_training_rows(prepared, monkeypatch):
    """The other splits are read as always, the training split not even if its files are unreadable."""
    arguments = DataArguments(dataset=str(prepared), streaming=True, test_splits=["val"], shuffle_buffer_size=3)
    load_dataset, loaded = datasets.load_dataset, []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: loaded.append(kwargs) or load_dataset(*args, **kwargs)
    )
    train_rows, eval_rows, test_rows = load_rows(arguments, True, True, True)
    assert [list(options["data_files"]) for options in loaded] == [["val"]]
    assert isinstance(train_rows, StreamedRows) and len(train_rows) == 38 and train_rows.shuffle_buffer_size == 3
    assert len(eval_rows) == len(test_rows["val"]) == 3
    without = load_rows(DataArguments(dataset=str(prepared)), True, True, False)
    assert len(without[0]) == 38
    assert without[1]["ref_id"][:] == eval_rows["ref_id"][:] and eval_rows.features == without[1].features


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": "shapes"}, "'shapes' cannot be streamed: .*data.prepare"),
        ({"dataset": "refcoco/unc", "data_root": "."}, "'refcoco/unc' cannot be streamed"),
        ({"dataset": "shapes + refcoco/unc"}, "streaming takes one data set, not the mixture 'shapes"),
        ({"train_split": "trian"}, "no split 'trian' to train on: it has .*'train'"),
        ({"eval_split": "vall"}, "'vall' does not exist"),
        ({"max_train_samples": 3}, "leave max_train_samples out"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size is 0"),
        ({"dataset": "prepared/nosuch"}, "no folder here, nor to be had from the Hub"),
    ],
)
def test_what_cannot_be_streamed_is_refused(prepared, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        load_rows(DataArguments(**{"dataset": str(prepared), "streaming": True} | changes), True, True, False)


# --- phrases that name nothing, or several objects ----------------------------------------------------------------


@pytest.fixture
def generalized(shapes):
    """The shapes with every other object's mask emptied, as of phrases that name nothing."""

    def empty(row: dict, index: int) -> dict:
        return {"mask": np.zeros_like(row["mask"]) if index % 2 else row["mask"]}

    return datasets.DatasetDict(
        {
            split: rows.map(empty, with_indices=True, features=rows.features, load_from_cache_file=False)
            for split, rows in shapes.items()
            if len(rows)
        }
    )


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


@pytest.mark.parametrize("logit", [100, -100], ids=["everything", "nothing"])
def test_no_target_phrases_reach_figures_files_table_and_card(
    config, shapes, generalized, tmp_path, monkeypatch, logit
):
    """Of a model that segments all of each image, or nothing, the figures are known without it."""
    rows, path, run = generalized["val"], tmp_path / "config.yaml", tmp_path / "run"
    monkeypatch.setattr(train_hf, "load_rows", lambda *args: (None, rows, {"classic": shapes["val"], "val": rows}))
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


@pytest.mark.parametrize("runs", [[20, 0], [5, 0, 15], [0, 0, 20], [0, 5, 0, 0, 15], [3, 0, 1, 2, 0, 4, 10, 0]])
def test_runs_of_no_length_are_read(runs):
    rle = {"size": [4, 5], "counts": runs}
    boxed = read_mask({"mask": RleMask().encode_example(rle)})
    pasted = np.zeros(boxed.size, np.uint8)
    height, width = boxed.values.shape
    pasted[boxed.top : boxed.top + height, boxed.left : boxed.left + width] = boxed.values
    assert np.array_equal(pasted, np.repeat(np.arange(len(runs)) % 2, runs).reshape(5, 4).T)


@pytest.mark.parametrize("kind", ["empty", "full", "one", "noise", "disc"])
def test_masks_are_decoded_in_their_boxes(kind):
    mask = np.zeros((40, 50), np.uint8)
    if kind == "full":
        mask[:] = 1
    elif kind == "one":
        mask[39, 49] = 1
    elif kind == "noise":
        mask[3:38, 5:48] = np.random.default_rng(0).integers(0, 2, (35, 43))  # more runs than a byte counts
    elif kind == "disc":
        mask[(np.arange(40)[:, None] - 20) ** 2 + (np.arange(50) - 30) ** 2 < 90] = 1
    boxed = read_mask({"mask": RleMask().encode_example(mask)})
    pasted = np.zeros(boxed.size, np.uint8)
    height, width = boxed.values.shape
    pasted[boxed.top : boxed.top + height, boxed.left : boxed.left + width] = boxed.values
    assert np.array_equal(pasted, mask)
    assert height * width <= (1 if kind in ("empty", "one") else mask.size)
    assert read_mask({"mask": mask}) is mask


@pytest.mark.parametrize("mask, message", HOSTILE_RLES)
def test_stored_masks_of_strangers_are_checked_before_their_boxes_are_read(mask, message):
    with pytest.raises(ValueError, match=f"ref_id 7 cannot be read .*{message}"):
        read_mask({"mask": mask, "ref_id": 7})
