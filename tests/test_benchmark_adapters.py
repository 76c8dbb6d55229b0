"""The benchmark of adapters, on a few scenes: what its table and picture say, and that it goes on where it stopped."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.markdown import table_rows

import train_hf
from benchmarks import adapters as benchmark
from benchmarks.adapters import CONFIG, HEAD, METHODS, Benchmark, folder_name, main, parse_with_shipped_backbones
from data.untrusted import load_yaml
from modeling_detris import DetrisForReferringSegmentation
from training.run_folder import locked
from training.trainer import DetrisTrainer

ROOT = Path(__file__).parents[1]
SPLITS = ("val", "testA", "testB", "unseen")
HEADER = "method", "seeds", *(f"mIoU {split}" for split in SPLITS), "trained parameters"
FEW = {
    "shapes_config": {"image_size": 80, "sizes": {"train": 8} | dict.fromkeys(SPLITS, 2)},
    "per_device_train_batch_size": 2,
    "warmup_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 2,
    "learning_rate": 0.5,  # with which the head alone is best at first
    "disable_tqdm": True,
}
pytestmark = pytest.mark.usefixtures("one_thread")


def command_in(folder: Path, *others: str, **changes: object) -> list[str]:
    """A command for a folder in which the backbones are made already, with a file of arguments beside it."""
    for name in ("vision", "text"):
        shutil.copytree(ROOT / "backbones" / name, folder / "backbones_3000" / name, dirs_exist_ok=True)
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(load_yaml(CONFIG) | FEW | changes))
    return ["--output_dir", str(folder), "--config", str(config), "--patience", "2", *others]


@pytest.fixture(scope="module")
def run(one_thread, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a benchmark with two methods and two seeds, and the last of three commands that trained them."""
    folder = tmp_path_factory.mktemp("adapters") / "run"
    (folder / "detris_old").mkdir(parents=True)  # is no run of the benchmark
    main(command_in(folder, "--methods", HEAD, "detris", "--seeds", "3"))
    main(command_in(folder, "--methods", HEAD, "--seeds", "4"))
    unfinished = json.loads((folder / "detris_3" / "run.json").read_text())
    unfinished["settings"]["given"]["seed"] = 5
    del unfinished["machine"]
    (folder / "detris_5").mkdir()
    (folder / "detris_5" / "run.json").write_text(json.dumps(unfinished))
    command = command_in(folder, "--methods", "detris", "--seeds", "4")
    main(command)
    return folder, command


def model_of(method: str) -> DetrisForReferringSegmentation:
    args, _, _ = parse_with_shipped_backbones(CONFIG, seed=0)
    args.model_config |= METHODS[method]
    return train_hf.build_model(args)[0]


