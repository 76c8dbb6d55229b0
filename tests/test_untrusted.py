"""Files and text of strangers: JSON and YAML are read without running or waiting for anything."""

import os

import pytest
from helpers.refer_folder import not_waiting

from data.untrusted import load_json, load_yaml


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/stdin"])
@pytest.mark.parametrize("read", [load_json, load_yaml])
def test_pipes_and_devices_are_not_read(tmp_path, read, kind):
    path = tmp_path / "file"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(kind)
    with not_waiting(), pytest.raises(ValueError, match="is no regular file"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &x [1]\nb: *x", r"file\.yaml is not YAML \(an alias, \*x, stands .* line 2, column 4"),
        ("a: &x [*x]", r"an alias, \*x"),
        ("a: &x {b: 1}\nc: {<<: *x}", r"an alias, \*x"),
        ("a: [", "is not YAML"),
        ("[" * 10_000, "is not YAML"),
        ("a: !!int ''", "is not YAML"),  # IndexError, AttributeError, KeyError and OverflowError of PyYAML
        ("a: !!timestamp ''", "is not YAML"),
        ("a: !!bool ''", "is not YAML"),
        ("a: 1" + ":59" * 1_000 + ".5", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("a: b\n" * 50_000, "has over 100,000 bytes"),
    ],
)
def test_yaml_is_plain(tmp_path, content, message):
    path = tmp_path / "file.yaml"
    path.write_text("a: {b: [1, 2.5, text, null]}")
    assert load_yaml(path) == {"a": {"b": [1, 2.5, "text", None]}}
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_yaml(path)
