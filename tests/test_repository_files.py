"""What folders and repositories hold, and what the Hub's errors become."""

import os
import shlex

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from convert_detris_checkpoint import _parse
from repository_files import (
    conversion_command,
    find_file,
    hub_errors,
    list_names,
    may_be_repository,
    official_checkpoints,
    refuse_official_checkpoints,
    require_repository_id,
)


class Answer:
    """As much of the Hub's answer as its errors read."""

    headers: dict = {}
    request = None
    status_code = 500


def answered(error: type[HfHubHTTPError]) -> HfHubHTTPError:
    return error("500 Server Error:\n\nbad \x1b[31m news", response=Answer())


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "online", "said"),
    [
        (answered(GatedRepoError), True, "a/b is a gated repository on the Hub: ask for access"),
        (answered(RepositoryNotFoundError), True, "a/b is neither on this machine nor a repository on the Hub that"),
        (answered(RevisionNotFoundError), True, "a/b has no revision v2: give a branch, a tag or a whole commit id"),
        (answered(HfHubHTTPError), True, r"Hub answered with an error (500 Server Error: bad \x1b[31m news): check"),
        (HTTPError("timed\nout"), True, "a/b is not on this machine, and the Hub cannot be reached (timed out): che"),
        (RuntimeError("storage"), True, "the Hub cannot be reached (storage): check the network and try again"),
        (
            caused(LocalEntryNotFoundError("long"), HTTPError("timed out")),
            True,
            "cannot be reached (timed out): check",
        ),
        (caused(RevisionResolutionError("long"), answered(HfHubHTTPError)), True, "answered with an error (500 Serve"),
        (
            caused(RevisionResolutionError("long"), OfflineModeIsEnabled("")),
            False,
            "because HF_HUB_OFFLINE is set: un",
        ),
        (LocalEntryNotFoundError("long"), False, "a/b is neither on this machine nor in the cache of the Hub, which"),
    ],
)
def test_errors_of_the_hub_become_one_sentence(monkeypatch, error, online, said):
    monkeypatch.setattr("repository_files.is_offline_mode", lambda: not online)
    with pytest.raises(OSError) as caught, hub_errors("a/b", "v2"):
        raise error
    assert type(caught.value) is OSError and said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [answered(RemoteEntryNotFoundError), OSError("disk full"), ValueError("x")])
def test_errors_that_say_something_else_pass(error):
    with pytest.raises(type(error)) as caught, hub_errors("a/b"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("source", "possible"),
    [
        ("someone/detris", True),
        ("x6team/DETRIS", True),
        ("gpt2", True),
        ("best.pth", False),
        ("runs/best.pth", False),
        ("a/b/c", False),
        ("./runs", False),
        ("../runs", False),
        ("/runs", False),
        ("runs/", False),
        ("a b/c", False),
        ("~/runs", False),
        ("", False),
        ("x" * 200, False),
    ],
)
def test_which_names_may_be_repositories(source, possible):
    assert may_be_repository(source) is possible
    if not possible:
        with pytest.raises(FileNotFoundError, match="does not exist: give a folder, or a Hub id"):
            require_repository_id(source)


def test_files_in_a_folder(tmp_path):
    (tmp_path / "b.pth").write_bytes(b"12345")
    (tmp_path / "a.pth").touch()
    (tmp_path / "c.pt").touch()
    (tmp_path / "d.pth").mkdir()
    (tmp_path / "d.pth" / "e.pth").touch()
    os.mkfifo(tmp_path / "f.pth")
    assert official_checkpoints(tmp_path) == {"a.pth": 0, "b.pth": 5}
    assert find_file(str(tmp_path), "a.pth") == str(tmp_path / "a.pth")
    assert find_file(str(tmp_path), "g.pth") is find_file(str(tmp_path), "d.pth") is None
    refuse_official_checkpoints(tmp_path / "d.pth" / "nothing")
    with pytest.raises(OSError, match=r"\(a.pth, b.pth\): convert one of them by"):
        refuse_official_checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["tiny.pth", "old runs/it's.pth", "$(touch x);.pth"])
def test_the_command_is_one_that_the_converter_takes(tmp_path, name):
    def arguments_of(command: str):
        program, *words = shlex.split(command)
        assert (program, words[0]) == ("python", "convert_detris_checkpoint.py")
        return _parse(words[1:])

    arguments = arguments_of(conversion_command("x6team/DETRIS", name))
    assert (arguments.source, arguments.file, arguments.output) == ("x6team/DETRIS", name, "out/")
    assert (arguments.dataset, arguments.revision) == ("refcoco/unc", None)
    assert arguments_of(conversion_command("x6team/DETRIS", name, "v2")).revision == "v2"
    arguments = arguments_of(conversion_command(str(tmp_path), name))
    assert (arguments.source, arguments.file, arguments.output) == (str(tmp_path / name), None, "out/")


def test_many_and_hostile_names_stay_short():
    assert list_names([]) == ""
    assert list_names({"a.pth": 1, "b.pth": None}) == "a.pth, b.pth"
    assert list_names([f"{n}.pth" for n in range(21)]).endswith("19.pth and 1 more")
    message = list_names(["a\n\x1b[2J.pth", "x" * 10_000] * 5_000)
    assert message.isprintable() and len(message) < 7_000
