"""Checkpoints: saved whole or not at all, and resumed to the numbers of a straight run or refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback

from train_hf import main
from training.checkpoints import (
    best_model_of,
    check_fits_run,
    check_tensors,
    check_whole,
    newest_whole_checkpoint,
    read_state,
    stop_if_not_finite,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = {"save_strategy": "steps", "save_steps": 2}
PARTS = {
    False: ["model.safetensors", "config.json"],
    True: ["adapter_model.safetensors", "adapter_config.json", "config.json"],
}
OTHERS = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def saved(make_trainer, kept, tmp_path, request):
    """A run of four steps with checkpoints at 2 and 4, of the whole model unless `request.param` says otherwise."""
    adapter_only = getattr(request, "param", False)
    folder = kept / str(adapter_only)
    if not folder.exists():
        make_trainer(max_steps=4, save_adapter_only=adapter_only, output_dir=str(folder), **STEPS).train()
    return shutil.copytree(folder, tmp_path / "run")


def same_weights(trainer, other) -> bool:
    weights = other.model.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [False, True], indirect=True)
def test_a_part_that_is_missing_empty_or_cut_is_named(saved):
    adapter_only = (saved / "checkpoint-4" / "adapter_model.safetensors").exists()
    check_whole(saved / "checkpoint-4", adapter_only)
    for name in PARTS[adapter_only] + OTHERS:
        path = saved / "checkpoint-4" / name
        content = path.read_bytes()
        for damaged, message in [(None, "missing"), (b"", "empty"), (content[: len(content) // 2], "broken")]:
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"checkpoint-4/{name} is {message}.*resume from another") as refused:
                check_whole(saved / "checkpoint-4", adapter_only)
            assert "\n" not in str(refused.value)
            assert newest_whole_checkpoint(saved, adapter_only) == (saved / "checkpoint-2", [saved / "checkpoint-4"])
            path.write_bytes(content)
    assert newest_whole_checkpoint(saved, adapter_only) == (saved / "checkpoint-4", [])


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("content", [{}, [], 1, {"state": {}}])
def test_a_part_with_another_content_is_named(saved, name, content):
    torch.save(content, saved / "checkpoint-4" / name)
    with pytest.raises(ValueError, match=f"{name} is broken .it does not hold"):
        check_whole(saved / "checkpoint-4", False)


def test_a_part_that_has_changed_inside_is_named(saved):
    path = saved / "checkpoint-4" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="optimizer.pt is broken .*has changed"):
        check_whole(saved / "checkpoint-4", False)


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"global_step": "x"}', '{"unknown": 1}', "[" * 10**5])
def test_a_state_that_is_invalid_is_named(saved, content):
    (saved / "checkpoint-4" / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match="trainer_state.json is broken"):
        check_whole(saved / "checkpoint-4", False)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": {"a": ["model-1.safetensors"]}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../checkpoint-2/model.safetensors"}},
    ],
    ids=str,
)
def test_an_index_that_leads_to_no_files_is_named(saved, index):
    (saved / "checkpoint-4" / "model.safetensors").unlink()
    (saved / "checkpoint-4" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json is broken .it names no files beside it.: resume from another"):
        check_whole(saved / "checkpoint-4", False)
    assert newest_whole_checkpoint(saved, False)[0] == saved / "checkpoint-2"


def test_the_tensors_of_shards_are_compared(make_trainer, saved):
    folder = saved / "checkpoint-4"
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": tensors[::2], "model-00002-of-00002.safetensors": tensors[1::2]}
    for name, part in shards.items():
        save_file(dict(part), folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in shards.items() for key, _ in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_whole(folder, False)
    model = make_trainer().model
    check_tensors(folder, model)
    save_file(dict(tensors[3::2]), folder / name, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"checkpoint-4 is of another model: .*{tensors[1][0]}"):
        check_tensors(folder, model)


def test_code_in_a_part_is_not_run(saved, tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"state": Hostile(), "param_groups": []}, saved / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(ValueError, match="optimizer.pt is broken"):
        check_whole(saved / "checkpoint-4", False)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "change, sizes",
    [
        ("lacks", "nothing.* {expected} "),
        ("has unknown", r"\(1,\).* nothing "),
        ("has in other shapes", r"\(1, .* {expected} "),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(make_trainer, saved, change, sizes):
    path, name = saved / "checkpoint-4" / "model.safetensors", "mask_head.output_projection.weight"
    tensors = load_file(path)
    expected = str(tuple(tensors[name].shape))
    if change == "lacks":
        del tensors[name]
    elif change == "has unknown":
        name = "mask_head.another"
        tensors[name] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"checkpoint-4 is of another model: .* 1 tens.*{name}.* with the arg") as no:
        make_trainer(max_steps=6, **STEPS).train(resume_from_checkpoint=str(saved / "checkpoint-4"))
    assert re.search(sizes.format(expected=re.escape(expected)).strip(), str(no.value))


@pytest.mark.parametrize("saved", [True], indirect=True)
def test_tensors_missing_among_adapters_are_refused(make_trainer, saved):
    path = saved / "checkpoint-4" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.mask_head.output_projection.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises((ValueError, OSError), match="mask_head.output_projection.weight"):
        make_trainer(max_steps=6, save_adapter_only=True).train(resume_from_checkpoint=str(saved / "checkpoint-4"))


def test_an_optimizer_that_knows_another_model_is_refused(make_trainer, saved):
    path = saved / "checkpoint-4" / "optimizer.pt"
    state = torch.load(path)
    whole = dict(state["state"])
    for changed in (
        {key: value for key, value in whole.items() if key != 3},
        whole | {3: whole[3] | {"exp_avg": torch.zeros(1)}},
    ):
        torch.save(state | {"state": changed}, path)
        with pytest.raises(ValueError, match="optimizer.pt or scheduler.pt in .* is of another model"):
            make_trainer(max_steps=6, **STEPS).train(resume_from_checkpoint=str(saved / "checkpoint-4"))


def test_weights_that_are_not_finite_are_not_resumed_from(make_trainer, saved):
    path, name = saved / "checkpoint-4" / "model.safetensors", "mask_head.output_projection.weight"
    tensors = load_file(path)
    tensors[name][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises((ValueError, FloatingPointError), match=name):
        make_trainer(max_steps=6, **STEPS).train(resume_from_checkpoint=str(saved / "checkpoint-4"))


# --- what does not fit --------------------------------------------------------------------------------------------


def test_another_number_of_processes_is_refused(saved):
    checkpoint = saved / "checkpoint-4"
    check_fits_run(checkpoint, processes=1, fp16=False, with_best=False)
    with pytest.raises(
        ValueError, match=r"has the random states of 1 processes \(rng_state.pth\), but this run has 2"
    ):
        check_fits_run(checkpoint, processes=2, fp16=False, with_best=False)
    for index in (0, 1):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{index}.pth")
    (checkpoint / "rng_state.pth").unlink()
    check_fits_run(checkpoint, processes=2, fp16=False, with_best=False)
    with pytest.raises(ValueError, match="has the random states of 2 processes"):
        check_fits_run(checkpoint, processes=1, fp16=False, with_best=False)
    # One of them is lost: a run of two is not told to start one.
    (checkpoint / "rng_state_1.pth").unlink()
    with pytest.raises(ValueError, match=r"1 processes \(rng_state_0.pth\), but this run has 2.*restore") as lost:
        check_fits_run(checkpoint, processes=2, fp16=False, with_best=False)
    assert "start 1" not in str(lost.value)
    (checkpoint / "rng_state_0.pth").rename(checkpoint / "rng_state_2.pth")
    with pytest.raises(ValueError, match=r"1 processes \(rng_state_2.pth\), but"):
        check_fits_run(checkpoint, processes=1, fp16=False, with_best=False)


def test_the_scaler_is_there_if_the_run_has_one(saved):
    checkpoint = saved / "checkpoint-4"
    with pytest.raises(ValueError, match="has no scaler.pt: go on without --fp16"):
        check_fits_run(checkpoint, processes=1, fp16=True, with_best=False)
    torch.save({"scale": 2.0}, checkpoint / "scaler.pt")
    check_whole(checkpoint, False)
    check_fits_run(checkpoint, processes=1, fp16=True, with_best=False)
    with pytest.raises(ValueError, match="has a scaler.pt: go on with --fp16"):
        check_fits_run(checkpoint, processes=1, fp16=False, with_best=False)
    torch.save({}, checkpoint / "scaler.pt")
    with pytest.raises(ValueError, match="scaler.pt is broken"):
        check_whole(checkpoint, False)


# --- the best checkpoint ------------------------------------------------------------------------------------------


def with_figures(trainer, figures: list[float]):
    """The trainer, whose evaluations give `figures` in turn."""
    figures = iter(figures)
    trainer.compute_metrics = lambda results: {"mean_iou": next(figures)}
    return trainer


EPOCHS = {"rows": 8, "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}


@pytest.mark.slow
def test_the_best_checkpoint_is_found_after_its_folder_has_moved(make_trainer, tmp_path):
    straight = with_figures(
        make_trainer(num_train_epochs=3, output_dir=str(tmp_path / "a"), **EPOCHS), [0.5, 0.2, 0.4]
    )
    straight.train()
    with_figures(make_trainer(num_train_epochs=2, **EPOCHS), [0.5, 0.2]).train()
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    checkpoint = moved / "checkpoint-4"
    assert read_state(checkpoint).best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    assert best_model_of(checkpoint, read_state(checkpoint)) == moved / "checkpoint-2"
    resumed = with_figures(make_trainer(num_train_epochs=3, output_dir=str(moved), **EPOCHS), [0.4])
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same_weights(resumed, straight) and resumed.state.best_model_checkpoint == str(moved / "checkpoint-2")

    shutil.rmtree(moved / "checkpoint-2")
    check_fits_run(checkpoint := moved / "checkpoint-6", processes=1, fp16=False, with_best=False)
    with pytest.raises(ValueError, match="checkpoint-2/.* is missing"):
        check_fits_run(checkpoint, processes=1, fp16=False, with_best=True)


@pytest.mark.slow
def test_the_best_checkpoint_outlives_resuming_by_another_spelling(make_trainer, tmp_path, monkeypatch):
    options = EPOCHS | {"save_total_limit": 2}
    with_figures(make_trainer(num_train_epochs=2, **options), [0.5, 0.2]).train()
    monkeypatch.chdir(tmp_path)
    resumed = with_figures(make_trainer(num_train_epochs=5, output_dir="run", **options), [0.1, 0.1, 0.1])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert {path.name for path in Path("run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-10"}


@pytest.mark.slow
def test_early_stopping_counts_on_when_resumed(make_trainer, tmp_path):
    """Without a better figure for three evaluations the run stops, whether or not it was broken off between them."""

    def make(epochs: int, figures: list[float], folder: str):
        trainer = make_trainer(num_train_epochs=epochs, output_dir=str(tmp_path / folder), **EPOCHS)
        trainer.add_callback(EarlyStoppingCallback(3))
        return with_figures(trainer, figures)

    straight = make(9, [0.5, 0.4, 0.3, 0.2], "straight")
    straight.train()
    assert straight.state.epoch == 4
    make(3, [0.5, 0.4, 0.3], "parts").train()
    resumed = make(9, [0.2], "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-6"))
    assert resumed.state.epoch == 4


def test_a_run_that_early_stopping_has_ended_is_not_trained_on_when_resumed(make_trainer, tmp_path):
    def make(patience: int, figures: list[float]):
        trainer = make_trainer(num_train_epochs=9, **EPOCHS)
        trainer.add_callback(EarlyStoppingCallback(patience))
        return with_figures(trainer, figures)

    make(2, [0.5, 0.4, 0.3]).train()
    for patience, figures, epochs in ((2, [], 3), (3, [0.2], 4)):
        resumed = make(patience, figures)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
        assert resumed.state.epoch == epochs


def test_early_stopping_may_begin_when_resumed(make_trainer, tmp_path):
    with_figures(make_trainer(num_train_epochs=1, **EPOCHS), [0.5]).train()
    resumed = with_figures(make_trainer(num_train_epochs=9, **EPOCHS), [0.4, 0.3])
    resumed.add_callback(EarlyStoppingCallback(2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.epoch == 3


# --- saving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_checkpoint_gets_its_name_when_it_is_whole(make_trainer, tmp_path, monkeypatch, adapter_only):
    run, present = tmp_path / "run", []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: present.append((run / "checkpoint-2").exists()) or save(*args))
    make_trainer(max_steps=2, save_adapter_only=adapter_only, **STEPS).train()
    assert present and not any(present)
    check_whole(run / "checkpoint-2", adapter_only)
    assert not (run / ".unfinished").exists()


def test_a_checkpoint_that_is_written_over_keeps_nothing_of_the_old(make_trainer, saved):
    (saved / "checkpoint-4" / "rng_state_7.pth").touch()
    (saved / ".unfinished" / "checkpoint-4").mkdir(parents=True)
    (saved / ".unfinished" / "checkpoint-4" / "scaler.pt").touch()
    trainer = make_trainer(max_steps=4, **STEPS)
    trainer.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert {path.name for path in saved.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    check_whole(saved / "checkpoint-4", False)
    assert not {"rng_state_7.pth", "scaler.pt"} & {path.name for path in (saved / "checkpoint-4").iterdir()}


def test_a_run_that_had_taken_all_its_steps_takes_no_more(make_trainer, saved):
    straight = make_trainer(max_steps=4, output_dir=str(saved.parent / "straight"))
    straight.train()
    resumed = make_trainer(max_steps=4, **STEPS)
    resumed.train(resume_from_checkpoint=str(saved / "checkpoint-4"))
    assert resumed.state.global_step == 4 and same_weights(resumed, straight)


@pytest.mark.parametrize("adapter_only", [False, True])
def test_nothing_that_is_not_finite_is_saved(make_trainer, tmp_path, adapter_only):
    """1e39 is infinite in float32: the first update breaks the weights, after the only loss that is looked at."""
    trainer = make_trainer(max_steps=1, learning_rate=1e39, save_adapter_only=adapter_only)
    trainer.train()
    with pytest.raises(FloatingPointError, match=r"^[\w.]+ is not finite after step 1, so that nothing is saved"):
        trainer.save_model()
    with pytest.raises(FloatingPointError, match="is not finite after step 1"):
        make_trainer(max_steps=1, learning_rate=1e39, save_strategy="steps", save_steps=1).train()
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_save_that_fails_leaves_no_unfinished_folder_to_write_into(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(max_steps=1, **STEPS | {"save_steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    assert trainer._get_output_dir(None) == str(tmp_path / "run")


def test_statistics_that_are_not_finite_are_named():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    stop_if_not_finite(model, "here")
    model[0].running_var[1] = torch.inf
    with pytest.raises(FloatingPointError, match="^0.running_var is not finite here"):
        stop_if_not_finite(model, "here")


# --- resuming by the command line ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("adapter_only", [False, True])
def test_last_is_the_newest_whole_checkpoint(config_file, tmp_path, adapter_only, caplog):
    arguments = [config_file, "--do_train", "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1"]
    arguments += ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--save_total_limit", "9"]
    arguments += ["--save_adapter_only", str(adapter_only)]
    main([*arguments, "--max_steps", "6", "--output_dir", str(tmp_path / "straight")])
    main([*arguments, "--max_steps", "4"])
    run = tmp_path / "run"
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    main([*arguments, "--max_steps", "6", "--resume_from_checkpoint", "last"])
    assert "checkpoint-4 is passed over" in caplog.text and "optimizer.pt is missing" in caplog.text
    names = {path.name for path in run.glob("*checkpoint-*")}
    assert names == {"checkpoint-2", "broken-checkpoint-4", "checkpoint-4", "checkpoint-6"}
    name = "adapter_model.safetensors" if adapter_only else "model.safetensors"
    expected, found = (load_file(folder / name) for folder in (tmp_path / "straight", run))
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    expected, found = (
        [entry["loss"] for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"][:-1]]
        for folder in (tmp_path / "straight", run)
    )
    assert expected == found and len(found) == 6


def test_resuming_without_a_checkpoint_is_refused_before_anything_is_loaded(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr("train_hf.load_rows", None)
    for resumed, message in [
        ("last", "no whole checkpoint to resume from in .*run"),
        ("", "resume_from_checkpoint is empty"),
        (str(tmp_path / "config.yaml"), "is no folder"),
        (str(tmp_path), "trainer_state.json is missing"),
    ]:
        with pytest.raises(ValueError, match=message):
            main([config_file, "--do_train", "--resume_from_checkpoint", resumed])
    with pytest.raises(ValueError, match="resume_from_checkpoint goes on with training: give --do_train"):
        main([config_file, "--do_eval", "--resume_from_checkpoint", "last"])