def evaluations_in(folder: Path) -> list[list[float]]:
    """Steps of a run, and val's mean IoU after them, as Trainer noted them."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [[log["step"], log["eval_mean_iou"]] for log in state["log_history"] if "eval_mean_iou" in log]


def test_the_larger_head_has_as_many_parameters_as_head_and_adapters():
    trained = {method: model_of(method).num_parameters(only_trainable=True) for method in METHODS}
    assert trained["larger head"] == pytest.approx(trained["detris"], rel=0.01)
    assert trained[HEAD] < trained["lora"] < trained["detris"] < trained["detris+lora"]
    assert not any("adapter" in name for name, _ in model_of("larger head").named_parameters())


def test_the_documented_table_counts_what_its_methods_train():
    rows = table_rows(ROOT / "docs" / "measurements.md", *HEADER)
    assert [row[0] for row in rows] == list(METHODS)
    for method, *_, count in rows:
        assert int(count.replace(",", "")) == model_of(method).num_parameters(only_trainable=True)


@pytest.mark.slow
def test_all_methods_train_for_as_long_as_the_head_alone_took_to_stop_improving(run):
    folder, _ = run
    values = [value for _, value in evaluations_in(folder / "search")]
    assert values.index(max(values)) == len(values) - 3  # two evaluations after the best one
    steps = 2 * len(values)
    caption = (folder / "adapters.md").read_text().splitlines()[0]
    assert f"trained for {steps} steps of 2 objects" in caption
    best = f"best after {steps - 4} steps, with {max(values):.3f} on val, and the next 2 evaluations"
    assert best in caption
    for name in ("head_only_3", "detris_3", "head_only_4", "detris_4"):
        state = json.loads((folder / name / "trainer_state.json").read_text())
        assert state["global_step"] == steps == state["log_history"][-1]["step"]
        rates = [log["learning_rate"] for log in state["log_history"] if "learning_rate" in log]
        assert rates[-1] < 0.1 < rates[0]  # logged before the last step, after which it is zero


@pytest.mark.slow
def test_each_run_trains_its_method_with_its_seed(run):
    folder, _ = run
    for method in (HEAD, "detris"):
        for seed in (3, 4):
            trained = folder / folder_name(method, seed)
            model = DetrisForReferringSegmentation.from_pretrained(trained)
            assert model.config.peft_method == METHODS[method]["peft_method"]
    heads = [DetrisForReferringSegmentation.from_pretrained(folder / f"head_only_{seed}") for seed in (3, 4)]
    weights = [model.neck.aggregation.state_dict() for model in heads]
    assert any(not weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_the_table_says_what_each_run_of_the_folder_has_reached(run):
    folder, _ = run
    rows = table_rows(folder / "adapters.md", *HEADER)
    assert [row[0] for row in rows] == [HEAD, "detris"]
    for row in rows:
        runs = [folder / folder_name(row[0], seed) for seed in (3, 4)]
        assert row[1] == "3 / 4"
        for split, cell in zip(SPLITS, row[2:-1], strict=True):
            reached = [json.loads((run / f"{split}_results.json").read_text()) for run in runs]
            assert cell == " / ".join(f"{metrics[f'{split}_mean_iou']:.3f}" for metrics in reached)
        assert int(row[-1].replace(",", "")) == model_of(row[0]).num_parameters(only_trainable=True)


@pytest.mark.slow
def test_the_picture_shows_vals_mean_iou_against_steps(run, monkeypatch):
    folder, command = run
    drawn, new_figure = [], benchmark.new_figure
    monkeypatch.setattr(benchmark, "new_figure", lambda: drawn.append(new_figure()) or drawn[-1])
    monkeypatch.setattr(train_hf, "prepare", None)  # nothing is trained again
    main(command)
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[-1][1].get_lines()}
    assert set(lines) == {
        f"{HEAD}, constant learning rate",
        *(f"{method}, seed {seed}" for method in (HEAD, "detris") for seed in (3, 4)),
    }
    evaluated = evaluations_in(folder / "detris_4")
    assert lines["detris, seed 4"] == evaluated
    last = json.loads((folder / "detris_4" / "val_results.json").read_text())["val_mean_iou"]
    assert len(evaluated) > 1 and evaluated[-1][1] == pytest.approx(last)
    assert (folder / "adapters.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(run, tmp_path, monkeypatch):
    whole, _ = run
    folder = tmp_path / "run"
    command = command_in(folder, "--methods", HEAD, "--seeds", "3")
    evaluate, asked = DetrisTrainer.evaluate, []

    def evaluate_once(trainer, *args, **kwargs):
        asked.append(trainer.state.global_step)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(DetrisTrainer, "evaluate", evaluate_once)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    with pytest.raises(SystemExit, match="search was begun with other settings: name another --output_dir"):
        main([*command, "--patience", "3"])
    with pytest.raises(SystemExit, match="search was begun with other settings"):
        main(command_in(folder, "--methods", HEAD, learning_rate=0.1))
    with pytest.raises(SystemExit, match="search was begun with other settings"):
        main([*command, "--pretraining_steps", "5"])
    assert not (folder / "backbones_5").exists()
    main(command_in(folder, "--methods", HEAD, "--seeds", "3"))
    assert asked[:3] == [2, 4, 4]  # the two steps before the checkpoint were not repeated
    assert evaluations_in(folder / "search") == evaluations_in(whole / "search")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [("run.json", ""), ("run.json", "[1]"), ("run.json", "{}"), ("trainer_state.json", None)],
)
def test_a_damaged_run_is_named(name, content, run, tmp_path):
    folder, command = run
    folder = shutil.copytree(folder, tmp_path / "run")
    (folder / "detris_3" / name).unlink()
    if content is not None:
        (folder / "detris_3" / name).write_text(content)
    with pytest.raises(SystemExit, match="run/detris_3 is damaged .*: delete it to train that run again"):
        main(["--output_dir", str(folder), *command[2:]])


def test_fields_that_fit_no_model_are_refused_before_the_backbones_are_made(tmp_path, capsys):
    command = command_in(tmp_path / "run", model_config={})  # is that of a larger model
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(SystemExit):
        main(command)
    assert "feature_layers names layers [8], which do not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_commands_do_not_make_the_same_backbones(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    with locked(tmp_path / "backbones_3000.partial"):
        with pytest.raises(SystemExit, match="Another run is at work in .*backbones_3000.partial: wait until it has"):
            main(["--output_dir", str(tmp_path)])


def test_two_commands_do_not_train_the_same_run(tmp_path):
    command = command_in(tmp_path / "run")
    with locked(tmp_path / "run" / "search"):
        with pytest.raises(SystemExit, match="Another run is at work in .*/run/search: wait until it has ended"):
            main(command)


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit, match=f"--output_dir {folder} cannot be made .*: name another."):
            main(["--output_dir", str(folder)])


def test_a_search_that_ends_at_the_limit_is_called_so(tmp_path):
    search = benchmark.Run({}, [(2, 0.1), (4, 0.2)], 4, "a machine")
    head = benchmark.Run(dict.fromkeys([f"{split}_mean_iou" for split in SPLITS], 0.1), [], 4, "another")
    head.metrics["trained_parameters"] = 7
    limited, free = (
        Benchmark(tmp_path, CONFIG, 1, patience=2, most_steps=most).make_table({HEAD: {5: head}}, search)
        for most in (4, 5)
    )
    assert "with 0.200 on val, and the run ended at the limit that was given. Machine" in limited
    assert "one every 500 steps, were not better. Machine: a machine and another." in free
    assert f"| {HEAD} | 5 | 0.100 |" in free


def test_the_backbones_are_those_that_learn_nothing_of_each_other(tmp_path, monkeypatch):
    commands = []

    def pretrain(command: list[str], **_: object) -> None:
        commands.append(command)
        if len(commands) == 1:
            raise subprocess.CalledProcessError(1, command)
        Path(command[command.index("--output_dir") + 1]).mkdir()

    monkeypatch.setattr(subprocess, "run", pretrain)
    made = Benchmark(tmp_path, CONFIG, pretraining_steps=7, patience=2, most_steps=9)
    with pytest.raises(subprocess.CalledProcessError):
        made.make_backbones()
    assert not made.backbones.exists()
    made.make_backbones()
    made.make_backbones()
    assert len(commands) == 2 and made.backbones.is_dir()
    assert commands[1][1:4] == ["-m", "backbones.pretrain", "--unaligned"]
    assert commands[1][-2:] == ["--max_steps", "7"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--methods", "dora"], "invalid choice: 'dora'"),
        (["--methods", "lora", "lora"], "--methods is ['lora', 'lora']: give each one once"),
        (["--seeds", "0", "0"], "--seeds is [0, 0]: give each one once"),
        (["--seeds", "-1"], "seed is -1"),
        (["--patience", "0"], "--patience is 0: give at least 1"),
        (["--learning_rate", "0.1"], "unrecognized arguments: --learning_rate"),
        (["--config", "nothing.yaml"], "nothing.yaml"),
        (["--config", str(ROOT / "configs")], "configs is no regular file"),
    ],
)
def test_wrong_arguments_are_refused_before_the_backbones_are_made(wrong, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "out"), *wrong])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
