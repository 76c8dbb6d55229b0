"""The benchmark of the model, at its tiny size: its figures are there and mean what they say."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import evaluation
from benchmarks import model as benchmark
from benchmarks.model import (
    BACKBONE,
    MATRICES,
    OURS,
    STAGES,
    Contestant,
    count_operations,
    figures_of,
    main,
    make_inputs,
    make_model,
    measure,
    parse,
    read_results,
)

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
]
TIMED = {"name", "seconds", "ratio", "gflop", "gflop_per_second", "share_of_peak", "memory_mib"}
COUNTED = {"launches", "reads"}


@pytest.fixture
def argv(tmp_path):
    """Arguments for a quick run."""
    arguments = ["--size", "tiny", "--device", "cpu", "--rounds", "1", "--batches", "2", "--objects", "4"]
    return ["--output", str(tmp_path / "scratch"), "--backend", "eager", *arguments]


@pytest.fixture
def settings(argv):
    return parse(argv)[0]


def measured(tmp_path) -> dict:
    """The stages that were measured, each with its rows by their names."""
    results = json.loads((tmp_path / "scratch" / "model_cpu_tiny.json").read_text())
    return {stage: {row["name"]: row for row in rows} for stage, rows in results["stages"].items()}


def make_other(config):
    """Another implementation, which does little."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 1, config.vision_config.patch_size, config.vision_config.patch_size)

        def forward(self, pixel_values, input_ids):
            return self.convolution(pixel_values)[:, 0] + input_ids.sum(1)[:, None, None]

    return Other()


def make_wrong(config):
    return lambda pixel_values, input_ids: pixel_values[:0]


# --- stages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_graphs(monkeypatch):
    """Graphs take most of the time, so that only one test counts them."""
    monkeypatch.setattr(benchmark, "count_graphs", lambda contestant, device: {})


