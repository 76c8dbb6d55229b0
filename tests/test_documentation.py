"""What README.md and docs/ say is so: their commands exist, their links lead somewhere, their numbers hold.

Commands go through the parser of the program that they call. tests/test_documented_examples.py runs what can be run.
"""

import argparse
import ast
import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers.markdown import Snippet, anchors, code_blocks, commands, inline_code, links, table_rows
from transformers import HfArgumentParser

import quickstart
import segment
from backbones.pretrain import PretrainingArguments
from checkpoint_files import skeleton
from configuration_detris import PEFT_METHODS, DetrisConfig
from data.images import MIN_WRAPPED
from data.records import MAX_PHRASE, MAX_PHRASES
from modeling_detris import DetrisForReferringSegmentation
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
OTHERS = {"wget", "sha256sum", "unzip", "for", "pre-commit", "source"}  # programs that are not ours
# It compares with data that cannot be passed on; CONTRIBUTING.md says so.
OF_THE_MAINTAINERS = "../shared/conformance/check.py"
MODULES = {
    "convert_detris_checkpoint.py": "convert_detris_checkpoint",
    "export_onnx.py": "export_onnx",
    "data.check": "data.check",
    "data.fetch": "data.fetch",
    "data.prepare": "data.prepare",
    "data.view": "data.view",
    "benchmarks.adapters": "benchmarks.adapters",
    "benchmarks.data": "benchmarks.data",
    "benchmarks.model": "benchmarks.model",
    "benchmarks.two_processes": "benchmarks.two_processes",
}
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


def app_arguments() -> type:
    pytest.importorskip("gradio")  # the environments of `make oldest` and `make newest` lack it
    return importlib.import_module("app").AppArguments


def check_app(arguments: list[str]) -> None:
    with redirect_stderr(StringIO()) as complaint:
        try:
            HfArgumentParser(app_arguments()).parse_args_into_dataclasses(arguments)
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
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


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
    if launched.training_script_args:
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
        "python -m benchmarks.adapters --output_dir out --methods none",
        "python -m benchmarks.adapters --output_dir out --learnin_rate 3",
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
    helps.append(HfArgumentParser(PretrainingArguments).format_help())
    for program, arguments in (
        ("convert_detris_checkpoint.py", ["source"]),
        ("data.check", ["root"]),
        ("data.fetch", ["refcoco", "root"]),
        ("data.prepare", ["folder", "path", "--output", "out"]),
        ("data.view", ["shapes"]),
        ("benchmarks.adapters", ["--output_dir", "out"]),
        ("benchmarks.model", ["--output", "out"]),
    ):
        helps.append(parse_and_stop(importlib.import_module(MODULES[program]).main, program, arguments))
    helps.append(parse_and_stop(segment.main, "segment.py", ["photo.jpg", "cat", "--model", "detris"]))
    helps.append(HfArgumentParser(app_arguments()).format_help())
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
            file = path.parent / target if target else path
            if not file.resolve().is_relative_to(ROOT) or not file.exists():
                broken.append(f"{say(link)}: {link.text} is not there")
            elif anchor and anchor not in anchors(file):
                broken.append(f"{say(link)}: {link.text} has no such heading")
    assert not broken, "\n".join(broken)


def is_path(text: str) -> bool:
    """Whether inline code looks like a file or folder of this repository."""
    if not re.fullmatch(r"\w[\w.\-/]*", text) or text in FOREIGN:
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


# --- numbers ---


def recipe(name: str) -> tuple[ModelArguments, DataArguments, DetrisTrainingArguments]:
    return parse_arguments([str(ROOT / "configs" / f"{name}.yaml")])


def own_image_size() -> int:
    path = str(ROOT / "configs" / "own_data.yaml")
    return parse_arguments([path, "--model_name_or_path", "some/model"])[0].image_size


