"""The layout of the repository: which files there are, how long they may be, and which may import which.

All sources are read with `ast`; nothing is imported. Imports inside functions count like those at the top of a file.
"""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from helpers.hub_files import MODEL_CODE, PROCESSOR_CODE

ROOT = Path(__file__).parents[1]
MAX_LINES, MAX_TEST_LINES, MAX_CLASS_LINES = 600, 700, 350
# Each module imports only modules that stand above it. The first paragraph is saved with a model or its processor.
ORDER = """
    configuration_detris adapters_detris adapter_layers_detris untrusted_pickles checkpoint_files official_layout
    peft_detris backbones_detris switching_detris pipeline_detris handler repository_files saving_detris sharing_detris
    gradient_checkpointing_detris input_checks_detris recording_detris modeling_detris
    letterbox_detris images_detris processing_detris

    metrics.referring_iou.referring_iou

    gallery pages

    data data.untrusted data.coco_names data.masks data.images data.records data.table_layouts data.tables data.refer
    data.sources data.decoding
    data.shapes.scenes data.shapes.drawing data.shapes.phrases data.shapes.composition data.shapes.rows
    data.shapes data.shapes.__main__
    data.streaming data.mixture data.check data.fetch data.prepare data.opening
    data.survey data.view

    model_card convert_detris_checkpoint load_detris segment_inputs segment_results segment app
    export_onnx

    training training.processes training.arguments training.rows training.collators training.checkpoints
    training.run_folder training.stopping training.sharding training.checkpointing_trainer training.mask_bits
    training.evaluating_trainer training.trainer training.report training.predictions training.results

    train_hf quickstart backbones.pretrain benchmarks.data benchmarks.two_processes
    benchmarks.counting benchmarks.evaluation benchmarks.model benchmarks.adapters
""".split()
PACKAGES = ("data", "data.shapes", "training")
# Modules that may import only some of those above them: beginning of their name -> beginnings of the others' names.
RESTRICTED = {
    "metrics": (),
    "data": ("data", "configuration_detris", "untrusted_pickles", "letterbox_detris"),
    "data.survey": ("data", "pages"),
    "data.view": ("data", "configuration_detris", "gallery", "pages"),
}
LEFT_BEHIND = r"\.git|\.venv.*|\.(pytest|ruff)_cache|\.hypothesis|__pycache__|runs"
AT_THE_ROOT = """
    README.md LICENSE CITATION.cff CONTRIBUTING.md CHANGELOG.md
    Makefile pyproject.toml requirements.txt requirements.lock requirements-app.txt requirements-app.lock
    requirements-onnx.txt requirements-dev.txt requirements-dev.lock
    .gitignore .pre-commit-config.yaml .ci page.html
    backbones benchmarks configs data docs metrics tests training
""".split()


@dataclass
class Module:
    """A Python file.

    `name` is what others import it by: for the files in `tests/` that is without `tests`, because pytest puts this
    folder on the import path.
    """

    path: Path
    name: str
    source: str
    imports: set[str] = field(default_factory=set)

    @property
    def is_test(self) -> bool:
        return self.name.startswith("test_")

    @property
    def is_in_tests(self) -> bool:
        return self.path.parts[0] == "tests"

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