@pytest.mark.slow
def test_phrases_beside_another_implementation(argv, tmp_path):
    other = "test_benchmark_model:make_other"
    main([*argv, "--against", other, "--stage", "phrases"])
    rows, backbone = measured(tmp_path)["phrases"], f"{BACKBONE}, 8 images"
    assert list(rows) == [backbone, MATRICES, OURS, other]
    for name in (backbone, OURS, other):
        assert rows[name].keys() == TIMED | COUNTED | {"graphs"}
        assert rows[name]["seconds"] > 0 and rows[name]["launches"] > 0 and rows[name]["graphs"] > 0
    assert rows[backbone]["ratio"] == rows[MATRICES]["share_of_peak"] == 1
    assert rows[MATRICES]["gflop"] == 2 * 2048**3 / 1e9
    assert rows[other]["graphs"] == 1 and rows[other]["reads"] == rows[backbone]["reads"] == 0
    assert rows[other]["launches"] == 3  # the convolution, and both sums
    patches = (112 // 14) ** 2
    assert rows[other]["gflop"] == pytest.approx(8 * patches * 2 * 3 * 14**2 / 1e9)
    table = (tmp_path / "scratch" / "model_cpu_tiny.md").read_text()
    assert table.count("\n|") == 2 + 3 and f"| one image, 8 phrases: {OURS} | " in table


@pytest.mark.slow
def test_a_pair(argv, tmp_path, without_graphs):
    main([*argv, "--stage", "pair", "--bf16"])
    rows = measured(tmp_path)["pair"]
    assert list(rows) == [BACKBONE, MATRICES, OURS]
    assert all(row.keys() == TIMED | COUNTED for row in rows.values())
    assert "bfloat16 (autocast)" in (tmp_path / "scratch" / "model_cpu_tiny.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["step", "step_checkpointed", "step_compiled"])
def test_training_steps(argv, tmp_path, stage, without_graphs):
    main([*argv, "--stage", stage])
    rows = measured(tmp_path)[stage]
    assert list(rows) == [f"{BACKBONE}, 2 images", MATRICES, f"{OURS}, 2 images"]
    ours = rows[f"{OURS}, 2 images"]
    assert ours.keys() == (TIMED if stage == "step_compiled" else TIMED | COUNTED)
    assert ours["gflop"] > rows[f"{BACKBONE}, 2 images"]["gflop"]


@pytest.mark.slow
def test_an_evaluation_that_writes_pictures(argv, tmp_path, monkeypatch, without_graphs):
    monkeypatch.setattr(benchmark, "clock", lambda run, device: 0.5)
    main([*argv, "--stage", "evaluation_pictures"])
    rows = measured(tmp_path)["evaluation_pictures"]
    ours = rows[f"{OURS}, 12 phrases"]
    assert ours.keys() == TIMED | COUNTED | {"share_in_model"}
    assert 0 < ours["share_in_model"] < 1 and ours["launches"] > 0
    assert ours["ratio"] == pytest.approx((ours["seconds"] / 12) / (0.5 / 8))  # by phrases and by images
    assert ours["share_of_peak"] == pytest.approx((ours["gflop"] / ours["seconds"]) / (2 * 2048**3 / 1e9 / 0.5))
    folder = tmp_path / "scratch" / "evaluation_cpu_tiny" / "predictions" / "val"
    assert len(list((folder / "overlays").iterdir())) == 12


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on(argv, settings, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the stage's process is started
    settings.output.mkdir()
    path = settings.output / "model_cpu_tiny.json"
    results = read_results(path, settings)
    earlier = [{"name": "from an earlier run", "seconds": 7}]
    results["stages"] = {stage: earlier for stage in STAGES if stage != "evaluation"}
    benchmark.write_results(path, results)
    main(argv)
    found = json.loads(path.read_text())["stages"]
    assert list(found) == list(STAGES)
    assert all(found[stage] == earlier for stage in STAGES if stage != "evaluation")
    assert found["evaluation"][-1]["name"] == f"{OURS}, 12 phrases"
    assert not (settings.output / "evaluation_cpu_tiny" / "predictions" / "val" / "overlays").exists()
    printed = capfd.readouterr().out
    assert printed.count("--- ") == 1 and path.with_suffix(".md").read_text() in printed


def test_only_whole_stages_are_kept(argv, tmp_path, monkeypatch):
    ran = []

    def run(command, **_):
        stage = command[-1]
        ran.append(stage)
        main(command[3:])
        return subprocess.CompletedProcess(command, 0)

    def fail(settings):
        raise KeyboardInterrupt

    rows = [{"name": OURS, "seconds": 1.0}]
    stages = {"pair": ("", lambda settings: rows), "phrases": ("", fail), "step": ("", lambda settings: rows)}
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    monkeypatch.setattr(benchmark, "STAGES", stages)
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    assert list(measured(tmp_path)) == ["pair"]
    stages["phrases"] = stages["step"]
    main(argv)
    assert ran == ["pair", "phrases", "phrases", "step"] and list(measured(tmp_path)) == list(stages)
    main(argv)
    assert len(ran) == 4
    main([*argv, "--stage", "pair"])  # asked for
    assert not list((tmp_path / "scratch").glob(".*.tmp"))
    with pytest.raises(SystemExit, match="was measured with rounds 1, not 2: give another --output"):
        main([*argv, "--rounds", "2"])
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9))
    stages["more"] = stages["step"]
    with pytest.raises(SystemExit, match="The stage more ended with status -9: the same command goes on from there."):
        main(argv)


# --- figures ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flop_of_a_base_pair(settings):
    settings = replace(settings, size="base", device="meta")
    model, inputs = make_model(settings).eval(), make_inputs(settings.config, "meta", 1, 1)
    pair = Contestant(OURS, lambda: model(**inputs), tensors=list(inputs.values()))
    gflop = count_operations(pair, "meta")["gflop"]
    assert gflop == pytest.approx(311, abs=0.5)  # which was worked out from the layers' sizes


def test_figures_compare_within_a_round():
    """A round in which the machine is ten times slower changes no ratio."""
    figures = figures_of([3.0, 30.0, 3.0], 12.0, backbone=[2.0, 20.0, 2.0], peak=[8.0, 0.8, 8.0])
    assert figures == {"seconds": 3, "ratio": 1.5, "gflop_per_second": 4, "share_of_peak": 0.5}


def test_what_fails_has_a_row(settings):
    def break_graph():
        torch._dynamo.graph_break()

    def fill_memory():
        raise torch.OutOfMemoryError("There are 2 GB too few.\nAnd more.")

    fine = [
        Contestant(BACKBONE, lambda: torch.ones(2)),
        Contestant(MATRICES, lambda: torch.ones(2, 2) @ torch.ones(2, 2)),
    ]
    broken = Contestant("broken", torch.compile(break_graph, fullgraph=True, backend="eager"), counted=lambda: None)
    rows = measure(settings, [*fine, broken, Contestant("large", fill_memory)])
    assert [row["name"] for row in rows] == [BACKBONE, MATRICES, "broken", "large"]
    assert rows[2]["error"].startswith("Unsupported: ") and rows[2]["gflop"] == 0 and "seconds" not in rows[2]
    assert rows[3] == {"name": "large", "error": "OutOfMemoryError: There are 2 GB too few."}
    results = {**benchmark.describe(settings), "stages": {"pair": rows}}
    assert "| one image, one phrase: large | OutOfMemoryError: There are 2 GB too few. | – |" in benchmark.make_table(
        results
    )
    with pytest.raises(ZeroDivisionError):  # a fault, and not the device's
        measure(settings, [Contestant("faulty", lambda: 1 / 0)])


def test_time_inside_the_model(monkeypatch):
    class Model(nn.Module):
        def forward(self):
            time.now += 2

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    time = Clock()
    monkeypatch.setattr(evaluation, "time", time)
    model = Model()
    model_time = evaluation.ModelTime(model, "cpu")
    model()
    time.now += 100
    model()
    assert model_time.seconds() == 2 + 2


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no_such_module:build", "math:no_such_function", "math", ":", ""])
def test_another_implementation_that_is_not_there(argv, name):
    with pytest.raises(SystemExit, match="cannot be imported .*: give module:function"):
        main([*argv, "--against", name])


def test_another_implementation_must_give_a_map_for_each_phrase(argv):
    with pytest.raises(
        SystemExit, match=r"make_wrong computed \(0, 3, 112, 112\): it must give logits, a map for each"
    ):
        main([*argv, "--against", "test_benchmark_model:make_wrong", "--stage", "pair"])


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--objects", "0"], ["--batches", "4", "0"], ["--stage", "x"]])
def test_wrong_arguments(argv, wrong, capsys):
    with pytest.raises(SystemExit):
        parse([*argv, *wrong])
    assert wrong[0] in capsys.readouterr().err
