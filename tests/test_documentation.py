"""What README.md and docs/ say is so: their commands and examples run, their links lead somewhere, their numbers hold.

Commands that would take hours or a network go through the parser of the program that they call.
"""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from helpers.hub_client import CLIENT_TIMEOUT, run_client
from helpers.hub_server import HubServer
from helpers.markdown import Snippet, anchors, code_blocks, commands, inline_code, links
from helpers.segmenting import save_picture
from helpers.tiny_conversion import write_tiny_conversion
from huggingface_hub import ModelCard
from transformers import HfArgumentParser

import quickstart
import segment
from configuration_detris import PEFT_METHODS
from train_hf import build_model
from training.arguments import (
    DataArguments,
    DetrisTrainingArguments,
    ModelArguments,
    check_combination,
    parse_arguments,
)

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *ROOT.glob("metrics/*/*.md"),
    ROOT / "backbones/README.md",
]
INSTRUCTIONS = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # what was so once may stand there
README, TRAINING, ADAPTERS, DATA, MEASURED = (
    ROOT / name
    for name in ("README.md", "docs/training.md", "docs/adapters.md", "docs/data.md", "docs/measurements.md")
)
LEFT_OUT = "…"
OTHERS = {"wget", "sha256sum", "unzip", "for", "pre-commit"}  # programs that are not ours
# It compares with data that cannot be passed on; CONTRIBUTING.md says so.
OF_THE_MAINTAINERS = "../shared/conformance/check.py"
MODULES = {
    "convert_detris_checkpoint.py": "convert_detris_checkpoint",
    "data.check": "data.check",
    "data.prepare": "data.prepare",
    "benchmarks.data": "benchmarks.data",
    "benchmarks.two_processes": "benchmarks.two_processes",
}
COMING = {"app.py", "docs/app.png", "docs/space.md"}  # with the page
# Named in backticks, and no files of this repository.
FOREIGN = {
    "demo.py",
    "test.py",
    "tools/data_process.py",
    "tools/folder2lmdb.py",
    "gres_model/evaluation/refer_evaluation.py",
}
FOREIGN |= {"tests/test_x.py", "x.py", "data/x.py"}  # stand for any file
HOW_TO = re.compile(
    r"(python|pytest|pip|make|accelerate launch|[\w./]+\.py) \S"
)  # how inline code that is a command begins


class Wrong(Exception):
    """A command that does not work as it is written."""


class Parsed(Exception):
    """Raised in place of what a program does after it has read its arguments; its text is the program's help."""


def say(snippet: Snippet) -> str:
    return f"{snippet.document}:{snippet.line}"


# --- commands ---


def parse_and_stop(main: Callable[[], object], program: str, arguments: list[str]) -> str:
    """Let a program read its arguments and stop there. Returns its help."""

    def stopping(parse: Callable) -> Callable:
        def parse_and_raise(parser: argparse.ArgumentParser, *args, **kwargs):
            parse(parser, *args, **kwargs)
            raise Parsed(parser.format_help())

        return parse_and_raise

    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as complaint:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [program, *arguments])
        try:
            main()
        except Parsed as parsed:
            return str(parsed)
        except SystemExit:
            raise Wrong(complaint.getvalue().splitlines()[-1]) from None
    raise AssertionError(f"{program} has not read its arguments")


def check_training(arguments: list[str]) -> None:
    given = [argument for argument in arguments if argument != LEFT_OUT]
    backbones = [] if given == arguments else ["--vision_backbone", "some/dinov2", "--text_backbone", "some/clip"]
    try:
        parsed = parse_arguments([*given, *backbones])
        if parsed[0].peft_method is not None and parsed[0].peft_method not in PEFT_METHODS:
            raise ValueError(f"there is no peft_method {parsed[0].peft_method}")
        if given == arguments:
            check_combination(*parsed)
    except (OSError, ValueError) as error:
        raise Wrong(str(error)) from None


def check_quickstart(arguments: list[str]) -> None:
    def stop(argv: list[str]) -> None:
        check_training(argv)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as complaint:
        patch.setattr(quickstart, "train", stop)
        try:
            quickstart.main(arguments)
        except Parsed:
            return
        except (OSError, ValueError, SystemExit) as error:
            raise Wrong(f"{error} {complaint.getvalue()}") from None