def files_of(root: Path) -> list[Path]:
    """List the files that git tracks; where git knows none, all but those that running the project leaves behind."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    paths = [Path(path) for path in listing.stdout.split("\0") if path]
    if not paths:
        paths = [path.relative_to(root) for path in root.rglob("*")]
        paths = [path for path in paths if not any(re.fullmatch(LEFT_BEHIND, part) for part in path.parts)]
    return sorted(path for path in paths if (root / path).is_file())


@cache
def find_statements(source: str) -> list[ast.Import | ast.ImportFrom | ast.ClassDef]:
    """Find imports and classes, inside functions too. Cached, because all tests here read nearly the same sources."""
    return [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))
    ]


def read_modules(root: Path, files: Iterable[Path]) -> dict[str, Module]:
    modules = {}
    for path in (path for path in files if path.suffix == ".py"):
        parts = path.with_suffix("").parts
        parts = parts[1:] if parts[0] == "tests" else parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(path, name, (root / path).read_text(encoding="utf-8"))
    for module in modules.values():
        module.imports = {name for name in imported_names(module, modules) if name in modules} - {module.name}
    return modules


def imported_names(module: Module, modules: dict[str, Module]) -> Iterator[str]:
    for node in find_statements(module.source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.package.split(".")
                base = ".".join([*package[: len(package) + 1 - node.level], base]).strip(".")
            for alias in node.names:  # from a package come its modules, from a module its names
                within = f"{base}.{alias.name}".strip(".")
                yield within if within in modules else base


def find_strangers(files: Iterable[Path], modules: dict[str, Module]) -> Iterator[str]:
    """Find files and modules that have no place."""
    for name in sorted({path.parts[0] for path in files}):
        if name not in AT_THE_ROOT and name.removesuffix(".py") not in ORDER:
            yield f"{name} is at the root, but not in AT_THE_ROOT or ORDER"
    for module in modules.values():
        if module.name.rpartition(".")[2] == "utils":
            yield f"{module.path} is named utils, which does not say what it holds"
        if module.name not in ORDER and not module.is_in_tests:
            yield f"{module.path} is not in ORDER"
    yield from (f"{name} is in ORDER, but there is no such file" for name in ORDER if name not in modules)


def find_long(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        lines, most = len(module.source.splitlines()), MAX_TEST_LINES if module.is_in_tests else MAX_LINES
        if lines > most:
            yield f"{module.path} has {lines} lines, more than {most}"
        for node in find_statements(module.source):
            if isinstance(node, ast.ClassDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_CLASS_LINES:
                    yield f"{module.path}: class {node.name} has {lines} lines, more than {MAX_CLASS_LINES}"


def find_cycles(modules: dict[str, Module]) -> Iterator[str]:
    """Find a shortest cycle through each module, and tell each cycle once, from its first module by name."""
    cycles = set()
    for start in modules:
        paths, seen = [[start]], set()
        while paths:
            path = paths.pop(0)
            if start in modules[path[-1]].imports:
                least = path.index(min(path))
                cycles.add((*path[least:], *path[:least]))
                break
            following = sorted(modules[path[-1]].imports - seen)
            seen.update(following)
            paths += [[*path, name] for name in following]
    yield from (f"{' -> '.join((*cycle, cycle[0]))} is a cycle of imports" for cycle in sorted(cycles))


def find_wrong_imports(modules: dict[str, Module]) -> Iterator[str]:
    def begins(name: str, beginning: str) -> bool:
        return f"{name}.".startswith(f"{beginning}.")

    for module in modules.values():
        for name in sorted(module.imports):
            imported = modules[name]
            if imported.is_test:
                yield f"{module.path} imports the test file {imported.path}"
            elif module.is_in_tests:
                continue
            elif imported.is_in_tests:
                yield f"{module.path} imports {imported.path}"
            elif module.name in ORDER and name in ORDER and ORDER.index(name) > ORDER.index(module.name):
                yield f"{module.path} imports {imported.path}, which stands below it"
            beginnings = [beginning for beginning in RESTRICTED if begins(module.name, beginning)]
            for beginning in sorted(beginnings, key=len)[-1:]:  # the longest
                allowed = RESTRICTED[beginning]
                if not any(begins(name, other) for other in allowed):
                    yield f"{module.path} imports {imported.path}, but may import {' or '.join(allowed) or 'none'}"


def find_faults(root: Path) -> list[str]:
    """Say what is wrong with the layout of a repository, one sentence for each fault."""
    files = files_of(root)
    modules = read_modules(root, files)
    return [
        *find_strangers(files, modules),
        *find_long(modules),
        *find_cycles(modules),
        *find_wrong_imports(modules),
    ]


def test_the_layout():
    faults = find_faults(ROOT)
    assert not faults, "\n" + "\n".join(faults)


def test_the_map_of_the_design_names_all_modules_in_this_order():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.partition("\n## Files\n")[2].partition("\n## ")[0]
    named = []
    for line in section.splitlines():
        folder = ""
        for path in re.findall(r"^[\w/]+\.py|(?<=, )\w+\.py(?=  )", line):
            folder, _, _ = path.rpartition("/") if "/" in path else (folder, "", "")
            name = path.removesuffix(".py").replace("/", ".")
            named.append(name if "." in name or not folder else f"{folder}.{name}")
    for group in ("", "data.", "training."):
        listed = [name for name in named if name.rpartition(".")[0] == group[:-1]]
        known = [name for name in ORDER if name.rpartition(".")[0] == group[:-1] and name not in PACKAGES]
        assert listed == known


def test_the_list_of_uploaded_code_begins_this_order():
    code = [name.removesuffix(".py") for name in MODEL_CODE + PROCESSOR_CODE]
    assert code == ORDER[: len(code)]


# --- the checks find what is planted ------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of the repository in which files other than Python's are empty."""
    for path in files_of(ROOT):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            shutil.copy(ROOT / path, tmp_path / path)
        else:
            (tmp_path / path).touch()
    return tmp_path


