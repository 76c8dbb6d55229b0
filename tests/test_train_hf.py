"""`train_hf.py` as a program: what it refuses and how, the model it builds, whole runs of one or two processes."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.other_layouts import ReferSet
from helpers.refer_folder import MINI
from helpers.runs import MODEL_CONFIG, SIZES
from helpers.table_writers import SCHEMAS, write
from helpers.warm_python import warm_python
from transformers import BitsAndBytesConfig, CLIPTokenizer

import train_hf
from convert_detris_checkpoint import from_official
from modeling_detris import DetrisForReferringSegmentation
from train_hf import build_model, main
from training.arguments import ModelArguments

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

pytestmark = pytest.mark.usefixtures("one_thread")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--learning_rate", "nan"], "learning_rate is nan: give a finite number of at least 0."),
        (
            ["--learning_rate", "x"],
            "argument --learning_rate/--learning-rate: invalid float value: 'x' (`--help` lists all arguments)",
        ),
        (["--do_train", "--dataset", "refcocoo"], "The data set 'refcocoo' is neither 'shapes' nor a file or folder"),
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


def test_quantised_backbones_that_cannot_be_saved_are_refused_before_anything_is_loaded(config_file, monkeypatch):
    monkeypatch.setattr("training.arguments.is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(train_hf, "load_rows", None)
    with pytest.raises(ValueError, match="Quantised backbones cannot be saved: give --save_adapter_only"):
        main([config_file, "--do_train", "--quantize_backbones", "4bit"])


# --- the model ------------------------------------------------------------------------------------------------------


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
    with pytest.raises((ValueError, OSError), match="broken cannot be read|tokenizer.json is neither a file"):
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


def test_the_attention_of_a_run_reaches_new_and_saved_models(model_arguments, tmp_path):
    model, processor = build_model(
        ModelArguments(**model_arguments, model_config=MODEL_CONFIG, attn_implementation="eager")
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved, _ = build_model(ModelArguments(model_name_or_path=str(tmp_path), attn_implementation="eager"))
    for backbone in (model.vision_model, model.text_model, saved.vision_model, saved.text_model):
        assert backbone.config._attn_implementation == "eager"


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_fewer_objects_than_a_batch_are_trained_on_all_the_same(config_file, caplog):
    arguments = [config_file, "--do_train", "--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no"]
    arguments += ["--load_best_model_at_end", "false", "--dataloader_drop_last"]
    arguments += ["--overwrite_output_dir"]
    assert main([*arguments, "--max_train_samples", "3"])["epoch"] == 2
    assert "dataloader_drop_last is off: 3 objects fill no batch of 4" in caplog.text
    caplog.clear()
    assert main([*arguments, "--max_train_samples", "7"])["epoch"] == 2  # the last three are left out
    assert "dataloader_drop_last" not in caplog.text


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
    monkeypatch.setattr("data.opening.load_shapes", None)  # the default data set is not drawn
    arguments = {"model_name_or_path": model, "data_root": SHARED / "refer_mini", "output_dir": run}
    arguments |= {"save_masks": False, "disable_tqdm": True, "report_to": "none"}
    arguments = [f"--{name}={value}" for name, value in arguments.items()]
    main([*arguments, "--do_predict", "--test_splits", *refer_mini])
    assert (run / "table.txt").read_text() in capsys.readouterr().out
    *lines, _ = json.loads((run / "table.json").read_text())
    assert {line["split"]: (line["objects"], line["phrases"]) for line in lines} == refer_mini

    # The same out of a table of the Hub, to the last digit.
    schema, of_table = SCHEMAS["refcoco_benchmark"], str(tmp_path / "of_table")
    table = write(schema, schema.rows(ReferSet(MINI, "refcoco/unc")), tmp_path / "table", "parquet")
    main(
        [
            *arguments,
            "--output_dir",
            of_table,
            "--do_predict",
            "--dataset",
            str(table),
            "--test_splits",
            "train",
            "val",
            "testA",
            "testB",
        ]
    )
    *figures, _ = json.loads(Path(of_table, "table.json").read_text())
    assert figures == [line | {"split": line["split"].rpartition(":")[2]} for line in lines[:4]]

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
    accelerate = [warm_python(), "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    subprocess.run(
        [*accelerate, "train_hf.py", config_file, *arguments, "--do_train", "--do_eval", "--do_predict"]
        + ["--max_steps", "6", "--learning_rate", "1e-3", "--global_batch_size", "4", "--use_cpu"]
        + ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"],
        cwd=ROOT,
        env=os.environ | {"PYTHON_EXEC": warm_python()},
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
    of_two, of_one = ((folder / "report.html").read_text().partition("<h2>Results</h2>")[2] for folder in (run, alone))
    without_pictures = [re.sub('"data:[^"]*"', "", page) for page in (of_two, of_one)]
    assert without_pictures[0] == without_pictures[1] and "<h4>Worst</h4>" in of_two


@pytest.mark.slow
def test_two_processes_stream_in_step(config_file, prepared, tmp_path):
    """38 rows in batches of 4 for 2 processes of 2 workers: runs of 9 and 10 rows, each in 3 batches."""
    subprocess.run(
        [warm_python(), "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu", "train_hf.py"]
        + [config_file, "--dataset", str(prepared), "--streaming", "--do_train", "--do_eval", "--use_cpu"]
        + ["--num_train_epochs", "2", "--dataloader_num_workers", "2", "--dataloader_drop_last"]
        + ["--save_strategy", "epoch", "--eval_strategy", "epoch"],
        cwd=ROOT,
        env=os.environ | {"PYTHON_EXEC": warm_python()},
        check=True,
        timeout=300,
    )
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 12 and state["epoch"] == 2
    assert 0 <= json.loads((tmp_path / "run" / "eval_results.json").read_text())["eval_mean_iou"] <= 1
