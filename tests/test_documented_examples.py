"""The examples of README.md and docs/ run as they are written; those that train get `--max_steps 1`.

tests/test_documentation.py holds that the other commands could run.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from helpers.folders import build
from helpers.hub_client import CLIENT_TIMEOUT, run_client
from helpers.hub_server import HubServer
from helpers.markdown import code_blocks, commands
from helpers.models import save_backbones
from helpers.other_layouts import ReferSet
from helpers.refer_folder import ReferFolder
from helpers.segmenting import save_picture
from helpers.table_writers import SCHEMAS, write
from helpers.tiny_conversion import write_tiny_conversion
from helpers.warm_python import warm_python
from huggingface_hub import ModelCard

import quickstart
from data import prepare
from data.masks import RleMask
from train_hf import build_model
from training.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
README, TRAINING, ADAPTERS, DATA, EXPORT = (
    ROOT / name for name in ("README.md", "docs/training.md", "docs/adapters.md", "docs/data.md", "docs/export.md")
)
pytestmark = pytest.mark.slow

# Runs commands one after the other in one process, because importing takes longer than what they do.
RUN_COMMANDS = """
import runpy, sys

for program, *arguments in COMMANDS:
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{sys.argv} ended with {end.code}") from None
"""
UPLOAD_OFFICIAL_WEIGHTS = """
import huggingface_hub as hub

hub.create_repo("x6team/DETRIS")
hub.upload_file(repo_id="x6team/DETRIS", path_or_fileobj="official.pth", path_in_repo="NAME.pth")
"""


def block_with(path: Path, text: str, *languages: str) -> str:
    (block,) = (block.text for block in code_blocks(path, *languages) if text in block.text)
    return block


def python_commands(text: str) -> list[list[str]]:
    """The words after `python` of a script's commands."""
    return [words[1:] for words in commands(text) if words[0] == "python"]