def check_segment(arguments: list[str]) -> None:
    with redirect_stderr(StringIO()) as complaint:
        try:
            segment.parse_arguments(arguments)
        except SystemExit:
            raise Wrong(complaint.getvalue()) from None


def check_app(arguments: list[str]) -> None:
    if not (ROOT / "app.py").exists():
        pytest.skip("app.py is not there yet")
    with redirect_stderr(StringIO()) as complaint:
        try:
            HfArgumentParser(importlib.import_module("app").AppArguments).parse_args_into_dataclasses(arguments)
        except SystemExit:
            raise Wrong(complaint.getvalue()) from None


PROGRAMS = {
    "train_hf.py": check_training,
    "quickstart.py": check_quickstart,
    "segment.py": check_segment,
    "app.py": check_app,
}


def check_program(program: str, arguments: list[str]) -> None:
    """Refuse arguments that a program of ours, or a module run by `python -m`, does not take."""
    if program in PROGRAMS and arguments == ["--help"]:
        pass
    elif program in PROGRAMS:
        PROGRAMS[program](arguments)
    elif program in MODULES:
        parse_and_stop(importlib.import_module(MODULES[program]).main, program, arguments)
    elif program != OF_THE_MAINTAINERS:
        raise Wrong(f"{program} is no program of ours")


@cache
def names_of_tests(path: Path) -> list[str]:
    names = [node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if hasattr(node, "name")]
    return [name for name in names if name.startswith("test_")]


def check_pytest(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("-k", default="test_")
    parser.add_argument("--durations", type=int)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise Wrong(f"{unknown[0]} is unknown here")
    for path in map(Path, options.paths):
        if not (ROOT / path).is_file():
            raise Wrong(f"there is no {path}")
        if not any(options.k in name for name in names_of_tests(ROOT / path)):
            raise Wrong(f"-k {options.k} selects no test of {path}")


def check_make(arguments: list[str]) -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1].split()
    target, *variables = arguments
    if target not in phony:
        raise Wrong(f"make has no target {target}")
    for variable in variables:
        name, _, value = variable.partition("=")
        if name != "ARGS":
            raise Wrong(f"make {target} takes no {name}")
        if target == "app":
            check_app(shlex.split(value))
        elif target in ("test", "test-fast"):
            check_pytest(shlex.split(value))
        else:
            raise Wrong(f"make {target} hands ARGS to nothing")