def required(package: str) -> str:
    return re.search(rf"^{package}[=>]=([\d.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)[1]


def backbone(name: str, field: str) -> int:
    return json.loads((ROOT / "backbones" / name / "config.json").read_text())[field]


def limit(name: str) -> str:
    """A number at the top of tests/test_architecture.py."""
    names, values = re.search(
        r"^(MAX_LINES, .+) = (.+)$", (ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"), re.M
    ).groups()
    return dict(zip(names.split(", "), values.split(", ")))[name]


COUNTED = {3: "three", 4: "four", 6: "six", 8: "eight"}
FIGURES = [
    ("README.md", r"(\d+) MB instead of \d+", lambda: base_megabytes("adapters", "head")),
    ("README.md", r"MB instead of (\d+)", lambda: base_megabytes("adapters", "head", "backbones")),
    ("docs/adapters.md", r"(\d+) MB for base", lambda: base_megabytes("adapters", "head")),
    ("docs/adapters.md", r"for base instead of (\d+)", lambda: base_megabytes("adapters", "head", "backbones")),
    ("README.md", r"install torch (\S+) first", lambda: required("torch")),
    ("README.md", r"Python (\S+) is all", lambda: "3.11"),
    ("README.md", r"--image_size (\d+) --output_dir runs/mine", lambda: DetrisConfig().image_size),
    (
        "docs/training.md",
        r"\(accelerate ([\d.]+)\)",
        lambda: required("accelerate").rpartition(".")[0],
    ),
    ("docs/training.md", r"tests on (\w+) splits", lambda: COUNTED[len(recipe("quickstart")[1].test_splits)]),
    ("docs/training.md", r"`examples/` \| (\w+) pictures", lambda: COUNTED[quickstart.EXAMPLE_IMAGES]),
    ("docs/training.md", r"images at (\d+) x", lambda: own_image_size()),
    ("docs/training.md", r"images at \d+ x (\d+) pixels", lambda: own_image_size()),
    ("docs/training.md", r"patch size, which is (\d+) here", lambda: backbone("vision", "patch_size")),
    ("docs/training.md", r"weights were trained at (\d+)", lambda: DetrisConfig().image_size),
    ("docs/training.md", r"step sees (\d+) objects", lambda: recipe("base_refcoco")[2].global_batch_size),
    ("docs/training.md", r"ends with status\s(\d+)", lambda: 128 + signal.SIGTERM),
    ("docs/training.md", r"ends with status\s\d+\sor\s(\d+)", lambda: 128 + signal.SIGINT),
    ("docs/data.md", r"phrase has at most ([\d,]+) characters", lambda: f"{MAX_PHRASE:,}"),
    ("docs/data.md", r"of an object\shave\s([\d,]+),", lambda: f"{MAX_PHRASES:,}"),
    ("docs/data.md", r"; (\d+) and more count as the object", lambda: MIN_WRAPPED),
    ("docs/measurements.md", r"head's ([\d,]+) parameters", lambda: f"{trained_parameters('none'):,}"),
    (
        "backbones/README.md",
        r"RegistersModel` of (\w+)\slayers",
        lambda: COUNTED[backbone("vision", "num_hidden_layers")],
    ),
    ("backbones/README.md", r"Projection` of (\w+)\slayers", lambda: COUNTED[backbone("text", "num_hidden_layers")]),
    ("backbones/README.md", r"Both are (\d+)\swide", lambda: backbone("text", "hidden_size")),
    ("CONTRIBUTING.md", r"more than (\d+) lines", lambda: limit("MAX_LINES")),
    ("CONTRIBUTING.md", r"\(a test (\d+)\)", lambda: limit("MAX_TEST_LINES")),
    (
        "CONTRIBUTING.md",
        r"no class more than (\d+)",
        lambda: limit("MAX_CLASS_LINES"),
    ),
]


@cache
def base_megabytes(*parts: str) -> int:
    """How large the tensors of these parts of the base model are, in millions of bytes."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 518}
    config = DetrisConfig(vision_config=sizes | {"model_type": "dinov2_with_registers", "patch_size": 14})
    tensors = skeleton(DetrisForReferringSegmentation, config).state_dict()
    part_of = DetrisForReferringSegmentation.part_of
    return round(sum(tensor.nbytes for name, tensor in tensors.items() if part_of(name) in parts) / 1e6)


@cache
def trained_parameters(method: str) -> int:
    """How many parameters the quickstart trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        model_args, _, _ = parse_arguments([quickstart.CONFIG])
        model_args.model_config |= quickstart.METHODS[method]
        model, _ = build_model(model_args)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("document", "pattern", "figure"), FIGURES, ids=[f"{row[0]}: {row[1]}" for row in FIGURES])
def test_numbers_are_those_of_the_code(document, pattern, figure):
    assert re.findall(pattern, (ROOT / document).read_text(encoding="utf-8")) == [str(figure())]


def test_the_backbones_that_ship_are_equally_wide():
    assert backbone("vision", "hidden_size") == backbone("text", "hidden_size")


def test_the_quickstarts_tables_of_methods_count_what_is_trained():
    """However they are laid out: a line that begins with a method and ends with a number of six digits or more."""
    sections = MEASURED.read_text(encoding="utf-8").replace("`", "").split("\n## ")
    (text,) = [section for section in sections if section.startswith("Methods on the synthetic set")]
    methods = "|".join(map(re.escape, sorted(quickstart.METHODS, key=len, reverse=True)))
    found = re.findall(rf"^\W*({methods})\b[^+\n].*?(\d{{3}},\d{{3}})\W*$", text, re.M)
    assert len(found) > 2
    for method, figure in found:
        assert figure == f"{trained_parameters(method):,}", method


def test_each_measurement_stands_beside_its_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = table_rows(MEASURED, "what", "figure", "command")
    assert len(rows) > 10
    program = None
    for what, figure, command in rows:
        assert what and figure and command, what
        if command == "the same":
            assert program is not None, what
            continue
        words = shlex.split(re.fullmatch("`(.+)`", command)[1])
        words, program = (words, words) if words[0] != LEFT_OUT else ([*program, *words[1:]], program)
        check_command(words)