def clone(folder: Path) -> Path:
    """Let a folder look like a clone of the repository."""
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("configs", "backbones", "data", "training", "metrics"):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def quick(one_thread, tmp_path_factory) -> Path:
    """A clone after `make quickstart`, except that nothing was trained."""
    folder = clone(tmp_path_factory.mktemp("clone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model_args, data_args, training_args = parse_arguments([quickstart.CONFIG])
        torch.manual_seed(0)
        model, processor = build_model(model_args)
        model.save_pretrained(training_args.output_dir)
        processor.save_pretrained(training_args.output_dir)
        quickstart.write_examples(Path(training_args.output_dir, quickstart.EXAMPLES), data_args.shapes_config)
    return folder


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Without network, and with the Python of the tests as `python`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {
        "PATH": path,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def run_program(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=CLIENT_TIMEOUT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_readmes_command_segments_a_picture(quick, environment):
    printed = run_program(["bash", "-ec", block_with(README, "--output masks", "bash")], quick, environment)
    assert "the star at top" in printed
    (entry,) = (quick / "masks").glob("*/*.png")
    assert entry.stat().st_size and (quick / "masks" / "results.json").is_file()


def test_the_readmes_python_runs_where_only_the_models_folder_is(quick, environment, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(quick / "runs" / "quickstart")
    steps = block_with(README, "post_process", "python")
    code = block_with(README, "pipeline(", "python") + steps
    code += "\nprint(len(masks), *(f'{tuple(mask.shape)}' for mask in masks), image.size)"
    *results, shapes = run_program([warm_python(), "-I", "-c", code], tmp_path, environment).splitlines()
    assert [re.match(r"(.+) [01]\.\d+ (\{'xmin.+\}|None)$", line)[1] for line in results] == [
        "the star at top",
        "the circle",
    ]
    assert shapes == "2 (96, 96) (96, 96) (96, 96)"


def test_the_examples_of_export_run(quick, environment):
    (export,) = python_commands(block_with(EXPORT, "export_onnx.py", "bash"))
    use, compiled = (block_with(EXPORT, text, "python") for text in ("onnxruntime", "torch.compile"))
    code = f"""COMMANDS = [{export}]{RUN_COMMANDS}{use}
exported = masks
{compiled.replace("torch.compile(model, ", "torch.compile(model, backend='aot_eager', ")}
print(*(bool((mask == other).all()) and tuple(mask.shape) for mask, other in zip(exported, masks, strict=True)))"""
    printed = run_program([warm_python(), "-c", code], quick, environment | {"PYTHONPATH": str(ROOT)})
    assert printed.startswith("Wrote detris.onnx (") and printed.splitlines()[-1] == "(96, 96) (96, 96)"


def test_what_the_quickstart_prints_at_its_end_runs(quick, environment, monkeypatch, capsys):
    monkeypatch.chdir(quick)
    monkeypatch.setattr(sys, "executable", str(quick / ".venv" / "bin" / "python"))
    folder = Path(quickstart.OWN_FOLDER)
    lines = (quick / folder / "examples" / "metadata.jsonl").read_text().splitlines()
    quickstart.print_next_steps(folder, list(map(json.loads, lines)))
    segment_picture, page, own_data = re.findall(r"^    (\S.+)", capsys.readouterr().out, re.M)
    assert page == "make app"
    own_data = shlex.split(own_data)[1:]
    assert [own_data] == python_commands(block_with(TRAINING, "own_data.yaml", "bash"))
    todo = [shlex.split(segment_picture)[1:], [*own_data, "--max_steps", "1"]]
    monkeypatch.undo()
    run_program(
        [warm_python(), "-c", f"COMMANDS = {todo}{RUN_COMMANDS}"], quick, environment | {"PYTHONPATH": str(ROOT)}
    )
    assert (quick / "out" / "results.json").is_file()
    assert (quick / "runs" / "own" / "report.html").is_file() and (quick / "runs" / "own" / "table.txt").is_file()


def test_official_weights_are_converted_used_trained_and_shared_as_the_readme_says(official, tmp_path):
    clone(tmp_path)
    save_picture(tmp_path / "photo.jpg")
    _, data_args, _ = parse_arguments([str(ROOT / quickstart.CONFIG)])
    mine = tmp_path / "path" / "to" / "mine"
    lines = quickstart.write_examples(mine, data_args.shapes_config)
    (mine / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    torch.save({"state_dict": official}, tmp_path / "official.pth")
    tiny = write_tiny_conversion(tmp_path)  # what a checkpoint of real size needs not be told
    (convert, segment_photo, _), (own_data,), (share,) = (  # tests/test_hub_sets.py makes the paper's table
        python_commands(block_with(README, text, "bash")) for text in ("NAME.pth", "own_data.yaml", "--push_to_hub")
    )
    todo = [[*convert, *tiny], segment_photo, [*own_data, "--max_steps", "1"], share]
    with HubServer() as server:
        run_client(UPLOAD_OFFICIAL_WEIGHTS, server, tmp_path)
        run_client(f"COMMANDS = {todo}{RUN_COMMANDS}", server, tmp_path, isolated=False, OMP_NUM_THREADS="1")
        files = server.files("someone/detris-mine")
    assert (tmp_path / "out" / "results.json").is_file() and (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert {
        "model.safetensors",
        "config.json",
        "processor_config.json",
        "modeling_detris.py",
        "README.md",
    } <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and card.data.eval_results and "@inproceedings" in card.text


PREPARE_ADAPTERS = """
import torch
from helpers.models import small_inputs
from transformers import AutoModel

inputs = small_inputs(2)
model = AutoModel.from_pretrained("runs/refcoco", trust_remote_code=True).eval()
"""


@pytest.fixture
def two_adapters(tmp_path) -> Path:
    """Adapters of two models with the same backbones, in the folders that docs/adapters.md names."""
    save_backbones(tmp_path / "backbones")
    for name in ("refcoco", "refcocoplus"):
        build(tmp_path / "backbones").save_adapter(tmp_path / "runs" / name)
    return tmp_path


def test_the_examples_of_adapters_run(two_adapters, environment, tmp_path):
    """As written, with adapters of the same backbones in the folders that they name."""
    code = PREPARE_ADAPTERS + "".join(block.text for block in code_blocks(ADAPTERS, "python"))
    run_program([warm_python(), "-c", code], two_adapters, environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    whole, half = (
        (two_adapters / "runs" / name / "adapter_model.safetensors").stat().st_size for name in ("refcoco", "half")
    )
    assert 0.4 < half / whole < 0.6


def test_the_examples_of_data_run(tmp_path, monkeypatch):
    """All but two: tests/test_sources.py runs that of a folder of one's own, and the Hub's tables are out of reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    refer = ReferFolder(tmp_path / "path" / "to" / "refer")
    refer.write()
    schema = SCHEMAS["refcoco_m"]
    write(schema, schema.rows(ReferSet(refer.root, "refcoco/unc")), tmp_path / "path" / "to" / "table", "parquet")
    _, data_args, _ = parse_arguments([str(ROOT / quickstart.CONFIG)])
    lines = quickstart.write_examples(tmp_path / "path" / "to" / "mine", data_args.shapes_config)
    names = {}
    blocks = [block.text for block in code_blocks(DATA, "python")]
    (share,) = (text for text in blocks if text.startswith("rows.cast_column"))
    (read_prepared,) = (text for text in blocks if "prepared/refcoco" in text)
    (tables,) = (text for text in blocks if "snapshot_download" in text)
    (own_folder,) = (text for text in blocks if "folder.mkdir()" in text)
    (with_pixels,) = (text for text in blocks if '"path/to/table"' in text)
    for text in blocks:
        if text not in (share, read_prepared, tables, own_folder, with_pixels):
            exec(text, names)
    assert names["splits"]["train"].num_rows == len(lines) and names["row"]["sentences"] == lines[0]["sentences"]
    names["rows"], names["datasets"] = names["splits"]["train"], datasets
    exec(with_pixels, names)
    assert names["splits"]["val"].num_rows == sum(ref["split"] == "val" for ref in refer.refs)
    ast.parse(tables)
    assert re.findall(r"^from (\S+) import (\w+)$", tables, re.M) == [("huggingface_hub", "snapshot_download")]

    plain = eval(share, names)
    assert plain[0]["mask"]["size"] == [96, 96] and plain.cast_column("mask", RleMask())[0]["mask"].shape == (96, 96)

    (prepare_refer,) = (
        words
        for words in python_commands(block_with(DATA, "--name refcoco/unc --output prepared/refcoco\n", "sh"))
        if words[2] == "refer"
    )
    prepare.main([*prepare_refer[2:], "--num_proc", "1"])
    exec(read_prepared, names)
    assert sum(rows.num_rows for rows in names["splits"].values()) == len(refer.refs)