def check_pip(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("command", choices=["install"])
    parser.add_argument("-r", action="append", default=[])
    for path in parser.parse_args(arguments).r:
        if not (ROOT / path).is_file():
            raise Wrong(f"there is no {path}")


def check_launch(arguments: list[str]) -> None:
    if not any(argument.endswith(".py") for argument in arguments):  # its own options are spoken of
        arguments = [*arguments, "train_hf.py"]
    with redirect_stderr(StringIO()) as complaint:
        try:
            launched = launch_command_parser().parse_args(arguments)
        except SystemExit:
            raise Wrong(complaint.getvalue().splitlines()[-1]) from None
    check_program(launched.training_script, launched.training_script_args)


def check_command(words: list[str]) -> None:
    """Refuse a command that is of no known kind, or cannot work as it is written."""
    match words:
        case ["make", *arguments]:
            check_make(arguments)
        case ["pip", *arguments]:
            check_pip(arguments)
        case ["pytest", *arguments]:
            check_pytest(arguments)
        case ["accelerate", "launch", *arguments]:
            check_launch(arguments)
        case ["python", "-m", "pytest", *arguments]:
            check_pytest(arguments)
        case ["python", "-m", program, *arguments] | ["python", program, *arguments]:
            check_program(program, arguments)
        case [name, *_] if name.endswith(".py"):
            check_program(name, words[1:])
        case [name, *_] if name in OTHERS or re.match(r"\w+=", name):
            pass
        case _:
            raise Wrong("it is of no known kind")


def commands_in_text(path: Path) -> list[Snippet]:
    return [code for code in inline_code(path) if HOW_TO.match(code.text)]


BLOCKS = [block for path in INSTRUCTIONS for block in code_blocks(path, "bash", "sh")]
IN_TEXT = [code for path in INSTRUCTIONS for code in commands_in_text(path)]


@pytest.mark.parametrize("block", BLOCKS, ids=say)
def test_every_command_of_a_block_works_as_it_is_written(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    found = list(commands(block.text))
    assert found and not any(words[0] == "$" for words in found)
    for words in found:
        try:
            check_command(words)
        except Wrong as wrong:
            pytest.fail(f"{say(block)}: {shlex.join(words)}\n{wrong}")


def test_commands_in_the_text_work_too(monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = []
    for code in IN_TEXT:
        if re.fullmatch(r"python (\S+\.py|-m \S+)", code.text):  # only names a program
            assert code.text.split()[-1] in (*PROGRAMS, *MODULES, OF_THE_MAINTAINERS), code
            continue
        if code.text.startswith("python app.py") and not (ROOT / "app.py").exists():
            continue
        try:
            check_command(shlex.split(code.text))
        except Wrong as error:
            wrong.append(f"{say(code)}: {code.text}\n{error}")
    assert len(IN_TEXT) > 10 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "command",
    [
        "make quickstrat",
        "make quickstart ARGS=--fast",
        "make test ARGS=tests/test_nothing.py",
        "pip install -r requirements-gpu.txt",
        "pytest tests/test_quickstart.py -k nowhere_to_be_found",
        "python nothing.py",
        "python -m data.download",
        "python segment.py photo.jpg cat --modle detris",
        "python segment.py photo.jpg cat",
        "python quickstart.py --methods adapters",
        "python quickstart.py --epochs 3",
        "python train_hf.py configs/nothing.yaml",
        "python train_hf.py configs/own_data.yaml --learnin_rate 3",
        "python train_hf.py --dataset mine --do_predict",
        "python train_hf.py … --peft_method adapters",
        "python convert_detris_checkpoint.py x6team/DETRIS --filename NAME.pth out",
        "python -m data.prepare folders path/to/mine --output out",
        "python -m benchmarks.data",
        "accelerate launch --num_gpus 2 train_hf.py configs/base_refcoco.yaml",
        "accelerate launch --num_processes 2 train_hf.py configs/base.yaml",
        "curl -O somewhere",
    ],
)
def test_commands_that_do_not_work_are_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Wrong):
        check_command(shlex.split(command))


@cache
def known_options() -> set[str]:
    """The long options of our programs."""
    helps = [HfArgumentParser((ModelArguments, DataArguments, DetrisTrainingArguments)).format_help()]
    helps.append(HfArgumentParser(quickstart.QuickstartArguments).format_help())
    for program, arguments in (
        ("convert_detris_checkpoint.py", ["source"]),
        ("data.check", ["root"]),
        ("data.prepare", ["folder", "path", "--output", "out"]),
    ):
        helps.append(parse_and_stop(importlib.import_module(MODULES[program]).main, program, arguments))
    helps.append(parse_and_stop(segment.main, "segment.py", ["photo.jpg", "cat", "--model", "detris"]))
    if (ROOT / "app.py").exists():
        helps.append(HfArgumentParser(importlib.import_module("app").AppArguments).format_help())
    return set(re.findall(r"--[\w-]+", " ".join(helps)))


def test_options_in_the_text_exist():
    codes = [code for path in INSTRUCTIONS for code in inline_code(path) if not HOW_TO.match(code.text)]
    options = [(option, code) for code in codes for option in re.findall(r"(?<!\S)--[a-zA-Z][\w-]+", code.text)]
    strange = [f"{say(code)}: {option}" for option, code in options if option not in known_options()]
    assert len(options) > 30 and not strange, "\n".join(strange)


# --- links, paths, lengths ---


def test_links_lead_to_files_and_headings():
    broken = []
    for path in DOCUMENTS:
        for link in links(path):
            target, _, anchor = link.text.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            if target in COMING:
                continue
            file = path.parent / target if target else path
            if not file.resolve().is_relative_to(ROOT) or not file.exists():
                broken.append(f"{say(link)}: {link.text} is not there")
            elif anchor and anchor not in anchors(file):
                broken.append(f"{say(link)}: {link.text} has no such heading")
    assert not broken, "\n".join(broken)


def is_path(text: str) -> bool:
    """Whether inline code looks like a file or folder of this repository."""
    if not re.fullmatch(r"\w[\w.\-/]*", text) or text in FOREIGN | COMING:
        return False
    return text.endswith((".py", ".yaml", ".lock", ".md", ".toml")) or (
        "/" in text and (ROOT / text.split("/")[0]).exists() and not text.startswith(("runs/", "../"))
    )


def test_files_that_are_named_exist():
    named = [(path, code) for path in INSTRUCTIONS for code in inline_code(path) if is_path(code.text)]
    missing = [
        f"{say(code)}: {code.text}"
        for path, code in named
        if not any((folder / code.text).exists() for folder in (ROOT, path.parent))
    ]
    assert len(named) > 40 and not missing, "\n".join(missing)


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


# --- examples that run ---

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


@pytest.mark.slow
def test_the_readmes_command_segments_a_picture(quick, environment):
    printed = run_program(["bash", "-ec", block_with(README, "--output masks", "bash")], quick, environment)
    assert "the star at top" in printed
    (entry,) = (quick / "masks").glob("*/*.png")
    assert entry.stat().st_size and (quick / "masks" / "results.json").is_file()


@pytest.mark.slow
def test_the_readmes_python_runs_where_only_the_models_folder_is(quick, environment, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(quick / "runs" / "quickstart")
    steps = block_with(README, "post_process", "python")
    code = block_with(README, "pipeline(", "python") + steps
    code += "\nprint(len(masks), *(f'{tuple(mask.shape)}' for mask in masks), image.size)"
    *results, shapes = run_program([sys.executable, "-I", "-c", code], tmp_path, environment).splitlines()
    assert [re.match(r"(.+) [01]\.\d+ (\{'xmin.+\}|None)$", line)[1] for line in results] == [
        "the star at top",
        "the circle",
    ]
    assert shapes == "2 (96, 96) (96, 96) (96, 96)"


@pytest.mark.slow
def test_what_the_quickstart_prints_at_its_end_runs(quick, environment, monkeypatch, capsys):
    monkeypatch.chdir(quick)
    monkeypatch.setattr(sys, "executable", str(quick / ".venv" / "bin" / "python"))
    folder = Path(quickstart.OWN_FOLDER)
    lines = (quick / folder / "examples" / "metadata.jsonl").read_text().splitlines()
    quickstart.print_next_steps(folder, list(map(json.loads, lines)))
    segment_picture, page, own_data = re.findall(r"^    (\S.+)", capsys.readouterr().out, re.M)
    check_make(shlex.split(page)[1:])
    assert page == "make app"
    own_data = shlex.split(own_data)[1:]
    assert [own_data] == python_commands(block_with(TRAINING, "own_data.yaml", "bash"))
    todo = [shlex.split(segment_picture)[1:], [*own_data, "--max_steps", "1"]]
    monkeypatch.undo()
    run_program(
        [sys.executable, "-c", f"COMMANDS = {todo}{RUN_COMMANDS}"], quick, environment | {"PYTHONPATH": str(ROOT)}
    )
    assert (quick / "out" / "results.json").is_file()
    assert (quick / "runs" / "own" / "report.html").is_file() and (quick / "runs" / "own" / "table.txt").is_file()


@pytest.mark.slow
def test_official_weights_are_converted_used_trained_and_shared_as_the_readme_says(official, tmp_path):
    clone(tmp_path)
    save_picture(tmp_path / "photo.jpg")
    _, data_args, _ = parse_arguments([str(ROOT / quickstart.CONFIG)])
    mine = tmp_path / "path" / "to" / "mine"
    lines = quickstart.write_examples(mine, data_args.shapes_config)
    (mine / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    torch.save({"state_dict": official}, tmp_path / "official.pth")
    tiny = write_tiny_conversion(tmp_path)  # what a checkpoint of real size needs not be told
    (convert, segment_photo), (own_data,), (share,) = (
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
