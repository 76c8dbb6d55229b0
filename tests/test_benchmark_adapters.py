"""The benchmark of adapters, on a few scenes: what its table and picture say, and that it goes on where it stopped."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.markdown import table_rows

import train_hf
from benchmarks import adapters as benchmark
from benchmarks.adapters import CONFIG, HEAD, METHODS, main
from modeling_detris import DetrisForReferringSegmentation
from training.arguments import parse_arguments
from training.trainer import DetrisTrainer

ROOT = Path(__file__).parents[1]
SPLITS = ("val", "testA", "testB", "unseen")
FEW = ["--shapes_config", json.dumps({"image_size": 80, "sizes": {"train": 8} | dict.fromkeys(SPLITS, 2)})]
FEW += ["--per_device_train_batch_size", "2", "--warmup_steps", "1", "--eval_steps", "2", "--save_steps", "2"]
FEW += ["--disable_tqdm", "true", "--patience", "2", "--most_steps", "12"]
TWO = ["--methods", HEAD, "detris", "--seeds", "3", "4", "--learning_rates", "0.5", "0.001"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # where the arguments' file finds the small backbones


def folder_with_backbones(folder: Path) -> Path:
    """A folder in which the backbones are made already."""
    for name in ("vision", "text"):
        shutil.copytree(ROOT / "backbones" / name, folder / "backbones_3000" / name)
    return folder


@pytest.fixture(scope="module")
def run(one_thread, tmp_path_factory) -> Path:
    """The folder of a benchmark with two methods and two seeds."""
    folder = folder_with_backbones(tmp_path_factory.mktemp("adapters"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        main(["--output_dir", str(folder), *TWO, *FEW])
    return folder


def model_of(method: str) -> DetrisForReferringSegmentation:
    args = parse_arguments([CONFIG])[0]
    args.model_config |= METHODS[method]
    return train_hf.build_model(args)[0]


def test_the_larger_head_has_as_many_parameters_as_head_and_adapters():
    trained = {method: model_of(method).num_parameters(only_trainable=True) for method in METHODS}
    assert trained["larger head"] == pytest.approx(trained["detris"], rel=0.01)
    assert trained[HEAD] < trained["lora"] < trained["detris"] < trained["detris+lora"]
    assert not any("adapter" in name for name, _ in model_of("larger head").named_parameters())


@pytest.mark.slow
def test_all_methods_train_for_as_long_as_the_head_alone_took_to_stop_improving(run):
    searches = [json.loads((run / f"search_{rate}" / "run.json").read_text()) for rate in ("0.5", "0.001")]
    for search in searches:
        values = [value for _, value in search["curve"]]
        ended = values.index(max(values)) == len(values) - 3  # two evaluations after the best one
        assert ended or search["steps"] == 12
    best, rate, steps = max(
        (max(value for _, value in search["curve"]), rate, search["steps"])
        for search, rate in zip(searches, (0.5, 0.001))
    )
    assert f"{best:.3f} at {rate} " in (run / "adapters.md").read_text()
    for name in ("head_only_3", "detris_3", "head_only_4", "detris_4"):
        state = json.loads((run / name / "trainer_state.json").read_text())
        assert state["global_step"] == steps == state["log_history"][-1]["step"]
        arguments = json.loads((run / name / "run.json").read_text())["arguments"]
        args = parse_arguments([CONFIG, *arguments])[2]
        assert (args.seed, args.learning_rate, args.lr_scheduler_type) == (int(name[-1]), rate, "cosine")


@pytest.mark.slow
def test_the_table_says_what_each_run_has_reached(run):
    rows = table_rows(run / "adapters.md", "method", *(f"mIoU {split}" for split in SPLITS), "trained parameters")
    assert [row[0] for row in rows] == [HEAD, "detris"]
    for row in rows:
        for split, cell in zip(SPLITS, row[1:-1], strict=True):
            folders = [run / f"{row[0].replace(' ', '_')}_{seed}" for seed in (3, 4)]
            reached = [json.loads((folder / f"{split}_results.json").read_text()) for folder in folders]
            assert cell == " / ".join(f"{metrics[f'{split}_mean_iou']:.3f}" for metrics in reached)
        assert int(row[-1].replace(",", "")) == model_of(row[0]).num_parameters(only_trainable=True)


@pytest.mark.slow
def test_the_picture_shows_vals_mean_iou_against_steps(run, monkeypatch):
    drawn = []
    new_figure = benchmark.new_figure
    monkeypatch.setattr(benchmark, "new_figure", lambda: drawn.append(new_figure()) or drawn[-1])
    monkeypatch.setattr(train_hf, "main", None)  # nothing is trained again
    main(["--output_dir", str(run), *TWO, *FEW])
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[-1][1].get_lines()}
    assert set(lines) == {
        *(f"{HEAD}, constant rate {rate}" for rate in ("0.5", "0.001")),
        *(f"{method}, seed {seed}" for method in (HEAD, "detris") for seed in (3, 4)),
    }
    state = json.loads((run / "detris_4" / "trainer_state.json").read_text())
    evaluated = [[log["step"], log["eval_mean_iou"]] for log in state["log_history"] if "eval_mean_iou" in log]
    assert lines["detris, seed 4"] == evaluated
    last = json.loads((run / "detris_4" / "val_results.json").read_text())["val_mean_iou"]
    assert len(evaluated) > 1 and evaluated[-1][1] == pytest.approx(last)
    assert (run / "adapters.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(run, tmp_path, monkeypatch):
    folder = folder_with_backbones(tmp_path)
    command = ["--output_dir", str(folder), "--seeds", "3", "--learning_rates", "0.5", "--methods", HEAD, *FEW]
    evaluate, asked = DetrisTrainer.evaluate, []

    def evaluate_once(trainer, *args, **kwargs):
        asked.append(trainer.state.global_step)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(DetrisTrainer, "evaluate", evaluate_once)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    main(command)
    assert asked[:3] == [2, 4, 4]  # the two steps before the checkpoint were not repeated
    whole, resumed = (json.loads((path / "search_0.5" / "run.json").read_text()) for path in (run, folder))
    assert (resumed["curve"], resumed["steps"]) == (whole["curve"], whole["steps"])


def test_runs_with_other_arguments_are_not_mixed(tmp_path):
    folder = folder_with_backbones(tmp_path)
    done = {"metrics": {}, "curve": [[2, 0.5]], "steps": 2, "arguments": ["--seed", "0"], "machine": "another"}
    (folder / "search_0.001").mkdir()
    (folder / "search_0.001" / "run.json").write_text(json.dumps(done))
    with pytest.raises(ValueError, match="search_0.001 was trained with other arguments: give another --output_dir"):
        main(["--output_dir", str(folder), *FEW])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--methods", "dora"],
        ["--learnin_rate", "1"],
        ["--eval_steps", "soon"],
        ["--learning_rate", "0.1"],  # those of all runs would be replaced
        ["--peft_method=lora"],
    ],
)
def test_wrong_arguments_are_refused_before_the_backbones_are_made(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "make_backbones", None)
    with pytest.raises((ValueError, SystemExit)):
        main(["--output_dir", str(tmp_path / "out"), *wrong])
    assert not (tmp_path / "out").exists()