LONG_CLASS = "class Long:\n" + "    x = 0\n" * MAX_CLASS_LINES


@pytest.mark.parametrize(
    "planted, faults",
    [
        pytest.param(
            {"gallery.py": "import model_card", "model_card.py": "def late():\n    from gallery import overlay"},
            [
                "gallery -> model_card -> gallery is a cycle of imports",
                "gallery.py imports model_card.py, which stands below it",
            ],
            id="cycle",
        ),
        pytest.param(
            {
                "benchmarks/data.py": "import benchmarks.a",
                "benchmarks/a.py": "from . import b",
                "benchmarks/b.py": "from .data import main",
            },
            [
                "benchmarks.a -> benchmarks.b -> benchmarks.data -> benchmarks.a is a cycle of imports",
                "benchmarks/a.py is not in ORDER",
                "benchmarks/b.py is not in ORDER",
            ],
            id="cycle of three, relative",
        ),
        pytest.param(
            {"images_detris.py": "try:\n    from .processing_detris import DetrisProcessor\nexcept ImportError: 0"},
            [
                "images_detris -> processing_detris -> images_detris is a cycle of imports",
                "images_detris.py imports processing_detris.py, which stands below it",
            ],
            id="relative at the root",
        ),
        pytest.param(
            {"configuration_detris.py": "if 0:\n    import gallery"},
            ["configuration_detris.py imports gallery.py, which stands below it"],
            id="upward",
        ),
        pytest.param(
            {
                "data/check.py": "from processing_detris import DetrisProcessor",
                "data/mixture.py": "from . import check",
                "data/view.py": "import gallery\nimport processing_detris",
                "data/records.py": "import gallery",
            },
            [
                "data/check.py imports processing_detris.py, but may import data or configuration_detris "
                "or untrusted_pickles or letterbox_detris",
                "data/mixture.py imports data/check.py, which stands below it",
                "data/records.py imports gallery.py, but may import data or configuration_detris or "
                "untrusted_pickles or letterbox_detris",
                "data/view.py imports processing_detris.py, but may import data or configuration_detris or gallery "
                "or pages",
            ],
            id="data",
        ),
        pytest.param(
            {"metrics/referring_iou/referring_iou.py": "import configuration_detris"},
            [
                "metrics/referring_iou/referring_iou.py imports configuration_detris.py, but may import none",
            ],
            id="metrics",
        ),
        pytest.param({"gallery.py": "#\n" * 601}, ["gallery.py has 601 lines, more than 600"], id="long file"),
        pytest.param(
            {"tests/test_gallery.py": "#\n" * 701},
            ["tests/test_gallery.py has 701 lines, more than 700"],
            id="long test",
        ),
        pytest.param(
            {"model_card.py": LONG_CLASS},
            ["model_card.py: class Long has 351 lines, more than 350"],
            id="long class",
        ),
        pytest.param(
            {"tests/test_gallery.py": "def test_x():\n    from test_check import x"},
            ["tests/test_gallery.py imports the test file tests/test_check.py"],
            id="test imports test",
        ),
        pytest.param(
            {"gallery.py": "from helpers.pictures import picture"},
            ["gallery.py imports tests/helpers/pictures.py"],
            id="helper",
        ),
        pytest.param(
            {"tests/helpers/utils.py": "", "notes.txt": "", "drawing.py": ""},
            [
                "drawing.py is at the root, but not in AT_THE_ROOT or ORDER",
                "drawing.py is not in ORDER",
                "notes.txt is at the root, but not in AT_THE_ROOT or ORDER",
                "tests/helpers/utils.py is named utils, which does not say what it holds",
            ],
            id="strangers",
        ),
        pytest.param({"gallery.py": None}, ["gallery is in ORDER, but there is no such file"], id="missing"),
    ],
)
def test_what_is_planted_is_found(copied, planted, faults):
    before = find_faults(copied)
    assert before == find_faults(ROOT)
    for name, text in planted.items():
        if text is None:
            (copied / name).unlink()
        else:
            (copied / name).write_text(text)
    assert sorted(set(find_faults(copied)) - set(before)) == faults
