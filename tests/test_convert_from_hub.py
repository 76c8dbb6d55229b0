"""Official checkpoints converted from a repository on the Hub, which is `HubServer` here."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.hub_client import CLIENT_TIMEOUT, ROOT, client_environment, run_client
from helpers.hub_server import HubServer
from helpers.tiny_conversion import write_tiny_conversion
from helpers.warm_python import warm_python
from huggingface_hub import ModelCard

from convert_detris_checkpoint import main

pytestmark = pytest.mark.slow
REPOSITORY = "someone/official"
UPLOAD = """
import huggingface_hub as hub

hub.create_repo("someone/official")
for revision in ("first", "second"):
    hub.upload_folder(repo_id="someone/official", folder_path=revision)
for name in ("someone/empty", "someone/gated"):
    hub.create_repo(name)
"""


@pytest.fixture(scope="module")
def hub(official, tmp_path_factory):
    """Two revisions of a repository with official checkpoints, and what the converter needs beside them."""
    folder = tmp_path_factory.mktemp("hub")
    first = {
        name: tensor.half().float() if tensor.is_floating_point() else tensor for name, tensor in official.items()
    }
    for revision, weights in (("first", first), ("second", official)):
        (folder / revision / "old runs").mkdir(parents=True)
        torch.save({"state_dict": weights}, folder / revision / "tiny_refcoco.pth")
        torch.save({"state_dict": first}, folder / revision / "old runs" / "tiny.pth")
        (folder / revision / "README.md").write_text("# Checkpoints")
    arguments = write_tiny_conversion(folder)
    with HubServer() as server:
        run_client(UPLOAD, server, folder)
        _, early, late = server.revisions(REPOSITORY)
        yield SimpleNamespace(server=server, folder=folder, arguments=arguments, early=early, late=late)


def convert(hub, tmp_path, *arguments, **settings):
    """Run the converter as a command in `tmp_path`, with a cache that stays from one run to the next."""
    environment = client_environment(hub.server, tmp_path / "cache", **settings)
    command = [warm_python(), str(ROOT / "convert_detris_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=CLIENT_TIMEOUT
    )


def expected(hub, tmp_path, file):
    """What the converter makes of the same checkpoint as a file on this machine."""
    main([str(hub.folder / file), str(tmp_path / "expected"), *hub.arguments])
    return tmp_path / "expected"


def assert_same_model(ours: Path, theirs: Path):
    files = {path.name for path in theirs.iterdir()}
    assert {path.name for path in ours.iterdir()} == files
    for name in files - {"README.md", "tokenizer_config.json"}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    configs = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (ours, theirs)]
    for config in configs:
        config.pop("local_files_only", None)  # whether transformers was allowed to ask the Hub
    assert configs[0] == configs[1]


def test_a_checkpoint_on_the_hub_becomes_the_same_folder_as_the_file_and_is_fetched_once(hub, tmp_path):
    before = len(hub.server.downloads)
    run = convert(hub, tmp_path, REPOSITORY, "--file", "tiny_refcoco.pth", "out/", *hub.arguments)
    assert run.returncode == 0, run.stderr
    assert_same_model(tmp_path / "out", expected(hub, tmp_path, "second/tiny_refcoco.pth"))
    card = ModelCard.load(tmp_path / "out" / "README.md").text
    origin = f"Converted from `tiny_refcoco.pth` of `{REPOSITORY}` on the Hub at commit `{hub.late}`, a checkpoint"
    assert origin in card
    fetched = hub.server.downloads[before:]
    assert [address.rpartition("/")[2] for address in fetched] == ["tiny_refcoco.pth"]

    offline = ("--revision", "main", "--file", "tiny_refcoco.pth", "again", *hub.arguments)
    run = convert(hub, tmp_path, REPOSITORY, *offline, HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr
    assert_same_model(tmp_path / "again", tmp_path / "out")
    assert origin in (tmp_path / "again" / "README.md").read_text()
    assert hub.server.downloads[before:] == fetched


@pytest.mark.parametrize("file", ["tiny_refcoco.pth", "old runs/tiny.pth"])
def test_an_older_revision_and_a_file_in_a_folder_are_converted(hub, tmp_path, file):
    run = convert(hub, tmp_path, "--revision", hub.early, REPOSITORY, "--file", file, tmp_path / "out", *hub.arguments)
    assert run.returncode == 0, run.stderr
    assert_same_model(tmp_path / "out", expected(hub, tmp_path, f"first/{file}"))
    assert f"`{file}` of `{REPOSITORY}` on the Hub at commit `{hub.early}`" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("arguments", [[], ["out/", "--dataset", "refcoco/unc"]])
def test_without_a_file_the_checkpoints_are_listed_and_nothing_is_converted(hub, tmp_path, arguments):
    before = list(hub.server.downloads)
    run = convert(hub, tmp_path, REPOSITORY, *arguments)
    assert run.returncode == 1
    lines = run.stdout.splitlines()
    assert lines[0] == f"{REPOSITORY} at commit {hub.late}:"
    paths = ["old runs/tiny.pth", "tiny_refcoco.pth"]
    sizes = [(hub.folder / "second" / path).stat().st_size for path in paths]
    assert [line.split(maxsplit=2) for line in lines[1:]] == [
        [f"{size / 2**20:.1f}", "MiB", path] for size, path in zip(sizes, paths)
    ]
    assert re.fullmatch(
        rf"Nothing was converted: name one of these files by --file, as `python convert_detris_checkpoint.py "
        rf"{REPOSITORY} --file 'old runs/tiny.pth' out/ --dataset refcoco/unc` does.\n",
        run.stderr,
    )
    assert hub.server.downloads == before and {path.name for path in tmp_path.iterdir()} <= {"cache"}


REFUSED = [
    (["someone/nothing", "--file", "a.pth", "out"], "someone/nothing is neither on this machine nor a repository on"),
    (["someone/nothing"], "someone/nothing is neither on this machine nor a repository on the Hub that you may read"),
    (["someone/gated", "--file", "tiny.pth", "out"], "someone/gated is a gated repository on the Hub: ask for access"),
    (["someone/empty"], "someone/empty holds no .pth file: name a repository of official checkpoints"),
    (["someone/empty", "--file", "a.pth", "out"], "no file a.pth: give one of its .pth files, which are none"),
    (
        ["someone/official", "--file", "tiny.pth", "out"],
        "someone/official has no file tiny.pth: give one of its .pth files, which are old runs/tiny.pth, tiny_refc",
    ),
    (["someone/official", "--file", "README.md", "out"], "README.md is no PyTorch checkpoint"),
    (["someone/official", "--file", "../tiny.pth", "out"], "--file is '../tiny.pth': give the path of a file inside"),
    (["someone/official", "--file", "a/../../b.pth", "out"], "--file is 'a/../../b.pth': give the path of a file"),
    (["someone/official", "--file", "/etc/passwd", "out"], "--file is '/etc/passwd': give the path of a file inside"),
    (["someone/official", "--file", "a\\b.pth", "out"], r"--file is 'a\\b.pth': give the path of a file inside"),
    (["someone/official", "--file", "a\nb.pth", "out"], r"--file is 'a\nb.pth': give the path of a file inside"),
    (["someone/official", "--file", "", "out"], "--file is '': give the path of a file inside"),
    (["someone/official", "--file", ".", "out"], "--file is '.': give the path of a file inside"),
    (["someone/official", "--file", "tiny_refcoco.pth"], "The folder to make is missing: name it after someone/off"),
    (["someone/official", "--file", "tiny_refcoco.pth", "taken"], "taken exists: name a folder that does not"),
    (
        ["someone/official", "--file", "tiny_refcoco.pth", "out", "--revision", "v9"],
        "someone/official has no revision v9: give a branch, a tag or a whole commit",
    ),
    (
        ["someone/official", "--file", "tiny_refcoco.pth", "out", "--revision", "0" * 40],
        "someone/official has no revision 0000",
    ),
    (["someone/official", "--revision", "v9"], "someone/official has no revision v9"),
    (["no/such/place", "--file", "a.pth", "out"], "no/such/place does not exist: give a folder, or a Hub id"),
    (["../up", "--file", "a.pth", "out"], "../up does not exist: give a folder, or a Hub id"),
    (["taken", "--file", "a.pth", "out"], "--file is for repositories on the Hub, but taken is on this machine"),
    (["taken", "out", "--revision", "main"], "--revision is for repositories on the Hub, but taken is on this mach"),
    (["runs/best.pth", "out"], "runs/best.pth does not exist: give the path of a checkpoint"),
    (["best.pth", "out"], "best.pth does not exist: give the path of a checkpoint"),
    (["best.pth"], "The folder to make is missing: name it after best.pth"),
    (["taken", "--to-official"], "The checkpoint to write is missing: name it after the folder"),
    (["taken", "out", "--to-official", "--file", "a.pth"], "--file has no effect with --to-official"),
    (["taken", "out", "--to-official", "--revision", "main"], "--revision has no effect with --to-official"),
]
REFUSE = """
import json
import os
from convert_detris_checkpoint import main

os.mkdir("taken")
messages = []
for arguments in COMMANDS:
    try:
        main([*arguments, *([] if "--to-official" in arguments else ["--dataset", "refcoco/unc"])])
        messages.append("nothing was refused")
    except (OSError, ValueError) as error:
        messages.append(str(error))
print(json.dumps([messages, sorted(os.listdir())]))
"""


def test_what_cannot_be_fetched_is_refused_in_one_sentence(hub, tmp_path):
    hub.server.gated.add("someone/gated")
    commands = [arguments for arguments, _ in REFUSED]
    code = f"COMMANDS = {commands!r}\n{REFUSE}"
    messages, left = json.loads(run_client(code, hub.server, tmp_path, isolated=False).splitlines()[-1])
    for (arguments, said), message in zip(REFUSED, messages, strict=True):
        assert said in message, (arguments, message)
        assert "\n" not in message and len(message) < 500
    assert left == ["taken"]
